"""The main job across containers: functions move from machine to machine while drivers on others use them."""

from pathlib import Path

import pytest
from support.containers.container import Container
from support.containers.engine import DockerError, docker
from support.containers.fleet import contained
from support.local_cluster import assert_nothing_left

from vfleet.v1.records_pb2 import Phase

NOBODY = "65532"


@pytest.mark.timeout(900)
async def test_functions_move_between_machines_under_drivers_at_work(tmp_path: Path, images: dict[str, str]) -> None:
    async with contained(tmp_path, images) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nic0")
        await cluster.fleet.create_function("vf2", "h2/nic0")
        # Across the fabric, at home, and two at one function.
        for driver, function, host in (("d1", "vf1", "h3"), ("d2", "vf2", "h2"), ("d3", "vf1", "h2")):
            await cluster.work(driver, function, host, channel=int(driver[1:]) - 1)
        for number, (first, second) in enumerate((("h2", "h3"), ("h3", "h1"), ("h1", "h2")), start=1):
            moved = await cluster.move(f"m{number}", {"vf1": f"{first}/nic0", "vf2": f"{second}/nic0"})
            assert moved.phase == Phase.PHASE_DONE, moved.abort_reason
            await cluster.until_working()
            assert await cluster.homes() == {"vf1": f"{first}/nic0", "vf2": f"{second}/nic0"}
        await assert_nothing_left(cluster)
        await cluster.stop_workloads()
        for container in (*cluster.local.daemons, *cluster.local.members.values()):
            await check_contained(container)


async def check_contained(container: Container) -> None:
    """Check that what runs in a container is nobody of importance, and writes to its volume alone."""
    assert (await docker("exec", container.container, "id", "-u")).strip() == NOBODY
    with pytest.raises(DockerError, match="Read-only file system"):
        await docker("exec", "--user", "root", container.container, "touch", "/written")
