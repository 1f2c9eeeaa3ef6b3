"""A guest's memory: the pieces of it that its VMM has given us to map, by the guest's physical address.

A piece comes as a descriptor that can't shrink (a sealed memfd): whoever mapped another could be killed by a VMM that
truncates it. The same goes for huge pages, which can be taken away under a map. Pieces without a descriptor are reached
by messages to the VMM.
"""

import asyncio
import fcntl
import mmap
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from hostd.memory import MemoryBusyError, NotAtHandError
from vfleet.address import PAGE_BYTES
from vfleet.errors import invalid_field

MAX_PIECES = 256
ADDRESSES = 1 << 64
_TAIL_BYTES = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of the guest's memory. `mapped` is None if it came without a descriptor."""

    start: int
    length: int
    mapped: mmap.mmap | None
    is_writable: bool

    @property
    def end(self) -> int:
        """The address after its last byte."""
        return self.start + self.length


class Messages(Protocol):
    """How pieces without a descriptor are reached, by the guest's physical address. Both raise MemoryBusyError."""

    def read(self, address: int, length: int, answered: Callable[[bytes | None], None]) -> None:
        """Call `answered` with bytes, or with None if the VMM refuses, or doesn't answer."""

    def write(self, address: int, data: bytes, *, completes: bool) -> None:
        """Put bytes there; `completes` if they are the last of what is written at once."""


