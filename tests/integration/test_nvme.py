"""An NVMe controller goes around the fleet with commands in flight, and daemons are killed: each completes once."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.local_cluster import Cluster, assert_nothing_left, running

from vfleet.v1.driver_service_pb2 import WorkloadOptions
from vfleet.v1.records_pb2 import Phase
from vfleet.v1.types_pb2 import TransferMode

TOPOLOGY = Path(__file__).with_name("data") / "nvme.yaml"
MAIN_MEMORY_BYTES = 4 << 20
MODES = (TransferMode.TRANSFER_MODE_PRE_COPY, TransferMode.TRANSFER_MODE_POST_COPY)
HOMES = ("h2/nvme0", "h3/nvme0", "h1/nvme0")  # after h1/nvme0; the driver is on h1


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path, topology=TOPOLOGY) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nvme0")
        await cluster.fleet.attach_driver("vf1", "d1", host="h1", main_memory_bytes=MAIN_MEMORY_BYTES)
        await cluster.hosts["h1"].start_workload("d1", "vf1", WorkloadOptions(kind="nvme", window=64, seed=5))
        cluster.workloads["d1", "vf1"] = "h1"
        yield cluster


async def test_every_command_completes_once_over_ten_moves_by_either_mode(cluster: Cluster) -> None:
    for number in range(10):
        await cluster.until_working(operations=300)
        migration = await cluster.move(f"m{number}", {"vf1": HOMES[number % 3]}, mode=MODES[number % 2])
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
    await cluster.until_working(operations=300)
    reports = await cluster.stop_workloads()
    assert reports["d1", "vf1"].operations >= 3300
    await assert_nothing_left(cluster)


async def test_a_command_completes_once_though_its_home_or_its_driver_is_killed(cluster: Cluster) -> None:
    for number, (target, killed) in enumerate(zip(HOMES, ("h2", "h1", "h1"), strict=True)):
        await cluster.until_working(operations=200)
        assert (await cluster.move(f"m{number}", {"vf1": target})).phase == Phase.PHASE_DONE
        await cluster.until_working(operations=50)
        await cluster.local.hosts[killed].kill()
        await cluster.local.hosts[killed].restart()
        await cluster.until_registered(killed)
        await cluster.until_working(operations=200)
    await cluster.stop_workloads()
