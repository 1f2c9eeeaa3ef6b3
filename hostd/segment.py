"""One host's PCI segment: which function answers to a routing ID, and which routing ID a function has.

A route is a walk down the tree: the root complex takes what is main memory's, each bridge passes on what its bus range
decodes, and a device takes what its SR-IOV capability says.
"""

from dataclasses import dataclass
from typing import Final

from hostd.topology import BridgeTopology, DeviceTopology, HostTopology
from vfleet.address import Location
from vfleet.errors import invalid_field, not_found

MAIN_MEMORY_ROUTING_ID: Final = 0


@dataclass(frozen=True, slots=True)
class Route:
    """Where a routing ID leads: VF `vf_index`, from 1, of `device` (HOST/DEVICE); or MAIN_MEMORY."""

    device: str
    vf_index: int


MAIN_MEMORY: Final = Route(device="", vf_index=0)


class Segment:
    """The segment that a topology describes. It never changes."""

    def __init__(self, topology: HostTopology) -> None:
        self.number: Final = topology.segment
        self._root_complex = topology.root_complex
        self._devices = {device.name: device for device in topology.root_complex.walk()}

    @property
    def main_memory(self) -> Location:
        """The place of the root complex, in whose window main memory lies."""
        return Location(self.number, MAIN_MEMORY_ROUTING_ID)

    def device(self, name: str) -> DeviceTopology:
        """Return a device by its name, HOST/DEVICE. Raise VfleetError NOT_FOUND."""
        device = self._devices.get(name)
        if device is None:
            raise not_found("device", name)
        return device

    def place(self, device: str, vf_index: int) -> Location:
        """Return the place of a VF. Raise VfleetError NOT_FOUND for the device, INVALID_FIELD for the index."""
        sriov = self.device(device).sriov
        if not 1 <= vf_index <= sriov.total_vfs:
            raise invalid_field("vf_index", vf_index, f"1 to {sriov.total_vfs}, the VFs of {device}")
        return Location(self.number, sriov.routing_id_of(vf_index))

    def route(self, routing_id: int) -> Route | None:
        """Return where memory accesses to a routing ID go; None if nobody claims them, as no PF does."""
        if routing_id == MAIN_MEMORY_ROUTING_ID:
            return MAIN_MEMORY
        bridge: BridgeTopology | None = self._root_complex
        at = self._root_complex
        bus = routing_id >> 8
        while bridge is not None:
            at = bridge
            bridge = next((below for below in at.bridges if below.secondary <= bus <= below.subordinate), None)
        for device in at.devices:
            vf_index = device.sriov.vf_index_of(routing_id)
            if vf_index is not None:
                return Route(device.name, vf_index)
        return None
