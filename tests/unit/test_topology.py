"""The topology file: what it makes, and how it is refused, each with file, line and field."""

import re
from pathlib import Path

import pytest

from hostd.topology import load, load_all
from vfleet.address import bar_layout
from vfleet.errors import Reason, VfleetError

DEMO = Path(__file__).parents[2] / "vfleet" / "topologies" / "demo.yaml"

# Line 1 is the first; tests name lines, so the text stands still.
GOOD = """\
hosts:
  - name: h1
    segment: 1
    bridges:
      - name: port0
        secondary: 1
        subordinate: 4
        bridges:
          - name: down0
            secondary: 3
            subordinate: 4
            devices:
              - name: nic1
                device: 2
                function: 1
                model: checker
                manufacturer: {vendor_id: 0x1af4, device_id: 0x10c0}
                io_type: storage
                physical_adapter: card0
                power_domain: psu-b
                attachments: [san, lan]
                total_vfs: 4
                first_vf_offset: 8
                vf_stride: 2
                bars: {2: 1MiB, 0: 4096}
        devices:
          - name: nic0
            bus: 2
            model: checker
            manufacturer: {vendor_id: 1, device_id: 2}
            io_type: network
            power_domain: psu-a
            total_vfs: 8
            first_vf_offset: 1
            vf_stride: 1
            bars: {0: 64 KiB}
  - name: h2
    segment: 2
    devices:
      - name: nic0
        device: 1
        model: checker
        manufacturer: {vendor_id: 1, device_id: 2}
        io_type: accelerator
        power_domain: psu-a
        total_vfs: 1
        first_vf_offset: 1
        vf_stride: 1
        bars: {0: 4KiB}
"""


def write(tmp_path: Path, content: str | bytes) -> Path:
    file = tmp_path / "fleet.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def refused(file: Path) -> VfleetError:
    with pytest.raises(VfleetError) as caught:
        load_all(file)
    assert caught.value.reason is Reason.INVALID_FIELD
    return caught.value


def test_a_device_record_says_all_that_the_file_says(tmp_path: Path) -> None:
    nic0, nic1 = load(write(tmp_path, GOOD), "h1").devices()
    assert nic1.name == "h1/nic1"
    assert nic1.host == "h1"
    assert nic1.routing_id == 0x0311
    assert nic1.model == "checker"
    assert (nic1.manufacturer.vendor_id, nic1.manufacturer.device_id) == (0x1AF4, 0x10C0)
    assert nic1.io_type == "storage"
    assert nic1.physical_adapter == "card0"
    assert (nic1.bridge, nic1.parent_bridge) == ("down0", "port0")
    assert nic1.power_domain == "psu-b"
    assert list(nic1.attachments) == ["san", "lan"]
    assert (nic1.total_vfs, nic1.first_vf_offset, nic1.vf_stride) == (4, 8, 2)
    assert [(bar.index, bar.size_bytes) for bar in nic1.bars] == [(0, 4096), (2, 1 << 20)]

    assert (nic0.routing_id, nic0.bridge, nic0.parent_bridge) == (0x0200, "port0", "")
    assert (nic0.physical_adapter, list(nic0.attachments)) == ("nic0", [])
    assert [bar.size_bytes for bar in nic0.bars] == [1 << 16]


def test_a_device_may_be_on_the_root_complex(tmp_path: Path) -> None:
    (nic0,) = load(write(tmp_path, GOOD), "h2").devices()
    assert (nic0.routing_id, nic0.bridge, nic0.parent_bridge) == (8, "", "")


def test_the_host_may_be_left_out_if_there_is_one(tmp_path: Path) -> None:
    one = GOOD[: GOOD.index("  - name: h2")]
    assert load(write(tmp_path, one)).name == "h1"


def test_the_host_must_be_named_if_there_are_several(tmp_path: Path) -> None:
    with pytest.raises(VfleetError, match="host is None; expected one of h1, h2") as caught:
        load(write(tmp_path, GOOD))
    assert caught.value.reason is Reason.INVALID_FIELD


def test_an_unknown_host_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(VfleetError, match="no host named 'h3'") as caught:
        load(write(tmp_path, GOOD), "h3")
    assert caught.value.reason is Reason.NOT_FOUND


H1 = "hosts[0]"
NIC1 = "hosts[0].bridges[0].bridges[0].devices[0]"
NIC0 = "hosts[0].bridges[0].devices[0]"
DOWN0 = "hosts[0].bridges[0].bridges[0]"

