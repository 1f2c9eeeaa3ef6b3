"""The SR-IOV arithmetic of one device: which routing ID a VF has, and which VF a routing ID is.

    routing ID of VF n = routing ID of the PF + First VF Offset + (n - 1) * VF Stride      (PCIe SR-IOV 9.2.1.2)

The two directions are exact inverses. Every value that can be constructed has all its VFs within 16 bits.
"""

from dataclasses import dataclass

from vfleet.address import AddressError, vf_routing_id


@dataclass(frozen=True, slots=True)
class Sriov:
    """A device's SR-IOV capability at its place.

    `pf_routing_id`: 0 to 65535; `total_vfs`, `first_vf_offset` and `vf_stride`: from 1. AddressError if a value is out
    of range or the last VF's routing ID would need more than 16 bits.
    """

    pf_routing_id: int
    total_vfs: int
    first_vf_offset: int
    vf_stride: int

    def __post_init__(self) -> None:
        if not 0 <= self.pf_routing_id <= 0xFFFF:
            raise AddressError(f"routing ID is {self.pf_routing_id}; expected 0 to 65535")
        for name, value in (
            ("TotalVFs", self.total_vfs),
            ("First VF Offset", self.first_vf_offset),
            ("VF Stride", self.vf_stride),
        ):
            if value < 1:
                raise AddressError(f"{name} is {value}; expected at least 1")
        vf_routing_id(self.pf_routing_id, self.first_vf_offset, self.vf_stride, self.total_vfs)

    @property
    def vf_routing_ids(self) -> range:
        """Routing IDs of all VFs, in the order of their indices."""
        first = self.pf_routing_id + self.first_vf_offset
        return range(first, first + self.total_vfs * self.vf_stride, self.vf_stride)

    def routing_id_of(self, vf_index: int) -> int:
        """Return the routing ID of VF `vf_index`. Raise AddressError unless it is 1 to `total_vfs`."""
        if not 1 <= vf_index <= self.total_vfs:
            raise AddressError(f"VF index is {vf_index}; expected 1 to {self.total_vfs}")
        return vf_routing_id(self.pf_routing_id, self.first_vf_offset, self.vf_stride, vf_index)

    def vf_index_of(self, routing_id: int) -> int | None:
        """Return the index, from 1, of the VF that has this routing ID; None if no VF of the device has it."""
        index, rest = divmod(routing_id - self.pf_routing_id - self.first_vf_offset, self.vf_stride)
        return index + 1 if rest == 0 and 0 <= index < self.total_vfs else None
