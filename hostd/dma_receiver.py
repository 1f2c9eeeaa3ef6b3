"""A driver's host's side of DMA: what a function writes to the driver's main memory, and its interrupts. Durable.

    file of an attachment:  | attachment, last sequence, interrupts by vector | redo record |

The function numbers its writes, and each takes effect once: the redo record (what goes where) is written first, then
the effect, and the sequence last. A daemon that is killed in between and comes back does the rest before anybody can
look into the memory; so the driver never sees a write that is applied again later, over something of its own.
"""

import asyncio
import mmap
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Final

from hostd.ledger import Ledger
from hostd.memory import Memory, MemoryBusyError
from hostd.models.base import MAX_DMA_BYTES
from hostd.models.msix import MAX_VECTORS
from hostd.translation import Entry
from vfleet.address import PAGE_BYTES, Location
from vfleet.errors import VfleetError
from vfleet.limits import INTERRUPT_PAGE_ADDRESS
from vfleet.v1.fabric_service_pb2 import DmaAttachment, DmaRead, DmaWindow
from vfleet.v1.host_records_pb2 import DriverRecord

_LAST = 3
_COUNTS = 256
_REDO_BYTES = 2 * PAGE_BYTES
_FILE_BYTES: Final = PAGE_BYTES + _REDO_BYTES
_REDO_HEAD = struct.Struct("<IIQII")  # CRC-32, bytes of data, sequence, what, where
_MEMORY, _INTERRUPT = 1, 2


Interrupted = Callable[[int, int], None]
"""Called with the vector and how many of it there were."""


