"""What requests may say: names, ranges and pages, checked field by field. Pure."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from coordinator.many_moves import DEFAULT_PARALLEL, MAX_PARALLEL
from coordinator.migration import Options
from coordinator.queueing import DEFAULT_DEADLINE_MS, MAX_DEADLINE_MS, MAX_PRIORITY
from vfleet.errors import invalid_field
from vfleet.names import check_device_name, check_name
from vfleet.v1.migration_service_pb2 import LimitPolicy, MigrationOptions, MoveRequest
from vfleet.v1.placement_pb2 import Boundary, BoundaryRule, Constraints, GroupRule, Preference, Relation
from vfleet.v1.types_pb2 import TransferMode

MAX_GROUPS = 64
MAX_REASON_CHARACTERS = 200
DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

_MODES = TransferMode.items()
_POLICIES = LimitPolicy.items()
_CONTRARY = {Preference.PREFERENCE_SPREAD, Preference.PREFERENCE_PACK}

EnumT = TypeVar("EnumT", bound=int)


class PageRequest(Protocol):
    """A request for one page of a list."""

    @property
    def page_size(self) -> int:
        """At most this many; 0 for the default."""

    @property
    def page_token(self) -> str:
        """As the last page gave it; empty for the first."""


def checked_moves(moves: Sequence[MoveRequest]) -> Sequence[MoveRequest]:
    """Return the moves. Raise INVALID_FIELD if there are none, for a malformed name, or for an index without device."""
    if not moves:
        raise invalid_field("moves", [], "1 move or more")
    for index, move in enumerate(moves):
        check_name(f"moves[{index}].function", move.function)
        if move.target_device:
            check_device_name(f"moves[{index}].target_device", move.target_device)
        elif move.target_vf_index:
            raise invalid_field(f"moves[{index}].target_vf_index", move.target_vf_index, "0 without a device")
    return moves


def checked_constraints(constraints: Constraints) -> Constraints:
    """Return the constraints. Raise INVALID_FIELD for a value that isn't one, or what contradicts itself."""
    boundaries: set[Boundary.ValueType] = set()
    for index, rule in enumerate(constraints.boundaries):
        field = f"constraints.boundaries[{index}]"
        _check_rule(field, rule)
        if rule.boundary in boundaries:
            raise invalid_field(f"{field}.boundary", Boundary.Name(rule.boundary), "each boundary once")
        boundaries.add(rule.boundary)
    if len(constraints.groups) > MAX_GROUPS:
        raise invalid_field("constraints.groups", f"{len(constraints.groups)} rules", f"at most {MAX_GROUPS}")
    for index, group in enumerate(constraints.groups):
        field = f"constraints.groups[{index}]"
        _check_rule(field, group)
        names = [check_name(f"{field}.functions", name) for name in group.functions]
        if len(names) < 2 or len(set(names)) < len(names):
            raise invalid_field(f"{field}.functions", names, "two functions or more, each once")
    preferences = list(constraints.preferences)
    for preference in preferences:
        _check_chosen("constraints.preferences", preference, Preference.items())
    if len(set(preferences)) < len(preferences) or set(preferences) >= _CONTRARY:
        names = [Preference.Name(preference) for preference in preferences]
        raise invalid_field("constraints.preferences", names, "each once, and not both SPREAD and PACK")
    for name in constraints.attachments:
        check_name("constraints.attachments", name)
    return constraints


def checked_reason(reason: str) -> str:
    """Return the reason of a cordon. Raise INVALID_FIELD for one that is too long."""
    if len(reason) > MAX_REASON_CHARACTERS:
        raise invalid_field("reason", reason, f"at most {MAX_REASON_CHARACTERS} characters")
    return reason


def checked_parallel(parallel: int) -> int:
    """Return how many migrations go on at once, the default for 0. Raise INVALID_FIELD beyond the most."""
    if parallel > MAX_PARALLEL:
        raise invalid_field("parallel", parallel, f"1 to {MAX_PARALLEL}, or 0 for {DEFAULT_PARALLEL}")
    return parallel or DEFAULT_PARALLEL


