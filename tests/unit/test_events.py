"""What a coordinator tells of changes: in which words, how far back, and what it says of what it can't know."""

import asyncio
from contextlib import aclosing
from random import Random

import pytest
from google.protobuf.message import Message
from support.fleet_values import LIMITS, FleetValues, move, three_hosts
from support.manual_clock import ManualClock, settle

from coordinator import transaction
from coordinator.context import Context
from coordinator.events import MAX_EVENTS, EventLog
from coordinator.inventory import Inventory
from coordinator.planner import plan
from coordinator.queueing import enqueue, give_up
from coordinator.service import FleetService
from coordinator.snapshot import Snapshot
from vfleet.decision import abort_transaction
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.records import decode
from vfleet.etcd.store import Changes, Event, Listing
from vfleet.v1.fleet_service_pb2 import EventKind, WatchEventsRequest
from vfleet.v1.migration_service_pb2 import CreateMigrationRequest, QueuedMigration
from vfleet.v1.records_pb2 import (
    Coordinator,
    Cordon,
    Driver,
    Function,
    FunctionStatus,
    Host,
    Migration,
    Phase,
    Step,
    StepDuration,
)


class World:
    """A fleet, and a log that follows it. `told` returns what was told since it was last asked."""

    def __init__(self, fleet: FleetValues | None = None) -> None:
        self.clock = ManualClock()
        self.fleet = fleet or three_hosts()
        self.log = EventLog(self.clock)
        self.snapshot = Snapshot(Listing(0, ()))
        self.read_anew()
        self._seen = 0

    def read_anew(self) -> None:
        self.log.listed(self.snapshot.revision, self.fleet.revision)
        self.snapshot = self.fleet.snapshot()

    def put(self, key: str, value: Message | str) -> None:
        self.fleet.put(key, value)
        self.follow()

    def delete(self, key: str) -> None:
        assert self.fleet.commit(transaction.Transaction((), (transaction.Delete(key),)))
        self.follow(key)

    def commit(self, change: transaction.Transaction) -> None:
        assert self.fleet.commit(change)
        self.follow(*(write.key for write in change.writes if isinstance(write, transaction.Delete)))

    def follow(self, *deleted: str) -> None:
        revision = self.fleet.revision
        events = [
            Event(kv.key, kv.value, kv.create_revision, revision)
            for kv in self.fleet.items.values()
            if kv.mod_revision == revision
        ]
        events += [Event(key, None, 0, revision) for key in deleted]
        self.log.follow(self.snapshot, Changes(revision, tuple(events)))

    def told(self) -> list[tuple[str, str, str]]:
        events, self._seen = self.log.read(self._seen), self.log.end
        return [
            (EventKind.Name(each.kind).removeprefix("EVENT_KIND_").lower(), each.name, each.what) for each in events
        ]


def migration_over(world: World, *, abort: bool) -> None:
    snapshot = world.fleet.snapshot()
    planned = plan(snapshot, [move("vf1", "h2/nic0")], name="m1", coordinator="c1", limits=LIMITS)
    planned.begin_time.FromMilliseconds(1000)
    key = keys.migration_key("m1")
    world.commit(transaction.begin(planned, 5, snapshot.fleet_generation_is_this))
    begun, revision = decode(Migration, world.fleet.items[key]), world.fleet.revision
    if abort:
        world.commit(abort_transaction(begun, revision, "h2 is full", Step.STEP_COPY, 2.0, None))
    else:
        world.commit(transaction.commit(begun, revision, 2.0))
    decided = decode(Migration, world.fleet.items[key])
    steps = [StepDuration(step=step) for step in (Step.STEP_BEGIN, Step.STEP_HOLD, Step.STEP_LIFT)]
    for step in steps:
        step.duration.FromMilliseconds(4)
    steps = steps[:1] if abort else steps
    world.commit(transaction.finish(decided, world.fleet.revision, finished_by="c1", now=1.25, steps=steps))


