"""Two network interfaces go around the fleet under traffic; daemons are killed. Frames sent equal frames received."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.local_cluster import Cluster, assert_nothing_left, running

from hostd.workloads.virtio_net import ACKNOWLEDGED, PEER_TOTAL, RECEIVED, SENDING
from vfleet.driver import DriverClient
from vfleet.limits import MAIN_MEMORY_VIRTUAL_ADDRESS
from vfleet.v1.driver_service_pb2 import WorkloadOptions
from vfleet.v1.records_pb2 import Phase
from vfleet.v1.types_pb2 import TransferMode

TOPOLOGY = Path(__file__).with_name("data") / "network.yaml"
MAIN_MEMORY_BYTES = 1 << 20
MODES = (TransferMode.TRANSFER_MODE_PRE_COPY, TransferMode.TRANSFER_MODE_POST_COPY)
HOSTS = ("h1", "h2", "h3")
ENDS = {"d1": ("vf1", "h1"), "d2": ("vf2", "h2")}


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path, topology=TOPOLOGY) as cluster:
        for driver, (function, host) in ENDS.items():
            await cluster.fleet.create_function(function, f"{host}/nic0")
            await cluster.fleet.attach_driver(function, driver, host=host, main_memory_bytes=MAIN_MEMORY_BYTES)
        for driver, (function, host) in ENDS.items():
            await cluster.hosts[host].start_workload(driver, function, WorkloadOptions(kind="virtio-net", window=32))
            cluster.workloads[driver, function] = host
        yield cluster


async def frames(cluster: Cluster, driver: str) -> dict[str, int]:
    """What a driver's main memory says of the frames that it has sent and received."""
    client = DriverClient(cluster.hosts[ENDS[driver][1]], driver)

    async def word(index: int) -> int:
        return int.from_bytes(await client.read(MAIN_MEMORY_VIRTUAL_ADDRESS + 8 * index, 8), "little")

    return {
        "sent": await word(SENDING) >> 17,
        "acknowledged": await word(ACKNOWLEDGED),
        "received": await word(RECEIVED) >> 16,
        "peer's total": await word(PEER_TOTAL) - 1,
    }


async def assert_all_arrived(cluster: Cluster, at_least: int) -> None:
    """Stop the workloads, which have seen nothing wrong, and check that frames sent equal frames received."""
    reports = await cluster.stop_workloads()
    d1, d2 = await frames(cluster, "d1"), await frames(cluster, "d2")
    for own, other, report in ((d1, d2, reports["d1", "vf1"]), (d2, d1, reports["d2", "vf2"])):
        assert own["sent"] == own["acknowledged"] == other["received"] == other["peer's total"]
        assert report.operations == own["sent"] >= at_least
    for host in cluster.hosts.values():
        for instance in await host.list_functions():
            assert instance.frames_dropped == 0


async def test_every_frame_arrives_over_ten_moves_of_either_end_by_either_mode(cluster: Cluster) -> None:
    homes = {"vf1": 0, "vf2": 1}
    for number in range(10):
        await cluster.until_working(operations=150)
        # Either end by turns, and sometimes both together.
        moving = ("vf1", "vf2") if number % 4 == 3 else (("vf1", "vf2")[number % 2],)
        for function in moving:
            homes[function] = (homes[function] + 1) % 3
        moves = {function: f"{HOSTS[homes[function]]}/nic0" for function in moving}
        migration = await cluster.move(f"m{number}", moves, mode=MODES[number // 2 % 2])
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
    await cluster.until_working(operations=150)
    await assert_all_arrived(cluster, at_least=1650)
    await assert_nothing_left(cluster)


async def test_every_frame_arrives_though_a_home_or_a_driver_is_killed(cluster: Cluster) -> None:
    for number, (function, target, killed) in enumerate(
        (("vf1", "h3", "h3"), ("vf2", "h3", "h2"), ("vf1", "h2", "h1"))
    ):
        await cluster.until_working(operations=100)
        assert (await cluster.move(f"m{number}", {function: f"{target}/nic0"})).phase == Phase.PHASE_DONE
        await cluster.until_working(operations=30)
        await cluster.local.hosts[killed].kill()
        await cluster.local.hosts[killed].restart()
        await cluster.until_registered(killed)
        await cluster.until_working(operations=100)
    await assert_all_arrived(cluster, at_least=600)
