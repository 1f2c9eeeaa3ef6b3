"""The registers and doorbells of the simulated NVMe controller, in BAR 0 (NVMe 1.4, 3.1)."""

from collections.abc import Sequence
from struct import Struct
from typing import Final

from hostd.models.base import Store
from hostd.models.msix import Msix
from hostd.models.nvme_admin import ADMIN_QUEUE, FEATURE_DEFAULTS
from hostd.models.nvme_identity import VERSION
from hostd.models.nvme_layout import (
    ACQ,
    AQA,
    ASQ,
    CAP,
    CC,
    CC_ENABLE,
    CC_SHUTDOWN,
    CSTS,
    CSTS_FATAL,
    CSTS_READY,
    CSTS_SHUTDOWN_COMPLETE,
    CSTS_SHUTDOWN_OCCURRING,
    DOORBELLS,
    INTMC,
    INTMS,
    MAX_ENTRIES,
    QUEUES,
    CompletionQueue,
    Core,
    Layout,
)
from vfleet.address import PAGE_BYTES

_WORD: Final = Struct("<I")
_LONG: Final = Struct("<Q")

_CONTIGUOUS_QUEUES: Final = 1 << 16
_TIMEOUT: Final = 40 << 24  # 20 s in half seconds: a hold may fall between
_NVM_COMMAND_SET: Final = 1 << 37
_CAPABILITIES: Final = MAX_ENTRIES - 1 | _CONTIGUOUS_QUEUES | _TIMEOUT | _NVM_COMMAND_SET
IDENTIFICATION: Final = _LONG.pack(_CAPABILITIES) + _WORD.pack(VERSION)
"""CAP and VS, with which BAR 0 begins: they never change."""
_CC_WRITABLE: Final = 0x00FFFFF1
_CC_PAGE_SIZE_ARBITRATION_COMMAND_SET: Final = 0x3FF0  # 0 is all that CAP offers
_AQA_WRITABLE: Final = 0x0FFF0FFF
_DOORBELLS_END: Final = DOORBELLS + 0x1000
_QUEUE_BASE_LOW: Final = ~(PAGE_BYTES - 1) & 0xFFFFFFFF

# Events of the type "error" (NVMe 1.4, 5.2.1), as bits of `Core.events`.
EVENT_INVALID_DOORBELL: Final = 1 << 0
EVENT_INVALID_DOORBELL_VALUE: Final = 1 << 1


