"""The model "nvme" behind a bare vfio-user server: `python -m benchmarks.bare_nvme SOCKET`. One process, one VMM.

Messages mean what they mean to hostd (`hostd.guest.device`), and the controller is the same. All else is left out:
each access is carried out in the call that reads it, and with it all work that it makes; there is no holder, no queue,
no sequence, no redo record, nothing durable, and no other host.
"""

import array
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from hostd.guest.device import Answered, GuestDevice
from hostd.guest.dma_messages import DmaMessages
from hostd.guest.memory import GuestMemory
from hostd.guest.vfio_user import HEADER, MAX_DESCRIPTORS, Message
from hostd.memory import MemoryBusyError
from hostd.models.base import Store
from hostd.models.nvme import Nvme
from hostd.models.pci import pci_function
from vfleet.address import bar_span
from vfleet.limits import INTERRUPT_PAGE_ADDRESS
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_RESET, ACCESS_KIND_WRITE, ACCESS_STATUS_OK, AccessKind
from vfleet.v1.types_pb2 import Bar, Guest

BARS = {0: 16 << 10, 2: 16 << 20}
MEMORY_BYTES = 1 << 30
MANUFACTURER = (0x1AF4, 0x10C5)
_NO_WRITES = bytes(8)


class BareNvme:
    """The controller, and the port of its device (hostd.guest.device.Port) to the VMM that is connected.

    All of the guest's memory comes with descriptors, so no messages ask for it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._model = Nvme(1, BARS)
        self._image = bytearray(bar_span(BARS) + Nvme.private_bytes)
        self._view = memoryview(self._image)
        self._memory = GuestMemory()
        self._eventfds: dict[bytes, int] = {}
        guest = Guest(model=Nvme.name, bars=[Bar(index=index, size_bytes=size) for index, size in BARS.items()])
        guest.manufacturer.vendor_id, guest.manufacturer.device_id = MANUFACTURER
        messages = DmaMessages(self, 0.0, lambda: 0.0)
        self._device = GuestDevice(guest, pci_function(Nvme.name), self._memory, messages, MEMORY_BYTES, self)
        self._device.connected()

    def serve(self) -> None:
        """Answer until the VMM goes."""
        space = socket.CMSG_SPACE(4 * MAX_DESCRIPTORS)
        while True:
            head, ancillary, _, _ = self._connection.recvmsg(HEADER.size, space, 0)
            if not head:
                return
            length = HEADER.unpack(head)[2] - HEADER.size
            body = self._connection.recv(length, socket.MSG_WAITALL) if length else b""
            descriptors = array.array("i", b"".join(data for _, _, data in ancillary))
            self._device.handle(Message.parse(head + body), list(descriptors))
            for descriptor in descriptors:
                os.close(descriptor)

    def access(
        self, kind: AccessKind.ValueType, offset: int, length: int, data: bytes, answered: Answered | None
    ) -> None:
        """Carry out an access, and all work that it makes."""
        answer = _NO_WRITES
        if kind == ACCESS_KIND_READ:
            read = self._model.read(self._view, offset, length)
            answer = read[0] if read is not None else b""
        elif kind == ACCESS_KIND_WRITE:
            self._apply(self._model.write(self._view, offset, data) or ())
            self._work()
        elif kind == ACCESS_KIND_RESET:
            self._image[: BARS[0]] = bytes(BARS[0])
            self._image[bar_span(BARS) :] = bytes(Nvme.private_bytes)
            self._apply(self._model.reset())
        if answered is not None:
            answered((ACCESS_STATUS_OK, answer))

    def reply(self, message: bytes, after_write: int = 0) -> None:
        """Answer: all writes have taken effect."""
        self._connection.sendall(message)

    def cut_off(self) -> None:
        """Nothing: a reset takes effect at once."""

    def reset_done(self, last_write: int) -> None:
        """Nothing: a reset takes effect at once."""

    def keep(self, key: bytes, data: bytes, descriptor: int = -1) -> None:
        """Keep an eventfd; nothing else is kept, as nobody comes after."""
        self.drop(key)
        if key.startswith(b"vector:") and descriptor >= 0:
            self._eventfds[key] = os.dup(descriptor)

    def drop(self, key: bytes) -> None:
        """Close what was kept."""
        descriptor = self._eventfds.pop(key, None)
        if descriptor is not None:
            os.close(descriptor)

    def ring(self, key: bytes) -> None:
        """Interrupt."""
        os.eventfd_write(self._eventfds[key], 1)

    def say(self, message: bytes, *, completes: bool) -> int:
        """Refuse: there is nothing to say."""
        raise MemoryBusyError

    def write_failed(self) -> None:
        """Nothing: no write is said."""

    def learned(self, state: bytes) -> None:
        """Nothing: nobody comes after."""

    def _work(self) -> None:
        model, view, memory = self._model, self._view, self._memory
        while (work := model.work(view)) is not None:
            found = [memory.read(read.address, read.length) for read in work.reads]
            data = [each for each in found if each is not None]
            step = model.finish(view, work, data if len(data) == len(found) else None)
            self._apply(step.stores)
            for write in step.sends:
                if write.address == INTERRUPT_PAGE_ADDRESS:
                    self._device.interrupts.raise_(int.from_bytes(write.data, "little"))
                else:
                    memory.write(write.address, write.data)

    def _apply(self, stores: Sequence[Store]) -> None:
        for offset, data in stores:
            self._image[offset : offset + len(data)] = data


def main() -> None:
    """Serve one VMM at the socket."""
    path = Path(sys.argv[1])
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        connection, _ = listener.accept()
    BareNvme(connection).serve()


if __name__ == "__main__":
    main()