class GuestMemory:
    """The pieces, without overlap. `is_present` is set once all that the VMM has given before are there.

    Without `messages` pieces that have no descriptor can't be reached.
    """

    def __init__(self) -> None:
        self.is_present = False
        self.messages: Messages | None = None
        self._pieces: list[Piece] = []
        self._starts: list[int] = []

    def add(
        self, start: int, length: int, descriptor: int | None, offset: int, limit: int, *, is_writable: bool
    ) -> None:
        """Map a piece; the same once more changes nothing. `limit` is how far main memory may reach.

        Raise INVALID_FIELD for one that isn't whole pages, overlaps another, lies beyond the limit, or can't be mapped;
        and for more than 256.
        """
        if not length or (start | length | offset) % PAGE_BYTES:
            raise invalid_field("region", f"{start:#x}+{length:#x} at {offset:#x}", f"multiples of {PAGE_BYTES}")
        if start + length > ADDRESSES:
            raise invalid_field("region", f"{start:#x}+{length:#x}", "one that ends within 64 bits")
        if self._is_known(start, length):
            return
        at = bisect_right(self._starts, start)
        if (at and self._pieces[at - 1].end > start) or (at < len(self._starts) and self._starts[at] < start + length):
            raise invalid_field("region", f"{start:#x}+{length:#x}", "one that overlaps no other")
        if len(self._pieces) >= MAX_PIECES:
            raise invalid_field("region", f"{start:#x}+{length:#x}", f"at most {MAX_PIECES} regions")
        mapped = None
        if descriptor is not None:
            if start + length > limit:
                expected = f"guest memory up to {limit:#x}: attach with more --main-memory-bytes"
                raise invalid_field("region", f"{start:#x}+{length:#x}", expected)
            mapped = _map(descriptor, length, offset, is_writable=is_writable)
        self._pieces.insert(at, Piece(start, length, mapped, is_writable))
        self._starts.insert(at, start)

    def remove(self, start: int, length: int) -> list[tuple[int, int]]:
        """Unmap all pieces within a range, and return their (start, length).

        Raise INVALID_FIELD for a range that ends inside a piece.
        """
        gone = [piece for piece in self._pieces if piece.start < start + length and start < piece.end]
        if any(piece.start < start or piece.end > start + length for piece in gone):
            raise invalid_field("region", f"{start:#x}+{length:#x}", "whole regions, as they were mapped")
        for piece in gone:
            self._pieces.remove(piece)
            self._starts.remove(piece.start)
            if piece.mapped is not None:
                piece.mapped.close()
        return [(piece.start, piece.length) for piece in gone]

    def clear(self) -> list[tuple[int, int]]:
        """Unmap all, and return their (start, length)."""
        return self.remove(0, ADDRESSES)

    def read(self, offset: int, length: int) -> bytes | None:
        """Return bytes of the guest's memory; None if they don't all lie in pieces that can be reached.

        Raise NotAtHandError if a message has to ask for them.
        """
        found: list[bytes] = []
        for piece, at, count in self._parts(offset, length):
            if not self._reaches(piece):
                return None
            if piece.mapped is None:
                raise NotAtHandError
            found.append(piece.mapped[at : at + count])
        return b"".join(found) if sum(map(len, found)) == length else None

    async def fetch(self, offset: int, length: int) -> bytes | None:
        """Return bytes of the guest's memory as `read` does, and ask for what isn't at hand. Raise MemoryBusyError."""
        messages = self.messages
        parts = list(self._parts(offset, length))
        if sum(count for _, _, count in parts) < length or not all(self._reaches(piece) for piece, _, _ in parts):
            return None
        # What is mapped is read at once: it may be unmapped before anything else is done.
        found = await asyncio.gather(*[self._fetch(*part) for part in parts])
        if self.messages is not messages:
            raise MemoryBusyError  # the connection to the holder is another: whom it asked may know nothing of it
        data = [each for each in found if each is not None]
        return b"".join(data) if len(data) == len(found) else None

    def write(self, offset: int, data: bytes) -> bool:
        """Put bytes into the guest's memory, the last four of them last. Raise MemoryBusyError.

        The guest polls what comes last (the phase of a completion, an index), and must find there what came before.
        Nothing is written, and False returned, if they don't all lie in pieces that can be written.
        """
        parts = list(self._parts(offset, len(data)))
        if sum(count for _, _, count in parts) < len(data):
            return False
        if not all(piece.is_writable and self._reaches(piece) for piece, _, _ in parts):
            return False
        for piece, at, count in parts:
            part, data = data[:count], data[count:]
            if piece.mapped is not None:
                _put(piece.mapped, at, part)
            elif self.messages is not None:
                self.messages.write(piece.start + at, part, completes=not data)
        return True

    def _reaches(self, piece: Piece) -> bool:
        return piece.mapped is not None or self.messages is not None

    def _parts(self, offset: int, length: int) -> Iterator[tuple[Piece, int, int]]:
        """Yield the pieces that a range lies in up to the first hole: piece, where in it, bytes."""
        while length and (piece := self._find(offset)) is not None:
            at = offset - piece.start
            count = min(length, piece.length - at)
            yield piece, at, count
            offset, length = offset + count, length - count

    def _fetch(self, piece: Piece, at: int, length: int) -> "asyncio.Future[bytes | None]":
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

        def answered(data: bytes | None) -> None:
            if not answer.done():
                answer.set_result(data)

        if piece.mapped is not None:
            answered(piece.mapped[at : at + length])
        elif self.messages is not None:
            self.messages.read(piece.start + at, length, answered)
        else:
            answered(None)
        return answer

    def _is_known(self, start: int, length: int) -> bool:
        piece = self._find(start)
        return piece is not None and (piece.start, piece.length) == (start, length)

    def _find(self, address: int) -> Piece | None:
        at = bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        piece = self._pieces[at]
        return piece if address < piece.end else None


def _put(mapped: mmap.mmap, at: int, data: bytes) -> None:
    if len(data) > _TAIL_BYTES:
        mapped[at : at + len(data) - _TAIL_BYTES] = data[:-_TAIL_BYTES]
        at, data = at + len(data) - _TAIL_BYTES, data[-_TAIL_BYTES:]
    mapped[at : at + len(data)] = data


def _map(descriptor: int, length: int, offset: int, *, is_writable: bool) -> mmap.mmap:
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    is_safe = seals & fcntl.F_SEAL_SHRINK and os.fstatvfs(descriptor).f_bsize == PAGE_BYTES
    if not is_safe or offset + length > os.fstat(descriptor).st_size:
        expected = "within a memfd that can't shrink (QEMU: -object memory-backend-memfd,share=on), without huge pages"
        raise invalid_field("region", f"{length:#x} bytes at {offset:#x} of its descriptor", expected)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
    try:
        return mmap.mmap(descriptor, length, flags=mmap.MAP_SHARED, prot=protection, offset=offset)
    except (OSError, ValueError) as error:
        raise invalid_field("region", f"{length:#x} bytes at {offset:#x}", f"what can be mapped ({error})") from None
