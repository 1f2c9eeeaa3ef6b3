"""Virtual time: an asyncio loop whose clock jumps to the next timer, and processes that can be killed and stopped.

Every callback belongs to the process in whose context it was made. A killed process's callbacks never run again, at
whatever await they are; a stopped one's wait until it goes on, while time passes. Nothing depends on addresses or on
Python's hash seed, so the same program makes the same run.
"""

import asyncio
import contextvars
import heapq
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

MAX_CALLBACKS = 3_000_000


class Killed(BaseException):  # no error of the program's: the process is no more
    """Unwinds a process that was killed in the middle of a step. Nothing that it does meanwhile has an effect."""


class StuckError(Exception):
    """Nothing is left to happen, or what happens never ends."""


class Life:
    """One process, from its start to its end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_alive = True
        self.is_stopped = False
        self.deferred: list[_Callback] = []
        self.kept: list[asyncio.Task[Any]] = []
        self.context = contextvars.copy_context()
        self.context.run(LIFE.set, self)
        self.at_death: dict[Callable[[], None], None] = {}

    async def running(self) -> None:
        """Wait here while the process is stopped: before it sends anything, since a step can't be stopped halfway."""
        self.check()
        if self.is_stopped:
            await asyncio.sleep(0)

    def check(self) -> None:
        """Unwind whoever calls this after the process has ended."""
        if not self.is_alive:
            raise Killed


LIFE: contextvars.ContextVar[Life | None] = contextvars.ContextVar("LIFE", default=None)


class _Task(asyncio.Task):
    """A task that sets order by its number, not its address."""

    def __init__(self, coro: Coroutine[Any, Any, Any], number: int, **options: Any) -> None:
        self.number = number
        context = options.get("context")
        self.life = LIFE.get() if context is None else context.get(LIFE)
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self.number


class _Future(asyncio.Future):
    def __init__(self, number: int, loop: asyncio.AbstractEventLoop) -> None:
        self.number = number
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self.number


class _Callback:
    """What asyncio's handles are, without what only its own loops need: there are tens of thousands in a run."""

    __slots__ = ("args", "callback", "context", "is_cancelled")

    def __init__(
        self, callback: Callable[..., object], args: tuple[object, ...], context: contextvars.Context | None
    ) -> None:
        self.callback = callback
        self.args = args
        self.context = contextvars.copy_context() if context is None else context
        self.is_cancelled = False

    def cancel(self) -> None:
        """As asyncio's."""
        self.is_cancelled = True
        self.args = ()

    def cancelled(self) -> bool:
        """As asyncio's."""
        return self.is_cancelled


class SimulatedLoop(asyncio.BaseEventLoop):
    """The loop. `time()` is virtual and begins at 0."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._numbers = itertools.count(1)
        self._timers: list[tuple[float, int, _Callback]] = []
        self._is_over = False
        self.callbacks = 0
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        """Return virtual seconds."""
        return self._now

    def create_future(self) -> asyncio.Future[Any]:
        """Return a future with a number."""
        return _Future(next(self._numbers), self)

    # asyncio's own check, for every callback, what can't be here; and its timers are compared in Python.

    def call_soon(self, callback, *args, context=None):
        """As asyncio's; after the end nothing is called any more."""
        handle = _Callback(callback, args, context)
        if not self._is_over:
            self._ready.append(handle)
        return handle

    def call_at(self, when, callback, *args, context=None):
        """As asyncio's, in order of time and then of the calls; after the end nothing is called any more."""
        timer = _Callback(callback, args, context)
        if not self._is_over:
            heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_later(self, delay, callback, *args, context=None):
        """As asyncio's."""
        return self.call_at(self._now + delay, callback, *args, context=context)

    call_soon_threadsafe = call_soon

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Pass over what is only said of tasks that ended with their process."""

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        """Run `main` to its end, and end everything else with it."""
        try:
            return self.run_until_complete(main)
        finally:
            tasks = asyncio.all_tasks(self)
            self._is_over = True
            self._ready.clear()
            self._timers.clear()
            for task in tasks:
                task._log_destroy_pending = False
            self.close()

    def start(self, life: Life, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task of a process."""
        return self.create_task(coro, context=life.context.copy())

    def kill(self, life: Life) -> None:
        """End a process where it stands."""
        if not life.is_alive:
            return
        life.is_alive = False
        # Kept, so that no finally block of theirs runs before the end of the simulation.
        life.kept = [task for task in asyncio.all_tasks(self) if task.life is life]
        for task in life.kept:
            task._log_destroy_pending = False
        for tell in list(life.at_death):
            tell()

    def stop_life(self, life: Life) -> None:
        """Stop a process, as SIGSTOP does."""
        life.is_stopped = True

    def continue_life(self, life: Life) -> None:
        """Let a stopped process go on."""
        life.is_stopped = False
        self._ready.extend(life.deferred)
        life.deferred = []

    def _make_task(self, loop, coro, **options) -> asyncio.Task[Any]:
        return _Task(coro, next(self._numbers), loop=loop, **options)

    def _run_once(self) -> None:
        ready, timers = self._ready, self._timers
        if not ready:
            while timers and timers[0][2].is_cancelled:
                heapq.heappop(timers)
            if not timers:
                raise StuckError("nothing is left to happen")
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        self.callbacks += len(ready)
        if self.callbacks > MAX_CALLBACKS:
            raise StuckError(f"no end after {MAX_CALLBACKS} callbacks, at {self._now:.3f} s")
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.is_cancelled:
                continue
            life = handle.context.get(LIFE)
            if life is not None and not life.is_alive:
                continue
            if life is not None and life.is_stopped:
                life.deferred.append(handle)
                continue
            try:
                handle.context.run(handle.callback, *handle.args)
            except (SystemExit, KeyboardInterrupt):
                raise
            except BaseException:  # noqa: BLE001  # a process that was killed ends in the middle of things
                pass

    def _process_events(self, event_list: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass
