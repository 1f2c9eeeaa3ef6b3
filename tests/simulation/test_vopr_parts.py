"""What the simulation itself promises: a kill is a kill, a stop is a stop, and each kind of message keeps its rules."""

import asyncio
from random import Random

import pytest
from simulation.vopr.disk import Disk, SimulatedLedger
from simulation.vopr.etcd import EtcdServer
from simulation.vopr.faults import CALM
from simulation.vopr.loop import Killed, Life, SimulatedLoop, StuckError
from simulation.vopr.network import Network, SimulatedServer

from vfleet.errors import Reason, VfleetError, not_found
from vfleet.etcd.store import Changes, Delete, Listing, Put, Transaction
from vfleet.rpc import Channels, call
from vfleet.v1.hold_service_pb2 import Hold, ListHoldsRequest, ListHoldsResponse
from vfleet.v1.hold_service_pb2_grpc import HoldServiceServicer, HoldServiceStub, add_HoldServiceServicer_to_server


class Holds(HoldServiceServicer):
    """A servicer that counts its requests, and fails if told to."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.requests = 0
        self.failure: VfleetError | None = None
        self.takes_s = 0.0

    async def ListHolds(self, request, context):  # noqa: N802  # as the proto says
        self.requests += 1
        await asyncio.sleep(self.takes_s)
        if self.failure is not None:
            raise self.failure
        return ListHoldsResponse(holds=[Hold(driver="d1")])


class Bench:
    """A loop, a network, and one server on it."""

    def __init__(self, **profile) -> None:
        self.loop = SimulatedLoop()
        self.profile = type(CALM)(**{**vars(CALM), **profile})
        self.network = Network(self.loop, Random(1), self.profile, lambda *_: None)
        self.client = Life("client")
        self.holds = Holds(Life("server"))
        server = SimulatedServer(self.network, self.holds.life, "server:1", "this-machine")
        add_HoldServiceServicer_to_server(self.holds, server)
        self.network.servers["server:1"] = server
        self.holds.life.at_death[lambda: self.network.servers.pop("server:1")] = None

    async def ask(self, **options) -> ListHoldsResponse:
        channels = Channels(self.network.connect(self.client))
        method = HoldServiceStub(channels.to("server:1")).ListHolds
        return await call(method, ListHoldsRequest(), address="server:1", timeout_s=5.0, **options)

    async def refused(self, **options) -> Reason:
        with pytest.raises(VfleetError) as refusal:
            await self.ask(**options)
        return refusal.value.reason


def test_time_jumps_to_the_next_timer():
    loop = SimulatedLoop()

    async def main() -> float:
        await asyncio.sleep(1e6)
        return loop.time()

    assert loop.run(main()) == pytest.approx(1e6)


def test_a_program_that_waits_for_nothing_is_stuck():
    with pytest.raises(StuckError):
        SimulatedLoop().run(asyncio.Event().wait())


def test_a_killed_process_does_nothing_more_not_even_clean_up():
    loop, life, done = SimulatedLoop(), Life("one"), []

    async def process() -> None:
        try:
            done.append("begun")
            await asyncio.sleep(10)
            done.append("went on")
        finally:
            done.append("cleaned up")

    async def main() -> None:
        loop.start(life, process())
        await asyncio.sleep(1)
        loop.kill(life)
        await asyncio.sleep(100)
        assert done == ["begun"]

    loop.run(main())


def test_a_stopped_process_goes_on_where_it_was_and_finds_that_time_has_passed():
    loop, life, times = SimulatedLoop(), Life("one"), []

    async def process() -> None:
        for _ in range(3):
            await asyncio.sleep(1)
            times.append(loop.time())

    async def main() -> None:
        loop.start(life, process())
        await asyncio.sleep(1.5)
        loop.stop_life(life)
        await asyncio.sleep(10)
        loop.continue_life(life)
        await asyncio.sleep(10)

    loop.run(main())
    assert times == pytest.approx([1, 11.5, 12.5])


def test_an_error_crosses_the_network_as_it_is():
    bench = Bench()
    bench.holds.failure = not_found("driver", "d9")

    async def main() -> None:
        with pytest.raises(VfleetError) as raised:
            await bench.ask()
        assert (raised.value.reason, raised.value.metadata["name"]) == (Reason.NOT_FOUND, "d9")
        bench.holds.failure = None
        assert (await bench.ask()).holds[0].driver == "d1"
        assert await bench.refused(incarnation="another-machine") is Reason.INCARNATION_CHANGED

    bench.loop.run(main())


def test_a_request_that_is_lost_or_cut_off_is_not_answered_in_time():
    bench = Bench()

    async def main() -> None:
        bench.network.cut("server", "client")
        assert await bench.refused() is Reason.UNREACHABLE
        assert bench.loop.time() == pytest.approx(5.0)
        assert bench.holds.requests == 1
        bench.network.heal()
        bench.network.cut("client", "server")
        assert await bench.refused() is Reason.UNREACHABLE
        assert bench.holds.requests == 1

    bench.loop.run(main())


def test_a_request_may_be_carried_out_twice_and_answered_once():
    bench = Bench(duplication=1.0)

    async def main() -> None:
        await bench.ask()
        await asyncio.sleep(20.0)
        assert bench.holds.requests == 2

    bench.loop.run(main())


def test_a_server_that_is_killed_breaks_its_calls_at_once():
    bench = Bench()
    bench.holds.takes_s = 3.0

    async def main() -> None:
        asking = asyncio.ensure_future(bench.refused())
        await asyncio.sleep(1.0)
        bench.loop.kill(bench.holds.life)
        assert await asking is Reason.UNREACHABLE
        assert bench.loop.time() < 1.1
        assert await bench.refused() is Reason.UNREACHABLE

    bench.loop.run(main())


def test_what_a_transaction_on_disk_had_not_committed_is_gone_after_a_kill():
    disk, life = Disk(), Life("one")
    ledger = SimulatedLedger(disk, life, lambda: None)
    ledger.put("hold", "a", Hold(driver="before"))

    def die_halfway() -> None:
        with ledger.together():
            ledger.put("hold", "a", Hold(driver="after"))
            ledger.put("hold", "b", Hold(driver="after"))
            life.is_alive = False
            ledger.put("hold", "c", Hold(driver="after"))

    with pytest.raises(Killed):
        die_halfway()
    reborn = SimulatedLedger(disk, Life("one"), lambda: None)
    assert [hold.driver for hold in reborn.all("hold", Hold)] == ["before"]
    with pytest.raises(Killed):
        ledger.get("hold", "a", Hold)


@pytest.mark.parametrize("seed", range(20))
def test_a_transaction_without_an_answer_happened_once_or_not_at_all(seed):
    loop = SimulatedLoop()
    profile = type(CALM)(**{**vars(CALM), "store_loss": 1.0})
    server = EtcdServer(loop, Random(seed), profile, lambda *_: None)
    store = server.client(Life("one"))

    async def main() -> int:
        with pytest.raises(VfleetError) as raised:
            await store.commit(Transaction((), (Put("/a", b"1"),)))
        assert raised.value.reason is Reason.OUTCOME_UNKNOWN
        await asyncio.sleep(20.0)
        return server.state.revision

    assert loop.run(main()) in (1, 2)


def put(key: str) -> Transaction:
    return Transaction((), (Put(key, b"1"),))


@pytest.mark.parametrize("is_lost", [True, False])
def test_a_watch_says_that_etcd_was_restored_if_it_lacks_what_was_delivered(is_lost):
    loop = SimulatedLoop()
    server = EtcdServer(loop, Random(1), CALM, lambda *_: None)
    store = server.client(Life("one"))

    async def main() -> None:
        await store.commit(put("/a/1"))
        backup = server.state.copy()
        updates = store.watch("/a/")
        assert [item.key for item in (await anext(updates)).items] == ["/a/1"]
        await store.commit(put("/a/2" if is_lost else "/b"))
        if is_lost:
            assert isinstance(await anext(updates), Changes)
        server.restore(backup, away_s=1.0)
        for key in ("/a/3", "/a/4"):
            await store.commit(put(key))
        following = await anext(updates)
        if is_lost:
            assert isinstance(following, Listing)
            assert following.restored
        else:
            assert [event.key for event in following.events] == ["/a/3"]

    loop.run(main())


def test_a_transaction_does_not_come_to_an_etcd_that_took_the_place_of_the_one_it_was_sent_to():
    loop = SimulatedLoop()
    server = EtcdServer(loop, Random(1), CALM, lambda *_: None)
    store = server.client(Life("one"))

    async def main() -> None:
        backup = server.state.copy()
        committing = asyncio.ensure_future(store.commit(put("/a")))
        await asyncio.sleep(0)
        server.restore(backup, away_s=0.0)
        with pytest.raises(VfleetError) as raised:
            await committing
        assert raised.value.reason is Reason.OUTCOME_UNKNOWN
        assert server.state.get("/a") is None

    loop.run(main())


def test_a_backup_keeps_its_leases_and_history():
    loop = SimulatedLoop()
    server = EtcdServer(loop, Random(1), CALM, lambda *_: None)

    async def main() -> None:
        lease = server.grant(3)
        server.commit("one", Transaction((), (Put("/a", b"1", lease),)))
        backup = server.state.copy()
        server.commit("one", Transaction((), (Delete("/a"),)))
        assert backup.get("/a") is not None
        assert [changes.revision for changes in backup.changes("/", 1)] == [2]
        server.restore(backup, away_s=0.0)
        server.revoke(lease)
        assert server.state.get("/a") is None

    loop.run(main())