REPLACEMENTS = [
    # What a single value may be.
    ("segment: 1\n", "segment: 65536\n", 3, f"{H1}.segment is 65536; expected an integer from 0 to 65535"),
    ("segment: 1\n", "segment: -1\n", 3, f"{H1}.segment is -1; expected an integer from 0"),
    ("segment: 1\n", "segment: '1'\n", 3, f"{H1}.segment is '1'; expected an integer"),
    ("segment: 1\n", "segment: yes\n", 3, f"{H1}.segment is True; expected an integer"),
    ("segment: 1\n", "segment: 1.0\n", 3, f"{H1}.segment is 1.0; expected an integer"),
    ("segment: 1\n", "segment:\n", 3, f"{H1}.segment is None; expected an integer"),
    ("    segment: 1\n", "", 2, f"{H1}.segment is missing"),
    ("device_id: 0x10c0}", "}", 17, f"{NIC1}.manufacturer.device_id is missing"),
    ("name: h1", "name: H1", 2, f"{H1}.name is 'H1'; expected 1 to 63 of a-z"),
    ("name: h1", "name: 7", 2, f"{H1}.name is 7; expected 1 to 63 of a-z"),
    ("name: h1", f"name: {'x' * 1000}", 2, f"{H1}.name is 'xxx"),
    ("bus: 2", "bus: 256", 28, f"{NIC0}.bus is 256; expected an integer from 0 to 255"),
    ("device: 2\n", "device: 32\n", 14, f"{NIC1}.device is 32; expected an integer from 0 to 31"),
    ("function: 1\n", "function: 8\n", 15, f"{NIC1}.function is 8; expected an integer from 0 to 7"),
    ("0x1af4", "0x10000", 17, f"{NIC1}.manufacturer.vendor_id is 65536; expected"),
    ("{vendor_id: 0x1af4, device_id: 0x10c0}", "intel", 17, f"{NIC1}.manufacturer is 'intel'; expected a mapping"),
    ("storage", "gpu", 18, f"{NIC1}.io_type is 'gpu'; expected 'network', 'storage' or 'accelerator'"),
    ("[san, lan]", "san", 21, f"{NIC1}.attachments is 'san'; expected a list"),
    ("[san, lan]", "[san, LAN]", 21, f"{NIC1}.attachments[1] is 'LAN'; expected 1 to 63"),
    ("total_vfs: 4", "total_vfs: 0", 22, f"{NIC1}.total_vfs is 0; expected an integer from 1"),
    ("first_vf_offset: 8", "first_vf_offset: 0", 23, f"{NIC1}.first_vf_offset is 0; expected an integer from 1"),
    ("vf_stride: 2", "vf_stride: 0", 24, f"{NIC1}.vf_stride is 0; expected an integer from 1"),
    ("checker", "toaster", 16, f"{NIC1}.model is 'toaster'; expected one of accelerator"),
    # BARs.
    ("1MiB", "1MB", 25, f"{NIC1}.bars[2] is '1MB'; expected a number of bytes, or one of KiB, MiB or GiB"),
    ("1MiB", "[1]", 25, f"{NIC1}.bars[2] is [1]; expected a number of bytes"),
    ("1MiB", "3MiB", 25, f"{NIC1}.bars is {{2: 3145728, 0: 4096}}; expected BARs that can exist: BAR 2 has 3145728"),
    ("1MiB", "4GiB", 25, f"{NIC1}.bars is {{2: 4294967296, 0: 4096}}; expected BARs that can exist: BAR 2 has"),
    ("0: 4096", "1: 4096", 25, f"{NIC1}.bars is {{2: 1048576, 1: 4096}}; expected BARs that can exist: BAR index is 1"),
    ("0: 4096", "x: 4096", 25, f"{NIC1}.bars.x is 'x'; expected a"),
    ("{2: 1MiB, 0: 4096}", "{2: 1MiB}", 25, f"{NIC1}.bars is {{2: 1048576}}; expected BAR 0 for registers"),
    ("{2: 1MiB, 0: 4096}", "{0: 4KiB, 4: 4KiB}", 25, f"{NIC1}.bars is {{0: 4096, 4: 4096}}; expected BAR 0 for"),
    ("{2: 1MiB, 0: 4096}", "{}", 25, f"{NIC1}.bars is {{}}; expected BAR 0 for registers"),
    ("{2: 1MiB, 0: 4096}", "[4096]", 25, f"{NIC1}.bars is [4096]; expected a mapping"),
    # Keys.
    ("power_domain: psu-b", "colour: red", 20, f"{NIC1}.colour is unknown; expected one of name, bus, device"),
    ("vendor_id: 0x1af4", "maker: 5", 17, f"{NIC1}.manufacturer.maker is unknown; expected one of vendor_id"),
    ("hosts:", "fleet: 1\nhosts:", 1, "fleet is unknown; expected one of hosts"),
    ("segment: 1\n", "segment: 1\n    5: 6\n", 4, f"{H1}[5] is unknown; expected one of name, segment"),
    ("segment: 1\n", "segment: 1\n    segment: 1\n", 4, f"{H1}.segment is given twice; expected once"),
    ("{2: 1MiB, 0: 4096}", "{0: 4096, 0x0: 4096}", 25, f"{NIC1}.bars[0] is given twice"),
    ("segment: 1\n", "segment: 1\n    [x]: 1\n", 4, f"{H1} has a key that is no text or number"),
    ("segment: 1\n", "segment: 1\n    true: 1\n", 4, f"{H1} has a key that is no text or number"),
    # Names and numbers that must differ.
    ("name: h2", "name: h1", 37, "hosts[1].name is 'h1'; expected a name that no other host has"),
    ("segment: 2", "segment: 1", 38, "hosts[1].segment is 1; expected a segment other than that of h1"),
    ("name: nic1", "name: nic0", 27, f"{NIC0}.name is 'nic0'; expected a name that no other device of the host"),
    ("name: down0", "name: port0", 9, f"{DOWN0}.name is 'port0'; expected a name that no other bridge of the host"),
    # Buses.
    ("secondary: 1", "secondary: 0", 6, "hosts[0].bridges[0].secondary is 0; expected 1 to 255, behind the root"),
    ("secondary: 3", "secondary: 1", 10, f"{DOWN0}.secondary is 1; expected 2 to 4, behind port0"),
    ("secondary: 3", "secondary: 5", 10, f"{DOWN0}.secondary is 5; expected 2 to 4, behind port0"),
    ("            subordinate: 4", "            subordinate: 5", 11, f"{DOWN0}.subordinate is 5; expected 3 to 4"),
    ("            subordinate: 4", "            subordinate: 2", 11, f"{DOWN0}.subordinate is 2; expected 3 to 4"),
    ("bus: 2", "bus: 5", 28, f"{NIC0}.bus is 5; expected buses 1 to 4 of its bridge: nic0 would have"),
    ("bus: 2", "bus: 3", 28, f"{NIC0}.bus is 3; expected buses that no bridge decodes: nic0 would have"),
    # Routing IDs.
    ("total_vfs: 8", "total_vfs: 300", 33, f"{NIC0}.total_vfs is 300; expected buses that no bridge decodes: nic0's"),
    ("total_vfs: 4", "total_vfs: 400", 22, f"{NIC1}.total_vfs is 400; expected buses 3 to 4 of its bridge: nic1's VF"),
    ("total_vfs: 4", "total_vfs: 65535", 22, f"{NIC1}.total_vfs is 65535; expected routing IDs of 16 bits"),
    ("device: 1\n", "device: 0\n", 40, "hosts[1].devices[0].bus is 0; expected routing IDs of its own: nic0"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "line", "message"), REPLACEMENTS)