class Registers:
    """BAR 0 of the controller with these tables; the MSI-X table in it is `msix`'s."""

    def __init__(self, layout: Layout, msix: Msix) -> None:
        self._layout = layout
        self._msix = msix

    def reset(self) -> Sequence[Store]:
        """Return the stores after a function-level reset, over zeroed memory."""
        return (
            (CAP, IDENTIFICATION),
            *self._msix.reset(),
            *self._default_features(),
        )

    def read(self, memory: memoryview, offset: int, length: int) -> bytes:
        """Read registers. What is reserved reads as 0, and so do doorbells."""
        if self._msix.claims(offset):
            data = self._msix.read(memory, offset, length)
            return data if data is not None else b"\xff" * length
        data = bytes(memory[offset : offset + length])
        if offset <= CSTS < offset + length:
            status = bytearray(data)
            status[CSTS - offset] |= self._shutdown_status(memory)
            return bytes(status)
        return data

    def write(self, memory: memoryview, offset: int, data: bytes) -> Sequence[Store]:
        """Write a register or doorbell. One of another size than the specification allows changes nothing."""
        if self._msix.claims(offset):
            return self._msix.write(offset, data) or ()
        if DOORBELLS <= offset < _DOORBELLS_END:
            return self._ring(memory, offset, int.from_bytes(data, "little")) if len(data) == 4 else ()
        value = int.from_bytes(data, "little")
        if len(data) == 4:
            return self._write_word(memory, offset, value)
        if len(data) == 8 and offset in (ASQ, ACQ):
            return (
                *self._write_word(memory, offset, value & 0xFFFFFFFF),
                *self._write_word(memory, offset + 4, value >> 32),
            )
        return ()

    def _write_word(self, memory: memoryview, offset: int, value: int) -> Sequence[Store]:
        if offset in (INTMS, INTMC):  # without effect: there are no interrupts but MSI-X
            before = _word(memory, INTMS)
            mask = _WORD.pack(before | value if offset == INTMS else before & ~value)
            return (INTMS, mask), (INTMC, mask)
        if offset == CC:
            return self._configure(memory, value & _CC_WRITABLE)
        if memory[CC] & CC_ENABLE:  # the admin queue's registers stand while it is in use
            return ()
        if offset == AQA:
            return ((AQA, _WORD.pack(value & _AQA_WRITABLE)),)
        if offset in (ASQ, ACQ):
            return ((offset, _WORD.pack(value & _QUEUE_BASE_LOW)),)
        if offset in (ASQ + 4, ACQ + 4):
            return ((offset, _WORD.pack(value)),)
        return ()

    def _configure(self, memory: memoryview, value: int) -> Sequence[Store]:
        was_enabled, configuration = memory[CC] & CC_ENABLE, (CC, _WORD.pack(value))
        if value & CC_ENABLE and not was_enabled:
            return configuration, *self._enable(memory, value)
        if was_enabled and not value & CC_ENABLE:
            return configuration, *self._reset_controller(memory)
        return (configuration,)

    def _enable(self, memory: memoryview, value: int) -> Sequence[Store]:
        sizes = _word(memory, AQA)
        submission, completion = (sizes & 0xFFFF) + 1, (sizes >> 16) + 1
        if value & _CC_PAGE_SIZE_ARBITRATION_COMMAND_SET or submission == 1 or completion == 1:
            return ((CSTS, _WORD.pack(CSTS_FATAL)),)
        layout = self._layout
        queue = CompletionQueue(_LONG.unpack_from(memory, ACQ)[0], completion, 0, 0, 0, 1, 1)
        return (
            (CSTS, _WORD.pack(CSTS_READY)),
            layout.submission.put(ADMIN_QUEUE, _LONG.unpack_from(memory, ASQ)[0], submission, ADMIN_QUEUE),
            layout.completion.put(ADMIN_QUEUE, *queue),
        )

    def _reset_controller(self, memory: memoryview) -> Sequence[Store]:
        layout = self._layout
        core = Core(*layout.core.get(memory))
        # Rows of commands and lists mean nothing without their bits in `busy`.
        return (
            (CSTS, _WORD.pack(0)),
            (INTMS, bytes(8)),  # and INTMC
            layout.core.put(0, core.epoch + 1 & 0xFFFFFFFF, 0, 0, 0, 0, 0, 0, 0, 0),
            (layout.core.end, bytes(layout.commands.start - layout.core.end)),
            *self._default_features(),
        )

    def _default_features(self) -> Sequence[Store]:
        return [self._layout.features.put(feature, value) for feature, value in FEATURE_DEFAULTS.items()]

    def _shutdown_status(self, memory: memoryview) -> int:
        if not _word(memory, CC) & CC_SHUTDOWN:
            return 0
        core = Core(*self._layout.core.get(memory))
        return CSTS_SHUTDOWN_OCCURRING if core.busy else CSTS_SHUTDOWN_COMPLETE

    def _ring(self, memory: memoryview, offset: int, value: int) -> Sequence[Store]:
        if memory[CSTS] != CSTS_READY:
            return ()
        queue, is_completion = divmod(offset - DOORBELLS, 8)
        if queue >= QUEUES:
            return self._happened(memory, EVENT_INVALID_DOORBELL)
        if is_completion:
            found = CompletionQueue(*self._layout.completion.get(memory, queue))
            first, last, entries = found.head, found.tail, found.entries
        else:
            entries = self._layout.submission.get(memory, queue)[1]
            # A tail may come up to one entry behind the head: a queue that looks full has one free.
            first = self._layout.tails.get(memory, queue)[0]
            last = self._layout.heads.get(memory, queue)[0] - 1
        if not entries:
            return self._happened(memory, EVENT_INVALID_DOORBELL)
        if value >= entries or (value - first) % entries > (last - first) % entries:
            return self._happened(memory, EVENT_INVALID_DOORBELL_VALUE)
        if is_completion:
            return (self._layout.completion.put(queue, *found._replace(head=value)),)
        return (self._layout.tails.put(queue, value),)

    def _happened(self, memory: memoryview, event: int) -> Sequence[Store]:
        core = Core(*self._layout.core.get(memory))
        return (self._layout.core.put(0, *core._replace(events=core.events | event)),)


def _word(memory: memoryview, offset: int) -> int:
    value: int = _WORD.unpack_from(memory, offset)[0]
    return value
