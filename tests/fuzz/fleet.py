"""A fleet for a fuzzer: the simulation's, at peace, in which whatever nobody foresaw is found."""

import gc
import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from unittest import mock

from simulation.vopr.loop import StuckError
from simulation.vopr.operators import set_up
from simulation.vopr.processes import Process
from simulation.vopr.world import World, _sweep

from coordinator.tasks import Tasks
from hostd.guest import holder_link
from vfleet.errors import Reason, VfleetError

ADDRESSES = tuple(f"{name}:1" for name in ("c1", "c2", "h1", "h2", "h3"))


class FoundError(Exception):
    """Something that nobody foresaw."""


def in_a_fleet(play: Callable[[World], Awaitable[None]]) -> None:
    """Set a fleet up, play, and raise what was found: defects that were caught somewhere, and processes that ended."""
    gc.disable()
    gc.freeze()
    try:
        found = _played(World(0, verbose=False), play)
    finally:
        # What processes say that end in the middle of things is nothing.
        logging.disable(logging.CRITICAL)
        _sweep()
        logging.disable(logging.NOTSET)
    if found:
        raise FoundError(*found) from next((each for each in found if isinstance(each, Exception)), None)


def _played(world: World, play: Callable[[World], Awaitable[None]]) -> list[object]:
    async def run() -> None:
        for process in (*world.hosts.values(), *world.coordinators.values()):
            process.start()
        await set_up(world)
        # What the simulation checks holds where nobody lies.
        world.etcd.observers.clear()
        world.network.observe = lambda *_: lambda _: None
        await play(world)

    with _watching() as found:
        try:
            world.loop.run(run())
        except StuckError as stuck:
            found.append(stuck)
        # What comes later is of the end of the simulation, in the middle of things.
        return list(found)


@contextmanager
def _watching() -> Iterator[list[object]]:
    """Collect what is logged as nobody's fault but ours, what ends a daemon's task, and what ends a daemon."""
    found: list[object] = []
    ended, live = Tasks._ended, Process._live

    def seen_ended(self, task) -> None:
        if not task.cancelled():
            _note(found, task.exception())
        ended(self, task)

    async def seen_live(self, life) -> None:
        try:
            await live(self, life)
        except Exception as error:
            _note(found, error)
            raise

    def seen_logged(record: logging.LogRecord) -> bool:
        if record.exc_info:
            found.append(record.exc_info[1])
        return False

    logging.root.addFilter(seen_logged)
    handler = logging.NullHandler()
    handler.addFilter(seen_logged)
    logging.root.addHandler(handler)
    try:
        with (
            mock.patch.object(Tasks, "_ended", seen_ended),
            mock.patch.object(Process, "_live", seen_live),
            mock.patch.object(holder_link, "start", _no_holder),
        ):
            yield found
    finally:
        logging.root.removeHandler(handler)
        logging.root.removeFilter(seen_logged)


def _note(found: list[object], error: BaseException | None) -> None:
    if isinstance(error, Exception) and not isinstance(error, VfleetError):
        found.append(error)


async def _no_holder(*_: object) -> None:
    raise VfleetError(Reason.HOST_UNAVAILABLE, "a fuzzer starts no processes")
