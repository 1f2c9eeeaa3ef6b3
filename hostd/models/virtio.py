"""The registers of a virtio device on PCI (virtio 1.2, 4.1.4): common configuration, status and queue set-up.

    0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK           a write of 0 resets, at any time
                                 (only a set that was offered)   -> DEVICE_NEEDS_RESET, by a broken ring

Little-endian. Fields of 64 bits are two halves of 32, as the specification says, or one access of 8. What the
specification forbids a driver to write changes nothing.
"""

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Final, NamedTuple

from hostd.models.base import Store
from hostd.models.virtqueue import MAX_QUEUE_SIZE, NO_VECTOR, Queue, Virtqueue, fresh, kicked

ACKNOWLEDGE: Final = 1 << 0
DRIVER: Final = 1 << 1
DRIVER_OK: Final = 1 << 2
FEATURES_OK: Final = 1 << 3
DEVICE_NEEDS_RESET: Final = 1 << 6
FAILED: Final = 1 << 7

VERSION_1: Final = 1 << 32
RING_RESET: Final = 1 << 40

ISR_QUEUE: Final = 1 << 0
ISR_CONFIGURATION: Final = 1 << 1

DEVICE_FEATURE_SELECT: Final = 0x00
DEVICE_FEATURE: Final = 0x04
DRIVER_FEATURE_SELECT: Final = 0x08
DRIVER_FEATURE: Final = 0x0C
CONFIGURATION_VECTOR: Final = 0x10
NUMBER_OF_QUEUES: Final = 0x12
DEVICE_STATUS: Final = 0x14
CONFIGURATION_GENERATION: Final = 0x15
QUEUE_SELECT: Final = 0x16
QUEUE_SIZE: Final = 0x18
QUEUE_VECTOR: Final = 0x1A
QUEUE_ENABLE: Final = 0x1C
QUEUE_NOTIFY_OFFSET: Final = 0x1E
QUEUE_DESCRIPTORS: Final = 0x20
QUEUE_DRIVER: Final = 0x28
QUEUE_DEVICE: Final = 0x30
QUEUE_NOTIFY_DATA: Final = 0x38
QUEUE_RESET: Final = 0x3A

_COMMON = Struct("<4IHHBB5H3QHH")
_EPOCH_MASK = 0xFFFF_FFFF
_HALF = 0xFFFF_FFFF
_DRIVER_STATUS = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED
_ADDRESSES = {QUEUE_DESCRIPTORS: "descriptors", QUEUE_DRIVER: "driver", QUEUE_DEVICE: "device"}


class Registers(NamedTuple):
    """What lasts of the registers that belong to no queue, in their order in memory."""

    driver_features: int
    device_feature_select: int
    driver_feature_select: int
    epoch: int
    """Grows whenever a queue is reset, mod 2**32: what was read from rings of before is read anew."""
    configuration_vector: int
    queue_select: int
    status: int
    isr: int

    @property
    def is_live(self) -> bool:
        """Whether queues are to be served."""
        return self.status & (DRIVER_OK | DEVICE_NEEDS_RESET) == DRIVER_OK


REGISTERS: Final = Struct("<QIIIHHBB")
_RESET = Registers(0, 0, 0, 0, NO_VECTOR, 0, 0, 0)


