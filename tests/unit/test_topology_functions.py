"""Functions and drivers that a topology declares: what is read, and how what can't be is refused."""

from pathlib import Path

import pytest

from hostd.topology import load_all
from vfleet.declared import DeclaredDriver, DeclaredFunction, read_declared
from vfleet.errors import Reason, VfleetError

# Line 1 is the first; tests name lines, so the text stands still.
GOOD = """\
functions:
  - name: disk1
    device: h1/nvme0
    vf_index: 2
    drivers:
      - guest: /run/disk1.sock
        main_memory: 256MiB
  - name: disk2
    device: h1/nvme0
    drivers:
      - {name: g2, guest: /run/disk2.sock, host: h2}
  - name: vf1
    device: h2/nic0
    drivers:
      - {name: d1, host: h1}
      - {name: d2}
  - name: vf2
    device: h2/nic0
    drivers: [{name: d1, host: h1}]
hosts:
  - name: h1
    segment: 1
    devices:
      - {name: nvme0, bus: 1, model: nvme, manufacturer: {vendor_id: 1, device_id: 2}, io_type: storage,
         power_domain: a, total_vfs: 2, first_vf_offset: 8, vf_stride: 1, bars: {0: 16KiB, 2: 1MiB}}
  - name: h2
    segment: 2
    devices:
      - {name: nic0, bus: 1, model: checker, manufacturer: {vendor_id: 1, device_id: 2}, io_type: network,
         power_domain: a, total_vfs: 8, first_vf_offset: 8, vf_stride: 1, bars: {0: 4KiB, 2: 16KiB}}
"""
F0, F1, F2 = "functions[0]", "functions[1]", "functions[2]"
D0, D1, D2 = f"{F0}.drivers[0]", f"{F1}.drivers[0]", f"{F2}.drivers[0]"
LONG = "x" * 60


def write(tmp_path: Path, content: str) -> Path:
    file = tmp_path / "fleet.yaml"
    file.write_text(content)
    return file


def test_what_is_declared_is_read(tmp_path: Path):
    file = write(tmp_path, GOOD)
    assert list(load_all(file)) == ["h1", "h2"]
    disk1, disk2, vf1, vf2 = read_declared(file)
    assert (disk1.name, disk1.device, disk1.vf_index) == ("disk1", "h1/nvme0", 2)
    (guest,) = disk1.drivers
    assert guest == DeclaredDriver(guest="/run/disk1.sock", main_memory=256 << 20)
    assert (disk1.driver_name(guest), disk1.driver_host(guest)) == ("guest-disk1", "h1")
    assert (disk2.driver_name(disk2.drivers[0]), disk2.driver_host(disk2.drivers[0])) == ("g2", "h2")
    assert [(vf1.driver_name(each), vf1.driver_host(each)) for each in vf1.drivers] == [("d1", "h1"), ("d2", "h2")]
    assert vf2 == DeclaredFunction(name="vf2", device="h2/nic0", drivers=(DeclaredDriver(name="d1", host="h1"),))


