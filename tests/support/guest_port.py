"""A guest's device with a world around it that answers at once, and sees that it asks for nothing it must not."""

from hostd.guest import frames
from hostd.guest.device import DMA_KEY, Answered, GuestDevice
from hostd.guest.dma_messages import DmaMessages
from hostd.guest.memory import GuestMemory
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
TIMEOUT_S = 5.0


class GuestPort:
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
        self.now = 0.0
        self.said: list[bytes] = []
        self.failed_writes = 0
        self.messages = self.memory.messages = DmaMessages(self, TIMEOUT_S, lambda: self.now)
        self.device = GuestDevice(guest, pci_function(model), self.memory, self.messages, LIMIT, self)

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
        assert len(message) == frames.HEADER.unpack_from(message)[2] <= frames.MAX_MESSAGE_BYTES
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
        # It may wait for writes, and its eventfd be gone by then: the holder rings nobody.
        assert key.startswith(b"vector:")

    def say(self, message: bytes, *, completes: bool) -> int:
        assert len(message) == frames.HEADER.unpack_from(message)[2] <= frames.MAX_MESSAGE_BYTES
        self.said.append(message)
        return len(self.said)

    def write_failed(self) -> None:
        self.failed_writes += 1

    def learned(self, state: bytes) -> None:
        self.keep(DMA_KEY, state)
