"""A function's image: everything of it that lasts, in one mapped file.

    +------------+----------------------+-------------------------------------------+
    | redo       | sequencers, one a    | memory: the BARs as they lie in the       |
    | record     | driver               | function's window, then the model's own,  |
    |            |                      | then, of a bus master, the engine's part  |
    +------------+----------------------+-------------------------------------------+

An access's effect and its sequence become durable together: the redo record (what is stored where, and the answer) is
written first, then the effect, and the sequence last. A daemon that is killed anywhere in between and comes back does
the rest; a record that was torn fails its checksum, and then the access has had no effect and will be sent again. A
step of the engine is the same with another number: the first word of the engine's part counts the steps.
"""

import mmap
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence

from hostd.models.base import Store
from vfleet.address import MAX_ACCESS_BYTES, PAGE_BYTES
from vfleet.errors import Reason, VfleetError
from vfleet.limits import MAX_DRIVERS, WINDOW
from vfleet.v1.access_pb2 import AccessStatus, Answer
from vfleet.v1.transfer_service_pb2 import DriverSequence

_REDO_BYTES = 4 * PAGE_BYTES
_REDO_HEAD = struct.Struct("<IIQIIII")  # CRC-32, bytes after it, sequence, sequencer, status, answer bytes, stores
_STORE_HEAD = struct.Struct("<QI")  # offset in memory, bytes
_NO_REDO = (1 << 64) - 1  # as the record's first word: longer than any can be
_ENGINE = MAX_DRIVERS  # in the place of a sequencer's index
MAX_STEP_BYTES = _REDO_BYTES - _REDO_HEAD.size  # of a step's stores, with 12 for each and 24 for each thing sent

