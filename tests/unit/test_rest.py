"""The rest of a function's state after the lift: every page once, from its source alone, or LOST; never wrong data."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from random import Random

import pytest
from support.bench import BARS, attempt, reason_of
from support.fake_transfer import Network
from support.fleet_store import FleetStore
from support.fleet_values import FleetValues
from support.full_disk import full_disk
from support.manual_clock import settle
from support.transfer_pair import LOCAL, PAGES, Pair, exported

from hostd import home, rest, transfer
from hostd.rest import FETCH_TIMEOUT_S, PUSH_AFTER_S, RETRY_LONGEST_S, SILENCE_S, Rest, watch_arrival
from hostd.state_stream import local_pages
from hostd.traffic import Traffic
from hostd.transfer import EARLY_PAGES
from vfleet.address import PAGE_BYTES
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.records import decode
from vfleet.etcd.store import Listing
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE, Access, Session
from vfleet.v1.fabric_service_pb2 import REFUSAL_NOT_YET, ExchangeRequest
from vfleet.v1.records_pb2 import FUNCTION_STATUS_ACTIVE, FUNCTION_STATUS_LOST, Function
from vfleet.v1.records_pb2 import Host as HostRecord
from vfleet.v1.transfer_service_pb2 import FetchStateRequest, FetchStateResponse, WatchArrivalRequest
from vfleet.v1.types_pb2 import DEVICE_STATE_STOP, TRANSFER_MODE_POST_COPY, TableEntry

POST_COPY = {"mode": TRANSFER_MODE_POST_COPY}
LONG_S = 60.0


class Store(FleetStore):
    async def list(self, prefix: str) -> Listing:
        return Listing(self.fleet.revision, tuple(i for k, i in self.fleet.items.items() if k.startswith(prefix)))


class History:
    """What the host has seen of etcd: `behind` is raised while it was restored from a backup."""

    behind: VfleetError | None = None

    async def check(self, store: Store) -> None:
        if self.behind is not None:
            raise self.behind


class Rig:
    """A pair in the middle of a post-copied move: the target has all but local memory, and etcd says COMMIT."""

    def __init__(self, path: Path, bars: dict[int, int] | None = None, model: str = "checker") -> None:
        self.pair = Pair(path, bars, model)
        self.clock = self.pair.h1.clock
        for page in local_pages(self.pair.source)[::3]:
            self.pair.write(page, b"page %d" % page)
        self.fleet = FleetValues()
        self.store, self.history = Store(self.fleet), History()
        self.network = Network(self.pair.h1)
        self.running: asyncio.Task[None] | None = None

    async def move(self) -> None:
        await self.pair.pull_all(self.network, **POST_COPY)
        about = self.pair.target.about
        self.fleet.put(keys.host_key("h1"), HostRecord(name="h1", incarnation="i1"))
        self.fleet.put(keys.registration_key("h1"), "i1")
        self.fleet.put(keys.registration_key("h2"), "i2")
        record = Function(
            name="vf1",
            identity=about.identity,
            generation=2,
            device=about.device,
            vf_index=about.vf_index,
            status=FUNCTION_STATUS_ACTIVE,
        )
        self.fleet.put(keys.function_key("vf1"), record)
        self.fleet.put(keys.entry_key("h3", "d1", "vf1"), TableEntry(driver="d1", function="vf1", generation=2))

    def start(self) -> None:
        functions, self.traffic = self.pair.h2.functions, Traffic()
        completing = Rest(
            "h2", "i2", functions, self.history, self.network, self.store, self.clock, Random(3), self.traffic
        )
        self.running = asyncio.create_task(completing.run())

    def prove(self) -> None:
        self.pair.h2.functions.prove(self.pair.target)

    def restart(self) -> None:
        """Kill the target's daemon and start it anew."""
        if self.running is not None:
            self.running.cancel()
        self.pair.h2.restart()
        self.pair.target = self.pair.h2.functions.require("vf1", 2)

    def status(self) -> int:
        return decode(Function, self.fleet.items[keys.function_key("vf1")]).status

    def exchange(self, *accesses: Access) -> ExchangeRequest:
        return ExchangeRequest(driver="d1", function="vf1", generation=2, session=Session(start=9), accesses=accesses)

    def access(self, page: int, sequence: int, data: bytes = b"") -> Access:
        return Access(
            sequence=sequence,
            kind=ACCESS_KIND_WRITE if data else ACCESS_KIND_READ,
            address=self.pair.target.about.base + page * PAGE_BYTES + 8,
            length_bytes=8,
            data=data,
        )

    def assert_all_here(self) -> None:
        target = self.pair.target
        assert not target.about.arriving
        assert (target.arrival, target.record.HasField("rest_source")) == (None, False)
        assert target.image.memory == self.pair.source.image.memory
        assert exported(target.image) == exported(self.pair.source.image)

    async def close(self) -> None:
        if self.running is not None:
            self.running.cancel()
            await asyncio.gather(self.running, return_exceptions=True)
        self.pair.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    found = Rig(tmp_path)
    await found.move()
    yield found
    await found.close()


