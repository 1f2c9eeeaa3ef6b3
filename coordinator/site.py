"""A device as placement sees it: what its record says, as plain values that are made once and compared often. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from vfleet.parts import within
from vfleet.v1.placement_pb2 import Boundary
from vfleet.v1.records_pb2 import Device, PartKind

# No name has a blank, so these are nobody's.
_ROOT_COMPLEX = "root complex"
_ABOVE_ROOT_COMPLEX = "no bridge"


@dataclass(frozen=True, slots=True)
class Site:
    """A device. `within` names, for each boundary, the one that encloses it, by a name that is unique in the fleet.

    `parts` are the keys of all parts of the fleet that it is in: see `vfleet.parts`.
    """

    name: str
    host: str
    model: str
    manufacturer: str
    io_type: str
    bars: Mapping[int, int]
    state_version: str
    attachments: frozenset[str]
    total_vfs: int
    within: Mapping[Boundary.ValueType, str]
    parts: tuple[str, ...]

    @classmethod
    def of(cls, device: Device) -> Self:
        """Return what the record says."""
        host, bridge = device.host, device.bridge or _ROOT_COMPLEX
        parent = (device.parent_bridge or _ROOT_COMPLEX) if device.bridge else _ABOVE_ROOT_COMPLEX
        version = device.state_version
        return cls(
            name=device.name,
            host=host,
            model=device.model,
            manufacturer=f"{device.manufacturer.vendor_id:04x}:{device.manufacturer.device_id:04x}",
            io_type=device.io_type,
            bars={bar.index: bar.size_bytes for bar in device.bars},
            state_version=f"{version.format}.{version.model}",
            attachments=frozenset(device.attachments),
            total_vfs=device.total_vfs,
            within={
                Boundary.BOUNDARY_HOST: host,
                Boundary.BOUNDARY_PHYSICAL_ADAPTER: f"{host}/{device.physical_adapter}",
                Boundary.BOUNDARY_BRIDGE: f"{host}/{bridge}",
                Boundary.BOUNDARY_PARENT_BRIDGE: f"{host}/{parent}",
                Boundary.BOUNDARY_POWER_DOMAIN: f"{host}/{device.power_domain}",
            },
            parts=(
                host,
                within(host, PartKind.PART_KIND_DEVICE, device.name.removeprefix(f"{host}/")),
                within(host, PartKind.PART_KIND_ADAPTER, device.physical_adapter),
                *(
                    within(host, PartKind.PART_KIND_BRIDGE, each)
                    for each in (device.bridge, device.parent_bridge)
                    if each
                ),
                within(host, PartKind.PART_KIND_POWER_DOMAIN, device.power_domain),
            ),
        )
