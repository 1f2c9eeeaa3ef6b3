"""A virtio-net device from its driver's side: set-up, and the two rings in main memory (virtio 1.2, 2.7 and 5.1).

    main memory:  0         4 KiB              20 KiB            36 KiB     228 KiB    420 KiB
                  | words   | receive ring     | transmit ring   | buffers  | buffers  |
                  | of ours |                  |                 | received | sent     |

Every entry of a ring has a buffer of its own for good, and entries are used in turn: so a ring's own index tells all
that there is to know of it, and a driver that comes after a kill goes on from there. The device returns chains in the
order in which it got them, which its data sheet promises and virtio does not.
"""

from collections.abc import Iterator
from struct import Struct, pack
from typing import Final

from hostd.models import virtio
from hostd.models.virtio_net import (
    CONFIGURATION,
    FEATURE_MAC,
    FEATURE_STATUS,
    HEADER,
    MSIX_TABLE,
    NOTIFY,
    NOTIFY_MULTIPLIER,
    RECEIVE,
    TRANSMIT,
)
from hostd.models.virtqueue import AVAILABLE_NO_INTERRUPT, DESCRIPTOR_WRITE, USED_NO_NOTIFY
from hostd.workloads.port import Port
from vfleet.errors import Reason, VfleetError, invalid_field

SIZE: Final = 128
"""Entries of each ring."""
RINGS_OFFSET: Final = 0x1000
MAIN_MEMORY_BYTES: Final = 0x69000
RECEIVE_VECTOR: Final = 1
CONFIGURATION_VECTOR: Final = 0

_RING_BYTES = 0x4000
_BUFFERS_OFFSET = RINGS_OFFSET + 2 * _RING_BYTES
_BUFFER_BYTES = 1536
_FEATURES = virtio.VERSION_1 | virtio.RING_RESET | FEATURE_MAC | FEATURE_STATUS
_INDEX_MASK = 0xFFFF
_DESCRIPTOR = Struct("<QIHH")
_USED_ELEMENT = Struct("<II")


