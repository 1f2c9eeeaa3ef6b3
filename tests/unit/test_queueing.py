"""Who waits for a turn: limits, the order, pauses, deadlines, and what is given up."""

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest
from support.drain_rig import DrainRig
from support.fake_host import device
from support.fleet_values import move
from support.manual_clock import ManualClock, settle

from coordinator.dispatch import Dispatcher
from coordinator.queueing import Allowance, as_migration, enqueue, give_up, in_order
from coordinator.snapshot import Stored
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.store import Event, KeyValue
from vfleet.failure import abort_cause, undone
from vfleet.v1.migration_service_pb2 import CreateMigrationRequest, QueuedMigration
from vfleet.v1.records_pb2 import Coordinator, Cordon, Migration, Phase


class QueueRig(DrainRig):
    """The fleet of drains, a queue, and coordinator c1 that works it off."""

    def __init__(self, allowance: Allowance) -> None:
        super().__init__()
        self.context = replace(self.context, allowance=allowance)
        self.errors: dict[str, list[VfleetError]] = {}
        self.tried: list[tuple[float, str]] = []
        self.dispatcher = Dispatcher(self.context, self)

    def queue(
        self, name: str, function: str, target: str = "", *, priority: int = 0, owner: str = "c1", wait_s: float = 100
    ) -> None:
        entry = QueuedMigration(
            request=CreateMigrationRequest(request_id=name, moves=[move(function, target)], priority=priority),
            coordinator=owner,
        )
        entry.expire_time.FromNanoseconds(round((self.clock.now + wait_s) * 1e9))
        assert self.fleet.commit(enqueue(entry))
        self.look()

    async def begin_queued(self, queued: Stored[QueuedMigration], _: object) -> Stored[Migration]:
        name = queued.record.request.request_id
        self.tried.append((self.clock.now, name))
        if self.errors.get(name):
            raise self.errors[name].pop(0)
        del self.fleet.items[keys.queue_key(name)]  # as BEGIN does
        return await self.begin(name, queued.record.request.moves)

    async def dispatch(self) -> list[str]:
        """Let the dispatcher look once, and return what is under way."""
        await self.dispatcher.pass_once()
        await settle()
        return sorted(self.inventory.snapshot.active_migrations)

    def record(self, name: str) -> Migration:
        return self.inventory.snapshot.migrations[name].record


def test_the_highest_priority_goes_first_and_then_who_came_first():
    rig = QueueRig(Allowance())
    for name, function, priority in (("a", "vf1", 0), ("b", "vf2", 5), ("c", "vf3", -1), ("d", "vf4", 5)):
        rig.queue(name, function, priority=priority)
    assert [each.record.request.request_id for each in in_order(rig.inventory.snapshot)] == ["b", "d", "a", "c"]


@pytest.mark.parametrize(
    ("allowance", "under_way", "then"),
    [
        (Allowance(), ["a", "b", "c"], ["b", "c"]),
        (Allowance(fleet=2), ["a", "b"], ["b", "c"]),
        (Allowance(host=1), ["a"], ["b"]),
        (Allowance(device=1), ["a", "c"], ["c"]),
    ],
)
async def test_no_limit_is_passed_and_one_that_waits_holds_up_none_that_needn_t(
    allowance: Allowance, under_way: list[str], then: list[str]
):
    rig = QueueRig(allowance)
    rig.queue("a", "vf1", "h2/nic0")
    rig.queue("b", "vf2", "h3/nic0")
    rig.queue("c", "vf4", "h3/nic0")
    assert await rig.dispatch() == under_way
    await rig.done("vf1")
    assert await rig.dispatch() == then