def test_a_migration_is_told_from_begin_to_finish() -> None:
    world = World()
    migration_over(world, abort=False)
    assert world.told() == [
        ("migration", "m1", "preparing: vf1 from h1/nic0 to h2/nic0"),
        ("migration", "m1", "committed"),
        ("function", "vf1", "moved from h1/nic0, VF 1 to h2/nic0, VF 1, generation 4"),
        ("migration", "m1", "done after 250.0 ms, blackout at most 8.0 ms"),
    ]
    world.commit(transaction.forget_migrations([world.snapshot.migrations["m1"]]))
    assert world.told() == [("migration", "m1", "its record is no longer kept")]


def test_an_abort_is_told_with_its_reason() -> None:
    world = World()
    migration_over(world, abort=True)
    assert world.told()[1:] == [
        ("migration", "m1", "aborting at copy: h2 is full"),
        ("migration", "m1", "aborted after 250.0 ms, blackout none"),
    ]


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_what_becomes_of_a_queued_migration_is_told(is_cancelled: bool) -> None:
    world = World()
    request = CreateMigrationRequest(request_id="m1", moves=[move("vf1", "h2/nic0"), move("vf2", "")])
    world.commit(enqueue(QueuedMigration(request=request, coordinator="c1")))
    assert world.told() == [("migration", "m1", "queued: vf1, vf2")]
    if is_cancelled:
        ended, _ = give_up(world.snapshot.queue["m1"], "cancelled before it began", Reason.CANCELLED, "c1", 1_000)
        world.commit(ended)
        assert world.told() == [("migration", "m1", "aborted: cancelled before it began")]
    else:
        planned = plan(world.snapshot, [move("vf1", "h2/nic0")], name="m1", coordinator="c1", limits=LIMITS)
        planned.begin_time.FromSeconds(1)
        queued_at = world.snapshot.queue["m1"].mod_revision
        world.commit(transaction.begin(planned, 5, world.snapshot.fleet_generation_is_this, queue_revision=queued_at))
        assert world.told() == [("migration", "m1", "preparing: vf1 from h1/nic0 to h2/nic0")]


def test_an_abort_at_no_step_names_none() -> None:
    world, record = World(), Migration(name="m1", phase=Phase.PHASE_ABORTING, abort_reason="its coordinator ended")
    record.begin_time.FromSeconds(1)
    world.put(keys.migration_key("m1"), record)
    assert world.told() == [("migration", "m1", "aborting: its coordinator ended")]


def test_the_life_of_a_function_is_told() -> None:
    world, key = World(), keys.function_key("vf3")
    record = Function(name="vf3", device="h1/nic0", vf_index=3, status=FunctionStatus.FUNCTION_STATUS_CREATING)
    world.put(key, record)
    record.status = FunctionStatus.FUNCTION_STATUS_ACTIVE
    world.put(key, record)
    record.drivers[:] = ["d1", "d2"]
    world.put(key, record)
    record.drivers[:] = ["d2"]
    world.put(key, record)
    world.put(key, record)  # the same again is no event
    record.status = FunctionStatus.FUNCTION_STATUS_LOST
    world.put(key, record)
    world.delete(key)
    assert [what for kind, name, what in world.told() if (kind, name) == ("function", "vf3")] == [
        "creating at h1/nic0, VF 3",
        "active",
        "driver d1 attached",
        "driver d2 attached",
        "driver d1 detached",
        "lost",
        "deleted",
    ]


def test_hosts_cordons_coordinators_and_the_generation_are_told() -> None:
    world = World(FleetValues())
    host = Host(name="h1", segment=1, address="h1:1", incarnation="a")
    world.put(keys.host_key("h1"), host)
    world.put(keys.registration_key("h1"), "a")
    world.delete(keys.registration_key("h1"))
    host.incarnation, host.address = "b", "h1:2"
    world.put(keys.host_key("h1"), host)
    world.put(keys.cordon_key("h1"), Cordon())
    world.put(keys.cordon_key("h1"), Cordon(reason="firmware"))
    world.delete(keys.cordon_key("h1"))
    world.delete(keys.host_key("h1"))
    world.put(keys.coordinator_key("c2"), Coordinator(name="c2", address="c2:1"))
    world.delete(keys.coordinator_key("c2"))
    world.put(keys.FLEET_GENERATION, "2")
    world.put(keys.driver_key("d1"), Driver(name="d1", host="h1"))  # drivers are not told of
    assert world.told() == [
        ("host", "h1", "new, segment 0x0001, at h1:1"),
        ("host", "h1", "registered"),
        ("host", "h1", "not registered any more"),
        ("host", "h1", "started anew, incarnation b"),
        ("host", "h1", "at h1:2"),
        ("cordon", "h1", "cordoned"),
        ("cordon", "h1", "cordoned: firmware"),
        ("cordon", "h1", "uncordoned"),
        ("host", "h1", "forgotten"),
        ("coordinator", "c2", "serves at c2:1"),
        ("coordinator", "c2", "gone"),
        ("fleet", "", "its generation is 2"),
    ]


