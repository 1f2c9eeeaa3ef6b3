"""A drain: how many at once, in what order, how often again, and what it leaves alone."""

import asyncio
from dataclasses import replace
from itertools import pairwise

import pytest
from support.drain_rig import DrainRig
from support.fake_host import device
from support.fleet_values import FleetValues, move
from support.manual_clock import ManualClock

from coordinator.drain_plan import Batch, plan_drain
from coordinator.retries import MAX_TRIES
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.v1.placement_pb2 import Boundary, Constraints, GroupRule, Relation
from vfleet.v1.records_pb2 import Cordon

HOST = Boundary.BOUNDARY_HOST
SAME, DIFFERENT = Relation.RELATION_SAME, Relation.RELATION_DIFFERENT


@pytest.fixture
def rig() -> DrainRig:
    return DrainRig()


def rule(*functions: str, relation: Relation.ValueType, boundary: Boundary.ValueType = HOST) -> Constraints:
    return Constraints(groups=[GroupRule(functions=functions, boundary=boundary, relation=relation)])


async def test_no_more_than_asked_for_move_at_once_until_all_have_left(rig: DrainRig):
    task = await rig.start("host", "h1", parallel=2)
    assert len(rig.moving) == 2
    assert sorted(rig.states().values()) == ["MOVING", "MOVING", "WAITING", "WAITING"]
    await rig.done(next(iter(rig.moving)))
    assert len(rig.moving) == 2
    await rig.until_over(task)
    assert rig.states() == dict.fromkeys(("vf1", "vf2", "vf3", "vf4"), "MOVED")
    assert {rig.home(name) for name in rig.told} == {"h2/nic0", "h3/nic0"}
    assert {each.held.ToMilliseconds() for each in rig.told.values()} == {6}


@pytest.mark.parametrize(
    ("kind", "name", "functions"),
    [
        ("device", "h1/nic0", {"vf1", "vf2", "vf3"}),
        ("device", "h1/nic1", {"vf4"}),
        ("host", "h2", set()),
    ],
)
async def test_what_is_elsewhere_stays(rig: DrainRig, kind: str, name: str, functions: set[str]):
    before = rig.functions()
    await rig.until_over(await rig.start(kind, name))
    assert set(rig.told) == functions
    moved = {function for function, record in rig.functions().items() if record != before[function]}
    assert moved == functions


async def test_what_is_on_its_way_there_moves_on_after_it_has_arrived(rig: DrainRig):
    await rig.begin("m1", [move("vf4", "h1/nic0")])
    task = await rig.start("device", "h1/nic0")
    assert rig.states()["vf4"] == "MOVING"
    await rig.done("vf4")
    assert rig.home("vf4") == "h1/nic0"
    await rig.until_over(task)
    assert rig.states()["vf4"] == "MOVED"
    assert rig.home("vf4") != "h1/nic0"


async def test_who_drains_again_goes_on_with_what_is_left(rig: DrainRig):
    """The first is cut off with two under way; of these one has been committed and one is aborted by an adopter."""
    (await rig.start("host", "h1", parallel=2)).cancel()
    first, second = rig.moving
    task = await rig.start("host", "h1", parallel=2)
    assert len(rig.begun) == 2  # those under way count
    await rig.done(first)
    await rig.fail(second, None, "its coordinator ended before it was decided")
    await rig.until_over(task)
    assert set(rig.states().values()) == {"MOVED"}
    moves = [function for _, batch in rig.begun for function in batch]
    assert sorted(moves) == sorted(["vf1", "vf2", "vf3", "vf4", second])  # one again, and no other


async def test_the_end_of_the_cordon_ends_the_drain(rig: DrainRig):
    task = await rig.start("host", "h1", parallel=1)
    (first,) = rig.moving
    del rig.fleet.items[keys.cordon_key("h1")]
    await rig.done(first)
    with pytest.raises(VfleetError, match="host h1 isn't cordoned any more") as caught:
        await task
    assert caught.value.reason is Reason.CANCELLED
    assert len(rig.begun) == 1


