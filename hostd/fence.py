"""The fence: per function, the highest attempt that this host has seen, and whether it has ended here. Durable.

A lower attempt is refused, whatever it asks (invariant 9). A preparatory request of an attempt that has ended here is
refused as well; a consequence ends its attempt.
"""

from hostd.ledger import Ledger
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.names import check_name
from vfleet.v1.host_records_pb2 import Fence
from vfleet.v1.types_pb2 import Attempt

_KIND = "fence"

AttemptOrder = tuple[int, int]


def order_of(attempt: Attempt) -> AttemptOrder:
    """Return what attempts are compared by: the fleet generation first, then the revision."""
    return attempt.fleet_generation, attempt.revision


class Fences:
    """The fences of all functions that this host has heard of."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        # As they are in the ledger, by function.
        self._fences = dict(ledger.items(_KIND, Fence))
        # How often, since the daemon's start, a fence has changed, or something was done under one that counts as much.
        self.changes = 0

    def prepare(self, function: str, attempt: Attempt) -> None:
        """Admit a preparatory request. Raise STALE_ATTEMPT if the attempt is over here, or lower than one seen.

        Raise INVALID_FIELD if `function` or `attempt` is none at all.
        """
        fence = self._check(function, attempt)
        if fence is not None and fence.attempt == attempt:
            if fence.ended:
                raise _stale(function, attempt, "has ended on this host")
            return
        self._put(function, Fence(attempt=attempt))

    def conclude(self, function: str, attempt: Attempt) -> None:
        """Admit a consequence, and end its attempt here. Raise STALE_ATTEMPT if it is lower than one seen.

        Raise INVALID_FIELD if `function` or `attempt` is none at all.
        """
        fence = self._check(function, attempt)
        if fence is None or fence.attempt != attempt or not fence.ended:
            self._put(function, Fence(attempt=attempt, ended=True))

    def end(self, function: str, attempt: Attempt) -> None:
        """End an attempt whose decision is known here. One that is lower than one seen is over already."""
        fence = self._fences.get(function)
        if fence is None or order_of(attempt) >= order_of(fence.attempt):
            self._put(function, Fence(attempt=attempt, ended=True))

    def highest(self) -> AttemptOrder:
        """Return the highest attempt seen for any function; zeros if there is none."""
        return max((order_of(fence.attempt) for fence in self._fences.values()), default=(0, 0))

    def _put(self, function: str, fence: Fence) -> None:
        self._ledger.put(_KIND, function, fence)
        self._fences[function] = fence
        self.changes += 1

    def _check(self, function: str, attempt: Attempt) -> Fence | None:
        check_name("function", function)
        if attempt.fleet_generation < 1 or attempt.revision < 1:
            raise invalid_field("attempt", _show(attempt), "a fleet generation and a revision, each from 1 on")
        fence = self._fences.get(function)
        if fence is not None and order_of(attempt) < order_of(fence.attempt):
            raise _stale(function, attempt, f"is lower than {_show(fence.attempt)}, which this host has seen")
        return fence


def _stale(function: str, attempt: Attempt, why: str) -> VfleetError:
    return VfleetError(
        Reason.STALE_ATTEMPT,
        f"attempt {_show(attempt)} on function {function!r} {why}",
        metadata={"function": function, "attempt": _show(attempt)},
    )


def _show(attempt: Attempt) -> str:
    return f"{attempt.fleet_generation}.{attempt.revision}"
