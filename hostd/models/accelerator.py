"""The "accelerator": a device with large local memory that carries out the commands of a ring in main memory.

BAR 0 has registers and MSI-X, BAR 2 is local memory. docs/device-model.md is its data sheet. Commands are fetched some
at a time and carried out in order, at most 4 KiB in a step; how far it is lies in its own memory, so that a command
that has begun here ends at the next home.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from hostd.models.base import MAX_DMA_BYTES, DmaRead, DmaWrite, Section, Step, Store, Work
from hostd.models.msix import NO_VECTOR, Msix
from vfleet.address import PAGE_BYTES, bar_layout
from vfleet.errors import invalid_field

MAGIC: Final = 0x43414656  # "VFAC" in the order of the bytes
VERSION: Final = 1

IDENTIFICATION: Final = 0x00
IDENTITY: Final = 0x08
STATUS: Final = 0x10
ERRORS: Final = 0x18
LOCAL_MEMORY_BYTES: Final = 0x20
CONTROL: Final = 0x28
SUBMISSION_RING: Final = 0x30
COMPLETION_RING: Final = 0x38
ENTRIES: Final = 0x40
VECTOR: Final = 0x48
SUBMITTED: Final = 0x50
CONSUMED: Final = 0x58
FETCHED: Final = 0x60
COMPLETED: Final = 0x68

MSIX_TABLE: Final = 0x1000
MSIX_PENDING: Final = 0x1800
VECTORS: Final = 8
MIN_REGISTER_BYTES: Final = 0x2000

STATUS_READY: Final = 1 << 0
STATUS_RING_FAULT: Final = 1 << 1
MAX_ENTRIES: Final = 1024

COMMAND: Final = Struct("<IIQQQQQQQ")  # opcode, flags, identifier, main, local, local source, bytes, value, reserved
COMPLETION: Final = Struct("<QIIQQ")  # identifier, checksum, status, reserved, number

READ: Final = 1
WRITE: Final = 2
COPY: Final = 3
CHECKSUM: Final = 4
FILL: Final = 5

OK: Final = 0
BAD_OPCODE: Final = 1
BAD_RANGE: Final = 2
DMA_FAULT: Final = 3

_REGISTER_BYTES = 8
_REGISTER = Struct("<Q")
_MASK = (1 << 64) - 1
_PIECE = MAX_DMA_BYTES
_BATCH = 32  # commands fetched at once
_READABLE = frozenset(range(IDENTIFICATION, COMPLETED + 1, 8))
_SET_UP = frozenset((SUBMISSION_RING, COMPLETION_RING, ENTRIES, VECTOR))

# In the device's own memory, from its start.
_PROGRESS = 0  # bytes of the present command done, checksum so far
_STARTS = 16  # how often the rings were turned on or off: what was read before is not of the rings after
_COMMANDS = 64
_PROGRESS_WORDS = Struct("<QQ")
_NOTHING_DONE = bytes(_PROGRESS_WORDS.size)


@dataclass(frozen=True, slots=True)
class Command:
    """A command as the ring has it."""

    opcode: int
    identifier: int
    main: int
    local: int
    source: int
    length: int
    value: int

    @classmethod
    def unpack(cls, memory: memoryview, offset: int) -> "Command":
        """Return the command at an offset."""
        opcode, _, identifier, main, local, source, length, value, _ = COMMAND.unpack_from(memory, offset)
        return cls(opcode, identifier, main, local, source, length, value)

    def pack(self) -> bytes:
        """Return the command's 64 bytes."""
        fields = (self.identifier, self.main, self.local, self.source, self.length, self.value)
        return COMMAND.pack(self.opcode, 0, *fields, 0)