@pytest.mark.parametrize("cause", [Reason.UNREACHABLE, Reason.LIMIT_EXCEEDED, None])
async def test_what_may_pass_is_tried_again_after_growing_pauses_and_not_for_ever(rig: DrainRig, cause: Reason | None):
    task = await rig.start("device", "h1/nic1")
    while not task.done():
        if rig.moving:
            await rig.fail("vf4", cause)
        await rig.clock.advance(0.25)
    times = [time for time, _ in rig.begun]
    pauses = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) == MAX_TRIES
    assert all(0.25 <= pause <= 8.25 for pause in pauses)
    assert pauses[-1] > pauses[0]
    (stuck,) = rig.told.values()
    assert rig.states() == {"vf4": "STUCK"}
    for words in ("5 tries failed", "at hold: h2 is gone", "the holds are lifted", "the functions are where they were"):
        assert words in stuck.why
    assert (rig.home("vf4"), stuck.device) == ("h1/nic1", "h1/nic1")


@pytest.mark.parametrize("cause", [Reason.BAD_STATE, Reason.CANCELLED, Reason.INTERNAL])
async def test_what_fails_for_good_is_not_tried_again(rig: DrainRig, cause: Reason):
    task = await rig.start("host", "h1", parallel=4)
    await rig.fail("vf2", cause)
    await rig.until_over(task)
    assert rig.states() == {"vf1": "MOVED", "vf2": "STUCK", "vf3": "MOVED", "vf4": "MOVED"}
    assert [batch for _, batch in rig.begun if "vf2" in batch] == [{"vf2": rig.begun[1][1]["vf2"]}]


async def test_a_target_that_has_failed_is_the_last_to_be_tried_again(rig: DrainRig):
    """By the function that it failed for, and by those that were to go there next."""
    task = await rig.start("device", "h1/nic0", parallel=1)
    ((function, migration),) = rig.moving.items()
    failed = rig.inventory.snapshot.migrations[migration].record.moves[0].target.device
    await rig.fail(function, Reason.UNREACHABLE, host=failed.partition("/")[0])
    await rig.until_over(task)
    assert set(rig.states().values()) == {"MOVED"}
    homes = {rig.home(name) for name in rig.told}
    assert homes
    assert failed not in homes


async def test_a_target_that_has_failed_is_tried_again_if_there_is_no_other(rig: DrainRig):
    rig.fleet.put(keys.cordon_key("h3"), Cordon())
    rig.fleet.put(keys.cordon_key("h1"), Cordon())
    task = await rig.start("device", "h1/nic1", parallel=1)
    await rig.fail("vf4", Reason.UNREACHABLE, host="h2")
    await rig.until_over(task)
    assert rig.home("vf4") == "h2/nic0"


@pytest.mark.parametrize(("cause", "host"), [(Reason.UNREACHABLE, "h1"), (None, ""), (Reason.LIMIT_EXCEEDED, "")])
async def test_a_target_is_not_avoided_for_what_others_did(rig: DrainRig, cause: Reason | None, host: str):
    task = await rig.start("device", "h1/nic1", parallel=1)
    await rig.fail("vf4", cause, host=host)
    await rig.until_over(task)
    assert [batch["vf4"] for _, batch in rig.begun] == ["h2/nic0"] * 2


async def test_one_without_drivers_holds_none(rig: DrainRig):
    rig.fleet.function("bare", rig.nics["h1/nic1"], 1, 2)
    rig.look()
    await rig.until_over(await rig.start("device", "h1/nic1"))
    assert {name: each.HasField("held") for name, each in rig.told.items()} == {"bare": False, "vf4": True}


async def test_a_refused_begin_is_planned_anew(rig: DrainRig):
    rig.refusals = [VfleetError(Reason.NO_FREE_SLOT, "somebody else was quicker")]
    await rig.until_over(await rig.start("device", "h1/nic1"))
    assert rig.states() == {"vf4": "MOVED"}
    assert len(rig.begun) == 2


class CreepingClock(ManualClock):
    """Time passes with each look at it."""

    step_s = 0.0

    def monotonic(self) -> float:
        self.now += self.step_s
        return self.now


