"""A host and etcd: what it believes, what it takes for nothing, and how it tells that etcd was restored."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random

import pytest
from support.bench import DEMO, IDENTITY, Bench

from hostd.history import History
from hostd.registration import LOOK_S, Registration
from hostd.resolution import Resolver
from hostd.topology import load
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.keys import (
    FLEET_GENERATION,
    driver_key,
    entry_key,
    function_key,
    host_key,
    registration_key,
    segment_key,
    witness_key,
)
from vfleet.etcd.records import encode
from vfleet.etcd.store import Delete, KeyValue, Put, Transaction
from vfleet.v1.records_pb2 import Driver, Function, Host
from vfleet.v1.types_pb2 import TableEntry

BASE = 0x0001_0180 << 32
PATIENCE_S = 60


class Rig:
    """Host h1 with its registration, over a real etcd."""

    def __init__(self, path: Path, store: EtcdStore, incarnation: str = "boot-1") -> None:
        self.bench, self.store = Bench(path), store
        self.tasks: list[asyncio.Task[None]] = []
        self.registrations = 0
        topology = load(DEMO, "h1")
        self.host = Host(name="h1", segment=1, address="h1:1", incarnation=incarnation, devices=topology.devices())
        self.begin()

    def begin(self) -> None:
        bench, random = self.bench, Random(7)
        self.history = History("h1", bench.ledger, bench.fences, random)
        resolver = Resolver("h1", bench.functions, bench.drivers, bench.fences, self.history, self.store, bench.clock)
        self.registration = Registration(
            self.host, bench.functions, bench.drivers, resolver, self.history, self.store, bench.clock, random, 60
        )

    def start(self) -> None:
        registration = self.registration
        self.tasks = [
            asyncio.create_task(work)
            for work in (
                registration.run(self.registered),
                self.always(registration.keep_witness),
                self.always(registration.follow_witness),
            )
        ]

    def registered(self) -> None:
        self.registrations += 1

    async def always(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except VfleetError:
                await self.bench.clock.sleep(0.1)

    async def stop(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks = []

    async def close(self) -> None:
        await self.stop()
        self.bench.close()

    async def put(self, key: str, value: bytes) -> int:
        return (await self.store.commit(Transaction((), (Put(key, value),)))).revision

    async def get(self, key: str) -> KeyValue | None:
        return await self.store.get(key)

    async def witness(self) -> bytes:
        stored = await self.get(witness_key("h1"))
        assert stored is not None
        return stored.value

    async def until(self, condition: Callable[[], Awaitable[bool]]) -> None:
        """Let time pass until `condition` holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not await condition():
                await self.bench.clock.advance(0.5)
                await asyncio.sleep(0.005)

    async def until_registered(self, times: int = 1) -> None:
        async def registered() -> bool:
            return self.registrations >= times

        await self.until(registered)

    async def until_away(self) -> None:
        async def away() -> bool:
            return await self.get(registration_key("h1")) is None

        await self.until(away)

    async def until_witness_changes(self) -> bytes:
        before = await self.witness()

        async def changed() -> bool:
            return await self.witness() != before

        await self.until(changed)
        return before


@pytest.fixture
async def rig(tmp_path: Path, store: EtcdStore) -> AsyncIterator[Rig]:
    found = Rig(tmp_path / "host", store)
    yield found
    await found.close()


def record(generation: int, identity: int = IDENTITY) -> bytes:
    return encode(Function(name="vf1", identity=identity, generation=generation, device="h2/nic0", vf_index=1))


# What etcd has no record of


async def test_what_etcd_has_no_record_of_stays(rig: Rig) -> None:
    instance = rig.bench.create()
    rig.bench.drivers.recorded("d1", 4096)
    rig.start()
    await rig.until_registered()
    assert rig.bench.functions.find("vf1", 1) is instance
    assert [driver.name for driver in rig.bench.drivers.all()] == ["d1"]


