"""The coordinator's inventory over a restored etcd and a raised fleet generation."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
from support.manual_clock import settle

from coordinator.inventory import Inventory
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.records import encode
from vfleet.etcd.store import Changes, Event, KeyValue, Listing
from vfleet.v1.records_pb2 import Driver


class Watched:
    """A store that is only watched: `tell` what a watch brings. `watches` counts how often one was begun."""

    def __init__(self) -> None:
        self.watches = 0
        self._updates: asyncio.Queue[Listing | Changes] = asyncio.Queue()

    async def watch(self, prefix: str) -> AsyncGenerator[Listing | Changes, None]:
        assert prefix == keys.PREFIX
        self.watches += 1
        while True:
            yield await self._updates.get()

    async def tell(self, update: Listing | Changes) -> None:
        self._updates.put_nowait(update)
        await settle()


class World:
    def __init__(self) -> None:
        self.store, self.inventory = Watched(), Inventory()
        self.task = asyncio.create_task(self.inventory.run(self.store))

    async def list(self, revision: int, *drivers: str, generation: int = 1, restored: bool = False) -> None:
        items = [KeyValue(keys.driver_key(name), encode(Driver(name=name)), 1, 1) for name in drivers]
        if generation > 1:
            items.append(KeyValue(keys.FLEET_GENERATION, str(generation).encode(), 1, 1))
        await self.store.tell(Listing(revision, tuple(items), restored=restored))

    async def change(self, revision: int, key: str, value: bytes) -> None:
        await self.store.tell(Changes(revision, (Event(key, value, revision, revision),)))

    @property
    def seen(self) -> tuple[int, bool]:
        return self.inventory.restorations, self.inventory.is_behind


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.list(100, "d1")
    yield world
    world.task.cancel()
    await asyncio.gather(world.task, return_exceptions=True)


async def test_a_new_listing_after_compaction_is_nothing_special(world: World) -> None:
    await world.list(200, "d2")
    assert world.seen == (0, False)
    assert list(world.inventory.snapshot.drivers) == ["d2"]


@pytest.mark.parametrize(("revision", "restored"), [(99, False), (99, True), (100, True), (500, True)])
async def test_an_etcd_that_lacks_what_was_read_was_restored_whatever_its_revision(
    world: World, revision: int, restored: bool
) -> None:
    waiting = asyncio.create_task(world.inventory.wait_for(1000))
    await settle()
    await world.list(revision, "d2", restored=restored)
    assert world.seen == (1, True)
    with pytest.raises(VfleetError) as caught:
        await waiting
    assert caught.value.reason is Reason.CONFLICT
    await world.list(600, "d2")
    assert world.seen == (1, True)


async def test_with_the_raise_all_is_listed_anew_before_anything_is_believed(world: World) -> None:
    await world.list(500, "phantom", restored=True)
    raised = asyncio.create_task(world.inventory.until(lambda: world.inventory.snapshot.fleet_generation == 2))
    await world.change(501, keys.FLEET_GENERATION, b"2")
    await raised
    assert world.store.watches == 2
    assert world.seen == (1, True)
    await world.list(502, "d3", generation=2)
    assert world.seen == (1, False)
    assert list(world.inventory.snapshot.drivers) == ["d3"]
    await world.change(503, keys.driver_key("d4"), encode(Driver(name="d4")))
    assert world.store.watches == 2
    assert set(world.inventory.snapshot.drivers) == {"d3", "d4"}


async def test_who_was_away_over_restoration_and_raise_drops_its_work_and_goes_on(world: World) -> None:
    await world.list(500, "d2", generation=2, restored=True)
    assert world.seen == (1, False)


async def test_a_generation_that_a_backup_has_not_raised_as_far_yet_is_not_enough(world: World) -> None:
    await world.list(110, "d1", generation=3)
    await world.list(120, "d1", generation=1, restored=True)
    await world.change(121, keys.FLEET_GENERATION, b"2")
    await world.change(122, keys.FLEET_GENERATION, b"3")
    assert world.seen == (1, True)
    await world.change(123, keys.FLEET_GENERATION, b"4")
    await world.list(123, "d1", generation=4)
    assert world.seen == (1, False)


async def test_who_waits_for_a_migration_looks_only_when_that_one_changes(world: World) -> None:
    looks: list[str] = []

    def look_for(what: str) -> None:
        looks.append(what)

    waits = [
        asyncio.create_task(world.inventory.until(lambda name=name: look_for(name), name)) for name in ("m1", "m2", "")
    ]
    await settle()
    for key, concerned in (
        (keys.migration_key("m1"), ["m1", ""]),
        (keys.owner_key("m2"), ["m2", ""]),
        (keys.driver_key("m1"), [""]),
    ):
        looks.clear()
        await world.change(world.inventory.snapshot.revision + 1, key, b"")
        assert sorted(looks) == sorted(concerned)
    for notified, concerned in ((["m1"], ["m1"]), (["", "m2"], ["", "m2"]), ([], ["", "m1", "m2"])):
        looks.clear()
        world.inventory.notify(*notified)
        assert sorted(looks) == sorted(concerned)
    looks.clear()
    await world.list(900, "d2")
    assert sorted(looks) == ["", "m1", "m2"]
    for wait in waits:
        wait.cancel()
    await asyncio.gather(*waits, return_exceptions=True)
