"""What a small Python driver has: its function's registers, its main memory, and the function's interrupts.

A driver knows nothing of hosts, homes or holds. All that it must remember lies in its main memory, in an order of
stores that is right after each of them: its daemon may be killed at any instruction, and then a new driver object is
made over the same memory, whose `run` goes on. What the old one had written to registers last may or may not have
arrived (in order, each at most once), so `run` begins by writing its doorbells anew, looking at its queues, and only
then waits for interrupts.
"""

from collections.abc import Callable
from typing import Protocol

from vfleet.v1.driver_service_pb2 import WorkloadOptions


class Port(Protocol):
    """A driver's way to one function, and to its own main memory."""

    memory: memoryview
    """The driver's main memory, whole. Words that are to be stored in one piece go through `memory.cast`."""
    memory_address: int
    """Where main memory begins for the device: the address of `memory[0]` in commands, rings and buffers."""
    span_bytes: int
    """Bytes of the function's window that are mapped: its BARs as `vfleet.address.bar_layout` has them."""
    interrupt_address: int
    """The address to put into an MSI-X table entry. Its data is the number that `interrupt` is asked for, 0 to 255."""

    @property
    def is_stopping(self) -> bool:
        """Whether the workload was asked to stop: begin nothing new, and let `run` return when all is done."""

    async def read(self, offset: int, length: int) -> bytes:
        """Return what the function's registers have at an offset in its window, after all writes before it.

        Raise VfleetError ILLEGAL_STATE if no register is there, and what ends the driver's accesses (a detachment, the
        function's loss).
        """

    def write(self, offset: int, data: bytes) -> None:
        """Write to the function's registers: posted, in order, exactly once while the daemon lives. Raise as `read`.

        What went wrong with it is raised by a later call.
        """

    async def flush(self) -> None:
        """Wait until all writes so far have taken effect. Raise as `read`."""

    async def interrupt(self, data: int, timeout_s: float | None = None) -> int:
        """Wait for interrupts with this data, and return how many came since the last call; 0 after the time-out.

        Those of before the driver object was made don't count: look at the queues first.
        """

    def interrupts(self, data: int) -> int:
        """Return how many interrupts with this data came since the function was attached: durable, each once."""

    def now(self) -> float:
        """Return seconds on a monotonic clock."""

    async def pause(self, seconds: float) -> None:
        """Wait, or less if the workload is to stop; 0 lets others run."""


class Tally(Protocol):
    """Where a driver counts what it sees; the workload's report shows it."""

    def completed(self, submitted: float) -> None:
        """Count an operation as done and verified; it was submitted at `submitted` by the port's clock."""

    def resumed(self, operations: int) -> None:
        """Say how many operations were done, by main memory, before this driver object was made."""

    def lost(self, what: str) -> None:
        """Count an operation that never completed, or a frame that never came. `what` is for people."""

    def repeated(self, what: str) -> None:
        """Count an operation that completed twice."""

    def reordered(self, what: str) -> None:
        """Count an operation that completed out of order."""

    def mismatch(self, what: str) -> None:
        """Count content that is not what it should be."""

    def error(self, what: str) -> None:
        """Count an operation that the device ended with an error."""


class DeviceDriver(Protocol):
    """A small driver of one kind of device.

    Raise VfleetError INVALID_FIELD, naming the option, for options or main memory that can't do.
    """

    async def start(self) -> None:
        """Find out whether the function is the right device, and set it and main memory up from nothing.

        Raise ILLEGAL_STATE if it is another device.
        """

    async def run(self) -> None:
        """Work until the port is stopping and all is done: after `start`, or over the main memory of an earlier run."""


NewDriver = Callable[[Port, Tally, WorkloadOptions], DeviceDriver]
"""How each driver file is used: its class, by the `kind` of the workload's options."""
