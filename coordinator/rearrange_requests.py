"""What requests about rearrangements may say, checked field by field. Pure."""

from collections.abc import Mapping

from coordinator.rearrangement import DEFAULT_TOLERANCE_PERCENT, MAX_MOVES
from coordinator.requests import checked_constraints
from vfleet.errors import invalid_field
from vfleet.names import check_device_name, check_name
from vfleet.v1.migration_service_pb2 import (
    REARRANGEMENT_GOAL_EVEN,
    DeviceChange,
    PlannedMove,
    Rearrangement,
    RearrangementGoal,
)
from vfleet.v1.placement_pb2 import Constraints, Relation


def checked_goal(field: str, goal: RearrangementGoal.ValueType) -> RearrangementGoal.ValueType:
    """Return what a rearrangement is for. Raise INVALID_FIELD if that isn't known."""
    known = {number: name for name, number in RearrangementGoal.items() if number}
    if goal not in known:
        raise invalid_field(field, goal, f"one of {', '.join(known.values())}")
    return goal


def checked_tolerance(goal: RearrangementGoal.ValueType, percent: int) -> int:
    """Return by how much loads may differ, the default for 0. Raise INVALID_FIELD out of its range or for no use."""
    if goal != REARRANGEMENT_GOAL_EVEN and percent:
        raise invalid_field("tolerance_percent", percent, "0 unless loads are to be even")
    if percent > 100:
        raise invalid_field("tolerance_percent", percent, f"1 to 100, or 0 for {DEFAULT_TOLERANCE_PERCENT}")
    return percent or DEFAULT_TOLERANCE_PERCENT


def checked_rest(constraints: Constraints) -> Constraints:
    """Return constraints under which functions can come to rest. Raise INVALID_FIELD for others."""
    for index, rule in enumerate(checked_constraints(constraints).boundaries):
        if rule.relation != Relation.RELATION_SAME:
            name = Relation.Name(rule.relation)
            raise invalid_field(f"constraints.boundaries[{index}].relation", name, "RELATION_SAME")
    return constraints


def checked_plan(plan: Rearrangement) -> Rearrangement:
    """Return a plan. Raise INVALID_FIELD for one that no planner makes."""
    checked_goal("plan.goal", plan.goal)
    if len(plan.moves) > MAX_MOVES:
        raise invalid_field("plan.moves", f"{len(plan.moves)} moves", f"at most {MAX_MOVES}")
    changes: dict[str, DeviceChange] = {}
    for index, change in enumerate(plan.changes):
        field = f"plan.changes[{index}]"
        if check_device_name(f"{field}.device", change.device) in changes:
            raise invalid_field(f"{field}.device", change.device, "each device once")
        if not change.total_vfs:
            raise invalid_field(f"{field}.total_vfs", 0, "1 or more")
        changes[change.device] = change
    earlier: set[str] = set()
    for index, move in enumerate(plan.moves):
        _check_move(f"plan.moves[{index}]", move, changes, earlier)
        earlier.add(move.function)
    return plan


def _check_move(field: str, move: PlannedMove, changes: Mapping[str, DeviceChange], earlier: set[str]) -> None:
    if check_name(f"{field}.function", move.function) in earlier:
        raise invalid_field(f"{field}.function", move.function, "each function once")
    for end, device in (("source_device", move.source_device), ("target_device", move.target_device)):
        if check_device_name(f"{field}.{end}", device) not in changes:
            raise invalid_field(f"{field}.{end}", device, "a device that plan.changes names")
    if move.source_device == move.target_device:
        raise invalid_field(f"{field}.target_device", move.target_device, "another device than the source")
    for name in move.after:
        if name not in earlier:
            raise invalid_field(f"{field}.after", name, "functions that move before")