@pytest.mark.parametrize("step_ms", range(20, 300, 20))
async def test_a_pause_that_is_over_between_the_look_and_the_wait_is_seen(rig: DrainRig, step_ms: int):
    rig.clock = CreepingClock(rig.clock.now)
    rig.clock.step_s = step_ms / 1000
    rig.context = replace(rig.context, clock=rig.clock)
    rig.refusals = [VfleetError(Reason.NO_FREE_SLOT, "somebody else was quicker")] * 2
    task = await rig.start("device", "h1/nic1")
    for _ in range(20):
        await rig.clock.advance(1)
    assert len(rig.moving) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_one_that_nothing_else_is_like_stays_and_the_others_move(rig: DrainRig):
    rare = device("h1/rare0", bus=3, vendor_id=7)
    rig.fleet.host("h1", 1, *rig.nics.values(), rare)
    rig.fleet.function("rare", rare, 1, 1)
    rig.look()
    await rig.until_over(await rig.start("host", "h1"))
    assert rig.states() == {"rare": "STUCK", **dict.fromkeys(("vf1", "vf2", "vf3", "vf4"), "MOVED")}
    assert "replace" in rig.told["rare"].why


async def test_a_lost_function_is_named(rig: DrainRig):
    rig.fleet.function("lost", rig.nics["h1/nic1"], 1, 2, incarnation="another")
    rig.look()
    await rig.until_over(await rig.start("device", "h1/nic1"))
    assert rig.states() == {"lost": "STUCK", "vf4": "MOVED"}
    assert "was lost" in rig.told["lost"].why


async def test_those_that_are_to_be_together_move_in_one_migration(rig: DrainRig):
    await rig.until_over(await rig.start("host", "h1", constraints=rule("vf1", "vf4", relation=SAME)))
    together = [batch for _, batch in rig.begun if "vf1" in batch]
    assert [sorted(batch) for batch in together] == [["vf1", "vf4"]]
    assert rig.home("vf1") == rig.home("vf4")


@pytest.mark.parametrize("fate", ["where the drain takes it", "elsewhere", "deleted"])
async def test_one_of_those_that_are_together_is_taken_away_by_another_and_the_rest_follows(rig: DrainRig, fate: str):
    task = await rig.start("host", "h1", parallel=1, constraints=rule("vf3", "vf4", relation=SAME))
    ((first, _),) = rig.moving.items()
    assert first not in ("vf3", "vf4")
    if fate == "deleted":
        for key in (keys.function_key("vf3"), keys.slot_key("h1/nic0", 3)):
            del rig.fleet.items[key]
        rig.look()
    else:
        await rig.begin("m1", [move("vf3", "h2/nic0" if fate == "elsewhere" else "h3/nic0")])
        await rig.done("vf3")
    async with asyncio.timeout(10):
        await rig.until_over(task)
    assert set(rig.states().values()) == {"MOVED"}
    if fate != "deleted":
        assert rig.home("vf4") == rig.home("vf3")


async def test_one_that_is_to_be_apart_does_not_come_to_where_the_other_has_gone_since_it_was_planned(rig: DrainRig):
    rig.fleet.function("other", device("h3/nic0"), 3, 1)
    rig.look()
    task = await rig.start("host", "h1", parallel=1, constraints=rule("vf4", "other", relation=DIFFERENT))
    assert "vf4" not in rig.moving
    await rig.begin("m1", [move("other", "h2/nic0")])
    await rig.done("other")
    await rig.until_over(task)
    assert set(rig.states().values()) == {"MOVED"}
    assert (rig.home("other"), rig.home("vf4")) == ("h2/nic0", "h3/nic0")


async def test_a_limit_that_others_reach_first_each_time_is_no_failure(rig: DrainRig):
    full = VfleetError(Reason.LIMIT_EXCEEDED, "256 migrations are under way in the fleet", retry_after_s=0.5)
    rig.refusals = [full] * (MAX_TRIES + 1)
    task = await rig.start("device", "h1/nic1")
    assert rig.told["vf4"].why == full.message
    await rig.until_over(task)
    assert rig.states() == {"vf4": "MOVED"}


