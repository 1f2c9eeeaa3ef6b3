"""What functions of the models are to a PCI driver: class, BARs, MSI-X and capabilities, for configuration space."""

from collections.abc import Mapping
from dataclasses import dataclass
from struct import Struct
from typing import Final

from hostd.models import accelerator, checker, nvme, nvme_layout, nvme_registers, virtio_net
from vfleet.errors import invalid_field

VIRTIO_VENDOR: Final = 0x1AF4
VIRTIO_NET_DEVICE: Final = 0x1041

_VENDOR_SPECIFIC = 0x09
_VIRTIO_COMMON, _VIRTIO_NOTIFY, _VIRTIO_ISR, _VIRTIO_DEVICE = 1, 2, 3, 4
_VIRTIO_CAPABILITY = Struct("<BBBBB3xII")  # identifier, next, bytes, kind, BAR; offset, bytes
_WORD = Struct("<I")


@dataclass(frozen=True, slots=True)
class PciFunction:
    """A function of a model. MSI-X table and pending bits are in BAR 0; there are `vectors`, or 0 for none.

    `manufacturer` is (vendor, device), for what drivers know by that; None if whoever made the device counts.
    """

    class_code: int
    bars: tuple[int, ...]
    vectors: int = 0
    table: int = 0
    pending: int = 0
    manufacturer: tuple[int, int] | None = None
    revision: int = 0
    capabilities: tuple[bytes, ...] = ()
    """Further ones, each from its identifier on; the second byte, which leads to the next, is 0 here."""
    identification: bytes = b""
    """What BAR 0 begins with and never changes: it is read without asking the function, also during a hold."""


def _virtio(kind: int, offset: int, length: int, *more: int) -> bytes:
    size = _VIRTIO_CAPABILITY.size + _WORD.size * len(more)
    head = _VIRTIO_CAPABILITY.pack(_VENDOR_SPECIFIC, 0, size, kind, 0, offset, length)
    return head + b"".join(_WORD.pack(word) for word in more)


_FUNCTIONS: Final[Mapping[str, PciFunction]] = {
    checker.Checker.name: PciFunction(0xFF0000, (0, 2)),
    accelerator.Accelerator.name: PciFunction(
        0x120000, (0, 2), accelerator.VECTORS, accelerator.MSIX_TABLE, accelerator.MSIX_PENDING
    ),
    # Its BAR 2 is the medium, which no NVMe driver knows of.
    nvme.Nvme.name: PciFunction(
        0x010802,
        (0,),
        nvme_layout.VECTORS,
        nvme_layout.MSIX_TABLE,
        nvme_layout.MSIX_PENDING,
        identification=nvme_registers.IDENTIFICATION,
    ),
    virtio_net.VirtioNet.name: PciFunction(
        0x020000,
        (0,),
        virtio_net.VECTORS,
        virtio_net.MSIX_TABLE,
        virtio_net.MSIX_PENDING,
        manufacturer=(VIRTIO_VENDOR, VIRTIO_NET_DEVICE),
        revision=1,
        capabilities=(
            _virtio(_VIRTIO_COMMON, virtio_net.COMMON, 60),
            _virtio(_VIRTIO_ISR, virtio_net.ISR, 1),
            _virtio(_VIRTIO_DEVICE, virtio_net.CONFIGURATION, 8),
            _virtio(_VIRTIO_NOTIFY, virtio_net.NOTIFY, 2 * virtio_net.NOTIFY_MULTIPLIER, virtio_net.NOTIFY_MULTIPLIER),
        ),
    ),
}


def pci_function(model: str) -> PciFunction:
    """Return what a model's functions are. Raise INVALID_FIELD for a model that isn't known."""
    if model not in _FUNCTIONS:
        raise invalid_field("model", model, f"one of {', '.join(sorted(_FUNCTIONS))}")
    return _FUNCTIONS[model]