async def until(rig: Rig, holds, turns: int = 200) -> None:
    for _ in range(turns):
        if holds():
            return
        await rig.clock.advance(0.01)
    raise AssertionError("it never came")


# What moves before COMMIT, and after it


async def test_before_commit_everything_moves_but_local_memory(rig: Rig):
    target, source = rig.pair.target, rig.pair.source
    assert (target.state, target.about.complete, target.about.arriving) == (DEVICE_STATE_STOP, True, True)
    edge = LOCAL * PAGE_BYTES
    assert target.image.memory[:edge] == source.image.memory[:edge]
    assert not any(target.image.memory[edge:])
    assert exported(target.image) == exported(source.image)


async def test_a_few_pages_that_were_just_written_are_there_at_once_and_are_not_fetched(tmp_path: Path):
    rig = Rig(tmp_path)
    written = [LOCAL + page for page in range(1, 2 * EARLY_PAGES, 2)]
    import_state = rig.pair.pull(rig.network, **POST_COPY)
    async with aclosing(import_state) as progress:
        async for step in progress:
            if step.ready_to_stop and not step.complete:
                for page in (*written, *(page + 64 for page in written[-3:])):
                    rig.pair.write(page, b"just now")
                rig.pair.h1.stop(1, 10)
    target, source = rig.pair.target, rig.pair.source
    assert target.arrival is not None
    there = [page for page in target.arrival.pages if target.arrival.is_all_there(range(page, page + 1))]
    assert there == written
    assert target.arrival.missing_pages == PAGES - LOCAL - EARLY_PAGES
    for start in (page * PAGE_BYTES for page in written):
        assert target.image.memory[start : start + PAGE_BYTES] == source.image.memory[start : start + PAGE_BYTES]
    target.image.store([(written[0] * PAGE_BYTES, b"since then")])
    source.image.store([(written[0] * PAGE_BYTES, bytes(PAGE_BYTES))])
    rig.restart()
    rig.start()
    rig.prove()
    await until(rig, lambda: rig.pair.target.arrival is None)
    target = rig.pair.target
    assert bytes(target.image.memory[written[0] * PAGE_BYTES :][:10]) == b"since then"
    others = (written[0] + 1) * PAGE_BYTES
    assert target.image.memory[others:] == source.image.memory[others:]
    await rig.close()


async def test_a_function_that_has_arrived_early_is_whole_as_soon_as_it_runs(tmp_path: Path):
    rig = Rig(tmp_path, {0: 4096, 2: 2 * PAGE_BYTES})
    async with aclosing(rig.pair.pull(rig.network, **POST_COPY)) as progress:
        async for step in progress:
            if step.ready_to_stop and not step.complete:
                first = local_pages(rig.pair.source).start
                rig.pair.write(first, b"just now")
                rig.pair.write(first + 1, b"just now")
                rig.pair.h1.stop(1, 10)
    assert rig.pair.target.arrival is not None
    rig.start()
    request = WatchArrivalRequest(attempt=attempt(10), function="vf1", generation=2)
    told = [each.missing_bytes async for each in watch_arrival(rig.pair.h2.functions, rig.clock, request)]
    assert told == [0]
    rig.assert_all_here()
    await rig.close()


