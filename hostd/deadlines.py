"""When something that waits for a decision is to wait no longer, so that whoever looks after that need not look before.

Most deadlines are set later than the one that is waited for, and withdrawn before they come; neither wakes anybody.
"""

import asyncio


class Deadlines:
    """The deadlines of one kind of thing, each in seconds since 1970, 0 for none. `sooner` is set by an earlier one."""

    def __init__(self) -> None:
        self.sooner = asyncio.Event()
        self._awaited: float | None = None

    def note(self, deadline: float) -> None:
        """Learn that something has got a deadline, or (0) has none."""
        if deadline and (self._awaited is None or deadline < self._awaited):
            self._awaited = deadline
            self.sooner.set()

    def wait_for(self, deadline: float | None) -> None:
        """Take it that this is the earliest, and that somebody waits for it."""
        self._awaited = deadline
        self.sooner.clear()
