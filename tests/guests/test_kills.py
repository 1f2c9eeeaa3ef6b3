"""kill -9 of everybody at each step of a move, with a Linux guest under load that never sees an error.

A cut through the cells; `make guest-matrix` runs all of them. Last of all the holder of the guest's socket dies,
without which the device is dead: the fleet says so.
"""

import os
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from support.failpoints import Failpoints
from support.guest import (
    PATIENT,
    VirtualMachine,
    attach_guest,
    dmesg_of,
    finish_storage,
    storage_operations,
    virtual_machine,
)
from support.kill_matrix.cells import Cell, Course, Fault, Participant
from support.kill_matrix.stage import Stage
from support.local_cluster import eventually, running

from vfleet.v1.types_pb2 import GUEST_STATE_LOST

pytestmark = pytest.mark.timeout(7200)

TOPOLOGY = Path(__file__).with_name("fleet.yaml")
STEPS = ("begin", "create", "import", "hold", "stop", "commit", "lift", "scrub", "finish")
KILLED = (Participant.COORDINATOR, Participant.SOURCE, Participant.TARGET, Participant.DRIVER_HOST)
LEASE_TTL_S = 2
OPERATIONS = 30
DRIVER = "g1"
SUBJECTS = "nvme|ext4|jbd2|blk|pci|aer|hotplug"

ALL = [
    Cell(Course.COMMIT, f"coordinator.{step}.{side}", participant, Fault.KILL)
    for step in STEPS
    for side in ("before", "after")
    for participant in KILLED
]
CUT = [
    Cell(Course.COMMIT, f"coordinator.{step}", participant, Fault.KILL)
    for step, participant in (
        ("import.after", Participant.TARGET),
        ("hold.after", Participant.DRIVER_HOST),
        ("stop.after", Participant.SOURCE),
        ("commit.before", Participant.COORDINATOR),
        ("commit.after", Participant.COORDINATOR),
        ("lift.before", Participant.DRIVER_HOST),
        ("lift.before", Participant.TARGET),
        ("scrub.before", Participant.SOURCE),
    )
]


@dataclass
class GuestStage(Stage):
    """A cluster with a guest that has a file system on the function."""

    device: str = "nvme0"
    machine: VirtualMachine | None = field(default=None)

    async def until_working(self) -> None:
        assert self.machine is not None
        wanted = await storage_operations(self.machine) + OPERATIONS
        while await storage_operations(self.machine) < wanted:
            pass

    async def check_drivers(self) -> None:
        assert self.machine is not None
        report, _ = await self.machine.report("storage")
        assert (report["mismatches"], report["errors"]) == (0, 0), report
        assert await dmesg_of(self.machine, SUBJECTS) == []


async def lose_holder(stage: GuestStage, pid: int) -> None:
    """Kill the holder under its virtual machine, and wait until the fleet says that the device is lost."""
    os.kill(pid, signal.SIGKILL)

    async def is_lost() -> bool:
        return (await stage.cluster.fleet.get_driver(DRIVER)).guest_state == GUEST_STATE_LOST

    await eventually(is_lost)


async def test_whoever_is_killed_the_guest_sees_no_error(
    tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
):
    cells = ALL if request.config.getoption("--all-cells", default=False) else CUT
    failpoints = Failpoints(tmp_path / "failpoints")
    async with running(
        tmp_path, topology=TOPOLOGY, coordinators=2, lease_ttl_s=LEASE_TTL_S, failpoints=failpoints.directory
    ) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nvme0")
        socket = await attach_guest(cluster, "vf1", DRIVER, "h3", tmp_path, **PATIENT)
        async with virtual_machine(tmp_path / "vm", [socket]) as machine:
            stage = GuestStage(cluster, failpoints, machine=machine)
            await machine.start("storage", "python3", "/storage.py", "/dev/nvme0n1", "2")
            await stage.until_working()
            await machine.run("touch /tmp/measure")
            began_s = time.monotonic()
            phases: Counter[str] = Counter()
            for cell in cells:
                try:
                    phases[(await stage.run(cell)).phase] += 1
                except BaseException as error:
                    error.add_note(f"{cell.point}, {cell.participant}")
                    raise
            took_s = time.monotonic() - began_s
            report = await finish_storage(machine)
            assert (report["mismatches"], report["errors"], report["is_over"]) == (0, 0, True), report
            assert await dmesg_of(machine, SUBJECTS) == []
            with capsys.disabled():
                sys.stdout.write(
                    f"\n{len(cells)} kills in {took_s:.0f} s ({dict(phases)}), {report['operations']:,} operations,"
                    f" none wrong; longest I/O {report['longest_ms']:.0f} ms\n"
                )
            await lose_holder(stage, int((tmp_path / "cluster" / "h3" / "guests" / f"{DRIVER}.pid").read_text()))