_NAME_BYTES = 64
_ANSWERS_OFFSET = PAGE_BYTES
_ANSWER_HEAD_BYTES = 16
_ANSWER_BYTES = _ANSWER_HEAD_BYTES + MAX_ACCESS_BYTES
_SEQUENCER_BYTES = _ANSWERS_OFFSET + -(-WINDOW * _ANSWER_BYTES // PAGE_BYTES) * PAGE_BYTES
_MEMORY_OFFSET = _REDO_BYTES + MAX_DRIVERS * _SEQUENCER_BYTES

KeptAnswer = tuple[AccessStatus.ValueType, bytes]


def image_bytes(memory_bytes: int) -> int:
    """Return the size of the file for a memory of this size, both multiples of 4096."""
    return _MEMORY_OFFSET + memory_bytes


class Sequencer:
    """What a function knows of one driver's accesses: the last sequence applied, and the answers kept.

    Words are stored through a view of 64-bit integers, because that is one machine store each: nothing is ever seen
    half written, also not by the process that comes after a kill.
    """

    __slots__ = ("_base", "_bytes", "_words", "acknowledged", "driver", "index", "last", "session")

    def __init__(self, memory: memoryview, words: memoryview, index: int) -> None:
        self._bytes = memory
        self._words = words
        self._base = _REDO_BYTES + index * _SEQUENCER_BYTES
        self.index = index
        # Its length stands before the name: 0 where there is no driver.
        name_bytes = words[self._base // 8]
        start = self._base + 8
        self.driver = bytes(memory[start : start + name_bytes]).decode()
        self.last: int = words[(self._base + 8 + _NAME_BYTES) // 8]
        self.session: int = words[(self._base + 16 + _NAME_BYTES) // 8]
        self.acknowledged = 0

    def take(self, driver: str) -> None:
        """Make this the sequencer of a driver that has none; it has seen nothing yet."""
        name = driver.encode()
        self._bytes[self._base : self._base + _SEQUENCER_BYTES] = bytes(_SEQUENCER_BYTES)
        self._bytes[self._base + 8 : self._base + 8 + len(name)] = name
        self._words[self._base // 8] = len(name)
        self.driver, self.last, self.session, self.acknowledged = driver, 0, 0, 0

    def free(self) -> None:
        """Forget the driver."""
        self._words[self._base // 8] = 0
        self.driver = ""

    def set_session(self, session: int) -> None:
        """Refuse earlier sessions from now on."""
        self._words[(self._base + 16 + _NAME_BYTES) // 8] = session
        self.session = session

    def advance(self, sequence: int, status: AccessStatus.ValueType, data: bytes) -> None:
        """Keep an answer, and only then count its access as applied."""
        start = self._base + _ANSWERS_OFFSET + sequence % WINDOW * _ANSWER_BYTES
        words = self._words
        words[start // 8] = sequence
        words[start // 8 + 1] = status << 32 | len(data)
        if data:
            self._bytes[start + _ANSWER_HEAD_BYTES : start + _ANSWER_HEAD_BYTES + len(data)] = data
        words[(self._base + 8 + _NAME_BYTES) // 8] = sequence
        self.last = sequence

    def answer(self, sequence: int) -> KeptAnswer | None:
        """Return the answer that an access got, or None once it is forgotten (more than 64 accesses ago)."""
        start = self._base + _ANSWERS_OFFSET + sequence % WINDOW * _ANSWER_BYTES
        if sequence > self.last or self._words[start // 8] != sequence:
            return None
        head: int = self._words[start // 8 + 1]
        data_start = start + _ANSWER_HEAD_BYTES
        status = AccessStatus.ValueType(head >> 32)
        return status, bytes(self._bytes[data_start : data_start + (head & 0xFFFFFFFF)])

    def export(self) -> DriverSequence:
        """Return the sequencer as it moves with the function's state."""
        exported = DriverSequence(driver=self.driver, last_sequence=self.last, session=self.session)
        for sequence in range(max(self.acknowledged, self.last - WINDOW) + 1, self.last + 1):
            kept = self.answer(sequence)
            if kept is not None:
                exported.answers.append(Answer(sequence=sequence, status=kept[0], data=kept[1]))
        return exported

    def load(self, exported: DriverSequence) -> None:
        """Become what another instance's sequencer was."""
        self.take(exported.driver)
        for answer in exported.answers:
            self.advance(answer.sequence, answer.status, answer.data)
        self._words[(self._base + 8 + _NAME_BYTES) // 8] = exported.last_sequence
        self.last = exported.last_sequence
        self.set_session(exported.session)


class FunctionImage:
    """The image in its mapped file. Opening one finishes what a killed daemon had begun."""

    def __init__(self, mapped: mmap.mmap, engine_start: int | None = None) -> None:
        """Take the file; `engine_start` is where in memory a bus master's engine has its part, a multiple of 8."""
        self._mapped = mapped
        self.engine_start = engine_start
        self._bytes = memoryview(mapped)
        self._words = self._bytes.cast("Q")
        self.memory = self._bytes[_MEMORY_OFFSET:]
        self._sequencers = [Sequencer(self._bytes, self._words, index) for index in range(MAX_DRIVERS)]
        self._by_driver = {s.driver: s for s in self._sequencers if s.driver}
        self._dirty: set[int] | None = None
        self._redo()

    def sequencer(self, driver: str) -> Sequencer:
        """Return the driver's sequencer, a new one if it has none. Raise LIMIT_EXCEEDED beyond 16 drivers."""
        found = self._by_driver.get(driver)
        if found is None:
            free = next((s for s in self._sequencers if not s.driver), None)
            if free is None:
                raise VfleetError(Reason.LIMIT_EXCEEDED, f"the function has {MAX_DRIVERS} drivers; expected no more")
            # What it says of this sequencer is another driver's access, and done.
            self._words[0] = _NO_REDO
            free.take(driver)
            self._by_driver[driver] = found = free
        return found

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
        stores: Sequence[Store],
    ) -> None:
        """Make an access's stores, its answer and its sequence durable, together."""
        if stores:
            parts = [data]
            for offset, stored in stores:
                parts += (_STORE_HEAD.pack(offset, len(stored)), stored)
            body = b"".join(parts)
            head = _REDO_HEAD.pack(0, len(body), sequence, sequencer.index, status, len(data), len(stores))
            record = head[4:] + body
            self._bytes[: len(record) + 4] = zlib.crc32(record).to_bytes(4, "little") + record
            self.store(stores)
        sequencer.advance(sequence, status, data)

    def store(self, stores: Iterable[Store]) -> None:
        """Put bytes into memory, outside of any access (a reset) or within one that has its redo record."""
        memory, dirty = self.memory, self._dirty
        for offset, data in stores:
            memory[offset : offset + len(data)] = data
            if dirty is not None:
                dirty.update(range(offset // PAGE_BYTES, (offset + len(data) - 1) // PAGE_BYTES + 1))

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
        record = _REDO_HEAD.pack(0, len(body), number, _ENGINE, 0, 0, len(stores))[4:] + body
        self._bytes[: len(record) + 4] = zlib.crc32(record).to_bytes(4, "little") + record
        self.store(stores)
        self.put_word(self.engine_start, number)

    def word(self, offset: int) -> int:
        """Return the 64-bit word at an offset in memory, a multiple of 8."""
        value: int = self._words[(_MEMORY_OFFSET + offset) // 8]
        return value

    def put_word(self, offset: int, value: int) -> None:
        """Store a 64-bit word at an offset in memory, a multiple of 8: by one machine store, never seen half done."""
        self._words[(_MEMORY_OFFSET + offset) // 8] = value
        if self._dirty is not None:
            self._dirty.add(offset // PAGE_BYTES)

    def clear(self) -> None:
        """Zero the memory and forget all drivers."""
        for start in range(0, len(self.memory), 1 << 20):
            end = min(start + (1 << 20), len(self.memory))
            self.memory[start:end] = bytes(end - start)
        self._bytes[:_REDO_BYTES] = bytes(_REDO_BYTES)
        for driver in list(self._by_driver):
            self.forget(driver)

    def track(self) -> set[int]:
        """Return a set to which every page that changes from now on is added; a set returned before gets no more."""
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
        self.memory.release()
        self._words.release()
        self._bytes.release()
        self._mapped.close()

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

    def _redo_record(self) -> tuple[Sequencer | None, int, AccessStatus.ValueType, bytes, list[Store]] | None:
        crc, length, sequence, index, status, data_bytes, count = _REDO_HEAD.unpack_from(self._bytes)
        end = _REDO_HEAD.size + length
        if end > _REDO_BYTES or index > _ENGINE or zlib.crc32(self._bytes[4:end]) != crc:
            return None
        data_end = _REDO_HEAD.size + data_bytes
        data = bytes(self._bytes[_REDO_HEAD.size : data_end])
        stores = list(self._redo_stores(data_end, count))
        sequencer = self._sequencers[index] if index != _ENGINE else None
        return sequencer, sequence, AccessStatus.ValueType(status), data, stores

    def _redo_stores(self, position: int, count: int) -> Iterator[Store]:
        for _ in range(count):
            offset, length = _STORE_HEAD.unpack_from(self._bytes, position)
            position += _STORE_HEAD.size
            yield offset, bytes(self._bytes[position : position + length])
            position += length
