"""A clock that moves by hand, so that a test waits for nothing."""

import asyncio
import heapq
from collections.abc import Coroutine
from typing import TypeVar

MAX_STEPS = 1000

ResultT = TypeVar("ResultT")


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

    async def until_done(self, work: Coroutine[None, None, ResultT], step_s: float) -> ResultT:
        """Let time pass, a step after the other, until `work` is done. Fail if it still is not after 1000 steps."""
        working = asyncio.create_task(work)
        for _ in range(MAX_STEPS):
            if working.done():
                return working.result()
            await self.advance(step_s)
        working.cancel()
        raise AssertionError(f"it still goes on after {MAX_STEPS * step_s} s")