class Accelerator:
    """One function of the accelerator. Little-endian.

    VfleetError INVALID_FIELD unless it has BAR 0, of 8 KiB or more, BAR 2, and no other.
    """

    name = "accelerator"
    version = VERSION
    keeps_local_memory = False
    private_bytes = PAGE_BYTES

    def __init__(self, identity: int, bar_bytes: Mapping[int, int]) -> None:
        if bar_bytes.keys() != {0, 2} or bar_bytes[0] < MIN_REGISTER_BYTES:
            raise invalid_field("bars", dict(bar_bytes), "BAR 0 of 8 KiB or more for registers, BAR 2 for local memory")
        self._identity = identity
        self._registers_end = bar_bytes[0]
        self._local = bar_layout(bar_bytes)[2]
        self._local_bytes = bar_bytes[2]
        self._private = self._local + self._local_bytes
        self._msix = Msix(VECTORS, MSIX_TABLE, MSIX_PENDING)
        self.local_memory = self.plain_memory = range(self._local, self._private)
        self.sections: Sequence[Section] = (
            Section("registers", 0, self._registers_end),
            Section("local memory", self._local, self._local_bytes),
            Section("queue", self._private, self.private_bytes),
        )

    # Accesses

    def reset(self) -> Sequence[Store]:
        """Return the registers that aren't 0 after a reset."""
        return (
            _put(IDENTIFICATION, VERSION << 32 | MAGIC),
            _put(IDENTITY, self._identity),
            _put(STATUS, STATUS_READY),
            _put(LOCAL_MEMORY_BYTES, self._local_bytes),
            _put(VECTOR, NO_VECTOR),
            *self._msix.reset(),
        )

    def read(self, memory: memoryview, offset: int, length: int) -> tuple[bytes, Sequence[Store]] | None:
        """Read local memory, a register or MSI-X; a bad access reads all ones and is counted."""
        if self._local <= offset < self._private:
            return bytes(memory[offset : offset + length]), ()
        if offset >= self._registers_end:
            return None
        data: bytes | None = None
        if self._msix.claims(offset):
            data = self._msix.read(memory, offset, length)
        elif length == _REGISTER_BYTES and offset in _READABLE:
            data = bytes(memory[offset : offset + length])
        return (data, ()) if data is not None else (b"\xff" * length, (_bad_access(memory),))

    def write(self, memory: memoryview, offset: int, data: bytes) -> Sequence[Store] | None:
        """Write local memory, a register or MSI-X; a bad access changes nothing else and is counted."""
        if self._local <= offset < self._private:
            return ((offset, data),)
        if offset >= self._registers_end:
            return None
        stores: Sequence[Store] | None = None
        if self._msix.claims(offset):
            stores = self._msix.write(offset, data)
        elif len(data) == _REGISTER_BYTES:
            stores = self._write_register(memory, offset, int.from_bytes(data, "little"))
        return stores if stores is not None else (_bad_access(memory),)

    def _write_register(self, memory: memoryview, offset: int, value: int) -> Sequence[Store] | None:
        is_enabled = bool(_register(memory, CONTROL))
        if offset == CONTROL:
            return self._control(memory, value)
        if offset in _SET_UP:
            return (_put(offset, value),) if not is_enabled else None
        entries = _register(memory, ENTRIES)
        if offset == SUBMITTED and is_enabled:
            is_due = _register(memory, SUBMITTED) <= value <= _register(memory, COMPLETED) + entries
            return (_put(SUBMITTED, value),) if is_due else None
        if offset == CONSUMED and is_enabled:
            is_due = _register(memory, CONSUMED) <= value <= _register(memory, COMPLETED)
            return (_put(CONSUMED, value),) if is_due else None
        return None

    def _control(self, memory: memoryview, value: int) -> Sequence[Store] | None:
        """Turn the rings on, if they are well-formed, or off; either way they begin anew."""
        entries = _register(memory, ENTRIES)
        is_power = 2 <= entries <= MAX_ENTRIES and not entries & (entries - 1)
        is_aligned = not (_register(memory, SUBMISSION_RING) | _register(memory, COMPLETION_RING)) % COMMAND.size
        if value > 1 or (value and not (is_power and is_aligned)):
            return None
        return (
            _put(CONTROL, value),
            _put(STATUS, STATUS_READY),
            (SUBMITTED, bytes(COMPLETED + _REGISTER_BYTES - SUBMITTED)),
            (self._private + _PROGRESS, _NOTHING_DONE),
            _put(self._private + _STARTS, self._starts(memory) + 1),
        )

    # Work

    def work(self, memory: memoryview) -> Work | None:
        """Return the next piece: an interrupt that was masked, some commands to fetch, or a part of one."""
        due = self._msix.due(memory)
        if due is not None:
            return Work(("release", due))
        if not _register(memory, CONTROL):
            return None
        completed, entries = _register(memory, COMPLETED), _register(memory, ENTRIES)
        if completed - _register(memory, CONSUMED) >= entries:
            return None
        fetched = _register(memory, FETCHED)
        if completed == fetched:
            return self._fetch(memory, fetched, entries)
        return self._piece(memory, completed)

    def finish(self, memory: memoryview, work: Work, data: Sequence[bytes] | None) -> Step:
        """Do a piece of work."""
        match work.what:
            case ("release", int(vector)):
                return self._msix.release(memory, vector)
            case ("fetch", *_):
                return self._fetched(memory, data)
        return self._finish_piece(memory, data)

    def receive(self, memory: memoryview, frame: bytes) -> Step | None:  # noqa: ARG002  # as the contract has it
        """Drop a frame: it has no network."""
        return Step()

    def _fetch(self, memory: memoryview, fetched: int, entries: int) -> Work | None:
        """Return the work that fetches what was submitted, up to the ring's end, or as much as there is a place for."""
        count = min(_register(memory, SUBMITTED) - fetched, entries - fetched % entries, _BATCH)
        if count <= 0:
            return None
        address = _register(memory, SUBMISSION_RING) + fetched % entries * COMMAND.size & _MASK
        return Work(("fetch", self._starts(memory), fetched), (DmaRead(address, count * COMMAND.size),))

    def _fetched(self, memory: memoryview, data: Sequence[bytes] | None) -> Step:
        if data is None:
            # There is no command to say that of: the rings stop until they are turned on anew.
            return Step((_put(STATUS, STATUS_READY | STATUS_RING_FAULT), _put(CONTROL, 0)))
        fetched = _register(memory, FETCHED)
        stores: list[Store] = [_put(FETCHED, fetched + len(data[0]) // COMMAND.size)]
        for index in range(len(data[0]) // COMMAND.size):
            command = data[0][index * COMMAND.size : (index + 1) * COMMAND.size]
            stores.append((self._slot(fetched + index), command))
        return Step(stores)

    def _piece(self, memory: memoryview, number: int) -> Work:
        command = Command.unpack(memory, self._slot(number))
        done, _ = _PROGRESS_WORDS.unpack_from(memory, self._private + _PROGRESS)
        what = ("piece", self._starts(memory), number, done)
        if self._refusal(command) != OK:
            return Work(what)
        size = min(_PIECE, command.length - done)
        touches: list[tuple[int, int]] = []
        if size:
            touches.append((self._local + command.local + done, size))
        if size and command.opcode == COPY:
            touches.append((self._local + command.source + done, size))
        reads = (DmaRead(command.main + done & _MASK, size),) if size and command.opcode == READ else ()
        return Work(what, reads, tuple(touches))

    def _finish_piece(self, memory: memoryview, data: Sequence[bytes] | None) -> Step:
        number = _register(memory, COMPLETED)
        command = Command.unpack(memory, self._slot(number))
        done, checksum = _PROGRESS_WORDS.unpack_from(memory, self._private + _PROGRESS)
        refusal = self._refusal(command)
        if refusal != OK or data is None:
            return self._complete(memory, number, command, refusal or DMA_FAULT, 0, [], [])
        size = min(_PIECE, command.length - done)
        stores: list[Store] = []
        sends: list[DmaWrite] = []
        at = self._local + command.local + done
        if not size:
            pass
        elif command.opcode == READ:
            stores.append((at, data[0]))
        elif command.opcode == WRITE:
            sends.append(DmaWrite(command.main + done & _MASK, bytes(memory[at : at + size])))
        elif command.opcode == COPY:
            source = self._local + command.source + done
            stores.append((at, bytes(memory[source : source + size])))
        elif command.opcode == CHECKSUM:
            checksum = zlib.crc32(memory[at : at + size], checksum)
        else:
            stores.append((at, _pattern(command.value, size)))
        if done + size < command.length:
            stores.append((self._private + _PROGRESS, _PROGRESS_WORDS.pack(done + size, checksum)))
            return Step(stores, sends)
        if command.opcode == CHECKSUM:
            sends.append(DmaWrite(command.main, _REGISTER.pack(checksum)))
        return self._complete(memory, number, command, OK, checksum, stores, sends)

    def _complete(
        self,
        memory: memoryview,
        number: int,
        command: Command,
        status: int,
        checksum: int,
        stores: list[Store],
        sends: list[DmaWrite],
    ) -> Step:
        """End a command: with its last piece go its completion and the interrupt, and the next one's turn comes."""
        entries = _register(memory, ENTRIES)
        address = _register(memory, COMPLETION_RING) + number % entries * COMPLETION.size & _MASK
        sends.append(DmaWrite(address, COMPLETION.pack(command.identifier, checksum, status, 0, number + 1)))
        pending, interrupts = self._msix.interrupt(memory, (_register(memory, VECTOR),))
        stores += [*pending, _put(COMPLETED, number + 1), (self._private + _PROGRESS, _NOTHING_DONE)]
        return Step(stores, [*sends, *interrupts])

    def _refusal(self, command: Command) -> int:
        """Return the status with which a command that can't be carried out ends; OK if it can."""
        if not READ <= command.opcode <= FILL:
            return BAD_OPCODE
        room = self._local_bytes - command.length
        if command.length > self._local_bytes or command.local > room:
            return BAD_RANGE
        if command.opcode == COPY:
            distance = abs(command.source - command.local)
            if command.source > room or distance < command.length:
                return BAD_RANGE
        return OK

    def _starts(self, memory: memoryview) -> int:
        return _register(memory, self._private + _STARTS)

    def _slot(self, number: int) -> int:
        return self._private + _COMMANDS + number % _BATCH * COMMAND.size


def _pattern(value: int, size: int) -> bytes:
    """Return `size` bytes of an 8-byte value that is repeated."""
    return (_REGISTER.pack(value) * (size // _REGISTER_BYTES + 1))[:size]


def _register(memory: memoryview, offset: int) -> int:
    value: int = _REGISTER.unpack_from(memory, offset)[0]
    return value


def _put(offset: int, value: int) -> Store:
    return offset, _REGISTER.pack(value & _MASK)


def _bad_access(memory: memoryview) -> Store:
    return _put(ERRORS, _register(memory, ERRORS) + 1)
