"""kill -9 of everybody at each step of a move, with a Linux guest under load that never sees an error.

A cut through the cells; `make guest-matrix` runs all of them.
"""

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
from support.local_cluster import running

pytestmark = pytest.mark.timeout(1800)

TOPOLOGY = Path(__file__).with_name("fleet.yaml")
STEPS = ("begin", "create", "import", "hold", "stop", "commit", "lift", "scrub", "finish")
KILLED = (Participant.COORDINATOR, Participant.SOURCE, Participant.TARGET, Participant.DRIVER_HOST)
LEASE_TTL_S = 2
OPERATIONS = 30

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


async def test_whoever_is_killed_the_guest_sees_no_error(tmp_path: Path, request: pytest.FixtureRequest):
    cells = ALL if request.config.getoption("--all-cells", default=False) else CUT
    failpoints = Failpoints(tmp_path / "failpoints")
    async with running(
        tmp_path, topology=TOPOLOGY, coordinators=2, lease_ttl_s=LEASE_TTL_S, failpoints=failpoints.directory
    ) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nvme0")
        socket = await attach_guest(cluster, "vf1", "g1", "h3", tmp_path, **PATIENT)
        async with virtual_machine(tmp_path / "vm", [socket]) as machine:
            stage = GuestStage(cluster, failpoints, machine=machine)
            await machine.start("storage", "python3", "/storage.py", "/dev/nvme0n1", "2")
            await stage.until_working()
            for cell in cells:
                await stage.run(cell)
            report = await finish_storage(machine)
            assert (report["mismatches"], report["errors"], report["is_over"]) == (0, 0, True), report
            assert await dmesg_of(machine, "nvme|ext4|jbd2|blk|pci|aer|hotplug") == []
