"""The topology file: what a fleet's simulated machines consist of. What `load` returns is a machine that can exist.

    hosts:
      - name: h1
        segment: 1                        # its PCI segment, unique in the fleet
        devices: []                       # on the root complex itself: bus 0
        bridges:
          - name: root-port0              # unique in the host, as device names are
            secondary: 1                  # buses 1 to 4 are behind it
            subordinate: 4
            bridges: []                   # behind this one, each with a part of its buses above `secondary`
            devices:
              - name: nic0
                bus: 1                    # the bridge's secondary bus by default; device and function are 0
                model: checker
                manufacturer: {vendor_id: 0x1af4, device_id: 0x1041}
                io_type: network          # or storage, or accelerator
                physical_adapter: card0   # the device's own name by default
                power_domain: psu-a
                attachments: [lan]        # none by default
                total_vfs: 32
                first_vf_offset: 16
                vf_stride: 1
                bars: {0: 4KiB, 2: 1MiB}  # a number of bytes, or KiB, MiB, GiB

Functions and drivers may be declared beside hosts: see vfleet/declared.py.

Names of bridges, physical adapters and power domains are those of the host, and are stored as given: on two hosts the
same name means two things. Attachments are names in the fleet.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hostd.declared import check_functions
from hostd.models import create_model, max_drivers
from hostd.sriov import Sriov
from hostd.state_stream import FORMAT_VERSION
from hostd.topology_schema import LAST_BUS, BridgeSection, DeviceSection, HostSection, read
from hostd.yaml_file import FieldPath, YamlFile
from vfleet.address import AddressError, format_routing_id, routing_id
from vfleet.errors import VfleetError, invalid_field, not_found
from vfleet.v1.records_pb2 import Device, StateVersion
from vfleet.v1.types_pb2 import Bar, Manufacturer


@dataclass(frozen=True, slots=True)
class DeviceTopology:
    """One device: as vfleet.v1.Device describes it, with its SR-IOV arithmetic."""

    name: str
    sriov: Sriov
    model: str
    vendor_id: int
    device_id: int
    io_type: str
    physical_adapter: str
    bridge: str
    parent_bridge: str
    power_domain: str
    attachments: tuple[str, ...]
    bar_bytes: Mapping[int, int]

    def record(self) -> Device:
        """Return the record that describes the device in the fleet."""
        model = create_model(self.model, 1, self.bar_bytes)
        return Device(
            name=self.name,
            host=self.name.partition("/")[0],
            routing_id=self.sriov.pf_routing_id,
            model=self.model,
            manufacturer=Manufacturer(vendor_id=self.vendor_id, device_id=self.device_id),
            io_type=self.io_type,
            physical_adapter=self.physical_adapter,
            bridge=self.bridge,
            parent_bridge=self.parent_bridge,
            power_domain=self.power_domain,
            attachments=self.attachments,
            total_vfs=self.sriov.total_vfs,
            first_vf_offset=self.sriov.first_vf_offset,
            vf_stride=self.sriov.vf_stride,
            bars=[Bar(index=index, size_bytes=size) for index, size in sorted(self.bar_bytes.items())],
            max_drivers=max_drivers(model),
            state_version=StateVersion(format=FORMAT_VERSION, model=model.version),
        )


@dataclass(frozen=True, slots=True)
class BridgeTopology:
    """A bridge, or, with an empty name, the root complex: it decodes the buses `secondary` to `subordinate`."""

    name: str
    secondary: int
    subordinate: int
    bridges: tuple["BridgeTopology", ...]
    devices: tuple[DeviceTopology, ...]

    def walk(self) -> Iterator[DeviceTopology]:
        """Yield the devices on the bridge, then those behind its bridges."""
        yield from self.devices
        for bridge in self.bridges:
            yield from bridge.walk()


@dataclass(frozen=True, slots=True)
class HostTopology:
    """One host: its name, its PCI segment and its root complex."""

    name: str
    segment: int
    root_complex: BridgeTopology

    def devices(self) -> list[Device]:
        """Return the records of its devices, in the order in which a walk of the tree finds them."""
        return [device.record() for device in self.root_complex.walk()]


def load(path: Path | str, host: str | None = None) -> HostTopology:
    """Return one host of a topology file; None stands for the only one.

    The whole file is checked. Raise VfleetError INVALID_FIELD with file, line and field for what is wrong in it, and
    for a `host` of None if there are several; NOT_FOUND if it has no such host.
    """
    hosts = load_all(path)
    if host is None:
        if len(hosts) > 1:
            raise invalid_field("host", None, f"one of {', '.join(hosts)}: {path} has several hosts")
        return next(iter(hosts.values()))
    if host not in hosts:
        raise not_found("host", host)
    return hosts[host]


def load_all(path: Path | str) -> dict[str, HostTopology]:
    """Return all hosts of a topology file by name, in its order. Raise as `load` does."""
    file = YamlFile(Path(path))
    fleet = read(file)
    if not fleet.hosts:
        raise file.refuse(("hosts",), "is []; expected at least one host")
    hosts: dict[str, HostTopology] = {}
    for index, host in enumerate(fleet.hosts):
        at: FieldPath = ("hosts", index)
        if host.name in hosts:
            raise file.refuse((*at, "name"), f"is {host.name!r}; expected a name that no other host has")
        for other in hosts.values():
            if other.segment == host.segment:
                raise file.refuse(
                    (*at, "segment"), f"is {host.segment}; expected a segment other than that of {other.name}"
                )
        hosts[host.name] = _HostBuilder(file, host.name).build(host, at)
    check_functions(file, fleet.functions, {name: host.devices() for name, host in hosts.items()})
    return hosts


class _HostBuilder:
    """Makes one host's tree of what the file says, and refuses what can't exist."""

    def __init__(self, file: YamlFile, host: str) -> None:
        self._file = file
        self._host = host
        self._bridges: set[str] = set()
        self._devices: set[str] = set()
        self._owners: dict[int, str] = {0: "main memory"}

    def build(self, host: HostSection, at: FieldPath) -> HostTopology:
        bridges = self._build_bridges(host.bridges, at, "the root complex", 0, LAST_BUS, parents=("", ""))
        devices = self._build_devices(host.devices, at, 0, LAST_BUS, bridges, parents=("", ""))
        return HostTopology(host.name, host.segment, BridgeTopology("", 0, LAST_BUS, bridges, devices))

    def _build_bridges(
        self,
        bridges: Sequence[BridgeSection],
        at: FieldPath,
        above: str,
        low: int,
        high: int,
        *,
        parents: tuple[str, str],
    ) -> tuple[BridgeTopology, ...]:
        built: list[BridgeTopology] = []
        for index, bridge in enumerate(bridges):
            here = (*at, "bridges", index)
            if bridge.name in self._bridges:
                raise self._refuse((*here, "name"), bridge.name, "a name that no other bridge of the host has")
            self._bridges.add(bridge.name)
            if not low < bridge.secondary <= high:
                expected = f"{low + 1} to {high}, behind {above}"
                raise self._refuse((*here, "secondary"), bridge.secondary, expected)
            if not bridge.secondary <= bridge.subordinate <= high:
                expected = f"{bridge.secondary} to {high}, behind {above}"
                raise self._refuse((*here, "subordinate"), bridge.subordinate, expected)
            for other in built:
                if bridge.secondary <= other.subordinate and other.secondary <= bridge.subordinate:
                    expected = f"buses apart from {other.secondary} to {other.subordinate} of {other.name}"
                    raise self._refuse((*here, "secondary"), bridge.secondary, expected)
            names = (bridge.name, parents[0])
            limits = (bridge.secondary, bridge.subordinate)
            children = self._build_bridges(bridge.bridges, here, bridge.name, *limits, parents=names)
            devices = self._build_devices(bridge.devices, here, *limits, children, parents=names)
            built.append(BridgeTopology(bridge.name, *limits, children, devices))
        return tuple(built)

    def _build_devices(
        self,
        devices: Sequence[DeviceSection],
        at: FieldPath,
        low: int,
        high: int,
        children: Sequence[BridgeTopology],
        *,
        parents: tuple[str, str],
    ) -> tuple[DeviceTopology, ...]:
        built: list[DeviceTopology] = []
        for index, device in enumerate(devices):
            here = (*at, "devices", index)
            if device.name in self._devices:
                raise self._refuse((*here, "name"), device.name, "a name that no other device of the host has")
            self._devices.add(device.name)
            sriov = self._build_sriov(device, here, low)
            self._claim(device, sriov, here, low, high, children)
            try:
                create_model(device.model, 1, device.bars)
            except VfleetError as error:
                violation = error.violations[0]
                raise self._file.refuse((*here, violation.field), violation.description) from None
            built.append(
                DeviceTopology(
                    name=f"{self._host}/{device.name}",
                    sriov=sriov,
                    model=device.model,
                    vendor_id=device.manufacturer.vendor_id,
                    device_id=device.manufacturer.device_id,
                    io_type=device.io_type,
                    physical_adapter=device.physical_adapter or device.name,
                    bridge=parents[0],
                    parent_bridge=parents[1],
                    power_domain=device.power_domain,
                    attachments=tuple(device.attachments),
                    bar_bytes=dict(sorted(device.bars.items())),
                )
            )
        return tuple(built)

    def _build_sriov(self, device: DeviceSection, here: FieldPath, secondary: int) -> Sriov:
        bus = secondary if device.bus is None else device.bus
        pf = routing_id(bus, device.device, device.function)
        try:
            return Sriov(pf, device.total_vfs, device.first_vf_offset, device.vf_stride)
        except AddressError as error:
            raise self._refuse((*here, "total_vfs"), device.total_vfs, f"routing IDs of 16 bits: {error}") from None

    def _claim(
        self,
        device: DeviceSection,
        sriov: Sriov,
        here: FieldPath,
        low: int,
        high: int,
        children: Sequence[BridgeTopology],
    ) -> None:
        """Take the routing IDs of the device and its VFs. Refuse one that is not on this bridge, or is taken."""
        for vf_index, rid in enumerate((sriov.pf_routing_id, *sriov.vf_routing_ids)):
            if vf_index:
                field, value, what = "total_vfs", device.total_vfs, f"{device.name}'s VF {vf_index}"
            else:
                field, value, what = "bus", rid >> 8, device.name
            who = f"{what} would have routing ID {format_routing_id(rid)}"
            if not low <= rid >> 8 <= high:
                raise self._refuse((*here, field), value, f"buses {low} to {high} of its bridge: {who}")
            for child in children:
                if child.secondary <= rid >> 8 <= child.subordinate:
                    raise self._refuse(
                        (*here, field), value, f"buses that no bridge decodes: {who}, behind {child.name}"
                    )
            if rid in self._owners:
                raise self._refuse((*here, field), value, f"routing IDs of its own: {who}, that of {self._owners[rid]}")
            self._owners[rid] = what

    def _refuse(self, path: FieldPath, value: object, expected: str) -> VfleetError:
        return self._file.refuse(path, f"is {value!r}; expected {expected}")