async def test_a_rule_about_one_that_is_in_a_migration_waits_for_it(rig: DrainRig):
    rig.fleet.function("other", device("h2/nic0"), 2, 1)
    rig.look()
    await rig.begin("m1", [move("other", "h3/nic0")])
    rig.begun.clear()
    task = await rig.start("device", "h1/nic1", constraints=rule("vf4", "other", relation=DIFFERENT))
    await rig.clock.advance(3)
    assert rig.begun == []
    assert "'other' is in migration" in rig.told["vf4"].why
    await rig.done("other")
    await rig.until_over(task)
    assert (rig.home("vf4"), rig.home("other")) == ("h2/nic0", "h3/nic0")


def test_if_there_is_not_room_for_all_as_few_as_can_be_stay():
    fleet = FleetValues()
    fleet.host("h1", 1, device("h1/nic0", total_vfs=8))
    fleet.host("h2", 2, device("h2/nic0", total_vfs=4))
    names = [f"vf{number}" for number in range(1, 7)]
    for index, name in enumerate(names, start=1):
        fleet.function(name, device("h1/nic0", total_vfs=8), 1, index)
    plan = plan_drain(fleet.snapshot(), names, Constraints())
    assert sorted(plan.devices) == ["vf1", "vf2", "vf3", "vf4"]
    assert {name: error.reason for name, error in plan.stuck.items()} == dict.fromkeys(
        ("vf5", "vf6"), Reason.UNSATISFIABLE
    )
    assert "free slots" in plan.stuck["vf5"].message


def test_one_that_is_to_be_apart_does_not_come_to_where_the_other_still_is():
    """Each is to leave a half of one host; the only room for vf1 is beside vf2."""
    fleet = FleetValues()
    fleet.host("h1", 1, device("h1/nic0", bus=1))
    fleet.host("h2", 2, device("h2/nic0", bus=1), device("h2/nic1", bus=2))
    fleet.host("h3", 3, device("h3/nic0", bus=1))
    fleet.function("vf1", device("h1/nic0"), 1, 1)
    fleet.function("vf2", device("h2/nic0"), 2, 1)
    for index in range(1, 4):
        fleet.function(f"x{index}", device("h3/nic0"), 3, index)
    for index in range(2, 5):
        fleet.function(f"y{index}", device("h1/nic0"), 1, index)
    fleet.put(keys.cordon_key("h2/device/nic0"), "")
    fleet.put(keys.cordon_key("h1"), "")
    asked = rule("vf1", "vf2", relation=DIFFERENT)
    plan = plan_drain(fleet.snapshot(), ["vf1", "vf2"], asked)
    assert plan.devices in ({"vf1": "h2/nic1", "vf2": "h3/nic0"}, {"vf1": "h3/nic0", "vf2": "h2/nic1"})
    if plan.devices["vf1"] == "h2/nic1":
        assert plan.batches == [Batch(("vf2",)), Batch(("vf1",), frozenset({"vf2"}))]


def test_those_that_would_take_each_others_places_move_in_one_migration():
    fleet = FleetValues()
    for segment, host in ((1, "h1"), (2, "h2")):
        kinds = ("a", "b") if host == "h1" else ("b", "a")
        fleet.host(
            host, segment, *(device(f"{host}/{kind}", bus=bus, model=kind) for bus, kind in enumerate(kinds, start=1))
        )
    fleet.function("vf1", device("h1/a", model="a"), 1, 1)
    fleet.function("vf2", device("h2/b", bus=1, model="b"), 2, 1)
    plan = plan_drain(fleet.snapshot(), ["vf1", "vf2"], rule("vf1", "vf2", relation=DIFFERENT))
    assert plan.devices == {"vf1": "h2/a", "vf2": "h1/b"}
    assert plan.batches == [Batch(("vf1", "vf2"))]


def test_a_rule_that_can_not_be_met_keeps_only_those_that_it_names():
    fleet = FleetValues()
    fleet.host("h1", 1, device("h1/nic0"))
    fleet.host("h2", 2, device("h2/nic0"))
    for index, name in enumerate(("vf1", "vf2", "vf3"), start=1):
        fleet.function(name, device("h1/nic0"), 1, index)
    plan = plan_drain(fleet.snapshot(), ["vf1", "vf2", "vf3"], rule("vf1", "vf2", relation=DIFFERENT))
    assert set(plan.devices) == {"vf3"}
    assert "apart" in plan.stuck["vf1"].message
