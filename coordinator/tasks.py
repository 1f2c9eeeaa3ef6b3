"""How work is done at once: groups that fail as one, deadlines that say what was late, tasks that end together."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

from vfleet.errors import Reason, VfleetError

CANCEL_AGAIN_S = 1.0

ResultT = TypeVar("ResultT")


async def together(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Do all at once; the first failure cancels the others and is raised as it is."""
    several = list(works)
    if len(several) == 1:
        return await several[0]
    try:
        async with asyncio.TaskGroup() as group:
            for work in several:
                group.create_task(work)
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return None


async def first_of(works: Iterable[Coroutine[None, None, None]]) -> None:
    """Start all, wait until one has ended, however it does, and cancel the others."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def within(timeout_ms: int, what: str) -> AsyncGenerator[None, None]:
    """Raise LIMIT_EXCEEDED, saying that `what` was not reached, if the block takes longer than `timeout_ms`."""
    try:
        async with asyncio.timeout(timeout_ms / 1000):
            yield
    except TimeoutError:
        raise VfleetError(Reason.LIMIT_EXCEEDED, f"{timeout_ms} ms passed before {what}") from None


class Tasks:
    """Tasks that end together. Nobody has to wait for one: its failure is its own."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[object]] = set()

    def spawn(self, work: Coroutine[None, None, ResultT]) -> asyncio.Task[ResultT]:
        """Start `work`."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Cancel all and wait until they have ended, cancelling again what has swallowed it."""
        while self._tasks:
            for task in list(self._tasks):
                task.cancel()
            await asyncio.wait(list(self._tasks), timeout=CANCEL_AGAIN_S)

    def _ended(self, task: asyncio.Task[object]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here too, in case whoever waited for it has gone
