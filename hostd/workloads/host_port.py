"""The port of a driver on this host: its queue for the function, its main memory, and what the function sends there."""

import asyncio
from collections.abc import Callable

from hostd.dma_receiver import DmaReceiver
from hostd.driver import Driver
from hostd.sequencer import Result
from hostd.waiting import Waiting
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.limits import INTERRUPT_PAGE_ADDRESS, MAIN_MEMORY_VIRTUAL_ADDRESS
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE, ACCESS_STATUS_OK, AccessKind

LONGEST_PAUSE_S = 0.1


class HostPort:
    """A port (hostd.workloads.port.Port). Raise INVALID_FIELD if the driver has no main memory, TRANSLATION_FAULT."""

    def __init__(self, driver: Driver, function: str, clock: Clock, is_stopping: Callable[[], bool]) -> None:
        receiver = driver.receivers.get(function)
        if driver.memory is None or receiver is None:
            raise invalid_field("main_memory_bytes", 0, f"some, for the queues and buffers of driver {driver.name!r}")
        self.memory = memoryview(driver.memory)
        self.memory_address = MAIN_MEMORY_VIRTUAL_ADDRESS
        self.interrupt_address = INTERRUPT_PAGE_ADDRESS
        entry = driver.table.by_function[function]
        self.span_bytes = entry.length_bytes
        self._start = entry.virtual_address
        self._driver = driver
        self._function = function
        self._clock = clock
        self._is_stopping = is_stopping
        self._receiver: DmaReceiver = receiver
        self._seen = receiver.all_interrupts()
        self._last: Waiting | None = None
        self._failure: VfleetError | None = None

    @property
    def is_stopping(self) -> bool:
        """Whether the workload was asked to stop."""
        return self._is_stopping()

    async def read(self, offset: int, length: int) -> bytes:
        """Return what is at an offset in the function's window, after all writes before it."""
        result = await self._submit(ACCESS_KIND_READ, offset, length, b"").answer
        self._check(offset, result)
        self._raise_failure()
        return result[1]

    def write(self, offset: int, data: bytes) -> None:
        """Write to the function's window: posted."""
        self._raise_failure()
        self._last = self._submit(ACCESS_KIND_WRITE, offset, len(data), data)
        self._last.answer.add_done_callback(lambda answer: self._written(offset, answer))

    async def flush(self) -> None:
        """Wait until all writes so far have taken effect."""
        if self._last is not None:
            await asyncio.wait([self._last.answer])
        # The callback that notes what went wrong comes after it.
        await asyncio.sleep(0)
        self._raise_failure()

    async def interrupt(self, data: int, timeout_s: float | None = None) -> int:
        """Wait for interrupts, and return how many came since the last call; 0 after the time-out."""
        self._raise_failure()
        seen = self._seen[data]
        try:
            async with asyncio.timeout(timeout_s):
                self._seen[data] = await self._receiver.interrupted_since(data, seen)
        except TimeoutError:
            self._raise_failure()
            return 0
        return self._seen[data] - seen

    def interrupts(self, data: int) -> int:
        """Return how many interrupts came since the function was attached."""
        return self._receiver.interrupts(data)

    def now(self) -> float:
        """Return seconds on a monotonic clock."""
        return self._clock.monotonic()

    async def pause(self, seconds: float) -> None:
        """Wait, or less if the workload is to stop."""
        until = self.now() + seconds
        await self._clock.sleep(0)
        while (left_s := until - self.now()) > 0 and not self.is_stopping:
            await self._clock.sleep(min(left_s, LONGEST_PAUSE_S))

    def close(self) -> None:
        """Let go of the driver's main memory."""
        self.memory.release()

    def _submit(self, kind: AccessKind.ValueType, offset: int, length: int, data: bytes) -> Waiting:
        if not 0 <= offset <= self.span_bytes - length:
            raise invalid_field("offset", offset, f"0 to {self.span_bytes - length}, within the function's window")
        access = Waiting(kind, self._start + offset, length, data)
        self._driver.queue(self._function).submit(access)
        return access

    def _written(self, offset: int, answer: "asyncio.Future[Result]") -> None:
        try:
            self._check(offset, answer.result())
        except VfleetError as error:
            self._failure = self._failure or error

    def _check(self, offset: int, result: Result) -> None:
        if result[0] != ACCESS_STATUS_OK:
            raise VfleetError(Reason.ILLEGAL_STATE, f"function {self._function!r} has no register at {offset:#x}")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
