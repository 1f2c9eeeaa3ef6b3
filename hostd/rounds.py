r"""How the rounds of a copy go while the function runs: when they end, how fast they are, how much it is slowed down.

    a round has ended --> few pages are dirty, or they don't get fewer --> ready: the source waits to be stopped
                     \-> they get fewer: another round
                     \-> they don't, and the last copy would be longer than its limit: slow the function, another round

The estimate is what is dirty over the rate of the rounds so far. Rounds never go on for ever: `max_rounds` bounds them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from vfleet.clock import Clock
from vfleet.v1.transfer_service_pb2 import CopyOptions

FEW_DIRTY_BYTES = 256 << 10  # cheaper to send while stopped than to chase in another round
CONVERGES_BELOW = 0.75  # of what was dirty a round before
ASSUMED_BYTES_PER_S = 100 << 20  # before anything was sent

THROTTLE_STEPS_PERCENT = (20, 40, 60, 80, 90)
THROTTLE_SLICE_S = 0.02
THROTTLE_SHORTEST_S = 0.0005  # the end of a slice, as it was computed, may be a moment before it
PACE_LONGEST_PAUSE_S = 0.05


class Throttle:
    """Lets a function work in only a part of each slice of time; whoever wants more waits for the next slice."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.percent = 0

    def blocks(self) -> bool:
        """Return whether the function has to wait now."""
        return self._left_s() > 0

    async def opened(self) -> None:
        """Wait until it doesn't."""
        while (left_s := self._left_s()) > 0:
            await self._clock.sleep(max(left_s, THROTTLE_SHORTEST_S))

    def _left_s(self) -> float:
        phase_s = self._clock.monotonic() % THROTTLE_SLICE_S
        is_open = phase_s < THROTTLE_SLICE_S * (100 - self.percent) / 100
        return 0.0 if is_open else THROTTLE_SLICE_S - phase_s


class Pace:
    """Keeps a copy below a bandwidth, in bytes a second; 0 for no bound."""

    def __init__(self, clock: Clock, bandwidth_bytes_per_s: int) -> None:
        self._clock = clock
        self._bandwidth = bandwidth_bytes_per_s
        self._due_s = clock.monotonic()

    async def sent(self, count_bytes: int, is_bound: Callable[[], bool] = lambda: True) -> None:
        """Wait until these bytes may have been sent, or `is_bound` says that the bandwidth doesn't count any more.

        Other tasks have their turn in any case.
        """
        await self._clock.sleep(0)
        if not self._bandwidth:
            return
        # Time that was not used is lost but for a moment's.
        earliest_s = self._clock.monotonic() - PACE_LONGEST_PAUSE_S
        self._due_s = max(self._due_s, earliest_s) + count_bytes / self._bandwidth
        while is_bound() and (left_s := self._due_s - self._clock.monotonic()) > 0:
            await self._clock.sleep(min(left_s, PACE_LONGEST_PAUSE_S))


@dataclass(slots=True)
class Rounds:
    """What is known of the rounds so far, and what follows from it. Pure."""

    options: CopyOptions
    number: int = 0
    throttle_percent: int = 0
    is_ready: bool = False
    dirty_bytes_per_s: int = 0
    dirty_bytes: int = 0
    _sent_bytes: int = 0
    _sending_s: float = 0.0
    _before_bytes: int = 0

    def sent(self, count_bytes: int, seconds: float) -> None:
        """Count bytes, and how long their sending took, without pauses."""
        self._sent_bytes += count_bytes
        self._sending_s += seconds

    @property
    def last_copy_us(self) -> int:
        """How long the copy of what is dirty would take."""
        measured = self._sent_bytes / self._sending_s if self._sent_bytes and self._sending_s else ASSUMED_BYTES_PER_S
        return round(self.dirty_bytes / measured * 1e6)

    def end(self, dirty_bytes: int, seconds: float, *, is_serving: bool) -> None:
        """Take it that a round of so many seconds has ended, with so much dirty, and decide what follows."""
        self.number += 1
        self._before_bytes, self.dirty_bytes = self.dirty_bytes, dirty_bytes
        self.dirty_bytes_per_s = round(dirty_bytes / seconds) if seconds > 0 else 0
        within = not self.options.has_limit or self.last_copy_us <= self.options.last_copy_limit_us
        converges = self.number == 1 or dirty_bytes < CONVERGES_BELOW * self._before_bytes
        is_enough = within and (dirty_bytes <= FEW_DIRTY_BYTES or not converges)
        if self.is_ready or is_enough or not is_serving or self.number >= self.options.max_rounds:
            self.is_ready = True
        elif not converges:
            self.throttle_percent = next((p for p in THROTTLE_STEPS_PERCENT if p > self.throttle_percent), 90)
