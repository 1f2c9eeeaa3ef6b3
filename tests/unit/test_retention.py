"""Which records of migrations are kept, how the others go, and how those that are kept are listed."""

import asyncio
from collections.abc import AsyncIterator
from random import Random

import pytest
from support.fleet_store import FleetStore
from support.fleet_values import FleetValues
from support.manual_clock import ManualClock

from coordinator import transaction
from coordinator.context import Context
from coordinator.inventory import Inventory
from coordinator.retention import BATCH, KEEP_AT_LEAST_S, LOOK_AGAIN_S, LOOK_EVERY_S, Retention, forget_migrations
from coordinator.service import MAX_PAGE_BYTES, MigrationService
from coordinator.snapshot import Stored
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.store import Committed, Transaction
from vfleet.v1.migration_service_pb2 import ListMigrationsRequest
from vfleet.v1.records_pb2 import Migration, Move, Phase

DAY_S = 86_400.0
MANY = 1_000_000
OVER = (Phase.PHASE_DONE, Phase.PHASE_ABORTED)
OPEN = (Phase.PHASE_PREPARING, Phase.PHASE_COMMITTED, Phase.PHASE_ABORTING)


class World(FleetStore):
    """A coordinator that keeps records by a rule, and the fleet that it has in its inventory at once."""

    max_operations = 128

    def __init__(self) -> None:
        super().__init__(FleetValues(), self.follow)
        self.clock = ManualClock()
        self.inventory = Inventory()
        self.context = Context("c1", self, self.inventory, None, self.clock, Random(7))
        self.largest = 0
        self.tasks: list[asyncio.Task[None]] = []

    def keep(self, *, count: int = MANY, age_s: float = MANY * DAY_S) -> None:
        self.tasks.append(asyncio.create_task(forget_migrations(self.context, Retention(count, age_s))))

    def follow(self) -> None:
        snapshot = self.fleet.snapshot()
        self.inventory.snapshot = snapshot
        self.inventory.notify()

    def add(self, name: str, age_s: float, phase: Phase.ValueType = Phase.PHASE_DONE, **more: object) -> None:
        record = Migration(name=name, phase=phase, **more)
        if phase in OVER:
            record.finish_time.FromNanoseconds(round((self.clock.time() - age_s) * 1e9))
        self.fleet.put(keys.migration_key(name), record)
        self.follow()

    async def commit(self, change: Transaction) -> Committed:
        self.largest = max(self.largest, change.size)
        return await super().commit(change)

    @property
    def kept(self) -> list[str]:
        return [key.removeprefix(keys.MIGRATIONS) for key in self.fleet.items]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    for task in world.tasks:
        task.cancel()
    await asyncio.gather(*world.tasks, return_exceptions=True)


async def test_the_latest_are_kept_by_count(world: World) -> None:
    for name, age_s in (("b", 4000), ("d", 3000), ("a", 2000), ("c", 1000)):
        world.add(name, age_s)
    world.keep(count=2)
    await world.clock.advance(0)
    assert world.kept == ["a", "c"]


async def test_those_that_are_too_old_go_whatever_their_number(world: World) -> None:
    world.add("a", 31 * DAY_S)
    world.add("b", 30 * DAY_S - 100)
    world.keep(age_s=30 * DAY_S)
    await world.clock.advance(0)
    assert world.kept == ["b"]
    await world.clock.advance(100 + LOOK_EVERY_S)
    assert world.kept == []


@pytest.mark.parametrize("phase", OPEN)
async def test_what_is_not_over_stays_and_does_not_count(world: World, phase: Phase.ValueType) -> None:
    world.add("open", 0, phase)
    world.add("a", 2 * DAY_S, Phase.PHASE_ABORTED)
    world.add("b", DAY_S)
    world.keep(count=1, age_s=DAY_S + 100)
    await world.clock.advance(0)
    assert world.kept == ["open", "b"]
    await world.clock.advance(100 + LOOK_EVERY_S)
    assert world.kept == ["open"]