async def test_nothing_is_fetched_before_the_instance_runs_and_then_everything(rig: Rig):
    rig.start()
    await rig.clock.advance(LONG_S)
    assert rig.pair.target.arrival is not None
    assert rig.pair.target.arrival.missing_pages == PAGES - LOCAL
    assert rig.traffic.state_bytes == 0
    rig.prove()
    await until(rig, lambda: rig.pair.target.arrival is None)
    rig.assert_all_here()
    assert rig.traffic.state_bytes == (PAGES - LOCAL) * PAGE_BYTES
    rig.restart()
    rig.assert_all_here()


async def test_an_arrival_that_is_over_leaves_no_task_behind(rig: Rig):
    before = asyncio.all_tasks()
    rig.start()
    rig.prove()
    await until(rig, lambda: rig.pair.target.arrival is None)
    await settle()
    assert asyncio.all_tasks() - before == {rig.running}


async def test_a_function_without_local_memory_is_whole_at_once(tmp_path: Path):
    pair = Pair(tmp_path, bars={0: BARS[0]})
    await pair.pull_all(**POST_COPY)
    assert (pair.target.about.complete, pair.target.about.arriving) == (True, False)
    pair.close()


async def test_an_instance_that_is_arriving_can_not_leave(rig: Rig):
    rig.prove()
    assert reason_of(rig.pair.h2.stop, 2, 20) is Reason.ILLEGAL_STATE
    assert reason_of(rig.pair.h2.functions.fence_for_export, "vf1", 2, attempt(21)) is Reason.ILLEGAL_STATE