async def test_of_a_function_that_has_moved_on_the_instance_goes(rig: Rig) -> None:
    rig.bench.create()
    # One of another identity is another function, which had or has the name.
    for generation, identity, is_there in ((1, IDENTITY, True), (2, IDENTITY + 1, True), (2, IDENTITY, False)):
        await rig.put(function_key("vf1"), record(generation, identity))
        await rig.registration.reconcile()
        assert (rig.bench.functions.find("vf1", 1) is not None) == is_there


async def test_an_entry_that_was_deleted_while_the_host_was_away_goes(rig: Rig) -> None:
    await rig.put(driver_key("d1"), encode(Driver(name="d1", host="h1")))
    entry = rig.bench.message(BASE)
    entry.ClearField("revision")
    await rig.put(entry_key("h1", "d1", "vf1"), encode(entry))
    await rig.registration.reconcile()
    assert "vf1" in rig.bench.drivers.require("d1").table.by_function
    await rig.store.commit(Transaction((), (Delete(entry_key("h1", "d1", "vf1")),)))
    await rig.registration.reconcile()
    assert "vf1" not in rig.bench.drivers.require("d1").table.by_function


async def test_a_driver_that_cannot_be_made_keeps_no_other_from_it(rig: Rig) -> None:
    rig.bench.drivers.recorded("d1", 4096)
    for name in ("d1", "d2"):
        await rig.put(driver_key(name), encode(Driver(name=name, host="h1", main_memory_bytes=8192)))
    await rig.registration.reconcile()
    sizes = {driver.name: driver.record.main_memory_bytes for driver in rig.bench.drivers.all()}
    assert sizes == {"d1": 4096, "d2": 8192}


# The witness


async def test_the_witness_is_written_with_the_registration(rig: Rig) -> None:
    rig.start()
    await rig.until_registered()
    registration, witness = await rig.get(registration_key("h1")), await rig.get(witness_key("h1"))
    assert registration is not None
    assert witness is not None
    assert registration.mod_revision == witness.create_revision


async def test_the_witness_is_written_anew_after_what_must_not_be_forgotten_and_only_then(rig: Rig) -> None:
    rig.start()
    await rig.until_registered()
    first = await rig.witness()
    await rig.bench.clock.advance(LOOK_S)
    rig.bench.create()
    assert await rig.until_witness_changes() == first
    second = await rig.witness()
    await rig.bench.clock.advance(LOOK_S)
    assert await rig.witness() == second


@pytest.mark.parametrize("is_forgotten", [False, True])
async def test_a_host_that_misses_its_witness_is_away_until_the_generation_is_raised(
    rig: Rig, is_forgotten: bool
) -> None:
    rig.start()
    await rig.until_registered()
    # As others' writes leave a restored etcd: registration and lease live, revisions as high, the witness earlier.
    if is_forgotten:
        await rig.store.commit(Transaction((), (Delete(witness_key("h1")),)))
    else:
        await rig.put(witness_key("h1"), b"earlier")
    await rig.until_away()
    await rig.bench.clock.advance(2 * LOOK_S)
    await rig.until_away()
    with pytest.raises(VfleetError, match="bump-generation"):
        await rig.registration.check()
    assert rig.registrations == 1
    await rig.put(FLEET_GENERATION, b"2")
    await rig.until_registered(2)
    await rig.registration.check()


async def test_with_a_raise_the_host_registers_anew_in_its_session(rig: Rig) -> None:
    """A backup of between the lease and the registration has the one without the other."""
    rig.start()
    await rig.until_registered()
    before = await rig.get(registration_key("h1"))
    await rig.store.commit(Transaction((), (Delete(registration_key("h1")),)))
    await rig.put(FLEET_GENERATION, b"2")

    async def registered() -> bool:
        return await rig.get(registration_key("h1")) is not None

    await rig.until(registered)
    after = await rig.get(registration_key("h1"))
    assert before is not None
    assert after is not None
    assert (after.lease, rig.registrations) == (before.lease, 1)


