"""The "checker": a device that tells whether its driver's accesses arrived once each and in order.

BAR 0 has registers, among them eight channels whose doorbells a sequence checker watches; BAR 2, which may be absent,
is local memory. docs/device-model.md is its data sheet. All its state is in its BARs, so whoever copies them copies it.
"""

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Final

from hostd.models.base import Section, Store
from vfleet.address import bar_layout
from vfleet.errors import invalid_field

MAGIC: Final = 0x4B434656  # "VFCK" in the order of the bytes
VERSION: Final = 1

IDENTIFICATION: Final = 0x00
IDENTITY: Final = 0x08
STATUS: Final = 0x10
ERRORS: Final = 0x18
SCRATCH: Final = 0x20
CONTROL: Final = 0x28
LOCAL_MEMORY_BYTES: Final = 0x30

CHANNELS: Final = 8
CHANNELS_OFFSET: Final = 0x100
CHANNEL_STRIDE: Final = 0x40
DOORBELL: Final = 0x00
LAST: Final = 0x08
ACCEPTED: Final = 0x10
LOST: Final = 0x18
REPEATED: Final = 0x20
REORDERED: Final = 0x28
WINDOW: Final = 0x30

STATUS_READY: Final = 1 << 0
STATUS_BAD_ACCESS: Final = 1 << 1
STATUS_CHANNEL_SHIFT: Final = 8
CONTROL_CLEAR_ERRORS: Final = 1 << 8

WINDOW_BITS: Final = 64

_REGISTER_BYTES = 8
_MASK = (1 << 64) - 1
_REGISTER = Struct("<Q")
_CHANNEL = Struct("<6Q")  # LAST to WINDOW
_COUNTERS = Struct("<3Q")  # LOST to REORDERED


def channel_offset(channel: int) -> int:
    """Return where in BAR 0 the registers of a channel, 0 to 7, begin."""
    return CHANNELS_OFFSET + channel * CHANNEL_STRIDE


_CHANNEL_OFFSETS = tuple(channel_offset(channel) for channel in range(CHANNELS))
_DOORBELLS = frozenset(offset + DOORBELL for offset in _CHANNEL_OFFSETS)
_READABLE = frozenset((IDENTIFICATION, IDENTITY, STATUS, ERRORS, SCRATCH, CONTROL, LOCAL_MEMORY_BYTES)) | frozenset(
    offset + register
    for offset in _CHANNEL_OFFSETS
    for register in (DOORBELL, LAST, ACCEPTED, LOST, REPEATED, REORDERED, WINDOW)
)


def _register(memory: memoryview, offset: int) -> int:
    value: int = _REGISTER.unpack_from(memory, offset)[0]
    return value


def _put(offset: int, value: int) -> Store:
    return offset, _REGISTER.pack(value & _MASK)


class Checker:
    """One function of the checker. Little-endian. VfleetError INVALID_FIELD unless it has BAR 0, and at most BAR 2."""

    name = "checker"
    version = VERSION
    keeps_local_memory = False
    private_bytes = 0

    def __init__(self, identity: int, bar_bytes: Mapping[int, int]) -> None:
        if 0 not in bar_bytes or not bar_bytes.keys() <= {0, 2}:
            raise invalid_field("bars", dict(bar_bytes), "BAR 0 for registers and, if any, BAR 2 for local memory")
        self._identity = identity
        self._registers_end = bar_bytes[0]
        self._local_bytes = bar_bytes.get(2, 0)
        self._local_start = bar_layout(bar_bytes).get(2, 0)
        self._local_end = self._local_start + self._local_bytes
        self.local_memory = self.plain_memory = range(self._local_start, self._local_end)
        registers = Section("registers", 0, self._registers_end)
        local = Section("local memory", self._local_start, self._local_bytes)
        self.sections: Sequence[Section] = (registers, local) if self._local_bytes else (registers,)

    def reset(self) -> Sequence[Store]:
        """Return the registers that aren't 0 after a reset."""
        return (
            _put(IDENTIFICATION, VERSION << 32 | MAGIC),
            _put(IDENTITY, self._identity),
            _put(LOCAL_MEMORY_BYTES, self._local_bytes),
        )

    def read(self, memory: memoryview, offset: int, length: int) -> tuple[bytes, Sequence[Store]] | None:
        """Read local memory or a register; a bad access to registers reads all ones and is counted."""
        if self._local_start <= offset < self._local_end:
            return bytes(memory[offset : offset + length]), ()
        if offset >= self._registers_end:
            return None
        if length != _REGISTER_BYTES or offset not in _READABLE:
            return b"\xff" * length, (_bad_access(memory),)
        if offset == STATUS:
            return _REGISTER.pack(_status(memory)), ()
        return bytes(memory[offset : offset + length]), ()

    def write(self, memory: memoryview, offset: int, data: bytes) -> Sequence[Store] | None:
        """Write local memory or a register; a bad access to registers changes nothing else and is counted."""
        if self._local_start <= offset < self._local_end:
            return ((offset, data),)
        if offset >= self._registers_end:
            return None
        if len(data) == _REGISTER_BYTES:
            value = int.from_bytes(data, "little")
            if offset in _DOORBELLS and value:
                return (_ring(memory, offset + LAST, value),)
            if offset == SCRATCH:
                return ((offset, data),)
            if offset == CONTROL and value < CONTROL_CLEAR_ERRORS << 1:
                return _clear(value)
        return (_bad_access(memory),)


def _bad_access(memory: memoryview) -> Store:
    return _put(ERRORS, _register(memory, ERRORS) + 1)


def _status(memory: memoryview) -> int:
    status = STATUS_READY
    if _register(memory, ERRORS):
        status |= STATUS_BAD_ACCESS
    for channel, offset in enumerate(_CHANNEL_OFFSETS):
        if any(_COUNTERS.unpack_from(memory, offset + LOST)):
            status |= 1 << STATUS_CHANNEL_SHIFT + channel
    return status


def _clear(bits: int) -> Sequence[Store]:
    cleared = [
        (offset + LAST, bytes(_CHANNEL.size)) for channel, offset in enumerate(_CHANNEL_OFFSETS) if bits >> channel & 1
    ]
    if bits & CONTROL_CLEAR_ERRORS:
        cleared.append(_put(ERRORS, 0))
    return cleared


def _ring(memory: memoryview, offset: int, number: int) -> Store:
    """Return the channel's registers from LAST to WINDOW after its doorbell was rung with `number`, from 1."""
    last, accepted, lost, repeated, reordered, window = _CHANNEL.unpack_from(memory, offset)
    if number > last:
        step = number - last
        # A long step would shift by as many bits as there are numbers in the gap.
        window = (window << step & _MASK | 1) if step < WINDOW_BITS else 1
        last, accepted, lost = number, accepted + 1, lost + step - 1
    else:
        age = last - number
        if age < WINDOW_BITS and not window >> age & 1:
            window |= 1 << age
            accepted, lost, reordered = accepted + 1, lost - 1, reordered + 1
        else:
            repeated += 1
    # State that was imported may hold any values, so that a count may leave 64 bits.
    counts = (accepted & _MASK, lost & _MASK, repeated & _MASK, reordered & _MASK)
    return offset, _CHANNEL.pack(last, *counts, window)
