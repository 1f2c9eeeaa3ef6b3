"""What a virtual machine says to its function: refused or done, answered at most once, never the end of a daemon."""

import os
import struct

from atheris import FuzzedDataProvider
from support.guest_port import BARS, GuestPort

from hostd.guest import frames, vfio_user
from hostd.guest.vfio_user import Command, Message

COMMANDS = [int(command) for command in Command]
LAYOUTS = (
    vfio_user.MAP,
    vfio_user.UNMAP,
    vfio_user.SET_INTERRUPTS,
    vfio_user.REGION_INFO,
    vfio_user.INTERRUPT_INFO,
    frames.REGION_ACCESS,
    vfio_user.VERSION,
)
EDGES = (0, 1, 3, 8, 0x10, 0x48, 0x1000, 0x4000, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 1)
MESSAGES = 16


def messages(given: bytes) -> None:
    """Say whatever to a function of some model, each answered at most once."""
    data = FuzzedDataProvider(given)
    world = GuestPort(data.PickValueInList(sorted(BARS)))
    world.device.connected()
    for _ in range(data.ConsumeIntInRange(1, MESSAGES)):
        message = Message(
            identifier=data.ConsumeIntInRange(0, 0xFFFF),
            command=data.PickValueInList([*COMMANDS, data.ConsumeIntInRange(0, 0xFFFF)]),
            flags=data.PickValueInList([0, 0, frames.NO_REPLY, data.ConsumeIntInRange(0, 0xFFFFFFFF)]),
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
    world.device.gone()
    assert world.kept <= {b"configuration"}


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