def test_an_event_has_the_time_and_the_revision() -> None:
    world = World(FleetValues())
    world.put(keys.cordon_key("h1"), Cordon())
    (event,) = world.log.read(0)
    assert (event.time.ToMilliseconds(), event.revision) == (round(world.clock.time() * 1000), world.fleet.revision)


def cordoned(world: World, times: int) -> None:
    for number in range(times):
        world.put(keys.cordon_key("h1"), Cordon(reason=str(number)))


def test_only_the_latest_are_remembered_and_who_reads_too_late_is_told() -> None:
    world = World(FleetValues())
    cordoned(world, MAX_EVENTS + 10)
    events = world.log.read(world.log.start(0))
    assert [each.what for each in (events[0], events[-1])] == ["cordoned: 10", f"cordoned: {MAX_EVENTS + 9}"]
    assert len(events) == MAX_EVENTS
    late = world.log.read(5)
    assert (late[0].kind, late[1].what) == (EventKind.EVENT_KIND_FLEET, "cordoned: 10")
    assert "not known" in late[0].what


def test_who_goes_on_after_a_revision_gets_what_came_after_it() -> None:
    world = World(FleetValues())
    cordoned(world, 5)
    revision = world.log.read(0)[2].revision
    assert [each.what for each in world.log.read(world.log.start(revision))] == ["cordoned: 3", "cordoned: 4"]
    assert world.log.read(world.log.start(world.fleet.revision)) == []


def test_who_goes_on_after_a_revision_that_was_before_the_log_is_told() -> None:
    fleet = FleetValues()
    fleet.host("h1", 1)
    world = World(fleet)
    cordoned(world, 1)
    first, second = world.log.read(world.log.start(1))
    assert "not known" in first.what
    assert second.what == "cordoned: 0"


def test_changes_that_a_new_listing_stands_for_are_told_as_missing() -> None:
    world = World()
    world.fleet.put(keys.cordon_key("h1"), Cordon())
    world.read_anew()
    before = world.fleet.revision - 1
    assert world.told() == [("fleet", "", f"read as a whole: what changed since revision {before} is not told")]


class Service:
    def __init__(self) -> None:
        self.inventory = Inventory(ManualClock())
        self.world = World(FleetValues())
        self.world.log = self.inventory.log
        self.service = FleetService(Context("c1", None, self.inventory, None, ManualClock(), Random(1)), lambda: None)

    def change(self, times: int) -> None:
        cordoned(self.world, times)
        self.inventory.notify()


async def test_watching_ends_unless_it_is_to_follow() -> None:
    rig = Service()
    rig.change(2)
    async with aclosing(rig.service.WatchEvents(WatchEventsRequest(), None)) as responses:
        assert [[event.what for event in each.events] async for each in responses] == [["cordoned: 0", "cordoned: 1"]]


async def test_who_follows_gets_each_change_once() -> None:
    rig, got = Service(), []

    async def watch() -> None:
        async with aclosing(rig.service.WatchEvents(WatchEventsRequest(follow=True), None)) as responses:
            async for response in responses:
                got.extend(event.what for event in response.events)

    watching = asyncio.create_task(watch())
    for times in (1, 3):
        await settle()
        rig.change(times)
    await settle()
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert got == ["cordoned: 0", "cordoned: 0", "cordoned: 1", "cordoned: 2"]


async def test_a_revision_that_can_not_be_is_refused() -> None:
    rig = Service()
    with pytest.raises(VfleetError) as caught:
        await anext(rig.service.WatchEvents(WatchEventsRequest(after_revision=-1), None))
    assert caught.value.reason is Reason.INVALID_FIELD
