"""Whatever a VMM says, a guest's device answers it once, accesses nothing but its function, and never raises."""

import os
import struct
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from support.guest_port import BARS, GuestPort

from hostd.guest import frames, vfio_user
from hostd.guest.vfio_user import Command, Message
from hostd.models import create_model

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
    st.tuples(packed(frames.REGION_ACCESS, numbers, st.integers(0, 10), small), st.binary(max_size=16)).map(b"".join),
)
messages = st.builds(
    Message,
    identifier=st.integers(0, 0xFFFF),
    command=st.one_of(st.sampled_from(Command), st.integers(0, 0xFFFF)),
    flags=st.one_of(st.just(0), st.sampled_from([frames.NO_REPLY, 1, 0xFFFFFFFF])),
    body=bodies,
)


def descriptors_open() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@given(model=st.sampled_from(sorted(BARS)), said=st.lists(st.tuples(messages, st.integers(0, 3)), max_size=20))
def test_any_messages_are_answered_once_and_harm_nothing(model: str, said: list[tuple[Message, int]]):
    world = GuestPort(model)
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
    world = GuestPort("nvme")
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