async def test_the_rest_is_asked_for_in_parts_and_only_where_something_is_missing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(rest, "PUSH_PAGES", 50)
    arrival, memory = rig.pair.target.arrival, rig.pair.source.image.memory
    assert arrival is not None
    for there in (range(LOCAL + 50, LOCAL + 100), range(LOCAL + 3, LOCAL + 4)):
        arrival.take(there.start, bytes(memory[there.start * PAGE_BYTES : there.stop * PAGE_BYTES]))
    rig.start()
    rig.prove()
    await until(rig, lambda: rig.pair.target.arrival is None)
    rig.assert_all_here()
    asked_for = [(r.image_offset // PAGE_BYTES - LOCAL, r.length_bytes // PAGE_BYTES) for r in rig.network.fetched]
    assert asked_for == [(0, 50), (100, 50), (150, 50), (200, 50), (250, 6)]
    assert [len(request.arrived) for request in rig.network.fetched] == [7, 0, 0, 0, 0]
    assert rig.network.fetched[0].arrived[0] == 1 << 3


# Accesses meanwhile


async def test_an_access_to_what_is_missing_has_no_effect_and_a_later_one_the_right_one(rig: Rig):
    functions = rig.pair.h2.functions
    before = rig.pair.target.image.sequencer("d1").last
    register, missing = rig.access(0, before + 1), rig.access(LOCAL + 4, before + 2, b"new data")
    refused = home.exchange(functions, rig.exchange(register, missing, rig.access(0, before + 3)))
    assert (len(refused.answers), refused.refusal) == (1, REFUSAL_NOT_YET)
    assert rig.pair.target.image.sequencer("d1").last == before + 1
    rig.start()
    await until(rig, lambda: not rig.pair.target.is_gated)
    again = home.exchange(functions, rig.exchange(missing, rig.access(LOCAL + 4, before + 3)))
    assert [answer.data for answer in again.answers] == [b"", b"new data"]


async def test_what_an_access_waits_for_comes_first(rig: Rig):
    """The stream of all pages stands still; what is asked for is fetched beside it."""

    async def only_what_is_asked_for(pages: AsyncIterator[FetchStateResponse]) -> AsyncIterator[FetchStateResponse]:
        async for each in pages:
            if each.pages.image_offset == LOCAL * PAGE_BYTES:
                await asyncio.Event().wait()
            yield each

    rig.network.tamper_rest = only_what_is_asked_for
    rig.start()
    page, before = PAGES - 1, rig.pair.target.image.sequencer("d1").last
    request = rig.exchange(rig.access(page, before + 1))
    waiting = asyncio.create_task(home.let_arrive(rig.pair.h2.functions, request))
    await settle(100)
    assert waiting.done()
    (answer,) = home.exchange(rig.pair.h2.functions, request).answers
    offset = page * PAGE_BYTES + 8
    assert answer.data == rig.pair.source.image.memory[offset : offset + 8]


async def test_what_is_on_its_way_is_not_asked_for_again(rig: Rig):
    requests: list[None] = []

    def never(pages: AsyncIterator[FetchStateResponse]) -> AsyncIterator[FetchStateResponse]:
        requests.append(None)
        return silent(pages)

    rig.prove()
    rig.network.tamper_rest = never
    rig.start()
    arrival = rig.pair.target.arrival
    assert arrival is not None
    waiting = asyncio.create_task(arrival.arrived([((PAGES - 1) * PAGE_BYTES, 8)]))
    await settle()
    for page in range(LOCAL, LOCAL + 5):
        arrival.take(page, bytes(PAGE_BYTES))
        await settle()
    assert len(requests) == 1
    arrival.take(PAGES - 1, bytes(PAGE_BYTES))
    await waiting


async def test_the_own_hosts_driver_waits_in_its_queue_and_keeps_its_order(rig: Rig):
    pair = rig.pair
    pair.h2.drivers.recorded("d9", 0)
    entry = pair.h2.message(pair.target.about.base, driver="d9", generation=2, length=PAGES * PAGE_BYTES)
    pair.h2.drivers.attach(entry)
    driver = pair.h2.drivers.require("d9")
    place = entry.virtual_address
    written = await driver.submit(ACCESS_KIND_WRITE, place + (LOCAL + 9) * PAGE_BYTES, 8, b"in order", sequence=0)
    read = await driver.submit(ACCESS_KIND_READ, place + 8, 8, b"", sequence=0)
    await settle()
    assert (written.access.answer.done(), read.access.answer.done()) == (False, False)
    rig.start()
    await until(rig, lambda: pair.target.arrival is None)
    await settle()
    assert (written.access.answer.done(), read.access.answer.done()) == (True, True)
    offset = (LOCAL + 9) * PAGE_BYTES
    assert pair.target.image.memory[offset : offset + 8] == b"in order"
    assert (
        pair.source.image.memory[offset + 16 : offset + 4096] == pair.target.image.memory[offset + 16 : offset + 4096]
    )


async def test_a_fault_meanwhile_and_a_restart_keep_nothing_from_arriving(rig: Rig):
    rig.prove()
    rig.pair.h2.functions.fail(rig.pair.target)
    rig.restart()
    rig.start()
    await until(rig, lambda: rig.pair.target.arrival is None)
    rig.assert_all_here()


async def test_a_reset_meanwhile_needs_nothing_of_before(rig: Rig):
    rig.prove()
    rig.pair.target.reset()
    rig.start()
    await until(rig, lambda: rig.pair.target.arrival is None)
    assert not any(rig.pair.target.image.memory[LOCAL * PAGE_BYTES :])


async def test_a_reset_meanwhile_of_what_keeps_its_medium_loses_nothing_of_it(tmp_path: Path):
    rig = Rig(tmp_path, {0: 16 << 10, 2: 1 << 20}, "nvme")
    await rig.move()
    rig.prove()
    rig.pair.target.reset()
    rig.start()
    await until(rig, lambda: rig.pair.target.arrival is None)
    rig.assert_all_here()
    await rig.close()


# Whatever fails


@pytest.mark.parametrize("after", range(4))
async def test_a_target_that_is_killed_after_any_part_goes_on_and_overwrites_nothing(rig: Rig, after: int):
    async def some(pages: AsyncIterator[FetchStateResponse]) -> AsyncIterator[FetchStateResponse]:
        left = after
        async for each in pages:
            if not left:
                await asyncio.Event().wait()
            yield each
            left -= 1

    rig.prove()
    rig.network.tamper_rest = some
    rig.start()
    await rig.clock.advance(PUSH_AFTER_S)
    await settle(100)
    arrival = rig.pair.target.arrival
    there = [page for page in range(LOCAL, PAGES) if rig.pair.target.image.arrived[page]]
    assert arrival is not None
    assert len(there) == PAGES - LOCAL - arrival.missing_pages
    assert bool(there) is bool(after)
    for page in there[:1]:
        rig.pair.target.image.store([(page * PAGE_BYTES, b"written since")])
        rig.pair.source.image.store([(page * PAGE_BYTES, b"not this")])
    rig.restart()
    rig.network.tamper_rest = lambda pages: pages
    rig.start()
    await until(rig, lambda: rig.pair.target.arrival is None)
    for page in there[:1]:
        offset = page * PAGE_BYTES
        assert rig.pair.target.image.memory[offset : offset + 13] == b"written since"
        rig.pair.source.image.store([(offset, b"written since")])
    rig.assert_all_here()


async def failing(pages: AsyncIterator[FetchStateResponse]) -> AsyncIterator[FetchStateResponse]:
    async for each in pages:
        yield each
        raise VfleetError(Reason.UNREACHABLE, "the connection broke")


async def silent(pages: AsyncIterator[FetchStateResponse]) -> AsyncIterator[FetchStateResponse]:
    await asyncio.Event().wait()
    async for each in pages:
        yield each


async def damaged(pages: AsyncIterator[FetchStateResponse]) -> AsyncIterator[FetchStateResponse]:
    async for each in pages:
        each.pages.crc ^= 1
        yield each


async def elsewhere(pages: AsyncIterator[FetchStateResponse]) -> AsyncIterator[FetchStateResponse]:
    async for each in pages:
        moved = FetchStateResponse()
        moved.pages.CopyFrom(each.pages)
        moved.pages.image_offset = 0
        moved.pages.crc = transfer.pages_crc(0, moved.pages.data, moved.pages.zero_bytes)
        yield moved


@pytest.mark.parametrize("failure", [failing, damaged, elsewhere])
async def test_a_request_that_fails_is_made_again_and_nothing_wrong_is_taken(rig: Rig, failure):
    rig.prove()
    rig.network.tamper_rest = failure
    rig.start()
    await rig.clock.advance(1.0)
    assert rig.status() == FUNCTION_STATUS_ACTIVE
    target, source = rig.pair.target.image, rig.pair.source.image
    for page in range(LOCAL, PAGES):
        own = target.memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
        assert not any(own) or own == source.memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
    assert target.memory[:PAGE_BYTES] == source.memory[:PAGE_BYTES]
    rig.network.tamper_rest = lambda pages: pages
    await rig.clock.advance(2 * RETRY_LONGEST_S)
    await until(rig, lambda: rig.pair.target.arrival is None)
    rig.assert_all_here()


async def test_a_source_that_says_nothing_is_asked_again(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hostd.rest.FETCH_TIMEOUT_S", 0.01)
    monkeypatch.setattr("hostd.rest.SILENCE_S", 0.01)
    assert FETCH_TIMEOUT_S < SILENCE_S
    rig.prove()
    rig.network.tamper_rest = silent
    rig.start()
    await settle()
    rig.network.tamper_rest = lambda pages: pages
    for _ in range(100):
        if rig.pair.target.arrival is None:
            break
        await asyncio.sleep(0.005)
        await rig.clock.advance(0.1)
    rig.assert_all_here()


async def test_what_a_full_disk_does_not_take_is_asked_for_until_it_does(rig: Rig):
    await fetched(rig)  # so that the source, which is on another disk, has nothing more to write
    rig.prove()
    rig.start()
    with full_disk():
        await rig.clock.advance(LONG_S)
    assert (rig.pair.target.about.arriving, rig.running.done()) == (True, False)
    await rig.clock.advance(2 * RETRY_LONGEST_S)
    await until(rig, lambda: rig.pair.target.arrival is None)
    rig.assert_all_here()


# LOST


def gone(pages: AsyncIterator[FetchStateResponse]) -> AsyncIterator[FetchStateResponse]:
    async def nothing() -> AsyncIterator[FetchStateResponse]:
        raise VfleetError(Reason.UNREACHABLE, "nobody answers")
        yield

    return nothing()


@pytest.mark.parametrize("how", ["another incarnation", "forgotten", "it says so itself"])
async def test_a_function_whose_source_is_gone_before_all_has_arrived_is_lost(rig: Rig, how: str):
    rig.prove()
    rig.network.tamper_rest = gone
    rig.start()
    await rig.clock.advance(LONG_S)
    assert rig.status() == FUNCTION_STATUS_ACTIVE
    if how == "another incarnation":
        rig.fleet.put(keys.registration_key("h1"), "i1b")
    elif how == "forgotten":
        del rig.fleet.items[keys.registration_key("h1")]
        await rig.clock.advance(LONG_S)
        assert rig.status() == FUNCTION_STATUS_ACTIVE  # it is away; its host's record says that it may come back
        del rig.fleet.items[keys.host_key("h1")]
    else:
        rig.network.tamper_rest = lambda pages: pages
        rig.pair.h1.destroy(1, 10, 1)
    await rig.clock.advance(LONG_S)
    assert rig.status() == FUNCTION_STATUS_LOST
    assert decode(TableEntry, rig.fleet.items[keys.entry_key("h3", "d1", "vf1")]).lost
    assert rig.pair.h2.functions.find("vf1", 2) is None
    assert not rig.running.done()


async def test_a_loss_is_said_by_the_registered_machine_alone_and_once_etcd_can_be_believed(rig: Rig):
    rig.prove()
    rig.network.tamper_rest = gone
    rig.fleet.put(keys.registration_key("h1"), "i1b")
    rig.history.behind = VfleetError(Reason.CONFLICT, "etcd was restored from a backup")
    rig.start()
    await rig.clock.advance(LONG_S)
    assert rig.status() == FUNCTION_STATUS_ACTIVE
    rig.history.behind = None
    rig.fleet.put(keys.registration_key("h2"), "another machine")
    await rig.clock.advance(LONG_S)
    assert rig.status() == FUNCTION_STATUS_ACTIVE
    rig.fleet.put(keys.registration_key("h2"), "i2")
    await rig.clock.advance(LONG_S)
    assert rig.status() == FUNCTION_STATUS_LOST


async def test_what_was_lost_before_a_restart_goes_after_it(rig: Rig):
    rig.prove()
    rig.network.tamper_rest = gone
    rig.fleet.put(keys.registration_key("h1"), "i1b")
    record = decode(Function, rig.fleet.items[keys.function_key("vf1")])
    record.status = FUNCTION_STATUS_LOST
    rig.fleet.put(keys.function_key("vf1"), record)
    rig.restart()
    rig.start()
    await rig.clock.advance(LONG_S)
    assert rig.pair.h2.functions.find("vf1", 2) is None


async def test_what_is_not_the_home_any_more_is_not_lost(rig: Rig):
    rig.prove()
    rig.network.tamper_rest = gone
    rig.fleet.put(keys.registration_key("h1"), "i1b")
    record = decode(Function, rig.fleet.items[keys.function_key("vf1")])
    record.generation = 3
    rig.fleet.put(keys.function_key("vf1"), record)
    rig.start()
    await rig.clock.advance(LONG_S)
    assert rig.status() == FUNCTION_STATUS_ACTIVE
    assert rig.pair.h2.functions.find("vf1", 2) is not None


# What the source gives, and what the coordinator is told


async def fetched(rig: Rig, **fields) -> list[FetchStateResponse] | Reason:
    request = FetchStateRequest(
        attempt=attempt(10),
        function="vf1",
        generation=1,
        image_offset=LOCAL * PAGE_BYTES,
        length_bytes=8 * PAGE_BYTES,
    )
    for name, value in fields.items():
        request.ClearField(name)
        getattr(request, name).CopyFrom(value) if name == "attempt" else setattr(request, name, value)
    try:
        async with aclosing(transfer.fetch_state(rig.pair.h1.functions, rig.clock, request)) as pages:
            return [each async for each in pages]
    except VfleetError as error:
        return error.reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"attempt": attempt(9)}, Reason.ILLEGAL_STATE),
        ({"attempt": attempt(11)}, Reason.ILLEGAL_STATE),
        ({"generation": 2}, Reason.WRONG_GENERATION),
        ({"function": "vf2"}, Reason.NOT_FOUND),
        ({"length_bytes": 0}, Reason.INVALID_FIELD),
        ({"length_bytes": 1}, Reason.INVALID_FIELD),
        ({"image_offset": LOCAL * PAGE_BYTES + 1}, Reason.INVALID_FIELD),
        ({"image_offset": 0}, Reason.INVALID_FIELD),
        ({"image_offset": (PAGES - 7) * PAGE_BYTES}, Reason.INVALID_FIELD),
    ],
)
async def test_the_rest_is_handed_out_only_where_it_is_named_right(rig: Rig, fields, reason):
    assert await fetched(rig, **fields) is reason


