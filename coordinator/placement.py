"""Placement: the device that each function of a request gets, all of them chosen together, from a snapshot. Pure.

The same snapshot and the same request give the same answer. A device that the request names is taken at its word: it
is refused only for what can't be, or what the request itself asks for.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from coordinator.assignment import Assignment, Group
from coordinator.matching import Matching
from coordinator.placement_filters import (
    FREE_SLOT,
    GroupNeed,
    Needs,
    Rule,
    RuleCheck,
    checks,
    failures,
    first_failure,
    free_slots,
)
from coordinator.preferences import Preferences
from coordinator.site import Site
from coordinator.snapshot import Snapshot
from vfleet.v1.placement_pb2 import Constraints, PlacementFilter, Relation
from vfleet.v1.records_pb2 import Function


@dataclass(frozen=True, slots=True)
class Mover:
    """A function that is to move: to the device `target`, HOST/DEVICE, or to any if that is empty.

    `stays` if the target is its home, with another VF than now.
    """

    function: Function
    target: str = ""
    stays: bool = False


class _Room(dict[str, int]):
    """How many functions each device takes, counted when it is asked for: of most devices nobody asks."""

    def __init__(self, snapshot: Snapshot, *, all_are_free: bool) -> None:
        super().__init__()
        self._snapshot = snapshot
        self._all_are_free = all_are_free

    def __missing__(self, device: str) -> int:
        site = self._snapshot.sites[device]
        self[device] = site.total_vfs if self._all_are_free else free_slots(self._snapshot, site)
        return self[device]


class Question:
    """Where functions are to go, given what is asked. Everything that is named exists.

    `homes` are the devices of functions that rules about groups name and that don't move. The hosts of `shunned` are
    taken only if no others will do.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        movers: Sequence[Mover],
        constraints: Constraints,
        homes: Mapping[str, str],
        shunned: Collection[str] = (),
    ) -> None:
        self.snapshot = snapshot
        self.movers = {mover.function.name: mover for mover in movers}
        self.constraints = constraints
        self.homes = homes
        self._shunned = shunned
        self.checks: list[RuleCheck] = checks(constraints.boundaries, len(constraints.groups))
        self.needs = {name: self._needs(mover) for name, mover in self.movers.items()}

    def answer(self) -> dict[str, str] | None:
        """Return a device for each function, or None if there is no choice that meets the constraints.

        Raise LIMIT_EXCEEDED as `Assignment.find` does.
        """
        choices = {needs: self._choices(needs) for needs in dict.fromkeys(self.needs.values())}
        options = {name: choices[needs] for name, needs in self.needs.items()}
        return self._assign(options, relaxed=None)

    def answer_without(self, relaxed: Rule) -> dict[str, str] | None:
        """Return what the answer would be without one of the constraints. Raise as `answer` does."""
        choices = {
            needs: [name for name, failed in every.items() if failed <= {relaxed}]
            for needs, every in self._failures.items()
        }
        options = {name: choices[needs] for name, needs in self.needs.items()}
        return self._assign(options, relaxed)

    def without_device(self) -> list[str]:
        """Return as few functions as can be without which all others have devices, if rules about groups allow it."""
        choices = {needs: self._choices(needs) for needs in dict.fromkeys(self.needs.values())}
        options = {name: choices[needs] for name, needs in self.needs.items()}
        return Matching.without_seat(options, _Room(self.snapshot, all_are_free=False))

    def obstacles(self) -> list[Rule]:
        """Return the constraints that any device fails at, or that keep functions from a device together, in order."""
        failed = {rule for every in self._failures.values() for rules in every.values() for rule in rules}
        joint = {Rule(PlacementFilter.PLACEMENT_FILTER_GROUP, number) for number, _ in self._joint_groups()}
        return [rule for rule, _ in self.checks if rule in failed or rule in joint or rule == FREE_SLOT]

    def preferences(self) -> Preferences:
        """Return what is preferred, with nothing placed yet."""
        drivers = {name: _driver_hosts(self.snapshot, mover.function) for name, mover in self.movers.items()}
        return Preferences(self.constraints.preferences, self.snapshot, drivers, self._shunned)

    def rejected(self, needs: Needs, site: Site) -> tuple[Rule, tuple[str, str]] | None:
        """Return the first constraint that a device fails at, for functions that need this, with the two values."""
        return first_failure(self.checks, needs, site, self.snapshot)

    def fails(self, rule: Rule, needs: Needs, site: Site) -> bool:
        """Return whether a device fails at a constraint, for functions that need this."""
        return any(each == rule and check(needs, site, self.snapshot) is not None for each, check in self.checks)

    @cached_property
    def _failures(self) -> dict[Needs, dict[str, set[Rule]]]:
        """For all functions and devices, all constraints that fail."""
        return {
            needs: {
                name: {rule for rule, _ in failures(self.checks, needs, site, self.snapshot)}
                for name, site in self.snapshot.sites.items()
            }
            for needs in dict.fromkeys(self.needs.values())
        }

    def _choices(self, needs: Needs) -> list[str]:
        sites = self.snapshot.sites
        candidates = {needs.target: sites[needs.target]} if needs.target else sites
        return [name for name, site in candidates.items() if self.rejected(needs, site) is None]

    def _assign(self, options: Mapping[str, Sequence[str]], relaxed: Rule | None) -> dict[str, str] | None:
        room = _Room(self.snapshot, all_are_free=relaxed == FREE_SLOT)
        groups = [group for number, group in self._joint_groups() if relaxed is None or relaxed.group != number]
        return Assignment(self.snapshot, options, room, groups, self.preferences()).find()

    def _joint_groups(self) -> list[tuple[int, Group]]:
        """Return the rules about functions that move together with others of the request, each with its number."""
        groups = []
        for number, rule in enumerate(self.constraints.groups, start=1):
            members = tuple(name for name in rule.functions if name in self.movers)
            if rule.relation and len(members) > 1:
                groups.append((number, Group(members, rule.boundary, rule.relation == Relation.RELATION_SAME)))
        return groups

    def _needs(self, mover: Mover) -> Needs:
        function = mover.function
        reached = self.snapshot.sites[function.device].attachments if not mover.target else frozenset()
        return Needs(
            source=function.device,
            model=function.model,
            bars=tuple((bar.index, bar.size_bytes) for bar in function.bars),
            attachments=frozenset(self.constraints.attachments) or reached,
            target=mover.target,
            stays=mover.stays,
            groups=self._group_needs(function.name),
        )

    def _group_needs(self, function: str) -> tuple[GroupNeed, ...]:
        needs = []
        for number, rule in enumerate(self.constraints.groups, start=1):
            homes = [self.homes[name] for name in rule.functions if name in self.homes]
            if rule.relation and homes and function in rule.functions:
                within = frozenset(self.snapshot.sites[home].within[rule.boundary] for home in homes)
                needs.append(GroupNeed(number, rule.boundary, rule.relation, within))
        return tuple(needs)


def _driver_hosts(snapshot: Snapshot, function: Function) -> dict[str, int]:
    """Return on how many drivers of a function run on each host."""
    hosts: dict[str, int] = {}
    for name in function.drivers:
        stored = snapshot.drivers.get(name)
        if stored is not None:
            hosts[stored.record.host] = hosts.get(stored.record.host, 0) + 1
    return hosts