def test_nothing_needs_to_be_declared(tmp_path: Path):
    assert read_declared(write(tmp_path, GOOD[GOOD.index("hosts:") :])) == ()


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        # What a single value may be.
        ("functions:\n", "functions: 5\nx:\n", 1, "functions is 5; expected a list"),
        ("name: disk1", "name: Disk", 2, f"{F0}.name is 'Disk'; expected 1 to 63 of a-z"),
        ("  - name: disk1\n    device", "  - device", 2, f"{F0}.name is missing; expected a value"),
        ("    device: h1/nvme0\n    vf", "    vf", 2, f"{F0}.device is missing; expected a value"),
        ("device: h1/nvme0", "device: nvme0", 3, f"{F0}.device is 'nvme0'; expected HOST/DEVICE, for example h1/nic0"),
        ("vf_index: 2", "vf_index: 0", 4, f"{F0}.vf_index is 0; expected an integer from 1 to 65535"),
        ("vf_index: 2", "vf_index: true", 4, f"{F0}.vf_index is True; expected an integer from 1"),
        ("vf_index: 2", "slot: 2", 4, f"{F0}.slot is unknown; expected one of name, device, vf_index, drivers"),
        ("guest: /run/disk1", "socket: /run/disk1", 6, f"{D0}.socket is unknown; expected one of name, host, guest"),
        ("/run/disk1.sock", "run/disk1.sock", 6, f"{D0}.guest is 'run/disk1.sock'; expected an absolute path of at"),
        ("/run/disk1.sock", "/", 6, f"{D0}.guest is '/'; expected an absolute path of at most 107 bytes"),
        ("/run/disk1.sock", f"/{'é' * 54}", 6, f"{D0}.guest is '/ééé"),
        ("/run/disk1.sock", "[a]", 6, f"{D0}.guest is ['a']; expected an absolute path"),
        ("256MiB", "0", 7, f"{D0}.main_memory is 0; expected a multiple of 4096 bytes, up to 1GiB"),
        ("256MiB", "4097", 7, f"{D0}.main_memory is 4097; expected a multiple of 4096 bytes"),
        ("256MiB", "2GiB", 7, f"{D0}.main_memory is '2GiB'; expected a multiple of 4096 bytes, up to 1GiB"),
        ("256MiB", "much", 7, f"{D0}.main_memory is 'much'; expected a number of bytes, or one of KiB"),
        # What must be there.
        (
            "device: h1/nvme0",
            "device: h3/nvme0",
            3,
            f"{F0}.device is 'h3/nvme0'; expected a device of a host here, for",
        ),
        ("host: h2}", "host: h3}", 11, f"{D1}.host is 'h3'; expected one of h1, h2"),
        ("vf_index: 2", "vf_index: 3", 4, f"{F0}.vf_index is 3; expected 1 to 2, the VFs of h1/nvme0"),
        ("{name: d2}", "{host: h2}", 16, f"{F2}.drivers[1].name is missing; expected a value, unless there is a guest"),
        ("name: disk1", f"name: {LONG}", 6, f"{D0}.name is 'guest-{LONG}'; expected 1 to 63 of a-z"),
        # What must differ, or be the same.
        ("name: disk2", "name: disk1", 8, f"{F1}.name is 'disk1'; expected a name that no other function has"),
        (
            "    drivers:\n      - {name: g2",
            "    vf_index: 2\n    drivers:\n      - {name: g2",
            10,
            f"{F1}.vf_index is 2; expected a VF of h1/nvme0 that is not that of function disk1",
        ),
        ("device: h2/nic0", "device: h1/nvme0", 13, f"{F2}.device is 'h1/nvme0'; expected at most 2 functions there"),
        ("{name: d2}", "{name: d1}", 16, f"{F2}.drivers[1].name is 'd1'; expected each driver once"),
        ("name: g2", "name: guest-disk1", 11, f"{D1}.name is 'guest-disk1'; expected a name that no other driver has"),
        ("name: d1, host: h1", "name: g2, host: h2", 15, f"{D2}.name is 'g2'; expected a name that no other driver"),
        ("[{name: d1, host: h1}", "[{name: d1}", 19, "functions[3].drivers[0].host is 'h2'; expected h1, where driver"),
        (
            "[{name: d1, host: h1}",
            "[{name: d1, host: h1, main_memory: 4KiB}",
            19,
            "functions[3].drivers[0].main_memory is 4096; expected what was said of driver d1 before: nothing",
        ),
        (
            "disk2.sock, host: h2",
            "disk1.sock, host: h1",
            11,
            f"{D1}.guest is '/run/disk1.sock'; expected a socket that is not that of driver guest-disk1",
        ),
        (
            "      - {name: g2",
            "      - {name: d9}\n      - {name: g2",
            10,
            f"{F1}.drivers is '2 drivers'; expected at most 1, the most that a function of model nvme can have",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_line_and_field(tmp_path: Path, old: str, new: str, line: int, message: str):
    assert old in GOOD
    file = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(VfleetError) as caught:
        load_all(file)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.message.startswith(f"{file}:{line}: {message}")
    (violation,) = caught.value.violations
    assert caught.value.message == f"{file}:{line}: {violation.field} {violation.description}"


def test_hosts_without_devices_can_not_have_functions(tmp_path: Path):
    file = write(tmp_path, "hosts: [{name: h1, segment: 1}]\nfunctions: [{name: vf1, device: h1/nic0}]")
    with pytest.raises(VfleetError, match=r":2: functions\[0\].device is 'h1/nic0'; expected a device: no host here"):
        load_all(file)


def test_two_hosts_may_have_sockets_of_one_name(tmp_path: Path):
    assert len(load_all(write(tmp_path, GOOD.replace("disk2.sock", "disk1.sock")))) == 2