async def test_a_source_that_runs_hands_out_nothing(rig: Rig):
    rig.pair.h1.resume(1, 10)
    assert await fetched(rig) is Reason.ILLEGAL_STATE


async def test_to_hand_out_the_rest_is_to_know_of_the_commit(rig: Rig):
    """So the source's witness follows, and an etcd that was restored to before COMMIT can't let it run."""
    source = rig.pair.h1
    changes = source.fences.changes
    assert await fetched(rig, length_bytes=0) is Reason.INVALID_FIELD
    assert not rig.pair.source.about.fetched
    await fetched(rig)
    await fetched(rig)
    assert source.fences.changes == changes + 1
    assert reason_of(source.stop, 1, 10) is Reason.STALE_ATTEMPT
    source.resume(1, 10, migration="m1")
    assert await fetched(rig), "it is stopped still"


async def test_what_has_arrived_is_not_sent_again(rig: Rig):
    pages = await fetched(rig, arrived=bytes([0b0101_1001]))
    assert [each.pages.image_offset // PAGE_BYTES - LOCAL for each in pages] == [1, 5, 7]
    assert [(len(each.pages.data) + each.pages.zero_bytes) // PAGE_BYTES for each in pages] == [2, 1, 1]


async def test_the_coordinator_is_told_until_all_is_here(rig: Rig):
    request = WatchArrivalRequest(attempt=attempt(10), function="vf1", generation=2)
    told = []

    async def watch() -> None:
        async for response in watch_arrival(rig.pair.h2.functions, rig.clock, request):
            told.append(response.missing_bytes // PAGE_BYTES)  # noqa: PERF401  # looked at while it goes on

    watching = asyncio.create_task(watch())
    await settle()
    assert (told, watching.done()) == ([PAGES - LOCAL], False)
    # To watch is to have read COMMIT: nobody has to access it before the rest comes.
    assert rig.pair.target.is_serving
    rig.start()
    await until(rig, watching.done)
    assert (told[-1], 0 in told[:-1]) == (0, False)
    rig.assert_all_here()
    told.clear()
    await watch()
    assert told == [0]


async def test_the_coordinator_is_told_of_a_loss_by_not_found(rig: Rig):
    request = WatchArrivalRequest(attempt=attempt(10), function="vf1", generation=2)

    async def watch() -> None:
        async for _ in watch_arrival(rig.pair.h2.functions, rig.clock, request):
            pass

    watching = asyncio.create_task(watch())
    await settle()
    rig.pair.h2.functions.remove(rig.pair.target)
    await rig.clock.advance(1.0)
    with pytest.raises(VfleetError) as caught:
        await watching
    assert caught.value.reason is Reason.NOT_FOUND
