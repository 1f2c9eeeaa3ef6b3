"""The filters of placement: what a device may fail at before it can become a function's home. Pure.

A filter looks at one device for one function and returns None, or what the device has and what it would need, for
people. Filters have a fixed order; a device is told of by the first that it fails at.
"""

# ruff: noqa: ARG001  # all filters are called alike

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from coordinator.site import Site
from coordinator.snapshot import Snapshot
from vfleet.parts import spoken
from vfleet.v1.placement_pb2 import Boundary, BoundaryRule, PlacementFilter, Relation

Values = tuple[str, str]

_SAME = Relation.RELATION_SAME


@dataclass(frozen=True, slots=True)
class GroupNeed:
    """What a rule about several functions demands because of those of them that don't move: see `GroupRule`."""

    rule: int
    boundary: Boundary.ValueType
    relation: Relation.ValueType
    within: frozenset[str]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a function needs of a device. Functions with equal needs can be looked at as one.

    `source` is its home, `target` the device that was asked for, if any; `stays` if that is its home, with another VF.
    """

    source: str
    model: str
    bars: tuple[tuple[int, int], ...]
    attachments: frozenset[str]
    target: str = ""
    stays: bool = False
    groups: tuple[GroupNeed, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """A constraint, as it can be named and relaxed: a filter, and for GROUP the number of the rule, from 1."""

    filter: PlacementFilter.ValueType
    group: int = 0


Check = Callable[[Needs, Site, Snapshot], Values | None]
RuleCheck = tuple[Rule, Check]


def cordon_words(snapshot: Snapshot, part: str) -> str:
    """Return that a part of the fleet is cordoned, and why, for people."""
    reason = snapshot.cordons[part].record.reason
    return f"cordoned: {reason}" if reason else "cordoned"


def free_slots(snapshot: Snapshot, site: Site) -> int:
    """Return how many VFs of a device no function has and no migration has reserved."""
    taken = snapshot.slots_of(site.name)
    if not taken:
        return site.total_vfs
    # A device may have fewer VFs than before, by its topology, and functions beyond them.
    beyond = sum(index > site.total_vfs for index in taken) if max(taken) > site.total_vfs else 0
    return site.total_vfs - len(taken) + beyond


def _target(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    return None if needs.target in ("", site.name) else (site.name, needs.target)


def _source(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    return None if site.name != needs.source or needs.stays else (site.name, "another device, or another VF of it")


def _manufacturer(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    wanted = snapshot.sites[needs.source].manufacturer
    return None if site.manufacturer == wanted else (site.manufacturer, wanted)


def _model(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    return None if site.model == needs.model else (site.model, needs.model)


def _io_type(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    wanted = snapshot.sites[needs.source].io_type
    return None if site.io_type == wanted else (site.io_type, wanted)


def _bars(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    for index, size in needs.bars:
        if site.bars.get(index, 0) < size:
            return f"BAR {index} of {site.bars.get(index, 0)} bytes", f"at least {size}"
    return None


def _state_version(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    wanted = snapshot.sites[needs.source].state_version
    return None if site.state_version == wanted else (site.state_version, wanted)


def _free_slot(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    free = free_slots(snapshot, site)
    return None if free > 0 else (f"{max(free, 0)} of {site.total_vfs} free", "1 free")


def _attachments(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    if needs.attachments <= site.attachments:
        return None
    return ", ".join(sorted(site.attachments)) or "none", ", ".join(sorted(needs.attachments))


def _host_registered(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    return None if site.host in snapshot.registrations else (f"{site.host} not registered", "registered")


def _cordon(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
    part = snapshot.cordoned(site.name)
    return None if part is None else (f"{spoken(part)} {cordon_words(snapshot, part)}", "not cordoned")


HARDWARE: Sequence[RuleCheck] = (
    (Rule(PlacementFilter.PLACEMENT_FILTER_MANUFACTURER), _manufacturer),
    (Rule(PlacementFilter.PLACEMENT_FILTER_MODEL), _model),
    (Rule(PlacementFilter.PLACEMENT_FILTER_IO_TYPE), _io_type),
    (Rule(PlacementFilter.PLACEMENT_FILTER_BARS), _bars),
    (Rule(PlacementFilter.PLACEMENT_FILTER_STATE_VERSION), _state_version),
)

TARGET = Rule(PlacementFilter.PLACEMENT_FILTER_TARGET)
FREE_SLOT = Rule(PlacementFilter.PLACEMENT_FILTER_FREE_SLOT)

BOUNDARY_FILTERS: Mapping[Boundary.ValueType, PlacementFilter.ValueType] = {
    Boundary.BOUNDARY_HOST: PlacementFilter.PLACEMENT_FILTER_HOST,
    Boundary.BOUNDARY_PHYSICAL_ADAPTER: PlacementFilter.PLACEMENT_FILTER_PHYSICAL_ADAPTER,
    Boundary.BOUNDARY_BRIDGE: PlacementFilter.PLACEMENT_FILTER_BRIDGE,
    Boundary.BOUNDARY_PARENT_BRIDGE: PlacementFilter.PLACEMENT_FILTER_PARENT_BRIDGE,
    Boundary.BOUNDARY_POWER_DOMAIN: PlacementFilter.PLACEMENT_FILTER_POWER_DOMAIN,
}


def checks(boundaries: Iterable[BoundaryRule], groups: int) -> list[RuleCheck]:
    """Return all filters of a request, in their order. It has so many rules about groups."""
    rules = sorted(boundaries, key=lambda rule: rule.boundary)
    return [
        (TARGET, _target),
        (Rule(PlacementFilter.PLACEMENT_FILTER_SOURCE), _source),
        *HARDWARE,
        (FREE_SLOT, _free_slot),
        (Rule(PlacementFilter.PLACEMENT_FILTER_ATTACHMENTS), _attachments),
        (Rule(PlacementFilter.PLACEMENT_FILTER_HOST_REGISTERED), _host_registered),
        (Rule(PlacementFilter.PLACEMENT_FILTER_CORDON), _cordon),
        *(
            (Rule(BOUNDARY_FILTERS[rule.boundary]), _boundary(rule.boundary, rule.relation))
            for rule in rules
            if rule.relation
        ),
        *((Rule(PlacementFilter.PLACEMENT_FILTER_GROUP, number), _group(number)) for number in range(1, groups + 1)),
    ]


def first_failure(
    rules: Iterable[RuleCheck], needs: Needs, site: Site, snapshot: Snapshot
) -> tuple[Rule, Values] | None:
    """Return the first constraint that a device fails at, with the two values; None if it will do."""
    for rule, check in rules:
        values = check(needs, site, snapshot)
        if values is not None:
            return rule, values
    return None


def failures(rules: Iterable[RuleCheck], needs: Needs, site: Site, snapshot: Snapshot) -> list[tuple[Rule, Values]]:
    """Return all constraints that a device fails at, with the two values."""
    return [(rule, values) for rule, check in rules if (values := check(needs, site, snapshot)) is not None]


def group_values(relation: Relation.ValueType, within: str, others: Collection[str]) -> Values | None:
    """Return how a place `within` a boundary fails a group rule whose other functions are within `others`."""
    if relation == _SAME:
        if all(within == other for other in others):
            return None
        return within, " and ".join(sorted(others))
    return (within, f"not within {within}") if within in others else None


def _boundary(boundary: Boundary.ValueType, relation: Relation.ValueType) -> Check:
    same = relation == _SAME

    def check(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
        there, here = site.within[boundary], snapshot.sites[needs.source].within[boundary]
        return None if (there == here) is same else (there, here if same else f"other than {here}")

    return check


def _group(number: int) -> Check:
    def check(needs: Needs, site: Site, snapshot: Snapshot) -> Values | None:
        for need in needs.groups:
            if need.rule == number:
                return group_values(need.relation, site.within[need.boundary], need.within)
        return None

    return check
