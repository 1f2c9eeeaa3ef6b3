"""A virtio driver for tests: it lays out rings by hand, so that it can also lay them out wrongly."""

from struct import pack, pack_into, unpack_from

from support.model_rig import MEMORY_ADDRESS, Rig

from hostd.models import virtio
from hostd.models.virtio_net import COMMON, MSIX_TABLE, NOTIFY, NOTIFY_MULTIPLIER, RECEIVE, TRANSMIT
from vfleet.limits import INTERRUPT_PAGE_ADDRESS

BARS = {0: 0x8000}
NO_VECTOR = 0xFFFF
NEXT, WRITE = 1, 2
FEATURES = virtio.VERSION_1 | virtio.RING_RESET | 1 << 5 | 1 << 16


def at(offset: int) -> int:
    """The address, for the device, of a place in main memory."""
    return MEMORY_ADDRESS + offset


class Ring:
    """One queue of the driver, in 16 KiB of main memory at `start`."""

    def __init__(self, rig: Rig, index: int, start: int, size: int = 8) -> None:
        self.rig, self.index, self.size = rig, index, size
        self.descriptors, self.available, self.used = start, start + 0x1000, start + 0x2000
        self.given = self.seen = 0

    def describe(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        pack_into("<QIHH", self.rig.memory, self.descriptors + 16 * index, address, length, flags, following)

    def give(self, *heads: int, kick: bool = True) -> None:
        for head in heads:
            pack_into("<H", self.rig.memory, self.available + 4 + 2 * (self.given % self.size), head)
            self.given += 1
        pack_into("<H", self.rig.memory, self.available + 2, self.given & 0xFFFF)
        if kick:
            self.kick()

    def kick(self) -> None:
        self.rig.write(NOTIFY + self.index * NOTIFY_MULTIPLIER, self.index, 2)

    def take(self) -> list[tuple[int, int]]:
        """Return what came back since: heads, and bytes written."""
        found = []
        while self.seen != self.used_index:
            found.append(unpack_from("<II", self.rig.memory, self.used + 4 + 8 * (self.seen % self.size)))
            self.seen = self.seen + 1 & 0xFFFF
        return found

    @property
    def used_index(self) -> int:
        return unpack_from("<H", self.rig.memory, self.used + 2)[0]

    @property
    def wants_kicks(self) -> bool:
        return not unpack_from("<H", self.rig.memory, self.used)[0]

    def want_interrupts(self, *, wanted: bool) -> None:
        pack_into("<H", self.rig.memory, self.available, not wanted)


class Bench:
    """A virtio-net function with a driver bound to it: two rings, three vectors with data 0, 1 and 2."""

    def __init__(self, rig: Rig, size: int = 8) -> None:
        self.rig = rig
        self.receive = Ring(rig, RECEIVE, 0x0000, size)
        self.transmit = Ring(rig, TRANSMIT, 0x4000, size)

    def common(self, register: int, length: int) -> int:
        value = self.rig.read(COMMON + register, length)
        assert value is not None
        return value

    def set_common(self, register: int, value: int, length: int) -> None:
        assert self.rig.write(COMMON + register, value, length)

    @property
    def status(self) -> int:
        return self.common(virtio.DEVICE_STATUS, 1)

    def set_status(self, bits: int) -> int:
        self.set_common(virtio.DEVICE_STATUS, bits, 1)
        return self.status

    def negotiate(self, features: int = FEATURES) -> int:
        self.set_status(virtio.ACKNOWLEDGE)
        self.set_status(virtio.ACKNOWLEDGE | virtio.DRIVER)
        for half in (0, 1):
            self.set_common(virtio.DRIVER_FEATURE_SELECT, half, 4)
            self.set_common(virtio.DRIVER_FEATURE, features >> 32 * half & 0xFFFF_FFFF, 4)
        return self.set_status(virtio.ACKNOWLEDGE | virtio.DRIVER | virtio.FEATURES_OK)

    def set_queue(self, ring: Ring, vector: int) -> None:
        self.set_common(virtio.QUEUE_SELECT, ring.index, 2)
        self.set_common(virtio.QUEUE_SIZE, ring.size, 2)
        self.set_common(virtio.QUEUE_VECTOR, vector, 2)
        for register, offset in (
            (virtio.QUEUE_DESCRIPTORS, ring.descriptors),
            (virtio.QUEUE_DRIVER, ring.available),
            (virtio.QUEUE_DEVICE, ring.used),
        ):
            self.set_common(register, at(offset) & 0xFFFF_FFFF, 4)
            self.set_common(register + 4, at(offset) >> 32, 4)
        self.set_common(virtio.QUEUE_ENABLE, 1, 2)

    def unmask(self, vector: int, *, masked: bool = False) -> None:
        entry = pack("<QII", INTERRUPT_PAGE_ADDRESS, vector, masked)
        for half in (0, 8):
            self.rig.write(MSIX_TABLE + 16 * vector + half, int.from_bytes(entry[half : half + 8], "little"), 8)

    def bind(self) -> "Bench":
        """Do what a driver does when it is bound, up to DRIVER_OK."""
        self.set_status(0)
        assert self.negotiate() & virtio.FEATURES_OK
        for vector in range(3):
            self.unmask(vector)
        self.set_common(virtio.CONFIGURATION_VECTOR, 0, 2)
        self.set_queue(self.receive, 1)
        self.set_queue(self.transmit, 2)
        assert self.set_status(0x0F) == 0x0F
        return self

    def send(self, frame: bytes, index: int = 0, *, kick: bool = True) -> None:
        """Send a frame with the transmit ring's descriptor `index`, from a place of its own."""
        place = 0x40000 + 0x800 * index
        packet = bytes(12) + frame
        self.rig.memory[place : place + len(packet)] = packet
        self.transmit.describe(index, at(place), len(packet))
        self.transmit.give(index, kick=kick)

    def give_buffer(self, index: int, length: int = 1530, *, kick: bool = True) -> None:
        """Give the receive ring's descriptor `index`, with a place of its own."""
        self.receive.describe(index, at(0x80000 + 0x800 * index), length, WRITE)
        self.receive.give(index, kick=kick)

    def buffer(self, index: int, length: int) -> bytes:
        place = 0x80000 + 0x800 * index
        return bytes(self.rig.memory[place : place + length])