class Ring:
    """One ring, at `start` in main memory, with its buffers at `buffers`."""

    def __init__(self, port: Port, index: int) -> None:
        self._port = port
        self._index = index
        self._memory = port.memory
        self._halves = port.memory.cast("H")
        start = RINGS_OFFSET + index * _RING_BYTES
        self.descriptors, self.available, self.used = start, start + 0x1000, start + 0x2000
        self._buffers = _BUFFERS_OFFSET + index * SIZE * _BUFFER_BYTES

    def lay_out(self, flags: int, available_flags: int) -> None:
        """Describe every entry's buffer, with these descriptor flags."""
        for entry in range(SIZE):
            address = self._port.memory_address + self._buffers + entry * _BUFFER_BYTES
            _DESCRIPTOR.pack_into(self._memory, self.descriptors + 16 * entry, address, _BUFFER_BYTES, flags, 0)
            self._halves[(self.available + 4) // 2 + entry] = entry
        self._halves[self.available // 2] = available_flags

    @property
    def given(self) -> int:
        """How many chains were given to the device, mod 2**16."""
        return self._halves[(self.available + 2) // 2]

    def give(self, given: int) -> None:
        """Give chains to the device, up to this number in all."""
        self._halves[(self.available + 2) // 2] = given & _INDEX_MASK

    @property
    def returned(self) -> int:
        """How many of them the device has returned, mod 2**16."""
        return self._halves[(self.used + 2) // 2]

    def kick(self, *, always: bool = False) -> None:
        """Notify the device, if it wants that."""
        if always or not self._halves[self.used // 2] & USED_NO_NOTIFY:
            self._port.write(NOTIFY + self._index * NOTIFY_MULTIPLIER, pack("<H", self._index))

    def used_element(self, number: int) -> tuple[int, int]:
        """Return the head, and the bytes written, of the chain that was returned as the `number`th, from 0."""
        head, written = _USED_ELEMENT.unpack_from(self._memory, self.used + 4 + number % SIZE * _USED_ELEMENT.size)
        return head, written

    def packet(self, entry: int, length: int) -> bytes:
        """Return what an entry's buffer has."""
        start = self._buffers + entry * _BUFFER_BYTES
        return bytes(self._memory[start : start + min(length, _BUFFER_BYTES)])

    def put_packet(self, entry: int, packet: bytes) -> None:
        """Fill an entry's buffer, and say how long it is."""
        start = self._buffers + entry * _BUFFER_BYTES
        self._memory[start : start + len(packet)] = packet
        self._memory[self.descriptors + 16 * entry + 8 : self.descriptors + 16 * entry + 12] = pack("<I", len(packet))


class VirtioQueues:
    """The device: frames in, frames out. Raise VfleetError INVALID_FIELD if main memory is too small."""

    def __init__(self, port: Port) -> None:
        if len(port.memory) < MAIN_MEMORY_BYTES:
            raise invalid_field("main_memory_bytes", len(port.memory), f"{MAIN_MEMORY_BYTES} at least")
        self._port = port
        self._receive = Ring(port, RECEIVE)
        self._transmit = Ring(port, TRANSMIT)

    async def start(self) -> None:
        """Set device and rings up from nothing. Raise ILLEGAL_STATE if it is no virtio-net with these features."""
        await self._check_device()
        self._port.memory[RINGS_OFFSET:_BUFFERS_OFFSET] = bytes(_BUFFERS_OFFSET - RINGS_OFFSET)
        self._receive.lay_out(DESCRIPTOR_WRITE, 0)
        # What was sent needs no interrupt: the entry is looked at when it is needed again.
        self._transmit.lay_out(0, AVAILABLE_NO_INTERRUPT)
        self._receive.give(SIZE)
        for vector in (CONFIGURATION_VECTOR, RECEIVE_VECTOR):
            self._port.write(MSIX_TABLE + 16 * vector, pack("<Q", self._port.interrupt_address))
            self._port.write(MSIX_TABLE + 16 * vector + 8, pack("<II", vector, 0))
        self._set_up()
        status = (await self._port.read(virtio.DEVICE_STATUS, 1))[0]
        if not status & virtio.DRIVER_OK or status & virtio.DEVICE_NEEDS_RESET:
            raise VfleetError(Reason.ILLEGAL_STATE, f"the device does not start: its status is {status:#x}")
        self.resume()

    def resume(self) -> None:
        """Go on after `start`, or after a kill: what had been written last may not have arrived."""
        self._receive.kick(always=True)
        self._transmit.kick(always=True)

    async def mac_address(self) -> bytes:
        """Return the device's MAC address."""
        return (await self._port.read(CONFIGURATION, 8))[:6]

    async def check(self) -> None:
        """Raise ILLEGAL_STATE if the device has stopped because something was wrong with the rings."""
        if self._port.interrupts(CONFIGURATION_VECTOR):
            status = (await self._port.read(virtio.DEVICE_STATUS, 1))[0]
            if status & virtio.DEVICE_NEEDS_RESET:
                raise VfleetError(Reason.ILLEGAL_STATE, f"the device needs a reset: its status is {status:#x}")

    def received(self, done: int) -> Iterator[bytes]:
        """Yield the frames that were received after the first `done` (mod 2**16), without their headers.

        An entry whose header is wrong gives an empty frame. Raise ILLEGAL_STATE for what no device may do.
        """
        for number in range((self._receive.returned - done) & _INDEX_MASK):
            entry, length = self._receive.used_element(done + number)
            if entry != (done + number) % SIZE:
                raise VfleetError(
                    Reason.ILLEGAL_STATE, f"the device returned buffer {entry}; expected {(done + number) % SIZE}"
                )
            packet = self._receive.packet(entry, length)
            yield packet[len(HEADER) :] if packet.startswith(HEADER) else b""

    def give_back(self, done: int) -> None:
        """Give the device the buffers of the first `done` frames again."""
        given = (done + SIZE) & _INDEX_MASK
        if self._receive.given != given:
            self._receive.give(given)
            self._receive.kick()

    @property
    def sent(self) -> int:
        """How many frames were given to the device, mod 2**16."""
        return self._transmit.given

    @property
    def room(self) -> int:
        """How many frames can be sent now."""
        return SIZE - ((self._transmit.given - self._transmit.returned) & _INDEX_MASK)

    def prepare(self, frame: bytes) -> None:
        """Put a frame where the next one to be sent is; it isn't sent yet."""
        self._transmit.put_packet(self._transmit.given % SIZE, bytes(len(HEADER)) + frame)

    def send(self) -> None:
        """Give the prepared frame to the device. The one store that does so is the index's."""
        self._transmit.give(self._transmit.given + 1)

    def kick(self) -> None:
        """Tell the device of the frames."""
        self._transmit.kick()

    async def _check_device(self) -> None:
        halves = []
        for select in (0, 1):
            self._port.write(virtio.DEVICE_FEATURE_SELECT, pack("<I", select))
            halves.append(await self._port.read(virtio.DEVICE_FEATURE, 4))
        features = int.from_bytes(b"".join(halves), "little")
        queues = int.from_bytes(await self._port.read(virtio.NUMBER_OF_QUEUES, 2), "little")
        if features & _FEATURES != _FEATURES or queues != 2:
            raise VfleetError(
                Reason.ILLEGAL_STATE,
                f"the function offers features {features:#x} and {queues} queues; expected a virtio-net, for which this"
                " workload is made",
            )

    def _set_up(self) -> None:
        write = self._port.write
        status = virtio.ACKNOWLEDGE | virtio.DRIVER
        for value in (0, virtio.ACKNOWLEDGE, status):
            write(virtio.DEVICE_STATUS, pack("<B", value))
        for select in (0, 1):
            write(virtio.DRIVER_FEATURE_SELECT, pack("<I", select))
            write(virtio.DRIVER_FEATURE, pack("<I", _FEATURES >> 32 * select & 0xFFFF_FFFF))
        write(virtio.DEVICE_STATUS, pack("<B", status | virtio.FEATURES_OK))
        write(virtio.CONFIGURATION_VECTOR, pack("<H", CONFIGURATION_VECTOR))
        for index, ring in ((RECEIVE, self._receive), (TRANSMIT, self._transmit)):
            write(virtio.QUEUE_SELECT, pack("<H", index))
            write(virtio.QUEUE_SIZE, pack("<H", SIZE))
            write(virtio.QUEUE_VECTOR, pack("<H", RECEIVE_VECTOR if index == RECEIVE else 0xFFFF))
            for register, offset in (
                (virtio.QUEUE_DESCRIPTORS, ring.descriptors),
                (virtio.QUEUE_DRIVER, ring.available),
                (virtio.QUEUE_DEVICE, ring.used),
            ):
                address = pack("<Q", self._port.memory_address + offset)
                write(register, address[:4])
                write(register + 4, address[4:])
            write(virtio.QUEUE_ENABLE, pack("<H", 1))
        write(virtio.DEVICE_STATUS, pack("<B", status | virtio.FEATURES_OK | virtio.DRIVER_OK))
