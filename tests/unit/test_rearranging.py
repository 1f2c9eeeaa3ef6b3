"""A rearrangement being done: in what order, what is looked at once more, and how it goes on."""

import asyncio
from contextlib import aclosing

import pytest
from support.drain_rig import DrainRig
from support.fake_host import device
from support.fleet_values import move

from coordinator.rearrangement import Premise, asked_of, plan_rearrangement
from coordinator.rearranging import Rearranging
from coordinator.retries import MAX_TRIES
from vfleet.errors import Reason
from vfleet.etcd import keys
from vfleet.v1.migration_service_pb2 import (
    REARRANGEMENT_GOAL_EVEN,
    REARRANGEMENT_GOAL_FREE_DEVICES,
    DeviceChange,
    PlannedMove,
    Rearrangement,
    RearrangementGoal,
)
from vfleet.v1.placement_pb2 import Boundary, BoundaryRule, Constraints, GroupRule, Relation

EVEN, FREE = REARRANGEMENT_GOAL_EVEN, REARRANGEMENT_GOAL_FREE_DEVICES


@pytest.fixture
def rig() -> DrainRig:
    """h1/nic0 has vf1 to vf3 of 4, h1/nic1 has vf4, and h2/nic0 and h3/nic0 have nothing."""
    return DrainRig()


def planned(rig: DrainRig, goal: RearrangementGoal.ValueType = EVEN) -> Rearrangement:
    response = plan_rearrangement(rig.fleet.snapshot(), goal, 10 if goal == EVEN else 0, Constraints())
    return response.plan


def targets(plan: Rearrangement) -> dict[str, str]:
    return {each.function: each.target_device for each in plan.moves}


async def test_the_moves_are_done_so_many_at_once_and_no_others(rig: DrainRig):
    plan = planned(rig)
    assert len(plan.moves) == 2
    task = await rig.rearrange(plan, parallel=1)
    assert len(rig.moving) == 1
    await rig.until_over(task)
    assert {name: rig.home(name) for name in rig.told} == targets(plan)
    assert set(rig.states().values()) == {"MOVED"}
    assert {each.held.ToMilliseconds() for each in rig.told.values()} == {6}
    assert not planned(rig).moves


async def test_who_does_the_same_plan_again_goes_on_with_what_is_left(rig: DrainRig):
    plan = planned(rig)
    first, second = targets(plan)
    (await rig.rearrange(plan, parallel=1)).cancel()
    await rig.done(first)
    task = await rig.rearrange(plan, parallel=1)
    assert rig.states() == {first: "MOVED", second: "MOVING"}
    await rig.until_over(task)
    assert len(rig.begun) == 2
    await rig.until_over(await rig.rearrange(plan))
    assert len(rig.begun) == 2


@pytest.mark.parametrize("is_drain", [False, True])
async def test_what_ends_while_the_last_news_is_still_being_taken_is_seen(rig: DrainRig, is_drain: bool):
    moves = rig.drain("host", "h1") if is_drain else Rearranging(rig.context, rig.begin, planned(rig), 2)
    async with asyncio.timeout(10), aclosing(moves.run()) as responses:
        async for _ in responses:
            if rig.moving:
                await rig.done(*rig.moving)
    assert not rig.moving


async def test_one_waits_until_those_before_it_have_moved(rig: DrainRig):
    plan = planned(rig)
    first, second = plan.moves
    second.after.append(first.function)
    task = await rig.rearrange(plan, parallel=2)
    assert set(rig.moving) == {first.function}
    await rig.done(first.function)
    assert set(rig.moving) == {second.function}
    await rig.until_over(task)


async def test_one_that_was_to_wait_for_one_that_stays_stays_as_well(rig: DrainRig):
    plan = planned(rig)
    first, second = plan.moves
    second.after.append(first.function)
    task = await rig.rearrange(plan)
    await rig.fail(first.function, Reason.BAD_STATE)
    await rig.until_over(task)
    assert set(rig.states().values()) == {"STUCK"}
    assert rig.told[second.function].why == f"{first.function}, which was to move before, stays"


@pytest.mark.parametrize(("cause", "tries"), [(Reason.UNREACHABLE, MAX_TRIES), (Reason.BAD_STATE, 1)])
async def test_what_fails_is_tried_again_at_the_same_target_if_it_may_pass(rig: DrainRig, cause: Reason, tries: int):
    plan = planned(rig)
    (name, target), *_ = targets(plan).items()
    del plan.moves[1:]
    task = await rig.rearrange(plan)
    while not task.done():
        if rig.moving:
            await rig.fail(name, cause, host="h2")
        await rig.clock.advance(1)
    assert [batch for _, batch in rig.begun] == [{name: target}] * tries
    assert rig.states() == {name: "STUCK"}
    assert "h2 is gone" in rig.told[name].why


async def test_what_was_moved_elsewhere_or_deleted_meanwhile_is_left_alone(rig: DrainRig):
    plan = planned(rig)
    first, second = plan.moves
    elsewhere = "h3/nic0" if first.target_device == "h2/nic0" else "h2/nic0"
    await rig.begin("m1", [move(first.function, elsewhere)])
    await rig.done(first.function)
    record = rig.functions()[second.function]
    del rig.fleet.items[keys.function_key(second.function)]
    del rig.fleet.items[keys.slot_key(record.device, record.vf_index)]
    rig.look()
    rig.begun.clear()
    await rig.until_over(await rig.rearrange(plan))
    assert rig.begun == []
    assert rig.told[first.function].why == f"it was moved to {elsewhere} meanwhile"
    assert rig.told[second.function].why == "it is no more"
    assert set(rig.states().values()) == {"STUCK"}


