"""A Linux guest with a file system on a function that goes around the fleet: its driver notices nothing."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.guest import (
    PATIENT,
    VirtualMachine,
    attach_guest,
    dmesg_of,
    finish_storage,
    storage_operations,
    virtual_machine,
)
from support.local_cluster import Cluster, assert_nothing_left, running

from vfleet.v1.records_pb2 import Phase

pytestmark = pytest.mark.timeout(1800)

TOPOLOGY = Path(__file__).with_name("fleet.yaml")
HOMES = ("h2/nvme0", "h3/nvme0", "h1/nvme0")
MOVES = 20
OPERATIONS = 10_000
DEVICE = "/dev/nvme0n1"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path, topology=TOPOLOGY) as cluster:
        yield cluster


async def until_operations(machine: VirtualMachine, number: int) -> None:
    while await storage_operations(machine) < number:
        pass


async def test_memory_that_is_not_shared_is_asked_for(cluster: Cluster, tmp_path: Path):
    await cluster.fleet.create_function("vf1", "h1/nvme0")
    socket = await attach_guest(cluster, "vf1", "g1", "h1", tmp_path, **PATIENT)
    async with virtual_machine(tmp_path / "vm", [socket], shares_memory=False) as machine:
        await machine.start("storage", "python3", "/storage.py", DEVICE, "4")
        for number, home in enumerate(HOMES):
            await until_operations(machine, await storage_operations(machine) + 100)
            migration = await cluster.move(f"m{number}", {"vf1": home})
            assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
            await until_operations(machine, await storage_operations(machine) + 100)
            await cluster.local.hosts["h1"].restart()
        await until_operations(machine, await storage_operations(machine) + 100)
        report = await finish_storage(machine)
        assert (report["mismatches"], report["errors"], report["is_over"]) == (0, 0, True), report
        assert await dmesg_of(machine, "nvme|ext4|jbd2|blk|pci|aer|hotplug") == []


async def test_a_file_system_goes_around_the_fleet(cluster: Cluster, tmp_path: Path):
    await cluster.fleet.create_function("vf1", "h1/nvme0")
    socket = await attach_guest(cluster, "vf1", "g1", "h1", tmp_path, **PATIENT)
    async with virtual_machine(tmp_path / "vm", [socket]) as machine:
        before = await machine.run("lspci -vvnn")
        await machine.start("storage", "python3", "/storage.py", DEVICE, "4")
        for number in range(MOVES):
            done = await storage_operations(machine)
            await until_operations(machine, max(done + 100, OPERATIONS * number // MOVES))
            migration = await cluster.move(f"m{number}", {"vf1": HOMES[number % len(HOMES)]})
            assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
        await until_operations(machine, OPERATIONS)
        report = await finish_storage(machine)
        assert (report["mismatches"], report["errors"], report["is_over"]) == (0, 0, True), report
        assert int(str(report["device_ios"])) >= int(str(report["operations"])) >= OPERATIONS, report
        assert await machine.run("lspci -vvnn") == before
        assert await dmesg_of(machine, "nvme|ext4|jbd2|blk|pci|aer|hotplug") == []
    await cluster.fleet.detach_driver("vf1", "g1")
    await assert_nothing_left(cluster)