async def test_each_limit_names_what_is_full_and_how_much_it_takes():
    rig = QueueRig(Allowance())
    await rig.begin("a", [move("vf1", "h2/nic0")])
    snapshot = rig.inventory.snapshot
    for allowance, devices, words in (
        (Allowance(fleet=1), ["h3/nic0"], "1 migration is under way in the fleet, which may have 1"),
        (Allowance(host=1), ["h1/nic1", "h3/nic0"], "from or to h1, which may have 1"),
        (Allowance(device=1), ["h2/nic0"], "from or to h2/nic0, which may have 1"),
    ):
        passed = allowance.passed(snapshot, devices)
        assert passed is not None
        assert words in passed
    assert Allowance(host=1, device=1).passed(snapshot, ["h3/nic0"]) is None


async def test_what_is_under_way_is_counted_where_it_is_until_it_is_over():
    rig = QueueRig(Allowance())
    snapshot = rig.inventory.snapshot
    stored: dict[str, KeyValue] = {}

    def follow() -> None:
        """Let the one snapshot take over what has changed."""
        for key in [key for key in stored if key not in rig.fleet.items]:
            del stored[key]
            snapshot.take(Event(key, None, 0, rig.fleet.revision))
        for key, item in rig.fleet.items.items():
            if key.startswith(keys.MIGRATIONS) and stored.get(key) != item:
                stored[key] = item
                snapshot.take(Event(key, item.value, item.create_revision, item.mod_revision))

    await rig.begin("a", [move("vf1", "h2/nic0"), move("vf4", "h2/nic0")])
    await rig.begin("b", [move("vf2", "h1/nic1")])
    follow()
    assert snapshot.active_at == {"h1": 2, "h1/nic0": 2, "h1/nic1": 2, "h2": 1, "h2/nic0": 1}
    assert snapshot.once_begun([rig.record("a")]).active_at["h2"] == 2
    await rig.done("vf1")
    follow()
    assert snapshot.active_at == {"h1": 1, "h1/nic0": 1, "h1/nic1": 1}
    await rig.fail("vf2", None)
    follow()
    assert dict(snapshot.active_at) == {}


async def test_what_may_pass_is_tried_again_after_pauses_until_the_deadline():
    rig = QueueRig(Allowance())
    rig.queue("a", "vf1", "h2/nic0", wait_s=20)
    rig.errors["a"] = [VfleetError(Reason.HOST_UNAVAILABLE, "host 'h2' is not registered")] * 99
    while "a" in rig.inventory.snapshot.queue:
        await rig.dispatch()
        await rig.clock.advance(0.25)
    pauses = [later - before for (before, _), (later, _) in pairwise(rig.tried)]
    assert 4 <= len(pauses) <= 10
    assert pauses[-1] > pauses[0]
    record = rig.record("a")
    assert (record.phase, abort_cause(record)) == (Phase.PHASE_ABORTED, Reason.LIMIT_EXCEEDED)
    assert record.abort_reason == "it could not begin before its deadline: host 'h2' is not registered"
    assert undone(record) == "it had not begun"