class Transport:
    """The registers of a device with these features, queues and vectors; their record lies at `offset` in the image."""

    def __init__(self, offset: int, features: int, queues: Sequence[Virtqueue], vectors: int) -> None:
        self._offset = offset
        self._features = features | VERSION_1 | RING_RESET
        self._queues = queues
        self._vectors = vectors

    def load(self, memory: memoryview) -> Registers:
        """Return the registers as the image has them."""
        return Registers._make(REGISTERS.unpack_from(memory, self._offset))

    def store(self, registers: Registers) -> Store:
        """Return what puts the registers into the image."""
        return self._offset, REGISTERS.pack(*registers)

    def reset(self, epoch: int = 0) -> list[Store]:
        """Return what sets registers and queues to their initial values."""
        return [self.store(_RESET._replace(epoch=epoch & _EPOCH_MASK)), *(q.store(fresh()) for q in self._queues)]

    def read_common(self, memory: memoryview) -> bytes:
        """Return the common configuration structure: 60 bytes."""
        registers = self.load(memory)
        selected = registers.queue_select
        queue = self._queues[selected].load(memory) if selected < len(self._queues) else Queue(*(0,) * 17)
        return _COMMON.pack(
            registers.device_feature_select,
            _half(self._features, registers.device_feature_select),
            registers.driver_feature_select,
            _half(registers.driver_features, registers.driver_feature_select),
            registers.configuration_vector,
            len(self._queues),
            registers.status,
            0,  # neither the MAC address nor the link ever changes
            selected,
            queue.size,
            queue.vector,
            queue.enabled,
            selected if queue.size else 0,
            queue.descriptors,
            queue.driver,
            queue.device,
            0,
            0,  # a reset of a queue is over at once
        )

    def read_isr(self, memory: memoryview) -> tuple[int, Sequence[Store]]:
        """Return the ISR status, which reading clears."""
        registers = self.load(memory)
        return registers.isr, (self.store(registers._replace(isr=0)),) if registers.isr else ()

    def write_common(self, memory: memoryview, offset: int, data: bytes) -> Sequence[Store] | None:
        """Return what a write to the common configuration structure changes; None if that is a reset of the device."""
        registers = self.load(memory)
        value = int.from_bytes(data, "little")
        if offset >= QUEUE_SIZE:
            return self._write_queue(memory, registers, offset, len(data), value)
        match offset, len(data):
            case 0x00, 4:
                registers = registers._replace(device_feature_select=value)
            case 0x08, 4:
                registers = registers._replace(driver_feature_select=value)
            case 0x0C, 4 if not registers.status & FEATURES_OK and registers.driver_feature_select < 2:
                shift = 32 * registers.driver_feature_select
                kept = registers.driver_features & ~(_HALF << shift)
                registers = registers._replace(driver_features=kept | value << shift)
            case 0x10, 2:
                registers = registers._replace(configuration_vector=self._vector(value))
            case 0x14, 1:
                return self._write_status(memory, registers, value) if value else None
            case 0x16, 2:
                registers = registers._replace(queue_select=value)
            case _:
                return ()
        return (self.store(registers),)

    def kick(self, memory: memoryview, index: int) -> Sequence[Store]:
        """Return what a notification of a queue changes."""
        queue = self._queues[index].load(memory)
        if not queue.enabled or not self.load(memory).is_live:
            return ()
        return (self._queues[index].store(kicked(queue)),)

    def _write_status(self, memory: memoryview, registers: Registers, value: int) -> Sequence[Store]:
        # Bits are set one after the other and cleared by a reset alone (virtio 1.2, 2.1.1).
        added = value & _DRIVER_STATUS & ~registers.status
        if added & FEATURES_OK and not self._accepts(registers.driver_features):
            added &= ~FEATURES_OK
        status = registers.status | added
        if not status & FEATURES_OK:
            status &= ~DRIVER_OK
        stores = [self.store(registers._replace(status=status))]
        if status & ~registers.status & DRIVER_OK:
            # A driver may have filled its queues before.
            for virtqueue in self._queues:
                queue = virtqueue.load(memory)
                if queue.enabled:
                    stores.append(virtqueue.store(kicked(queue)))
        return stores

    def _accepts(self, features: int) -> bool:
        return bool(features & VERSION_1) and not features & ~self._features

    def _write_queue(
        self, memory: memoryview, registers: Registers, offset: int, length: int, value: int
    ) -> Sequence[Store]:
        if registers.queue_select >= len(self._queues):
            return ()
        virtqueue = self._queues[registers.queue_select]
        queue = virtqueue.load(memory)
        match offset, length:
            case 0x1A, 2:
                return (virtqueue.store(queue._replace(vector=self._vector(value))),)
            case 0x3A, 2 if value == 1 and registers.driver_features & RING_RESET and registers.status & FEATURES_OK:
                epoch = registers.epoch + 1 & _EPOCH_MASK
                return (virtqueue.store(fresh()), self.store(registers._replace(epoch=epoch)))
        if queue.enabled:
            return ()
        match offset, length:
            case 0x18, 2 if value <= MAX_QUEUE_SIZE and value.bit_count() == 1:
                queue = queue._replace(size=value)
            case 0x1C, 2 if value == 1 and registers.status & FEATURES_OK:
                queue = queue._replace(enabled=1)
                queue = kicked(queue) if registers.is_live else queue
            case _:
                queue = _with_address(queue, offset, length, value)
        return (virtqueue.store(queue),)

    def _vector(self, vector: int) -> int:
        """Return the vector that a register takes on: no other than those there are."""
        return vector if vector < self._vectors else NO_VECTOR


def _half(features: int, select: int) -> int:
    return features >> 32 * select & _HALF if select < 2 else 0


def _with_address(queue: Queue, offset: int, length: int, value: int) -> Queue:
    """Return the queue after a write to half an address, or to a whole one; the same if it is to none."""
    field = _ADDRESSES.get(offset & ~7)
    before: Mapping[str, int] = queue._asdict()
    if field is None or length not in (4, 8):
        return queue
    shift = 8 * (offset & 7)
    mask = (1 << 8 * length) - 1 << shift
    return queue._replace(**{field: before[field] & ~mask | value << shift})
