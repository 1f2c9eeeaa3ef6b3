"""What moves with a function counts: with one field of it falsified at a move, a Linux guest notices.

Every field of the tables is falsified in tests/property/test_nvme_state.py, with a host that knows all that it is to
see. Here it is the kernel's driver that notices, or the guest's own verification.
"""

import asyncio
import mmap
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from guests.fields import FIELDS, IMAGE_BYTES, Field, unknown
from support.failpoints import Failpoints, until_stopped
from support.guest import VirtualMachine, attach_guest, virtual_machine
from support.local_cluster import Cluster, running

from hostd.image import _MEMORY_OFFSET
from vfleet.v1.records_pb2 import Phase

pytestmark = pytest.mark.timeout(7200)

TOPOLOGY = Path(__file__).with_name("fleet.yaml")
HOMES = ("h2", "h3")
ARRIVED = "hostd.complete.after"
OPERATIONS = 25  # of each thread
WARM = 50
PCI = "/sys/bus/pci/devices/0000:01:00.0"
STATE = "/sys/class/nvme/nvme0/state"
TIMEOUT_S = 10  # of the driver, for its commands
TIMES = {"longest_hold_ms": 7_000, "message_timeout_ms": 10_000}  # reads that nothing answers end after that
TRIES = 40
PATIENCE_S = 120.0
# A cut, of what is noticed by each of: the verification, the kernel, a command's time-out.
CUT = (
    *("core.busy", "heads.head", "commands.kind", "commands.listed", "lists.page"),
    "namespace",
)


@dataclass
class Rig:
    """A guest on h1 at work on a function that goes to and fro between two other hosts."""

    cluster: Cluster
    failpoints: Failpoints
    machine: VirtualMachine
    folder: Path
    moves: int = 0
    beginnings: int = 0

    async def begin(self) -> None:
        """Give the driver short time-outs, and verify blocks of the device, without a file system."""
        await self.machine.run(
            "rmmod nvme; cd /sys/module/nvme_core/parameters"
            f" && echo {TIMEOUT_S} >io_timeout && echo {TIMEOUT_S} >admin_timeout; modprobe nvme;"
            " while [ ! -b /dev/nvme0n1 ]; do sleep 0.05; done; rm -f /tmp/stop"
        )
        self.beginnings = 0
        await self.machine.start("storage", "python3", "/storage.py", "/dev/nvme0n1", "8", "raw")
        await self._well()

    async def begin_anew(self) -> None:
        """Reset the function, and with it whatever is wrong; load the driver anew if it has given the device up."""
        state = await self.machine.run(
            f"echo 1 >{PCI}/reset; while grep -qE 'new|resetting|connecting' {STATE} 2>/dev/null; do sleep 0.05; done;"
            f" cat {STATE} 2>/dev/null || true"
        )
        if state.strip() == "live":
            self.beginnings += 1
            await self.machine.run("touch /tmp/anew")
            await self._well()
            return
        await self.machine.run("touch /tmp/stop")
        while (await self.machine.report("storage"))[1]:
            pass
        await self.begin()

    async def _well(self) -> None:
        """Wait until the guest is at work, and all that it said before is forgotten."""
        async with asyncio.timeout(PATIENCE_S):
            report: Mapping[str, object] = {}
            while report.get("beginning", 0) != self.beginnings or int(str(report.get("operations", 0))) < WARM:
                report, runs = await self.machine.report("storage")
                assert runs, report
        assert (report["mismatches"], report["errors"]) == (0, 0), report
        await self.machine.run("dmesg -c >/dev/null")

    async def noticed(self) -> str:
        """Wait until each thread has done more. Return what the guest has noticed before that, if anything."""
        wanted = None
        while True:
            report, runs = await self.machine.report("storage")
            assert runs, report
            done = int(str(report["least"]))
            wanted = done + OPERATIONS if wanted is None else wanted
            said = await self.machine.run("dmesg | grep -E 'nvme|blk' || true")
            if said or report["mismatches"] or report["errors"]:
                return f"{said}{report}"
            if done >= wanted:
                return ""

    async def falsify(self, fields: Sequence[Field]) -> tuple[bytes, bool]:
        """Move the function, and change fields once all of its state has come.

        Return the state as it came, and whether all of the fields are others now.
        """
        self.moves += 1
        name, target = f"m{self.moves}", self.home
        self.failpoints.arm(target, ARRIVED, "stop")
        await self.cluster.begin(name, {"vf1": f"{target}/nvme0"})
        await self.failpoints.reached(target, ARRIVED)
        daemon = self.cluster.local.hosts[target]
        await until_stopped(daemon)
        with Image(self.folder / "cluster" / target / "memory") as image:
            before = bytes(image)
            is_changed = {field.falsify(image) for field in fields} <= {True}
        daemon.resume()
        migration = await self.cluster.over(name)
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
        return before, is_changed

    async def put_right(self, field: Field, before: bytes) -> None:
        """Put a field right that no reset does."""
        daemon = self.cluster.local.hosts[self.home]
        daemon.pause()
        await until_stopped(daemon)
        with Image(self.folder / "cluster" / self.home / "memory") as image:
            place = field.place(image)
            assert place is not None
            image[place : place + field.length] = before[place : place + field.length]
        daemon.resume()

    @property
    def home(self) -> str:
        return HOMES[self.moves % 2]


