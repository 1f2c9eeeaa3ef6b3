"""What requests may say: names, ranges and pages, checked field by field. Pure."""

from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

from coordinator.migration import Options
from vfleet.errors import invalid_field
from vfleet.names import check_device_name, check_name
from vfleet.v1.migration_service_pb2 import LimitPolicy, MigrationOptions, MoveRequest
from vfleet.v1.types_pb2 import TransferMode

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

_MODES = TransferMode.items()
_POLICIES = LimitPolicy.items()

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
    """Return the moves. Raise INVALID_FIELD if there are none, or for a malformed name in one."""
    if not moves:
        raise invalid_field("moves", [], "1 move or more")
    for index, move in enumerate(moves):
        check_name(f"moves[{index}].function", move.function)
        check_device_name(f"moves[{index}].target_device", move.target_device)
    return moves


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


def _known(field: str, value: EnumT, names: Sequence[tuple[str, EnumT]]) -> EnumT:
    """Return an enum's value. Raise INVALID_FIELD for one that this version does not know."""
    if value not in (number for _, number in names):
        raise invalid_field(f"options.{field}", value, f"one of {', '.join(name for name, _ in names)}")
    return value


def _at_most(field: str, value: int, most: int) -> int:
    if value > most:
        raise invalid_field(f"options.{field}", value, f"1 to {most}, or 0 for the default")
    return value
