"""A function's image: everything of it that lasts, in one mapped file.

    +--------+--------------+-------------------+----------------------------------------+--------------+
    | redo   | that of      | sequencers, one a | memory: the BARs as they lie in the    | arrived: a   |
    | record | plain writes | driver            | function's window, then the model's    | byte a page  |
    |        |              |                   | own, then, of a bus master, the        |              |
    |        |              |                   | engine's part                          |              |
    +--------+--------------+-------------------+----------------------------------------+--------------+

An access's effect and its sequence become durable together: the redo record (what is stored where, and the answer) is
written first, then the effect, and the sequence last. A daemon that is killed anywhere in between and comes back does
the rest; a record that was torn fails its checksum, and then the access has had no effect and will be sent again. A
step of the engine is the same with another number: the first word of the engine's part counts the steps. Plain writes,
which need no model, have a record of their own (hostd/plain_redo.py).

`arrived` counts only while the state is still coming after the lift (post-copy): a page's byte is set after its bytes.
"""

import errno
import mmap
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import BinaryIO

from hostd.grant import Grant
from hostd.models.base import Store
from hostd.plain_redo import PLAIN_REDO_START, record_plain_write, recorded_plain_writes
from hostd.sequencer import SEQUENCERS_END, SEQUENCERS_START, Sequencer
from vfleet.address import PAGE_BYTES
from vfleet.errors import Reason, VfleetError
from vfleet.limits import MAX_DRIVERS
from vfleet.v1.access_pb2 import ACCESS_STATUS_OK, AccessStatus

_REDO_BYTES = PLAIN_REDO_START
_CRC_BYTES = 4  # of the CRC-32 of all that follows it
_REDO_HEAD = struct.Struct("<IQIIII")  # bytes after it, sequence, sequencer, status, answer bytes, stores
_STORE_HEAD = struct.Struct("<QI")  # offset in memory, bytes
_NO_REDO = (1 << 64) - 1  # as the record's first word: longer than any can be
_ENGINE = MAX_DRIVERS  # in the place of a sequencer's index
_BODY_START = _CRC_BYTES + _REDO_HEAD.size
MAX_STEP_BYTES = _REDO_BYTES - _BODY_START  # of a step's stores, with 12 for each and 24 for each thing sent

_MEMORY_OFFSET = SEQUENCERS_END

SHORT_GAP_PAGES = 8  # to send so many pages of zeros costs less than another message


