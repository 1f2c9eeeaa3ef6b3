"""Rearrangements: plans of many moves that make loads even, or devices or hosts free, and what they do for it. Pure.

The moves are in an order. Each can be done once those of its `after` are: then there is a free slot for it, and rules
about functions hold, however far the others are. Planned anew after all moves, there is nothing left to do.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

from coordinator.arrangement import Arrangement
from coordinator.balance import balance
from coordinator.defragment import by_device, by_host, defragment
from coordinator.drain_plan import binding_rules
from coordinator.snapshot import Snapshot
from vfleet.names import host_of
from vfleet.v1.migration_service_pb2 import (
    REARRANGEMENT_GOAL_EVEN,
    REARRANGEMENT_GOAL_FREE_DEVICES,
    REARRANGEMENT_GOAL_FREE_HOSTS,
    DeviceChange,
    FleetFigures,
    PlannedMove,
    PlanRearrangementResponse,
    Rearrangement,
    RearrangementGoal,
    StuckFunction,
)
from vfleet.v1.placement_pb2 import Constraints

DEFAULT_TOLERANCE_PERCENT = 10
MAX_MOVES = 1000

_UNITS = {REARRANGEMENT_GOAL_FREE_DEVICES: by_device, REARRANGEMENT_GOAL_FREE_HOSTS: by_host}


def plan_rearrangement(
    snapshot: Snapshot,
    goal: RearrangementGoal.ValueType,
    tolerance_percent: int,
    constraints: Constraints,
    max_moves: int = MAX_MOVES,
) -> PlanRearrangementResponse:
    """Return a plan of `max_moves` at most."""
    before = Arrangement(snapshot, constraints)
    fixed: set[str] = set()
    while True:
        end = Arrangement(snapshot, constraints, fixed)
        if goal == REARRANGEMENT_GOAL_EVEN:
            is_all = balance(end, tolerance_percent, max_moves)
        else:
            is_all = defragment(end, _UNITS[goal], max_moves)
        targets = {name: end.homes[name] for name in end.moved if end.homes[name] != before.homes[name]}
        sequence = _Sequence(Arrangement(snapshot, constraints, fixed))
        left = sequence.add_all(targets)
        if not left:
            break
        fixed |= left
    moves = list(sequence.moves.values())
    sites, used = before.all_sites, before.used
    changes = {
        name: DeviceChange(
            device=name, total_vfs=sites[name].total_vfs, used_before=used[name], used_after=end.used[name]
        )
        for name in sorted({device for move in moves for device in (move.source_device, move.target_device)})
    }
    for move in moves:
        move.why = _why(goal, changes[move.source_device], changes[move.target_device])
    return PlanRearrangementResponse(
        plan=Rearrangement(goal=goal, moves=moves, changes=changes.values()),
        before=_figures(snapshot, before),
        after=_figures(snapshot, end),
        stuck=[StuckFunction(function=name, why=why) for name, why in sorted(end.stuck.items())],
        is_partial=not is_all,
    )


class Premise:
    """What a plan took for granted: how many functions others than its own are on the devices."""

    def __init__(self, plan: Rearrangement) -> None:
        self._goal = plan.goal
        self._changes = {change.device: change for change in plan.changes}
        self._movers = {move.function for move in plan.moves}
        leaving = Counter(move.source_device for move in plan.moves)
        self._others = {name: change.used_before - leaving[name] for name, change in self._changes.items()}

    def fails(self, snapshot: Snapshot, move: PlannedMove) -> str:
        """Return why a move doesn't serve its purpose any more, for people; empty if it does.

        What the plan itself has done and will do is no reason, nor is what makes its purpose only more pressing.
        """
        gone = [name for name in (move.source_device, move.target_device) if name not in snapshot.sites]
        if gone:
            return f"device {gone[0]} is no more"
        if self._goal == REARRANGEMENT_GOAL_EVEN:
            return self._is_even(snapshot, move.source_device, move.target_device)
        unit_of = _UNITS[self._goal]
        freed, filled = (unit_of(snapshot.sites[name]) for name in (move.source_device, move.target_device))
        inside = [name for name, site in snapshot.sites.items() if unit_of(site) == freed]
        if any(self._more(snapshot, name) > 0 for name in inside):
            return f"{freed} would not become free any more: there are functions of which the plan doesn't know"
        if not any(snapshot.slots_of(name) for name, site in snapshot.sites.items() if unit_of(site) == filled):
            return f"{filled} is free by now"
        return ""

    def _is_even(self, snapshot: Snapshot, source: str, target: str) -> str:
        left, come = self._changes[source], self._changes[target]
        more_left, more_come = self._more(snapshot, source), self._more(snapshot, target)
        load_left = (left.used_after + more_left + 1) / left.total_vfs
        load_come = (come.used_after + more_come) / come.total_vfs
        if (more_left < 0 or more_come > 0) and load_left <= load_come:
            return f"the loads of {source} and {target} have changed since it was planned"
        return ""

    def _more(self, snapshot: Snapshot, device: str) -> int:
        """Return how many functions of others a device has more than when the plan was made."""
        others = sum(slot.record.function not in self._movers for slot in snapshot.slots_of(device).values())
        return others - self._others.get(device, 0)


def asked_of(snapshot: Snapshot, move: PlannedMove, constraints: Constraints) -> Constraints:
    """Return what is asked of the target of a single move, so that its BEGIN is held to what the plan was."""
    asked = Constraints(boundaries=constraints.boundaries, attachments=constraints.attachments)
    asked.groups.extend(binding_rules(snapshot, (move.function,), constraints))
    source = snapshot.sites.get(move.source_device)
    if not asked.attachments and source is not None:
        asked.attachments.extend(sorted(source.attachments))
    return asked


class _Sequence:
    """Moves in an order in which each can be done, made by doing them in an arrangement."""

    def __init__(self, arrangement: Arrangement) -> None:
        self.moves: dict[str, PlannedMove] = {}
        self._arrangement = arrangement
        self._room = dict(arrangement.room)
        self._come: Counter[str] = Counter()
        self._gone: defaultdict[str, list[str]] = defaultdict(list)
        self._bound = frozenset(arrangement.bound)

    def add_all(self, targets: Mapping[str, str]) -> set[str]:
        """Add moves, and return the functions for which there is no such order."""
        pending = dict(targets)
        while ready := [name for name, target in pending.items() if self._add(name, target)]:
            for name in ready:
                del pending[name]
        return set(pending)

    def _add(self, name: str, target: str) -> bool:
        if not self._arrangement.may_go(name, target):
            return False
        source = self._arrangement.homes[name]
        self._come[target] += 1
        # Those that come together could take all slots that are free: what leaves has to be gone before.
        after = set(self._gone[target]) if self._come[target] > self._room[target] else set()
        if name in self._bound:
            after |= {other for other in self._bound & self.moves.keys() if self._arrangement.share_a_rule(name, other)}
        self.moves[name] = PlannedMove(function=name, source_device=source, target_device=target, after=sorted(after))
        self._gone[source].append(name)
        self._arrangement.move(name, target)
        return True


def _why(goal: RearrangementGoal.ValueType, source: DeviceChange, target: DeviceChange) -> str:
    if goal == REARRANGEMENT_GOAL_FREE_HOSTS:
        return f"host {host_of(source.device)} becomes free"
    if goal == REARRANGEMENT_GOAL_FREE_DEVICES:
        return f"device {source.device} becomes free"
    return (
        f"{source.device} has {source.used_before} of {source.total_vfs} slots in use,"
        f" {target.device} {target.used_before} of {target.total_vfs}"
    )


def _figures(snapshot: Snapshot, arrangement: Arrangement) -> FleetFigures:
    used = arrangement.used
    loads = [used[name] / site.total_vfs for name, site in arrangement.sites.items()]
    in_use = [name for name in arrangement.sites if used[name]]
    return FleetFigures(
        highest_load=max(loads, default=0.0),
        lowest_load=min(loads, default=0.0),
        devices_in_use=len(in_use),
        hosts_in_use=len({host_of(name) for name in in_use}),
        local_attachments=sum(
            arrangement.local_attachments(name, arrangement.homes.get(name, stored.record.device))
            for name, stored in snapshot.functions.items()
        ),
    )
