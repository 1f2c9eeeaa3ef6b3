"""What other hosts may do here, by what this one knows; over real connections, see test_secured."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from support.fleet_store import FleetStore
from support.fleet_values import three_hosts
from support.manual_clock import settle

from hostd.directory import Directory
from hostd.neighbours import Neighbours
from hostd.stations import Stations
from hostd.translation import Entry, TranslationTable
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.store import Changes, Event, KeyValue, Listing
from vfleet.principal import CALLER, Principal
from vfleet.roles import Role
from vfleet.v1.fabric_service_pb2 import ExchangeDmaRequest
from vfleet.v1.records_pb2 import Migration, Move, Place
from vfleet.v1.types_pb2 import Attempt, TableEntry


class Store(FleetStore):
    """A fleet whose watches are told when the test says so."""

    def __init__(self) -> None:
        super().__init__(three_hosts())
        self._told: asyncio.Queue[tuple[Event, ...]] = asyncio.Queue()

    async def watch(self, prefix: str) -> AsyncIterator[Listing | Changes]:
        yield Listing(1, tuple(item for key, item in self.fleet.items.items() if key.startswith(prefix)))
        while True:
            yield Changes(2, await self._told.get())

    async def tell(self, *events: Event) -> None:
        self._told.put_nowait(events)
        await settle()


class World:
    """Host h1 and what it knows: drivers d1 on h1 and d2 on h3 are attached to vf1, whose home is h1."""

    def __init__(self) -> None:
        self.store = Store()
        self.directory = Directory()
        for name in ("h1", "h2", "h3"):
            self.directory._put(self.store.fleet.items[keys.host_key(name)])
        entry = TableEntry.FromString(self.store.fleet.items[keys.entry_key("h1", "d1", "vf1")].value)
        table = TranslationTable((Entry.from_proto(entry),))
        drivers = SimpleNamespace(find=lambda name: SimpleNamespace(table=table) if name == "d1" else None)
        self.neighbours = Neighbours(self.directory, Stations(self.directory), drivers, self.store)
        self.following = asyncio.create_task(self.neighbours.follow())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await settle()
    yield world
    world.following.cancel()


@contextmanager
def calling(name: str, role: Role = Role.HOST) -> Iterator[None]:
    token = CALLER.set(Principal(role, name))
    try:
        yield
    finally:
        CALLER.reset(token)


def is_denied(error: pytest.ExceptionInfo[VfleetError]) -> bool:
    return error.value.reason is Reason.PERMISSION_DENIED


async def test_a_driver_accesses_from_its_own_host(world: World) -> None:
    may = world.neighbours.may_access
    with calling("h3"):
        assert may("d2", "vf1")
        assert not may("d9", "vf1")
        assert not may("d2", "vf2")
        with pytest.raises(VfleetError, match="refused to host 'h3': driver 'd1' is on host 'h1'") as refused:
            may("d1", "vf1")
        assert is_denied(refused)
    assert may("d1", "vf1")  # in plaintext


async def test_attachments_come_and_go(world: World) -> None:
    key, value = keys.entry_key("h2", "d9", "vf1"), b"any"
    with calling("h2"):
        await world.store.tell(Event(key, value, 5, 5))
        assert world.neighbours.may_access("d9", "vf1")
        await world.store.tell(Event(key, value, 5, 6))  # its function has moved
        assert world.neighbours.may_access("d9", "vf1")
        # Made anew on another host: what is told of the first comes after that.
        await world.store.tell(Event(keys.entry_key("h3", "d9", "vf1"), value, 7, 7))
        await world.store.tell(Event(key, None, 0, 8))
        with pytest.raises(VfleetError):
            world.neighbours.may_access("d9", "vf1")
        await world.store.tell(Event(keys.entry_key("h3", "d9", "vf1"), None, 0, 9))
        assert not world.neighbours.may_access("d9", "vf1")


async def test_before_anything_is_known_nobody_is_attached() -> None:
    neighbours = Neighbours(Directory(), Stations(Directory()), SimpleNamespace(), Store())
    with calling("h3"):
        assert not neighbours.may_access("d2", "vf1")


async def test_a_driver_is_forgotten_for_its_own_host_for_a_coordinator_and_when_it_is_nobodys(world: World) -> None:
    check = world.neighbours.check_forgets
    with calling("h3"):
        check("d2", "vf1")
        check("d9", "vf1")
        with pytest.raises(VfleetError) as refused:
            check("d1", "vf1")
        assert is_denied(refused)
    with calling("c1", Role.COORDINATOR):
        check("d1", "vf1")


async def test_the_home_by_the_drivers_own_table_masters_the_bus(world: World) -> None:
    def request(driver: str = "d1", function: str = "vf1", generation: int = 3) -> ExchangeDmaRequest:
        return ExchangeDmaRequest(driver=driver, function=function, generation=generation)

    with calling("h1"):
        world.neighbours.check_masters(request())
    with calling("h2"):
        with pytest.raises(VfleetError, match="it is not the home of function 'vf1'") as refused:
            world.neighbours.check_masters(request())
        assert is_denied(refused)
        # What the table doesn't name is refused by the table itself.
        for other in (request(driver="d9"), request(function="vf9"), request(generation=4)):
            world.neighbours.check_masters(other)
    world.neighbours.check_masters(request())


async def test_frames_are_taken_from_the_senders_home(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    stations = {7: SimpleNamespace(device="h2/nic0")}
    monkeypatch.setattr(world.neighbours._stations, "find", stations.get)
    with calling("h2"):
        assert world.neighbours.may_deliver(7)
        assert not world.neighbours.may_deliver(8)
    with calling("h3"):
        assert not world.neighbours.may_deliver(7)
    assert world.neighbours.may_deliver(8)


def begun(world: World, target: str) -> Attempt:
    """Begin a migration of vf1, and return its attempt."""
    moves = [Move(function="vf1", source=Place(host="h1"), target=Place(host=target))]
    world.store.fleet.put(keys.lock_key("vf1"), "m1")
    revision = world.store.fleet.put(keys.migration_key("m1"), Migration(name="m1", moves=moves))
    return Attempt(fleet_generation=1, revision=revision)


async def test_the_target_of_the_attempt_under_way_pulls_state(world: World) -> None:
    attempt = begun(world, "h2")
    check = world.neighbours.check_pulls
    with calling("h3"):
        with pytest.raises(VfleetError, match="function 'vf1' moves to host 'h2'") as refused:
            await check("vf1", attempt)
        assert is_denied(refused)
    with calling("h2"):
        await check("vf1", attempt)
        for function, other in (("vf2", attempt), ("vf1", Attempt(fleet_generation=1, revision=attempt.revision + 1))):
            with pytest.raises(VfleetError, match="no migration under way") as refused:
                await check(function, other)
            assert is_denied(refused)
    await check("vf2", attempt)


async def test_a_target_is_known_though_etcd_is_out_of_reach_since(world: World) -> None:
    attempt = begun(world, "h2")
    with calling("h2"):
        await world.neighbours.check_pulls("vf1", attempt)
        world.store.unreadable = [Reason.STORE_UNAVAILABLE] * 2
        await world.neighbours.check_pulls("vf1", attempt)
    world.neighbours._targets.clear()
    with calling("h2"), pytest.raises(VfleetError) as refused:
        await world.neighbours.check_pulls("vf1", attempt)
    assert refused.value.reason is Reason.STORE_UNAVAILABLE


async def test_a_record_of_an_earlier_migration_says_nothing_of_a_later_one(world: World) -> None:
    first = begun(world, "h2")
    items = world.store.fleet.items
    key = keys.migration_key("m1")
    items[key] = KeyValue(key, items[key].value, first.revision + 5, first.revision + 5)
    with calling("h2"), pytest.raises(VfleetError, match="no migration under way"):
        await world.neighbours.check_pulls("vf1", first)