def image_bytes(memory_bytes: int) -> int:
    """Return the size of the file for a memory of this size, both multiples of 4096."""
    pages = memory_bytes // PAGE_BYTES
    return _MEMORY_OFFSET + (pages + -(-pages // PAGE_BYTES)) * PAGE_BYTES


class FunctionImage:
    """The image in its mapped file. Opening one finishes what a killed daemon had begun."""

    def __init__(self, mapped: mmap.mmap, engine_start: int | None = None, *, is_new: bool = False) -> None:
        """Take the file; `engine_start` is where in memory a bus master's engine has its part, a multiple of 8.

        `is_new` says that all of the file is zero. What is never looked at then takes no memory, and no time.
        """
        self._mapped = mapped
        self.engine_start = engine_start
        self.bytes = memoryview(mapped)
        self.words = self.bytes.cast("Q")
        # A page of `arrived` is for so many pages of memory as it has bytes.
        pages = (len(mapped) - _MEMORY_OFFSET) // PAGE_BYTES
        self._end = _MEMORY_OFFSET + (pages - -(-pages // (PAGE_BYTES + 1))) * PAGE_BYTES
        self.memory = self.bytes[_MEMORY_OFFSET : self._end]
        self.arrived = self.bytes[self._end : self._end + len(self.memory) // PAGE_BYTES]
        self._sequencers = [Sequencer(self.bytes, self.words, n, is_blank=is_new) for n in range(MAX_DRIVERS)]
        self._by_driver = {s.driver: s for s in self._sequencers if s.driver}
        self._dirty: set[int] | None = None
        if not is_new:
            self._redo()
            self._redo_plain_writes()

    def known_sequencer(self, driver: str) -> Sequencer | None:
        """Return the driver's sequencer, or None."""
        return self._by_driver.get(driver)

    def sequencer(self, driver: str) -> Sequencer:
        """Return the driver's sequencer, a new one if it has none. Raise LIMIT_EXCEEDED beyond 16 drivers."""
        found = self._by_driver.get(driver)
        if found is None:
            free = next((s for s in self._sequencers if not s.driver), None)
            if free is None:
                raise VfleetError(Reason.LIMIT_EXCEEDED, f"the function has {MAX_DRIVERS} drivers; expected no more")
            if not free.is_blank:
                # What it says of this sequencer is another driver's access, and done.
                self.words[0] = _NO_REDO
            free.take(driver)
            self._by_driver[driver] = found = free
        return found

    def sequencer_at(self, index: int) -> Sequencer:
        """Return the sequencer with this index, below 16, whether it has a driver or not."""
        return self._sequencers[index]

    def sequencers(self) -> list[Sequencer]:
        """Return all that have a driver, by its name."""
        return [self._by_driver[driver] for driver in sorted(self._by_driver)]

    def forget(self, driver: str) -> None:
        """Free the sequencer of a driver that was detached."""
        found = self._by_driver.pop(driver, None)
        if found is not None:
            found.free()

    def apply(
        self,
        sequencer: Sequencer,
        sequence: int,
        status: AccessStatus.ValueType,
        data: bytes,
        stores: Sequence[Store] = (),
    ) -> None:
        """Make an access's stores, its answer and its sequence durable, together."""
        if stores:
            body = data
            for offset, stored in stores:
                body += _STORE_HEAD.pack(offset, len(stored)) + stored
            head = _REDO_HEAD.pack(len(body), sequence, sequencer.index, status, len(data), len(stores))
            self._put_redo(head + body)
            self.store(stores)
        sequencer.advance(sequence, status, data)

    def write_plain(self, sequencer: Sequencer, sequence: int, offset: int, data: bytes) -> None:
        """Make a write to plain memory, its answer and its sequence durable, together: as `apply`, in half the time."""
        record_plain_write(self.bytes, self.words, sequencer.index, sequence, offset, data)
        self.store(((offset, data),))
        sequencer.advance(sequence, ACCESS_STATUS_OK, b"")

    def store(self, stores: Iterable[Store]) -> None:
        """Put bytes into memory, outside of any access (a reset) or within one that has its redo record."""
        memory, dirty = self.memory, self._dirty
        for offset, data in stores:
            memory[offset : offset + len(data)] = data
            if dirty is not None:
                dirty.update(range(offset // PAGE_BYTES, (offset + len(data) - 1) // PAGE_BYTES + 1))

    def store_through(self, file: BinaryIO, offset: int, data: bytes) -> None:
        """Do what `store` does through the image's file: of many pages that are new, several times as fast.

        Raise LIMIT_EXCEEDED if the disk is full.
        """
        view, position = memoryview(data), _MEMORY_OFFSET + offset
        while view:
            try:
                count = os.pwrite(file.fileno(), view, position)
            except OSError as error:
                raise VfleetError(Reason.LIMIT_EXCEEDED, f"a function's memory can't be written: {error}") from error
            view, position = view[count:], position + count
        if self._dirty is not None:
            self._dirty.update(range(offset // PAGE_BYTES, (offset + len(data) - 1) // PAGE_BYTES + 1))

    def written(self, file: BinaryIO, pages: range) -> Iterator[range]:
        """Yield which of `pages` may be other than zero, in ascending order: those that its file has, and short gaps.

        A page that is written to while this goes on may be left out.
        """
        position, end = (_MEMORY_OFFSET + page * PAGE_BYTES for page in (pages.start, pages.stop))
        found: range | None = None
        while position < end:
            try:
                start = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:  # no data from there on
                    raise
                break
            if start >= end:
                break
            position = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            first = (start - _MEMORY_OFFSET) // PAGE_BYTES
            stop = min(-(-(position - _MEMORY_OFFSET) // PAGE_BYTES), pages.stop)
            if found is not None and first - found.stop > SHORT_GAP_PAGES:
                yield found
                found = None
            found = range(first if found is None else found.start, stop)
        if found is not None:
            yield found

    def grant(self, sequencer: Sequencer, base: int, span: int, plain: range) -> Grant | None:
        """Give a driver that sees the image's `span` bytes at `base` leave to access `plain` of them directly.

        None while changes are tracked: a direct write tells nobody.
        """
        sequencer.revoke()
        if self._dirty is not None:
            return None
        grant = Grant(self.bytes, self.words, self.memory, sequencer, base, span, plain)
        sequencer.grant = grant
        return grant

    def revoke(self) -> None:
        """End all leaves to access memory directly."""
        for sequencer in self._sequencers:
            sequencer.revoke()

    def step(self, stores: Sequence[Store]) -> None:
        """Make a step of the engine durable, all of its stores together.

        Raise LIMIT_EXCEEDED if they don't fit into the redo record; nothing has changed then.
        """
        assert self.engine_start is not None  # noqa: S101  # only a bus master has steps
        body = b"".join(part for offset, data in stores for part in (_STORE_HEAD.pack(offset, len(data)), data))
        if len(body) > MAX_STEP_BYTES:
            raise VfleetError(
                Reason.LIMIT_EXCEEDED,
                f"a step of the device stores {len(body)} bytes, heads included; expected at most {MAX_STEP_BYTES}",
            )
        number = self.word(self.engine_start) + 1
        self._put_redo(_REDO_HEAD.pack(len(body), number, _ENGINE, 0, 0, len(stores)) + body)
        self.store(stores)
        self.put_word(self.engine_start, number)

    def word(self, offset: int) -> int:
        """Return the 64-bit word at an offset in memory, a multiple of 8."""
        value: int = self.words[(_MEMORY_OFFSET + offset) // 8]
        return value

    def put_word(self, offset: int, value: int) -> None:
        """Store a 64-bit word at an offset in memory, a multiple of 8: by one machine store, never seen half done."""
        self.words[(_MEMORY_OFFSET + offset) // 8] = value
        if self._dirty is not None:
            self._dirty.add(offset // PAGE_BYTES)

    def clear(self) -> None:
        """Zero the memory and forget all drivers; nothing has arrived."""
        # The redo records go first: what they say must not come back over what is put there next.
        self.bytes[:SEQUENCERS_START] = bytes(SEQUENCERS_START)
        try:
            # Of a file that has never been written to this is nothing, however large it is.
            self._mapped.madvise(mmap.MADV_REMOVE, _MEMORY_OFFSET, len(self.bytes) - _MEMORY_OFFSET)
        except OSError:  # a file system without holes
            for start in range(_MEMORY_OFFSET, len(self.bytes), 1 << 20):
                end = min(start + (1 << 20), len(self.bytes))
                self.bytes[start:end] = bytes(end - start)
        for driver in list(self._by_driver):
            self.forget(driver)

    def track(self) -> set[int]:
        """Return a set to which every page that changes from now on is added; a set returned before gets no more."""
        self.revoke()
        self._dirty = set()
        return self._dirty

    def untrack(self, dirty: set[int]) -> bool:
        """Add no more to a set; then stores cost nothing extra. Return False if another one is in its place."""
        if self._dirty is not dirty:
            return False
        self._dirty = None
        return True

    def close(self) -> None:
        """Unmap the file; the image can't be used any more."""
        self.release().close()

    def release(self) -> mmap.mmap:
        """Let go of the file's map and return it; the image can't be used any more."""
        self.revoke()
        self.memory.release()
        self.arrived.release()
        self.words.release()
        self.bytes.release()
        return self._mapped

    def _put_redo(self, record: bytes) -> None:
        self.bytes[: _CRC_BYTES + len(record)] = zlib.crc32(record).to_bytes(_CRC_BYTES, "little") + record

    def _redo(self) -> None:
        found = self._redo_record()
        if found is None:
            return
        sequencer, sequence, status, data, stores = found
        if sequencer is None:
            if self.engine_start is not None and sequence == self.word(self.engine_start) + 1:
                self.store(stores)
                self.put_word(self.engine_start, sequence)
        elif sequencer.driver and sequence == sequencer.last + 1:
            self.store(stores)
            sequencer.advance(sequence, status, data)

    def _redo_plain_writes(self) -> None:
        """Do the writes of a record whose sequence a killed daemon had not stored yet."""
        recorded = recorded_plain_writes(self.words)
        sequencer = self._sequencers[recorded.sequencer_index]
        if not sequencer.driver or recorded.sequence <= sequencer.last:
            return
        self.store(recorded.stores(self.bytes))
        if recorded.count == 1:
            sequencer.advance(recorded.sequence, ACCESS_STATUS_OK, b"")
        else:
            sequencer.skip_to(recorded.sequence)

    def _redo_record(self) -> tuple[Sequencer | None, int, AccessStatus.ValueType, bytes, list[Store]] | None:
        length, sequence, index, status, data_bytes, count = _REDO_HEAD.unpack_from(self.bytes, _CRC_BYTES)
        end = _BODY_START + length
        if end > _REDO_BYTES or index > _ENGINE:
            return None
        if zlib.crc32(self.bytes[_CRC_BYTES:end]) != int.from_bytes(self.bytes[:_CRC_BYTES], "little"):
            return None
        data_end = _BODY_START + data_bytes
        data = bytes(self.bytes[_BODY_START:data_end])
        stores = list(self._redo_stores(data_end, count))
        sequencer = self._sequencers[index] if index != _ENGINE else None
        return sequencer, sequence, AccessStatus.ValueType(status), data, stores

    def _redo_stores(self, position: int, count: int) -> Iterator[Store]:
        for _ in range(count):
            offset, length = _STORE_HEAD.unpack_from(self.bytes, position)
            position += _STORE_HEAD.size
            yield offset, bytes(self.bytes[position : position + length])
            position += length
