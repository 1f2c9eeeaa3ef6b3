"""The contract between a simulated device and the engine that runs it.

A model is pure: it sees its memory and returns what changes, and the engine makes that durable, together with the
access's sequence, before it puts it into memory. So a model knows nothing of drivers, hosts, migrations or files; all
that it knows lies in its memory, and whoever copies that copies the device, with every command in flight.

    function's image:  0                          bar_span(bars)            + private_bytes
                       | BARs, as in the window   | the model's own memory  |

A bus master does more than answer accesses: it reads and writes its driver's main memory, interrupts, and sends frames.
What it does next is a function of its memory (`work`), so that a home that has just imported it, or a daemon that was
killed, goes on where the last step ended.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

MAX_DMA_BYTES: Final = 4096
MAX_FRAME_BYTES: Final = 1518

Store = tuple[int, bytes]
"""An offset in the function's image, and the bytes to put there."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the image that moves as a whole: `start` and `length` in bytes, multiples of 4096."""

    name: str
    start: int
    length: int


class DeviceModel(Protocol):
    """One function of a simulated device.

    The engine has checked each access: a power of two from 1 to 4096 bytes, naturally aligned. `offset` is that in the
    function's window, where the BARs lie as `vfleet.address.bar_layout` says. `memory` is the whole image. No access
    makes a model raise.
    """

    name: str
    version: int
    """Of what its memory means: state of another version is refused."""
    private_bytes: int
    """Memory of the model's own, after the BARs in the image: a multiple of 4096."""
    sections: Sequence[Section]
    """What the image consists of, by ascending start, without overlap: bytes in no section are zero, always."""
    local_memory: range
    """The image's bytes that an access, or work, touches only where it says so: they may come after the lift
    (post-copy). Empty, or a section's. An access to a BAR touches there what it reads or writes, no more."""
    keeps_local_memory: bool
    """Whether a function-level reset leaves the local memory as it is: a medium, on which a controller's reset has no
    effect."""
    plain_memory: range
    """Bytes of a BAR that are plain memory: an access there reads or writes them and does nothing else, so that the
    engine need not ask the model. No work begins by it. Empty, or a whole BAR: the grant of a driver on the same host
    (hostd/grant.py) counts on its alignment."""

    def reset(self) -> Sequence[Store]:
        """Return the stores that give the registers their initial values: an FLR zeroes all else but a medium."""

    def read(self, memory: memoryview, offset: int, length: int) -> tuple[bytes, Sequence[Store]] | None:
        """Return `length` bytes and the read's side effects; None if no BAR claims the offset."""

    def write(self, memory: memoryview, offset: int, data: bytes) -> Sequence[Store] | None:
        """Return what the write changes; None if no BAR claims the offset."""


@dataclass(frozen=True, slots=True)
class DmaRead:
    """A read of the driver's main memory: `address` is the driver's (an I/O virtual address), `length` 1 to 4096."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class DmaWrite:
    """A posted write of 1 to 4096 bytes to the driver's main memory, or to its interrupt page (MSI-X)."""

    address: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Frame:
    """An Ethernet frame, without its checksum: 14 to 1518 bytes, to the other functions on the same attachment."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Work:
    """What a bus master does next. Equal work is the same work: it holds all that tells it from other work."""

    what: Hashable
    reads: tuple[DmaRead, ...] = ()
    touches: tuple[tuple[int, int], ...] = ()
    """(offset in the image, bytes) in `local_memory` that finishing it reads or writes."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one piece of work changes and sends: durable together, sent in this order.

    At most 12 KiB of data, in at most 64 stores and 64 sends. A longer one is a fault of the device: state ERROR.
    """

    stores: Sequence[Store] = ()
    sends: Sequence[DmaWrite | Frame] = ()


@runtime_checkable
class BusMaster(DeviceModel, Protocol):
    """A model that has work of its own: queues, DMA, interrupts, frames.

    While the function runs the engine takes `work`, does its reads, takes `work` again, and if that is equal it
    calls `finish`; if not (an access came between), what was read is thrown away. No work makes a model raise, whatever
    the driver has put in its memory.
    """

    def work(self, memory: memoryview) -> Work | None:
        """Return what is to be done next, by memory alone; None until an access or a frame changes that."""

    def finish(self, memory: memoryview, work: Work, data: Sequence[bytes] | None) -> Step:
        """Return what the work does, given what its reads returned; None if one of them was a DMA fault.

        Memory is different after it: the same work does not come again for ever.
        """

    def receive(self, memory: memoryview, frame: bytes) -> Step | None:
        """Take a frame from the network; None if there is no room, and then it is offered again later."""


@runtime_checkable
class FrameSender(BusMaster, Protocol):
    """A bus master that sends frames.

    While those that it has sent fill their place, what it receives must go on: else two that send to each other would
    each wait for the other to take frames.
    """

    def work_without_frames(self, memory: memoryview) -> Work | None:
        """Return what can be done next that sends no frame, as `work` does."""
