"""A driver's main memory, as its functions' DMA finds it: mapped here, or a virtual machine's."""

import mmap
from typing import Protocol


class MemoryBusyError(Exception):
    """Main memory can't be reached just now, and nothing was done: ask again later."""


class NotAtHandError(Exception):
    """What is to be read is not in this process, and has to be fetched."""


class Memory(Protocol):
    """Main memory, by offset. A virtual machine's has holes, and isn't there before the machine is."""

    @property
    def is_present(self) -> bool:
        """Whether it is there. If not, what is to be done to it waits."""

    def read(self, offset: int, length: int) -> bytes | None:
        """Return bytes; None if there is a hole, or its end. Raise NotAtHandError if they have to be fetched."""

    async def fetch(self, offset: int, length: int) -> bytes | None:
        """Return bytes, wherever they are, within a bounded time; None as `read` does. Raise MemoryBusyError."""

    def write(self, offset: int, data: bytes) -> bool:
        """Put bytes there, those at the end last; nothing, and return False, if there is a hole, or its end.

        Raise MemoryBusyError: it is to be written again, all of it, before anything else is.
        """


class MappedMemory:
    """Main memory that is one mapped file."""

    is_present = True

    def __init__(self, mapped: mmap.mmap) -> None:
        self._mapped = mapped

    def read(self, offset: int, length: int) -> bytes | None:
        """Return bytes; None if they don't lie within."""
        return self._mapped[offset : offset + length] if 0 <= offset <= len(self._mapped) - length else None

    async def fetch(self, offset: int, length: int) -> bytes | None:
        """Return bytes; None if they don't lie within."""
        return self.read(offset, length)

    def write(self, offset: int, data: bytes) -> bool:
        """Put bytes there. False if they don't lie within."""
        if not 0 <= offset <= len(self._mapped) - len(data):
            return False
        self._mapped[offset : offset + len(data)] = data
        return True
