"""How far the copies of a migration's functions are, and how long their drivers would be on hold.

    estimate = what is dirty / the rate of the copy so far          (the source measures both)
             + two round trips + one transaction                    (hold and stop; apply and lift; COMMIT)

The fixed part is measured as well, on what the migration has done already: BEGIN, and the round trip of a create.
"""

from collections.abc import Iterable

from vfleet.errors import Reason, VfleetError
from vfleet.v1.migration_service_pb2 import CopyProgress
from vfleet.v1.records_pb2 import Move
from vfleet.v1.transfer_service_pb2 import ImportStateResponse

ROUND_TRIPS = 2


class Copies:
    """The progress of all copies of one migration. `commit_s` is how long one of its transactions takes."""

    def __init__(self, moves: Iterable[Move], commit_s: float) -> None:
        self._by_function = {move.function: CopyProgress(function=move.function) for move in moves}
        self._commit_s = commit_s
        self._round_trip_s = 0.0

    def progress(self) -> list[CopyProgress]:
        """Return the progress of each, in the order of the moves."""
        return list(self._by_function.values())

    def took_a_round_trip(self, seconds: float) -> None:
        """Learn how long a request to a host takes; the longest counts, since all are waited for."""
        self._round_trip_s = max(self._round_trip_s, seconds)

    @property
    def fixed_us(self) -> int:
        """The part of a blackout that no copy makes shorter."""
        return round((ROUND_TRIPS * self._round_trip_s + self._commit_s) * 1e6)

    def left_for_the_copy_us(self, limit_ms: int) -> int:
        """Return how long the last copy may take within a limit."""
        return max(limit_ms * 1000 - self.fixed_us, 0)

    def received(self, function: str, response: ImportStateResponse) -> None:
        """Take what an import says of its progress."""
        copy = CopyProgress(
            function=function,
            rounds=response.rounds,
            received_bytes=response.received_bytes,
            dirty_bytes=response.dirty_bytes,
            total_bytes=response.total_bytes,
            dirty_bytes_per_s=response.dirty_bytes_per_s,
            throttle_percent=response.throttle_percent,
        )
        if response.rounds:
            copy.estimated_blackout.FromMicroseconds(self.fixed_us + response.last_copy_us)
        self._by_function[function] = copy

    def is_missing(self, function: str, missing_bytes: int) -> None:
        """Learn how much of a function's state is still at its source, after COMMIT (post-copy)."""
        copy = CopyProgress()
        copy.CopyFrom(self._by_function[function])
        copy.missing_bytes = missing_bytes
        self._by_function[function] = copy

    def check_limit(self, limit_ms: int) -> None:
        """Raise LIMIT_EXCEEDED if a limit is given (not 0) and an estimate is above it."""
        for copy in self._by_function.values() if limit_ms else ():
            estimate_us = copy.estimated_blackout.ToMicroseconds()
            if estimate_us > limit_ms * 1000:
                raise VfleetError(
                    Reason.LIMIT_EXCEEDED,
                    f"the driver of function {copy.function!r} would be on hold for {estimate_us / 1000:.1f} ms;"
                    f" expected at most {limit_ms} ms: {copy.dirty_bytes} bytes are dirty after {copy.rounds} rounds,"
                    f" {copy.dirty_bytes_per_s} become so a second, and {self.fixed_us / 1000:.1f} ms are fixed",
                    metadata={
                        "function": copy.function,
                        "limit_ms": str(limit_ms),
                        "estimate_us": str(estimate_us),
                        "dirty_bytes_per_s": str(copy.dirty_bytes_per_s),
                    },
                )