async def test_what_another_has_moved_to_the_target_has_moved(rig: DrainRig):
    plan = planned(rig)
    first, _ = plan.moves
    await rig.begin("m1", [move(first.function, first.target_device)])
    task = await rig.rearrange(plan, parallel=1)
    assert rig.states()[first.function] == "MOVING"
    assert len(rig.begun) == 1
    await rig.until_over(task)
    assert set(rig.states().values()) == {"MOVED"}


async def test_a_move_that_would_make_loads_less_even_by_now_is_not_begun(rig: DrainRig):
    """Others have filled the target since the plan was made, and left the source."""
    plan = planned(rig)
    first, _ = plan.moves
    target = device(first.target_device)
    for index in range(1, 4):
        rig.fleet.function(f"new{index}", target, int(target.host[1:]), index)
    rig.look()
    await rig.until_over(await rig.rearrange(plan))
    stuck = [name for name, state in rig.states().items() if state == "STUCK"]
    assert stuck == [each.function for each in plan.moves if each.target_device == first.target_device]
    assert "have changed since it was planned" in rig.told[first.function].why


async def test_what_makes_a_move_more_pressing_does_not_stop_it(rig: DrainRig):
    plan = planned(rig)
    rig.fleet.function("new", rig.nics["h1/nic0"], 1, 4)
    rig.look()
    await rig.until_over(await rig.rearrange(plan))
    assert set(rig.states().values()) == {"MOVED"}


async def test_a_device_that_would_not_become_free_any_more_is_left_as_it_is(rig: DrainRig):
    plan = planned(rig, FREE)
    assert targets(plan) == {"vf4": "h1/nic0"}
    rig.fleet.function("new", rig.nics["h1/nic1"], 1, 2)
    rig.look()
    await rig.until_over(await rig.rearrange(plan))
    assert rig.states() == {"vf4": "STUCK"}
    assert "h1/nic1 would not become free any more" in rig.told["vf4"].why


async def test_a_device_that_is_free_by_now_stays_so(rig: DrainRig):
    plan = planned(rig, FREE)
    for name in ("vf1", "vf2", "vf3"):
        await rig.begin(f"m-{name}", [move(name, "h2/nic0")])
        await rig.done(name)
    await rig.until_over(await rig.rearrange(plan))
    assert rig.told["vf4"].why == "h1/nic0 is free by now"


def test_a_device_that_is_no_more_is_no_target(rig: DrainRig):
    plan = planned(rig, FREE)
    plan.moves[0].target_device = "h9/nic0"
    assert Premise(plan).fails(rig.fleet.snapshot(), plan.moves[0]) == "device h9/nic0 is no more"


def test_a_plans_own_moves_are_no_reason_against_those_that_are_left(rig: DrainRig):
    """Where functions come to a device that others leave, whatever the order."""
    plan = Rearrangement(goal=EVEN)
    plan.moves.add(function="vf1", source_device="h1/nic0", target_device="h1/nic1")
    plan.moves.add(function="vf4", source_device="h1/nic1", target_device="h2/nic0")
    for name, before, after in (("h1/nic0", 3, 2), ("h1/nic1", 1, 1), ("h2/nic0", 0, 1)):
        plan.changes.append(DeviceChange(device=name, total_vfs=4, used_before=before, used_after=after))
    premise = Premise(plan)
    for _ in range(2):
        assert [premise.fails(rig.fleet.snapshot(), each) for each in plan.moves] == ["", ""]
        rig.fleet.function("vf1", rig.nics["h1/nic1"], 1, 2)  # has moved
        rig.fleet.items.pop(keys.slot_key("h1/nic0", 1), None)


def test_each_move_is_held_to_what_the_plan_was_asked_for(rig: DrainRig):
    same_host = BoundaryRule(boundary=Boundary.BOUNDARY_HOST, relation=Relation.RELATION_SAME)
    apart = GroupRule(functions=["vf1", "vf2"], boundary=Boundary.BOUNDARY_HOST, relation=Relation.RELATION_DIFFERENT)
    wired = device("h1/nic0")
    wired.attachments.append("lan")
    rig.fleet.host("h1", 1, wired, rig.nics["h1/nic1"])
    constraints = Constraints(boundaries=[same_host], groups=[apart])
    snapshot = rig.fleet.snapshot()
    asked = asked_of(snapshot, PlannedMove(function="vf1", source_device="h1/nic0"), constraints)
    assert asked == Constraints(boundaries=[same_host], groups=[apart], attachments=["lan"])
    asked = asked_of(snapshot, PlannedMove(function="vf3", source_device="h1/nic0"), constraints)
    assert asked == Constraints(boundaries=[same_host], attachments=["lan"])
    constraints.attachments.append("san")
    asked = asked_of(snapshot, PlannedMove(function="vf3", source_device="h1/nic0"), constraints)
    assert list(asked.attachments) == ["san"]
