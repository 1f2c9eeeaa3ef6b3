"""Requests about rearrangements: what can't be meant is refused, by the field's name."""

from collections.abc import Callable

import pytest

from coordinator.rearrange_requests import checked_goal, checked_plan, checked_rest, checked_tolerance
from coordinator.rearrangement import MAX_MOVES
from vfleet.errors import Reason, VfleetError
from vfleet.v1.migration_service_pb2 import (
    REARRANGEMENT_GOAL_EVEN,
    REARRANGEMENT_GOAL_FREE_HOSTS,
    DeviceChange,
    PlannedMove,
    Rearrangement,
    RearrangementGoal,
)
from vfleet.v1.placement_pb2 import Boundary, BoundaryRule, Constraints, Relation


def a_plan() -> Rearrangement:
    names = ("h1/nic0", "h2/nic0")
    return Rearrangement(
        goal=REARRANGEMENT_GOAL_EVEN,
        moves=[
            PlannedMove(function="vf1", source_device=names[0], target_device=names[1]),
            PlannedMove(function="vf2", source_device=names[1], target_device=names[0], after=["vf1"]),
        ],
        changes=[DeviceChange(device=name, total_vfs=4) for name in names],
    )


def test_a_plan_as_planners_make_it_is_taken():
    assert checked_plan(a_plan()) == a_plan()
    assert checked_plan(Rearrangement(goal=REARRANGEMENT_GOAL_EVEN)).moves == []


def many(plan: Rearrangement) -> None:
    for number in range(3, MAX_MOVES + 2):
        plan.moves.add(function=f"vf{number}", source_device="h1/nic0", target_device="h2/nic0")


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda plan: plan.ClearField("goal"), "plan.goal"),
        (many, "plan.moves"),
        (lambda plan: setattr(plan.moves[0], "function", "Not A Name"), "plan.moves[0].function"),
        (lambda plan: setattr(plan.moves[1], "function", "vf1"), "plan.moves[1].function"),
        (lambda plan: setattr(plan.moves[0], "source_device", "h1"), "plan.moves[0].source_device"),
        (lambda plan: setattr(plan.moves[0], "target_device", "h3/nic0"), "plan.moves[0].target_device"),
        (lambda plan: setattr(plan.moves[0], "target_device", "h1/nic0"), "plan.moves[0].target_device"),
        (lambda plan: plan.moves[0].after.append("vf2"), "plan.moves[0].after"),
        (lambda plan: setattr(plan.changes[0], "total_vfs", 0), "plan.changes[0].total_vfs"),
        (lambda plan: setattr(plan.changes[1], "device", "h1/nic0"), "plan.changes[1].device"),
        (lambda plan: setattr(plan.changes[1], "device", ""), "plan.changes[1].device"),
    ],
)
def test_a_plan_that_no_planner_makes_is_refused(spoil: Callable[[Rearrangement], None], field: str):
    plan = a_plan()
    spoil(plan)
    with pytest.raises(VfleetError) as caught:
        checked_plan(plan)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.message.startswith(f"{field} ")


@pytest.mark.parametrize("goal", [0, 99])
def test_a_goal_is_one_that_is_known(goal: RearrangementGoal.ValueType):
    with pytest.raises(VfleetError, match="expected one of REARRANGEMENT_GOAL_EVEN"):
        checked_goal("goal", goal)


def test_a_tolerance_is_a_percentage_of_use():
    assert [checked_tolerance(REARRANGEMENT_GOAL_EVEN, percent) for percent in (0, 1, 100)] == [10, 1, 100]
    for goal, percent in ((REARRANGEMENT_GOAL_EVEN, 101), (REARRANGEMENT_GOAL_FREE_HOSTS, 1)):
        with pytest.raises(VfleetError, match="tolerance_percent"):
            checked_tolerance(goal, percent)


def test_functions_are_to_come_to_rest():
    for relation in (Relation.RELATION_SAME, Relation.RELATION_DIFFERENT):
        rule = BoundaryRule(boundary=Boundary.BOUNDARY_HOST, relation=relation)
        if relation == Relation.RELATION_SAME:
            assert list(checked_rest(Constraints(boundaries=[rule])).boundaries) == [rule]
        else:
            with pytest.raises(VfleetError, match=r"boundaries\[0\].relation"):
                checked_rest(Constraints(boundaries=[rule]))
