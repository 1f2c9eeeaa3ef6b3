"""What a virtual machine says to its function: refused or done, answered at most once, never the end of a daemon.

Between its messages the function reads and writes its memory: what is asked is answered once, with what was asked for.
"""

import os
import struct

from atheris import FuzzedDataProvider
from support.guest_port import BARS, TIMEOUT_S, GuestPort

from hostd.guest import dma_messages, frames, vfio_user
from hostd.guest.vfio_user import Command, Message
from hostd.memory import MemoryBusyError

COMMANDS = [int(command) for command in Command]
LAYOUTS = (
    vfio_user.MAP,
    vfio_user.UNMAP,
    vfio_user.SET_INTERRUPTS,
    vfio_user.REGION_INFO,
    vfio_user.INTERRUPT_INFO,
    frames.REGION_ACCESS,
    vfio_user.VERSION,
    dma_messages.WHOLE,
    dma_messages.SHORT,
)
EDGES = (0, 1, 3, 8, 0x10, 0x48, 0x1000, 0x4000, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
FLAGS = (0, 0, frames.NO_REPLY, frames.REPLY, frames.REPLY | frames.FAILED)
MESSAGES = 16


def messages(given: bytes) -> None:
    """Say whatever to a function of some model, each answered at most once."""
    data = FuzzedDataProvider(given)
    world = GuestPort(data.PickValueInList(sorted(BARS)))
    world.device.connected()
    answers: list[list[bytes | None]] = []
    for _ in range(data.ConsumeIntInRange(1, MESSAGES)):
        message = Message(
            identifier=data.PickValueInList([len(world.said), data.ConsumeIntInRange(0, 0xFFFF)]),
            command=data.PickValueInList([*COMMANDS, data.ConsumeIntInRange(0, 0xFFFF)]),
            flags=data.PickValueInList([*FLAGS, data.ConsumeIntInRange(0, 0xFFFFFFFF)]),
            body=_body(data),
        )
        descriptors = [_descriptor(data) for _ in range(data.ConsumeIntInRange(0, 2))]
        before = world.replies
        try:
            world.device.handle(message, descriptors, refused=int(data.ConsumeIntInRange(0, 9) == 9))
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        assert world.replies - before <= 1
        _access_memory(data, world, answers)
    world.now += TIMEOUT_S
    world.messages.expire()
    assert world.messages.expires_s is None
    assert all(len(each) == 1 for each in answers), answers
    world.device.gone()
    assert world.kept <= {b"configuration"}


def _access_memory(data: FuzzedDataProvider, world: GuestPort, answers: list[list[bytes | None]]) -> None:
    address, length = data.PickValueInList([0, 8, 4096, *EDGES]), data.ConsumeIntInRange(1, 4096)
    before = len(world.said)
    try:
        if data.ConsumeBool():
            found: list[bytes | None] = []
            world.messages.read(address, length, lambda data: found.append(_checked(data, length)))
            answers.append(found)
        else:
            world.memory.write(address, bytes(length))
        world.device.interrupts.raise_(data.ConsumeIntInRange(0, 3))
    except MemoryBusyError:
        return
    finally:
        world.now += data.PickValueInList([0.0, TIMEOUT_S / 4])
        world.messages.expire()
    assert len(world.said) - before <= dma_messages.MAX_UNANSWERED


def _checked(data: bytes | None, length: int) -> bytes | None:
    assert data is None or len(data) == length
    return data


def _body(data: FuzzedDataProvider) -> bytes:
    layout = data.PickValueInList(list(LAYOUTS))
    numbers = [
        data.PickValueInList([*EDGES, data.ConsumeIntInRange(0, (1 << 64) - 1)])
        for _ in layout.unpack(bytes(layout.size))
    ]
    widths = [struct.calcsize(f"<{letter}") for letter in layout.format if letter.isalpha()]
    fields = [number % (1 << 8 * width) for number, width in zip(numbers, widths, strict=False)]
    packed = layout.pack(*fields) if len(fields) == len(numbers) else b""
    return packed + data.ConsumeBytes(data.ConsumeIntInRange(0, 64))


def _descriptor(data: FuzzedDataProvider) -> int:
    if data.ConsumeBool():
        return os.eventfd(0)
    descriptor = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, data.PickValueInList([0, 4096, 1 << 20]))
    return descriptor