async def test_a_migration_that_has_just_ended_is_kept_for_those_who_ask_again(world: World) -> None:
    for number in range(5):
        world.add(f"m{number}", 0)
    world.keep(count=1, age_s=1)
    await world.clock.advance(KEEP_AT_LEAST_S - 1)
    assert len(world.kept) == 5
    await world.clock.advance(LOOK_EVERY_S)
    assert world.kept == []


async def test_one_transaction_deletes_so_many_only_and_the_next_follows_soon(world: World) -> None:
    for number in range(2 * BATCH + 1):
        world.add(f"m{number}", DAY_S + number)
    world.keep(age_s=DAY_S / 2)
    await world.clock.advance(0)
    assert len(world.kept) == BATCH + 1
    await world.clock.advance(2 * LOOK_AGAIN_S)
    assert world.kept == []
    assert world.largest == BATCH


async def test_a_record_that_has_changed_since_it_was_read_is_not_deleted(world: World) -> None:
    world.add("a", 2 * DAY_S)
    read = world.inventory.snapshot
    world.add("a", 2 * DAY_S, finished_by="another")
    world.inventory.snapshot = read
    world.changed = lambda: None
    world.keep(age_s=DAY_S)
    await world.clock.advance(0)
    assert (world.commits, world.kept) == (1, ["a"])


async def test_two_coordinators_do_it_together(world: World) -> None:
    for number in range(BATCH + 5):
        world.add(f"m{number}", 2 * DAY_S)
    world.keep(age_s=DAY_S)
    world.keep(age_s=DAY_S)
    await world.clock.advance(2 * LOOK_EVERY_S)
    assert world.kept == []


async def test_an_etcd_out_of_reach_is_asked_again_later(world: World) -> None:
    world.add("a", 2 * DAY_S)
    world.answers = ["lost"]
    world.keep(age_s=DAY_S)
    await world.clock.advance(0)
    assert world.kept == ["a"]
    await world.clock.advance(LOOK_EVERY_S)
    assert world.kept == []


@pytest.mark.parametrize("phase", [Phase.PHASE_UNSPECIFIED, *OPEN])
def test_a_record_that_is_not_final_can_not_be_deleted(phase: Phase.ValueType) -> None:
    with pytest.raises(VfleetError) as caught:
        transaction.forget_migrations([Stored(Migration(name="m", phase=phase), 1, 2)])
    assert caught.value.reason is Reason.INTERNAL


async def listed(world: World, **request: object) -> list[list[str]]:
    """Return the names on each page."""
    service, pages, token = MigrationService(world.context, lambda: None), [], ""
    while True:
        response = await service.ListMigrations(ListMigrationsRequest(page_token=token, **request), None)
        pages.append([each.name for each in response.migrations])
        token = response.next_page_token
        if not token:
            return pages


async def test_pages_are_of_the_size_that_was_asked_for(world: World) -> None:
    for number in range(5):
        world.add(f"m{number}", 0)
    assert await listed(world, page_size=2) == [["m4", "m3"], ["m2", "m1"], ["m0"]]


async def test_a_page_with_migrations_of_large_groups_fits_in_a_message(world: World) -> None:
    for number in range(3):
        world.add(f"m{number}", 0, abort_reason="x" * (MAX_PAGE_BYTES // 2 - 100))
    assert await listed(world, page_size=1000) == [["m2", "m1"], ["m0"]]


async def test_only_the_migrations_of_a_function_are_listed(world: World) -> None:
    world.add("m1", 0, moves=[Move(function="vf1"), Move(function="vf2")])
    world.add("m2", 0, moves=[Move(function="vf2")])
    world.add("m3", 0, moves=[Move(function="vf1")])
    assert await listed(world, function="vf1") == [["m3", "m1"]]
    with pytest.raises(VfleetError) as caught:
        await listed(world, function="Not A Name")
    assert caught.value.reason is Reason.INVALID_FIELD
