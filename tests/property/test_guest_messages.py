"""Whatever a VMM says, a guest's device answers it once, accesses nothing but its function, and never raises."""

import os
import struct
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from hostd.guest import vfio_user
from hostd.guest.device import Answered, GuestDevice
from hostd.guest.memory import GuestMemory
from hostd.guest.vfio_user import Command, Message
from hostd.models import create_model
from hostd.models.pci import pci_function
from vfleet.address import bar_layout
from vfleet.v1.access_pb2 import (
    ACCESS_KIND_FENCE,
    ACCESS_KIND_RESET,
    ACCESS_KIND_WRITE,
    ACCESS_STATUS_OK,
    AccessKind,
)
from vfleet.v1.types_pb2 import Bar, Guest, Manufacturer

BARS = {"nvme": {0: 16 << 10, 2: 1 << 20}, "virtio-net": {0: 32 << 10}, "checker": {0: 4096, 2: 4096}}
LIMIT = 1 << 20


class World:
    """A port that answers at once, and remembers."""

    def __init__(self, model: str) -> None:
        self.replies = self.accesses = 0
        self.last_reply = b""
        self.kept: set[bytes] = set()
        self.cuts = 0
        self.layout = bar_layout(BARS[model])
        self.bars = {bar: size for bar, size in BARS[model].items() if bar in pci_function(model).bars}
        guest = Guest(
            socket="/s",
            model=model,
            bars=[Bar(index=index, size_bytes=size) for index, size in BARS[model].items()],
            manufacturer=Manufacturer(vendor_id=0x1AF4, device_id=0x10C5),
        )
        self.memory = GuestMemory()
        self.device = GuestDevice(guest, pci_function(model), self.memory, LIMIT, self)

    def access(
        self, kind: AccessKind.ValueType, offset: int, length: int, data: bytes, answered: Answered | None
    ) -> None:
        self.accesses += 1
        if kind in (ACCESS_KIND_RESET, ACCESS_KIND_FENCE):
            assert (offset, length, data) == (0, 8, b"")
        else:
            assert any(self.layout[b] <= offset <= self.layout[b] + size - length for b, size in self.bars.items())
            assert len(data) == (length if kind == ACCESS_KIND_WRITE else 0)
        if answered is not None:
            answered((ACCESS_STATUS_OK, bytes(length)))

    def reply(self, message: bytes, after_write: int = 0) -> None:
        assert len(message) == vfio_user.HEADER.unpack_from(message)[2] <= vfio_user.MAX_MESSAGE_BYTES
        self.replies += 1
        self.last_reply = message

    def cut_off(self) -> None:
        self.cuts += 1

    def reset_done(self, last_write: int) -> None:
        self.cuts -= 1

    def keep(self, key: bytes, data: bytes, descriptor: int = -1) -> None:
        assert len(key) <= 256
        self.kept.add(key)

    def drop(self, key: bytes) -> None:
        self.kept.discard(key)

    def ring(self, key: bytes) -> None:
        assert key in self.kept


numbers = st.one_of(
    st.integers(0, 64), st.integers(0, 1 << 32), st.sampled_from([4096, 8192, (1 << 64) - 4096, 1 << 63])
)
small = numbers.map(lambda number: number & 0xFFFFFFFF)


def packed(layout: struct.Struct, *fields: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    return st.tuples(*fields).map(lambda values: layout.pack(*values))


bodies = st.one_of(
    st.binary(max_size=64),
    packed(vfio_user.MAP, small, small, numbers, numbers, numbers),
    packed(vfio_user.UNMAP, small, small, numbers, numbers),
    packed(vfio_user.SET_INTERRUPTS, small, st.integers(0, 63), st.integers(0, 5), small, small),
    packed(vfio_user.REGION_INFO, small, small, small, small, numbers, numbers),
    st.tuples(packed(vfio_user.REGION_ACCESS, numbers, st.integers(0, 10), small), st.binary(max_size=16)).map(
        b"".join
    ),
)
messages = st.builds(
    Message,
    identifier=st.integers(0, 0xFFFF),
    command=st.one_of(st.sampled_from(Command), st.integers(0, 0xFFFF)),
    flags=st.one_of(st.just(0), st.sampled_from([vfio_user.NO_REPLY, 1, 0xFFFFFFFF])),
    body=bodies,
)


def descriptors_open() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@given(model=st.sampled_from(sorted(BARS)), said=st.lists(st.tuples(messages, st.integers(0, 3)), max_size=20))
def test_any_messages_are_answered_once_and_harm_nothing(model: str, said: list[tuple[Message, int]]):
    world = World(model)
    world.device.connected()
    opened = descriptors_open()
    for message, count in said:
        before = world.replies
        descriptors = [os.memfd_create("guest", os.MFD_ALLOW_SEALING) for _ in range(count)]
        world.device.handle(message, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        replies = world.replies - before
        always = message.command in (Command.REGION_READ, Command.VERSION) or not message.wants_reply
        assert replies == 1 or (always and replies <= 1)
        assert world.cuts == 0
    world.device.gone()
    assert world.kept <= {b"configuration"}
    assert descriptors_open() <= opened


def test_what_never_changes_is_read_without_the_function():
    world = World("nvme")
    world.device.connected()
    model = create_model("nvme", 1, BARS["nvme"])
    registers = bytearray(BARS["nvme"][0])
    for offset, data in model.reset():
        registers[offset : offset + len(data)] = data[: len(registers) - offset] if offset < len(registers) else b""
    for offset, length, is_asked in ((0, 8, False), (4, 4, False), (8, 4, False), (0xC, 4, True), (0x1C, 4, True)):
        before = world.accesses
        world.device.handle(Message(1, Command.REGION_READ, 0, struct.pack("<QII", offset, 0, length)), [])
        assert (world.accesses > before) == is_asked
        if not is_asked:
            assert world.last_reply[-length:] == bytes(registers[offset : offset + length])
