"""Devices with queues go around the fleet with commands in flight, and daemons are killed: each completes once."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.local_cluster import Cluster, assert_nothing_left, refusal, running

from vfleet.errors import Reason
from vfleet.v1.driver_service_pb2 import WorkloadOptions
from vfleet.v1.records_pb2 import Phase
from vfleet.v1.types_pb2 import TransferMode

DATA = Path(__file__).with_name("data")
MAIN_MEMORY_BYTES = 4 << 20
MODES = (TransferMode.TRANSFER_MODE_PRE_COPY, TransferMode.TRANSFER_MODE_POST_COPY)


@pytest.fixture(params=[("devices.yaml", "accel0", "accelerator"), ("nvme.yaml", "nvme0", "nvme")], ids=lambda p: p[2])
def kind(request: pytest.FixtureRequest) -> tuple[str, str, str]:
    """The topology, the device of each host, and the workload."""
    return request.param


@pytest.fixture
async def cluster(tmp_path: Path, kind: tuple[str, str, str]) -> AsyncIterator[Cluster]:
    """A fleet with vf1 on h1, and its driver at work there."""
    topology, device, workload = kind
    async with running(tmp_path, topology=DATA / topology) as cluster:
        await cluster.fleet.create_function("vf1", f"h1/{device}")
        await cluster.fleet.attach_driver("vf1", "d1", host="h1", main_memory_bytes=MAIN_MEMORY_BYTES)
        await cluster.hosts["h1"].start_workload("d1", "vf1", WorkloadOptions(kind=workload, window=64, seed=5))
        cluster.workloads["d1", "vf1"] = "h1"
        yield cluster


@pytest.fixture
def homes(kind: tuple[str, str, str]) -> tuple[str, str, str]:
    """Where it goes in turn."""
    return f"h2/{kind[1]}", f"h3/{kind[1]}", f"h1/{kind[1]}"


async def test_every_command_completes_once_over_ten_moves_by_either_mode(cluster: Cluster, homes) -> None:
    for number in range(10):
        await cluster.until_working(operations=300)
        migration = await cluster.move(f"m{number}", {"vf1": homes[number % 3]}, mode=MODES[number % 2])
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
    await cluster.until_working(operations=300)
    reports = await cluster.stop_workloads()
    assert reports["d1", "vf1"].operations >= 3300
    await assert_nothing_left(cluster)


async def test_a_command_completes_once_though_its_home_or_its_driver_is_killed(cluster: Cluster, homes) -> None:
    for number, (target, killed) in enumerate(zip(homes, ("h2", "h1", "h1"), strict=True)):
        await cluster.until_working(operations=200)
        assert (await cluster.move(f"m{number}", {"vf1": target})).phase == Phase.PHASE_DONE
        await cluster.until_working(operations=50)
        await cluster.local.hosts[killed].kill()
        await cluster.local.hosts[killed].restart()
        await cluster.until_registered(killed)
        await cluster.until_working(operations=200)
    await cluster.stop_workloads()


async def test_it_has_one_driver(cluster: Cluster) -> None:
    error = await refusal(cluster.fleet.attach_driver("vf1", "d2", host="h2", main_memory_bytes=MAIN_MEMORY_BYTES))
    assert error.reason is Reason.LIMIT_EXCEEDED
    assert "'vf1' is attached to d1; expected no more than 1" in error.message