def test_what_cannot_exist_is_refused_with_line_and_field(
    tmp_path: Path, old: str, new: str, line: int, message: str
) -> None:
    assert old in GOOD
    file = write(tmp_path, GOOD.replace(old, new, 1))
    error = refused(file)
    assert error.message.startswith(f"{file}:{line}: {message}")
    assert len(error.message) < len(str(file)) + 400
    (violation,) = error.violations
    assert error.message == f"{file}:{line}: {violation.field} {violation.description}"
    assert error.metadata == {"field": violation.field, "file": str(file), "line": str(line)}


DEVICE = """{name: %s, bus: %d, device: %d, function: %d, model: checker, manufacturer: {vendor_id: 1, device_id: 1},
 io_type: network, power_domain: p, total_vfs: %d, first_vf_offset: %d, vf_stride: %d, bars: {0: 4KiB}}"""
FIRST = DEVICE % ("a", 1, 0, 0, 4, 8, 2)  # 01:00.0 with VFs 01:01.0, 01:01.2, 01:01.4 and 01:01.6


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("b", 1, 0, 0, 1, 64, 1), "bus is 1; expected routing IDs of its own: b would have .* 01:00.0, that of a"),
        (("b", 1, 1, 2, 1, 64, 1), "bus is 1; expected routing IDs of its own: b would .* 01:01.2, that of a's VF 2"),
        (("b", 1, 0, 1, 3, 1, 6), "total_vfs is 3; .*: b's VF 2 would have routing ID 01:01.0, that of a's VF 1"),
        (("b", 0, 31, 7, 1, 1, 1), "total_vfs is 1; .*: b's VF 1 would have routing ID 01:00.0, that of a"),
    ],
)  # fmt: skip
def test_two_owners_of_a_routing_id_are_refused(tmp_path: Path, other: tuple[str | int, ...], message: str) -> None:
    both = f"- {FIRST}\n    - {DEVICE % other}"
    error = refused(write(tmp_path, f"hosts:\n- name: h\n  segment: 0\n  devices:\n    {both}\n"))
    assert re.search(rf"hosts\[0\]\.devices\[1\]\.{message}$", error.message)
    assert int(error.metadata["line"]) >= 7