async def test_a_host_in_whose_place_another_machine_is_registered_gives_up(rig: Rig) -> None:
    rig.start()
    await rig.until_registered()
    registration = await rig.get(registration_key("h1"))
    assert registration is not None
    await rig.put(registration_key("h1"), b"boot-2")
    await rig.put(FLEET_GENERATION, b"2")

    async def ended() -> bool:
        return not await rig.store.keep_lease_alive(registration.lease)

    await rig.until(ended)
    await rig.store.commit(Transaction((), (Delete(registration_key("h1")),)))
    await rig.until_registered(2)


async def test_a_host_that_was_down_meanwhile_believes_nothing(rig: Rig) -> None:
    rig.bench.create()
    rig.start()
    await rig.until_registered()
    await rig.stop()
    await rig.put(witness_key("h1"), b"earlier")
    await rig.put(function_key("vf1"), record(2))
    rig.bench.restart()
    rig.begin()
    with pytest.raises(VfleetError, match="bump-generation"):
        await rig.registration.reconcile()
    assert rig.bench.functions.find("vf1", 1) is not None


async def test_while_another_machine_is_registered_nothing_is_read_and_its_witness_is_no_reason(rig: Rig) -> None:
    rig.bench.create()
    rig.start()
    await rig.until_registered()
    await rig.stop()
    await rig.put(function_key("vf1"), record(2))
    await rig.put(registration_key("h1"), b"boot-2")
    await rig.put(witness_key("h1"), b"of-boot-2")
    running = asyncio.create_task(rig.registration.run(rig.registered))
    await rig.bench.clock.advance(10)
    assert rig.bench.functions.find("vf1", 1) is not None

    async def ended() -> bool:
        return running.done()

    await rig.until(ended)
    error = running.exception()
    assert isinstance(error, VfleetError)
    assert error.reason is Reason.ALREADY_EXISTS


async def test_a_host_that_was_forgotten_joins_as_a_new_one(rig: Rig) -> None:
    """`forget-host` takes all keys of the host but its witness."""
    await rig.registration.claim_segment()
    rig.start()
    await rig.until_registered()
    await rig.stop()
    forgotten = (host_key("h1"), segment_key(1), registration_key("h1"))
    await rig.store.commit(Transaction((), tuple(Delete(key) for key in forgotten)))
    rig.bench.restart()
    rig.begin()
    rig.start()
    await rig.until_registered(2)
    assert await rig.get(segment_key(1)) is not None


# What can't be read


async def attached(rig: Rig) -> TableEntry:
    await rig.put(driver_key("d1"), encode(Driver(name="d1", host="h1")))
    entry = rig.bench.message(BASE)
    entry.ClearField("revision")
    await rig.put(entry_key("h1", "d1", "vf1"), encode(entry))
    await rig.registration.reconcile()
    return entry


@pytest.mark.parametrize("value", [b"\xff", encode(TableEntry(driver="d9", function="vf9", host="h1"))])
async def test_an_entry_that_cannot_be_read_detaches_nobody_and_stops_nobody(rig: Rig, value: bytes) -> None:
    entry = await attached(rig)
    await rig.put(entry_key("h1", "d1", "vf1"), value)
    await rig.put(entry_key("h1", "d1", "vf0"), value)
    await rig.registration.reconcile()
    assert "vf1" in rig.bench.drivers.require("d1").table.by_function
    entry.function, entry.virtual_address = "vf2", entry.virtual_address + (1 << 32)
    await rig.put(entry_key("h1", "d1", "vf2"), encode(entry))
    await rig.registration.reconcile()
    assert rig.bench.drivers.require("d1").table.by_function.keys() >= {"vf1", "vf2"}


async def test_records_that_cannot_be_read_keep_no_host_from_registering(rig: Rig) -> None:
    instance = rig.bench.create()
    for key in (function_key("vf1"), function_key("vf9"), driver_key("d9"), host_key("h9")):
        await rig.put(key, b"\xff")
    rig.start()
    await rig.until_registered()
    assert rig.bench.functions.find("vf1", 1) is instance
