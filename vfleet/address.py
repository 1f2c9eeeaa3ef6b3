"""Fabric addresses: one 64-bit space for the whole fleet, in which an address is a function of a place.

    63            48 47            32 31                               0
    +---------------+----------------+---------------------------------+
    | segment       | routing ID     | offset in the function's window |
    +---------------+----------------+---------------------------------+

Pure arithmetic: nothing is allocated and nothing is looked up (US 9,256,559: the base address is computed from the
logical location). Constructors reject what can't exist and never mask.
"""

from collections.abc import Mapping
from dataclasses import dataclass

ADDRESS_SPACE = 1 << 64
WINDOW_SHIFT = 32
WINDOW_BYTES = 1 << WINDOW_SHIFT
PAGE_BYTES = 4096
MAX_ACCESS_BYTES = 4096
BAR_INDICES = (0, 2, 4)
MIN_BAR_BYTES = PAGE_BYTES
MAX_BAR_BYTES = 1 << 31


class AddressError(ValueError):
    """A place, BAR or access that can't exist."""


@dataclass(frozen=True, slots=True, order=True)
class Location:
    """A place in the PCI structure: a segment (0 to 65535) and a routing ID (0 to 65535). RID 0 is main memory's."""

    segment: int
    routing_id: int

    def __post_init__(self) -> None:
        for name, value in (("segment", self.segment), ("routing ID", self.routing_id)):
            if not 0 <= value <= 0xFFFF:
                raise AddressError(f"{name} is {value}; expected 0 to 65535")

    @property
    def base(self) -> int:
        """Fabric address at which the window of this place begins."""
        return self.segment << 48 | self.routing_id << 32

    def __str__(self) -> str:
        """Return the place as `lspci -D` writes it, SSSS:BB:DD.F."""
        return f"{self.segment:04x}:{format_routing_id(self.routing_id)}"


def routing_id(bus: int, device: int, function: int) -> int:
    """Return bus << 8 | device << 3 | function (PCIe Base 2.2.6.2). Raise AddressError outside 8, 5 and 3 bits."""
    for name, value, limit in (("bus", bus, 255), ("device", device, 31), ("function", function, 7)):
        if not 0 <= value <= limit:
            raise AddressError(f"{name} number is {value}; expected 0 to {limit}")
    return bus << 8 | device << 3 | function


def format_routing_id(rid: int) -> str:
    """Return BB:DD.F in hexadecimal, as lspci writes it."""
    return f"{rid >> 8:02x}:{rid >> 3 & 31:02x}.{rid & 7:x}"


def vf_routing_id(pf_routing_id: int, first_vf_offset: int, vf_stride: int, vf_index: int) -> int:
    """Return the routing ID of VF `vf_index`, from 1 (PCIe SR-IOV 9.2.1.2). Raise AddressError beyond 16 bits."""
    rid = pf_routing_id + first_vf_offset + (vf_index - 1) * vf_stride
    if vf_index < 1 or not 0 <= rid <= 0xFFFF:
        raise AddressError(f"VF {vf_index} would have routing ID {rid:#x}; expected an index from 1 and 16 bits")
    return rid


def location_of(address: int) -> Location:
    """Return the place whose window holds a fabric address."""
    return Location(address >> 48, address >> 32 & 0xFFFF)


def window_offset(address: int) -> int:
    """Return where in its window a fabric address lies."""
    return address & (WINDOW_BYTES - 1)


def table_offset(base: int, virtual_address: int) -> int:
    """Return (base - virtual_address) mod 2**64: what a table entry stores."""
    return (base - virtual_address) % ADDRESS_SPACE


def translate(virtual_address: int, offset: int) -> int:
    """Return the fabric address of a virtual one: their sum mod 2**64."""
    return (virtual_address + offset) % ADDRESS_SPACE


def bar_layout(bar_bytes: Mapping[int, int]) -> dict[int, int]:
    """Return where in the function's window each BAR begins: in index order, each at its natural alignment.

    `bar_bytes` maps an index (0, 2 or 4: 64-bit BARs) to a size, a power of two from 4096 to 2**31. Raise AddressError
    for anything else.
    """
    layout: dict[int, int] = {}
    end = 0
    for index in sorted(bar_bytes):
        size = bar_bytes[index]
        if index not in BAR_INDICES:
            raise AddressError(f"BAR index is {index}; expected 0, 2 or 4")
        if not MIN_BAR_BYTES <= size <= MAX_BAR_BYTES or size & (size - 1):
            raise AddressError(f"BAR {index} has {size} bytes; expected a power of two from 4096 to {MAX_BAR_BYTES}")
        layout[index] = -(-end // size) * size
        end = layout[index] + size
    if end > WINDOW_BYTES:
        raise AddressError(f"the BARs span {end} bytes; expected at most {WINDOW_BYTES}")
    return layout


def bar_span(bar_bytes: Mapping[int, int]) -> int:
    """Return the bytes from the window's start to the end of the last BAR. Raise AddressError as `bar_layout` does."""
    layout = bar_layout(bar_bytes)
    return max((start + bar_bytes[index] for index, start in layout.items()), default=0)


def check_access(address: int, length: int) -> None:
    """Raise AddressError unless `length` is a power of two from 1 to 4096 and `address` is aligned to it.

    Such an access never crosses a 4 KiB boundary, as PCIe Base 2.2.7 demands of a memory request.
    """
    if not 1 <= length <= MAX_ACCESS_BYTES or length & (length - 1):
        raise AddressError(f"length is {length} bytes; expected a power of two from 1 to {MAX_ACCESS_BYTES}")
    if address & (length - 1):
        raise AddressError(f"address {address:#x} is not aligned to its length of {length} bytes")
