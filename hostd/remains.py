"""The memory of instances that are gone, given back to the system a piece at a time.

Its files have no names any more, and nobody looks into it: to free a gigabyte at once takes the system a tenth of a
second, in which the daemon would serve nobody. If the daemon is killed before, the system frees it all.
"""

import asyncio
import contextlib
import mmap
from collections import deque

from vfleet.clock import Clock

PIECE_BYTES = 4 << 20


class Remains:
    """Maps of deleted files, in the order in which they go."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._maps: deque[mmap.mmap] = deque()
        self._added = asyncio.Event()

    def add(self, mapped: mmap.mmap) -> None:
        """Take a map that nobody uses any more. One that is small goes at once."""
        if len(mapped) <= PIECE_BYTES:
            mapped.close()
            return
        self._maps.append(mapped)
        self._added.set()

    async def run(self) -> None:
        """Free whatever is here, and will be, for ever."""
        while True:
            await self._added.wait()
            while self._maps:
                await self._free(self._maps[0])
                self._maps.popleft().close()
            self._added.clear()

    def close(self) -> None:
        """Free the rest at once."""
        while self._maps:
            self._maps.popleft().close()

    async def _free(self, mapped: mmap.mmap) -> None:
        # A file system without holes says so; then its whole file goes at once.
        with contextlib.suppress(OSError):
            for start in range(0, len(mapped), PIECE_BYTES):
                mapped.madvise(mmap.MADV_REMOVE, start, min(PIECE_BYTES, len(mapped) - start))
                await self._clock.sleep(0)