class DmaReceiver:
    """What one attachment of a driver to a function has received. Opening it finishes what a kill left begun."""

    def __init__(self, mapped: mmap.mmap, memory: Memory, window: DmaWindow, new_attachment: DmaAttachment) -> None:
        """Take the attachment's file, and the driver's main memory, which is at `window.base`.

        A file that is new gets `new_attachment`; else the attachment is the one that it was made with.
        """
        self.interrupted: Interrupted | None = None
        self.faults = 0
        self.is_cut_off = False
        self._reached: list[tuple[int, asyncio.Event]] = []
        self._ended: VfleetError | None = None
        self._mapped = mapped
        self._bytes = memoryview(mapped)
        self._words = self._bytes.cast("Q")
        self._memory = memory
        self._came: dict[int, asyncio.Event] = {}
        if not self._words[1]:
            # The revision, which is never 0, says that the rest is there.
            self._words[0], self._words[2] = new_attachment.fleet_generation, new_attachment.session
            self._words[1] = new_attachment.revision
        self.attachment: Final = DmaAttachment(
            fleet_generation=self._words[0], revision=self._words[1], session=self._words[2]
        )
        self.window: Final = DmaWindow(
            attachment=self.attachment,
            base=window.base,
            length_bytes=window.length_bytes,
            from_zero=window.from_zero,
        )
        self._base = window.base
        self._interrupt_page = window.base >> 32 << 32 | INTERRUPT_PAGE_ADDRESS
        self._length = window.length_bytes
        self._is_redone = False
        if memory.is_present:
            self._try_to_redo()

    @property
    def last(self) -> int:
        """The last sequence that has taken effect; 0 for none."""
        value: int = self._words[_LAST]
        return value

    @property
    def accepts(self) -> bool:
        """Whether writes and reads may come: the main memory is there, and nobody has cut it off (`is_cut_off`)."""
        return not self.is_cut_off and self._memory.is_present and (self._is_redone or self._try_to_redo())

    def skip_to(self, sequence: int) -> None:
        """Let no write up to a sequence take effect any more: a reset of the function has cancelled them."""
        if sequence > self.last:
            self._advance(sequence)

    async def reached(self, sequence: int) -> None:
        """Wait until the write with this sequence has taken effect, or is cancelled; for ever if none comes."""
        if sequence > self.last:
            event = asyncio.Event()
            self._reached.append((sequence, event))
            await event.wait()

    def interrupts(self, vector: int) -> int:
        """Return how many interrupts of a vector, 0 to 255, came so far. Raise as `interrupted_since` does."""
        if self._ended is not None:
            raise self._ended
        return self._count(vector)

    def all_interrupts(self) -> list[int]:
        """Return how many interrupts came so far, by vector."""
        return list(self._words[_COUNTS : _COUNTS + MAX_VECTORS])

    async def interrupted_since(self, vector: int, seen: int) -> int:
        """Wait until more interrupts of a vector came than `seen`, and return how many came so far.

        Raise what no more will come for, once `end` has said so.
        """
        while (came := self.interrupts(vector)) <= seen:
            await self._came.setdefault(vector, asyncio.Event()).wait()
        return came

    def end(self, error: VfleetError | None) -> None:
        """Let nobody wait for interrupts that won't come; None: they may come again."""
        self._ended = error
        for came in self._came.values():
            came.set()
        self._came.clear()

    def write(self, sequence: int, address: int, data: bytes) -> None:
        """Apply the write with the next sequence, if it `accepts`. One that goes nowhere is counted, and done.

        Raise MemoryBusyError: then it is the next still.
        """
        offset = address - self._base
        if data and self._is_interrupt(address, data):
            vector = int.from_bytes(data, "little")
            count = self._count(vector) + 1
            self._record(sequence, _INTERRUPT, vector, count.to_bytes(8, "little"))
            self._words[_COUNTS + vector] = count
            self._advance(sequence)
            self._tell(vector, count)
            return
        if data:
            is_within = 0 <= offset <= self._length - len(data)
            if is_within:
                self._record(sequence, _MEMORY, offset, data)
            self.faults += not (is_within and self._memory.write(offset, data))
        self._advance(sequence)

    def read(self, reads: Sequence[DmaRead]) -> list[bytes] | None:
        """Return what is in main memory; None, a DMA fault, if one of the reads isn't within it.

        Raise NotAtHandError if it has to be fetched.
        """
        found: list[bytes] = []
        for read in reads:
            data = self._memory.read(read.address - self._base, read.length_bytes)
            if data is None:
                return None
            found.append(data)
        return found

    async def fetch(self, reads: Sequence[DmaRead]) -> list[bytes] | None:
        """Return what is in main memory, wherever that is, as `read` does. Raise MemoryBusyError."""
        fetched = (self._memory.fetch(read.address - self._base, read.length_bytes) for read in reads)
        found = await asyncio.gather(*fetched)
        data = [each for each in found if each is not None]
        return data if len(data) == len(found) else None

    def close(self) -> None:
        """Unmap the file."""
        self._words.release()
        self._bytes.release()
        self._mapped.close()

    def _advance(self, sequence: int) -> None:
        self._words[_LAST] = sequence
        if self._reached:
            for wanted, event in self._reached:
                if wanted <= sequence:
                    event.set()
            self._reached = [(wanted, event) for wanted, event in self._reached if wanted > sequence]

    def _count(self, vector: int) -> int:
        value: int = self._words[_COUNTS + vector]
        return value

    def _is_interrupt(self, address: int, data: bytes) -> bool:
        page = self._interrupt_page
        return page <= address < page + PAGE_BYTES and len(data) == 4 and int.from_bytes(data, "little") < MAX_VECTORS

    def _tell(self, vector: int, count: int) -> None:
        came = self._came.pop(vector, None)
        if came is not None:
            came.set()
        if self.interrupted is not None:
            self.interrupted(vector, count)

    def _record(self, sequence: int, what: int, where: int, data: bytes) -> None:
        record = _REDO_HEAD.pack(0, len(data), sequence, what, where)[4:] + data
        self._bytes[PAGE_BYTES : PAGE_BYTES + len(record) + 4] = zlib.crc32(record).to_bytes(4, "little") + record

    def _try_to_redo(self) -> bool:
        """Do the rest of a write that a kill left begun. Return False if it is to be done still."""
        crc, length, sequence, what, where = _REDO_HEAD.unpack_from(self._bytes, PAGE_BYTES)
        start = PAGE_BYTES + _REDO_HEAD.size
        is_whole = length <= MAX_DMA_BYTES and zlib.crc32(self._bytes[PAGE_BYTES + 4 : start + length]) == crc
        if is_whole and sequence == self.last + 1:
            data = bytes(self._bytes[start : start + length])
            if what == _MEMORY:
                try:
                    self._memory.write(where, data)
                except MemoryBusyError:
                    return False
            else:
                self._words[_COUNTS + where] = int.from_bytes(data, "little")
            self._advance(sequence)
        self._is_redone = True
        return True


class Receivers:
    """Opens the files of attachments. A driver without main memory has none: nothing is to be read or written there."""

    def __init__(self, place: Location, ledger: Ledger, session: int, fleet_generation: Callable[[], int]) -> None:
        self._place = place
        self._ledger = ledger
        self._session = session
        self._fleet_generation = fleet_generation

    def open(self, record: DriverRecord, memory: Memory, entry: Entry) -> DmaReceiver:
        """Open the file of a driver's attachment by an entry, or make it."""
        attachment = DmaAttachment(
            fleet_generation=self._fleet_generation(), revision=max(entry.revision, 1), session=self._session
        )
        window = DmaWindow(
            base=self._place.base + record.main_memory_offset,
            length_bytes=record.main_memory_bytes,
            from_zero=record.HasField("guest"),
        )
        mapped = self._ledger.map_file(file_of(record.driver, entry.function), _FILE_BYTES)
        return DmaReceiver(mapped, memory, window, attachment)

    def discard(self, driver: str, function: str, receiver: DmaReceiver) -> None:
        """End an attachment."""
        receiver.close()
        self._ledger.delete_file(file_of(driver, function))


def file_of(driver: str, function: str) -> str:
    """Return the name of an attachment's file; no name of a driver or a function has a dot."""
    return f"{driver}.{function}.dma"