async def test_a_turn_that_comes_while_another_is_looked_at_is_taken(monkeypatch: pytest.MonkeyPatch):
    rig = QueueRig(Allowance(device=1))
    await rig.begin("x", [move("vf1", "h2/nic0")])
    rig.queue("a", "vf2", "h2/nic0")  # waits for x
    rig.queue("b", "vf4", "h3/nic0")
    rig.errors["b"] = [VfleetError(Reason.UNSATISFIABLE, "no choice of devices")]
    begin_queued = rig.begin_queued

    async def x_ends_first(queued: Stored[QueuedMigration], options: object) -> Stored[Migration]:
        if queued.record.request.request_id == "b":
            await rig.done("vf1")
        return await begin_queued(queued, options)

    monkeypatch.setattr(rig, "begin_queued", x_ends_first)
    task = asyncio.create_task(rig.dispatcher.run())
    await settle(100)
    assert list(rig.inventory.snapshot.active_migrations) == ["a"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class CreepingClock(ManualClock):
    """Time passes with each look at it, a millisecond."""

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now

    time = monotonic


@pytest.mark.parametrize("wait_ms", range(1, 20))
async def test_a_deadline_that_passes_between_the_look_and_the_wait_is_seen(wait_ms: int):
    rig = QueueRig(Allowance(device=1))
    await rig.begin("x", [move("vf1", "h2/nic0")])
    rig.clock = CreepingClock(rig.clock.now)
    rig.context = replace(rig.context, clock=rig.clock)
    rig.dispatcher = Dispatcher(rig.context, rig)
    rig.queue("a", "vf2", "h2/nic0", wait_s=wait_ms / 1000 + 0.0005)
    task = asyncio.create_task(rig.dispatcher.run())
    await rig.clock.advance(1)
    assert "a" not in rig.inventory.snapshot.queue
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_can_not_begin_is_given_up_at_once_and_says_why():
    rig = QueueRig(Allowance())
    rig.queue("a", "vf1", "h2/nic0")
    rig.errors["a"] = [VfleetError(Reason.UNSATISFIABLE, "no choice of devices")]
    assert await rig.dispatch() == []
    assert (rig.record("a").abort_reason, abort_cause(rig.record("a"))) == (
        "no choice of devices",
        Reason.UNSATISFIABLE,
    )
    assert rig.inventory.snapshot.queue == {}


async def test_one_that_another_queued_is_left_to_it_while_it_is_there():
    rig = QueueRig(Allowance())
    rig.fleet.put(keys.coordinator_key("c2"), Coordinator(name="c2"))
    rig.queue("a", "vf1", "h2/nic0", owner="c2")
    assert await rig.dispatch() == []
    del rig.fleet.items[keys.coordinator_key("c2")]
    rig.look()
    assert await rig.dispatch() == ["a"]


def test_cancel_and_begin_of_a_queued_one_exclude_each_other():
    rig = QueueRig(Allowance())
    rig.queue("a", "vf1", "h2/nic0")
    queued = rig.inventory.snapshot.queue["a"]
    assert as_migration(queued).record.phase == Phase.PHASE_QUEUED
    cancel, _ = give_up(queued, "cancelled", Reason.CANCELLED, "c2", 1)
    assert rig.fleet.commit(cancel)
    assert not rig.fleet.commit(cancel)
    rig.look()
    assert rig.inventory.snapshot.active_migrations == {}
    assert abort_cause(rig.record("a")) is Reason.CANCELLED
    assert [each.function for each in rig.record("a").moves] == ["vf1"]


async def test_a_drain_keeps_to_the_limits_and_fails_nothing_for_them():
    rig = QueueRig(Allowance(host=1))
    task = await rig.start("host", "h1", parallel=4)
    assert len(rig.moving) == 1
    assert any("from or to h1, which may have 1" in each.why for each in rig.told.values())
    while not task.done():
        assert len(rig.moving) <= 1
        if rig.moving:
            await rig.done(*rig.moving)
        await rig.clock.advance(0.25)
    await task
    assert set(rig.states().values()) == {"MOVED"}
    assert len(rig.begun) == 4


async def test_a_drain_sees_that_there_is_room_also_if_another_migration_has_begun_at_the_same_moment(
    monkeypatch: pytest.MonkeyPatch,
):
    """Both are news of one message of the watch: as many are under way as before, but elsewhere."""
    rig = QueueRig(Allowance(device=1))
    rig.fleet.function("other", device("h3/nic0"), 3, 1)
    rig.fleet.put(keys.cordon_key("h3"), Cordon())
    rig.look()
    await rig.begin("x", [move("vf4", "h2/nic0")])
    task = await rig.start("device", "h1/nic0", parallel=1)
    assert rig.moving == {"vf4": "x"}
    with monkeypatch.context() as silence:
        silence.setattr(rig.inventory, "notify", lambda: None)
        await rig.done("vf4")
        await rig.begin("y", [move("other", "h1/nic1")])
    rig.look()
    await settle()
    assert rig.moving.keys() & {"vf1", "vf2", "vf3"}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
