"""A clock that moves by hand, so that a test waits for nothing."""

import asyncio
import heapq


async def settle(turns: int = 30) -> None:
    """Let all tasks run until they wait for something that only the test does."""
    for _ in range(turns):
        await asyncio.sleep(0)


class ManualClock:
    """A `vfleet.clock.Clock`. Time stands still but for `advance`."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        self._count += 1
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, self._count, woken))
        await woken

    async def advance(self, seconds: float) -> None:
        """Let time pass; whoever sleeps is woken at the moment that it chose, in order."""
        end = self.now + seconds
        await settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.now, _, woken = heapq.heappop(self._sleepers)
            if not woken.done():
                woken.set_result(None)
                await settle()
        self.now = end
        await settle()