def test_vfs_of_two_devices_may_alternate(tmp_path: Path) -> None:
    both = f"- {FIRST}\n    - {DEVICE % ('b', 1, 0, 1, 4, 8, 2)}"
    file = write(tmp_path, f"hosts:\n- name: h\n  segment: 0\n  devices:\n    {both}\n")
    assert [device.routing_id for device in load(file).devices()] == [0x100, 0x101]


@pytest.mark.parametrize(("one", "other"), [((1, 4), (4, 5)), ((4, 5), (1, 4)), ((1, 9), (3, 4)), ((3, 4), (1, 9))])
def test_bus_ranges_of_sibling_bridges_may_not_overlap(
    tmp_path: Path, one: tuple[int, int], other: tuple[int, int]
) -> None:
    bridge = "{name: %s, secondary: %d, subordinate: %d}"
    bridges = f"[{bridge % ('a', *one)},\n{bridge % ('b', *other)}]"
    error = refused(write(tmp_path, f"hosts: [{{name: h, segment: 0, bridges: {bridges}}}]"))
    assert error.message.endswith(
        f"fleet.yaml:2: hosts[0].bridges[1].secondary is {other[0]};"
        f" expected buses apart from {one[0]} to {one[1]} of a"
    )


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b"", 1, "the document is None; expected a mapping"),
        (b"[]", 1, "the document is []; expected a mapping"),
        (b"hosts: []", 1, "hosts is []; expected at least one host"),
        (b"hosts: {}", 1, "hosts is {}; expected a list"),
        (b"hosts:\n- 5", 2, "hosts[0] is 5; expected a mapping"),
        (b"hosts: [\n\n", 3, "the document is not YAML: "),
        (b"a: b\n c: d", 2, "the document is not YAML: mapping values are not allowed here"),
        (b"hosts: []\n---\nhosts: []", 2, "the document is not YAML: but found another document"),
        (b"hosts: !!python/object:os.system {}", 1, "hosts is {}; expected a list"),
        (b"hosts: !!python/name:os.system x", 1, "the document is not YAML: could not determine a constructor"),
        (b"x: 1\nhosts: 2024-13-45", 2, "hosts is '2024-13-45'; expected a value that exists"),
        (b"hosts: &a []\nb: *a", 2, "b is an alias; expected the value written out"),
        (b"hosts: &a [*a]", 1, "hosts[0] is an alias; expected the value written out"),
        (b"hosts:\n- name: \xff", 2, "the file is not text: byte 0xff; expected UTF-8"),
        (b"hosts:\n- name: a\0", 2, "the file has '\\x00'; expected printable characters"),
        (b"[" * 10_000, 1, "the document is nested too deeply to be read"),
    ],
)
def test_what_is_no_topology_is_refused(tmp_path: Path, content: bytes, line: int, message: str) -> None:
    file = write(tmp_path, content)
    assert refused(file).message.startswith(f"{file}:{line}: {message}")


def test_the_first_of_several_errors_is_told(tmp_path: Path) -> None:
    content = (
        GOOD.replace("segment: 2", "segment: x").replace("bus: 2", "bus: x").replace("secondary: 3", "secondary: x")
    )
    assert refused(write(tmp_path, content)).metadata["line"] == "10"


def test_of_several_that_are_missing_the_first_is_told(tmp_path: Path) -> None:
    content = GOOD.replace("    segment: 1\n", "").replace("segment: 2", "").replace(", device_id: 0x10c0", "")
    assert refused(write(tmp_path, content)).violations[0].field == f"{H1}.segment"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "none.yaml"
    assert refused(file).message == f"{file}: the file is not readable: No such file or directory"
    assert refused(tmp_path).message == f"{tmp_path}: the file is not readable: Is a directory"


def test_the_demo_has_three_hosts_of_different_layouts() -> None:
    hosts = load_all(DEMO)
    assert list(hosts) == ["h1", "h2", "h3"]
    assert len({host.segment for host in hosts.values()}) == 3
    devices = [device for host in hosts.values() for device in host.root_complex.walk()]
    assert len(devices) == 6
    assert all(device.model == "checker" and device.sriov.total_vfs >= 32 for device in devices)
    assert all(bar_layout(device.bar_bytes) == {0: 0, 2: 1 << 20} for device in devices)
    assert len({device.sriov.routing_id_of(1) for device in devices}) == 6
    assert all(device.attachments and device.power_domain and device.physical_adapter for device in devices)
