"""Clock and delays as arguments.

Logic never takes the time, or waits, by itself: it is given a `Clock`, so that a simulation can replace it. Timeouts
are `asyncio.timeout`, which follows the event loop's own clock; the simulation runs on a loop with virtual time.
Randomness is a `random.Random` that is passed in the same way.
"""

import asyncio
import time
from collections.abc import Iterator
from random import Random
from typing import Protocol


class Clock(Protocol):
    """What logic may know of time."""

    def monotonic(self) -> float:
        """Return seconds on a clock that never goes back; for durations and deadlines."""

    def time(self) -> float:
        """Return seconds since 1970; for stamps that people read and deadlines that outlive the process."""

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds`; 0 lets other tasks run."""


class SystemClock:
    """The clock of the machine."""

    def monotonic(self) -> float:
        """Return the machine's monotonic clock, in seconds."""
        return time.monotonic()

    def time(self) -> float:
        """Return the machine's wall clock, in seconds since 1970."""
        return time.time()

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds`."""
        await asyncio.sleep(seconds)


def backoff_delays(random: Random, first_s: float, longest_s: float) -> Iterator[float]:
    """Yield for ever how long to wait before each retry, in seconds.

    The ceiling doubles from `first_s` to `longest_s`; each delay lies between half the ceiling and the ceiling, so that
    clients that failed together don't return together.
    """
    ceiling_s = first_s
    while True:
        yield ceiling_s * random.uniform(0.5, 1.0)
        ceiling_s = min(2 * ceiling_s, longest_s)