def checked_priority(priority: int) -> int:
    """Return the priority of a migration. Raise INVALID_FIELD out of its range."""
    if abs(priority) > MAX_PRIORITY:
        raise invalid_field("priority", priority, f"-{MAX_PRIORITY} to {MAX_PRIORITY}")
    return priority


def checked_deadline(deadline_ms: int) -> int:
    """Return for how long a migration may be queued, 0 for the default. Raise INVALID_FIELD beyond the most."""
    if deadline_ms > MAX_DEADLINE_MS:
        raise invalid_field("deadline_ms", deadline_ms, f"1 to {MAX_DEADLINE_MS}, or 0 for {DEFAULT_DEADLINE_MS}")
    return deadline_ms


def checked_options(options: MigrationOptions) -> Options:
    """Return the options, with defaults for what is 0. Raise INVALID_FIELD for one out of its range."""
    default = Options()
    return Options(
        max_rounds=_at_most("max_rounds", options.max_rounds, 1000) or default.max_rounds,
        prepare_timeout_ms=_at_most("prepare_timeout_ms", options.prepare_timeout_ms, 86_400_000)
        or default.prepare_timeout_ms,
        hold_timeout_ms=_at_most("hold_timeout_ms", options.hold_timeout_ms, 600_000) or default.hold_timeout_ms,
        acknowledge_timeout_ms=_at_most("acknowledge_timeout_ms", options.acknowledge_timeout_ms, 10_000)
        or default.acknowledge_timeout_ms,
        mode=_known("mode", options.mode, _MODES) or default.mode,
        downtime_limit_ms=_at_most("downtime_limit_ms", options.downtime_limit_ms, 600_000),
        limit_policy=_known("limit_policy", options.limit_policy, _POLICIES) or default.limit_policy,
        bandwidth_mib_per_s=_at_most("bandwidth_mib_per_s", options.bandwidth_mib_per_s, 1 << 20),
    )


def checked_page_size(size: int) -> int:
    """Return the size of a page, the default for 0. Raise INVALID_FIELD beyond the most."""
    if size > MAX_PAGE_SIZE:
        raise invalid_field("page_size", size, f"1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}")
    return size or DEFAULT_PAGE_SIZE


def page_of(names: Iterable[str], request: PageRequest) -> tuple[list[str], str]:
    """Return the names on the page asked for, sorted, and the token of the next: the last name of this one."""
    size, after = checked_page_size(request.page_size), request.page_token
    rest = sorted(name for name in names if name > after)
    page = rest[:size]
    return page, page[-1] if len(rest) > size else ""


def checked_revision(token: str) -> int:
    """Return the revision that a page token of migrations is. Raise INVALID_FIELD for another."""
    if not token.isascii() or not token.isdecimal():
        raise invalid_field("page_token", token, "a token that a page of this list gave")
    return int(token)


def _check_rule(field: str, rule: BoundaryRule | GroupRule) -> None:
    _check_chosen(f"{field}.boundary", rule.boundary, Boundary.items())
    _check_chosen(f"{field}.relation", rule.relation, Relation.items())


def _check_chosen(field: str, value: int, names: Iterable[tuple[str, int]]) -> None:
    """Raise INVALID_FIELD for an enum's value that is not set, or that this version does not know."""
    known = {number: name for name, number in names if number}
    if value not in known:
        raise invalid_field(field, value, f"one of {', '.join(known.values())}")


def _known(field: str, value: EnumT, names: Sequence[tuple[str, EnumT]]) -> EnumT:
    """Return an enum's value. Raise INVALID_FIELD for one that this version does not know."""
    if value not in (number for _, number in names):
        raise invalid_field(f"options.{field}", value, f"one of {', '.join(name for name, _ in names)}")
    return value


def _at_most(field: str, value: int, most: int) -> int:
    if value > most:
        raise invalid_field(f"options.{field}", value, f"1 to {most}, or 0 for the default")
    return value