class Image:
    """The image of the function whose file is in this folder, of a hostd that stands still."""

    def __init__(self, folder: Path) -> None:
        (path,) = folder.glob("vf1-*")
        with path.open("r+b") as file:
            self._mapped = mmap.mmap(file.fileno(), 0)
        self._whole = memoryview(self._mapped)
        self._image = self._whole[_MEMORY_OFFSET : _MEMORY_OFFSET + IMAGE_BYTES]

    def __enter__(self) -> memoryview:
        return self._image

    def __exit__(self, *_: object) -> None:
        self._image.release()
        self._whole.release()
        self._mapped.close()


async def test_a_guest_notices_each_field_that_is_falsified(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
):
    is_whole = request.config.getoption("--all-cells", default=False)
    assert {*CUT} <= {field.name for field in FIELDS}
    harmless = [field for field in FIELDS if field.harmless]
    harmful = [field for field in FIELDS if not field.harmless and (is_whole or field.name in CUT)]
    failpoints = Failpoints(tmp_path / "failpoints")
    async with running(tmp_path, topology=TOPOLOGY, failpoints=failpoints.directory) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nvme0")
        socket = await attach_guest(cluster, "vf1", "g1", "h1", tmp_path, **TIMES)
        async with virtual_machine(tmp_path / "vm", [socket], modules=("nvme",)) as machine:
            rig = Rig(cluster, failpoints, machine, tmp_path)
            await rig.begin()
            for fields in ([], harmless):
                image, is_changed = await rig.falsify(fields)
                assert is_changed
                assert unknown(memoryview(image)) == []
                assert not await rig.noticed()
            for field in harmful:
                await assert_noticed(rig, field, capsys)


async def assert_noticed(rig: Rig, field: Field, capsys: pytest.CaptureFixture[str]) -> None:
    """Falsify a field, again if it was of no use at that moment, and wait until the guest notices."""
    began_s = time.monotonic()
    for number in range(1, TRIES + 1):
        image, is_changed = await rig.falsify([field])
        noticed = await rig.noticed() if is_changed else ""
        if noticed:
            with capsys.disabled():
                took_s = time.monotonic() - began_s
                sys.stdout.write(f"\n{field.name}: {took_s:.1f} s, move {number}: {noticed.splitlines()[0]:.100}")
            if field.is_kept:
                await rig.put_right(field, image)
            await rig.begin_anew()
            return
    raise AssertionError(f"nobody noticed {field.name}")
