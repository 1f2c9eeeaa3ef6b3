"""When something that failed is tried again: after growing pauses, a bounded number of times, if it is worth it."""

from random import Random

from vfleet.clock import backoff_delays
from vfleet.errors import Reason
from vfleet.failure import is_passing

MAX_TRIES = 5
FIRST_S = 0.5
LONGEST_S = 8.0


class Retries:
    """The tries of one thing. `due_s` is when the next may be made, on the monotonic clock; `why` is what kept it."""

    def __init__(self, random: Random) -> None:
        self.due_s = 0.0
        self.failures = 0
        self.why = ""
        self._delays = backoff_delays(random, FIRST_S, LONGEST_S)

    def failed(self, cause: Reason | None, now_s: float) -> bool:
        """Note a failure, as `vfleet.failure` knows its cause; return whether it is to be tried again."""
        self.failures += 1
        self.due_s = now_s + next(self._delays)
        return is_passing(cause) and self.failures < MAX_TRIES

    def put_off(self, pause_s: float, now_s: float) -> None:
        """Note that it has to wait, which is no failure."""
        self.due_s = now_s + pause_s
