"""Machines whose packets are lost and late: migrations take longer, or are aborted, and nothing else goes wrong."""

from pathlib import Path

import pytest
from support.containers.fleet import contained
from support.containers.weather import late_packets, lose_packets, lost_packets, slow_down
from support.local_cluster import assert_nothing_left

from vfleet.v1.records_pb2 import Phase

MOST_MOVES = 40


@pytest.mark.timeout(900)
async def test_over_a_bad_network_functions_move_and_no_access_is_lost(tmp_path: Path, images: dict[str, str]) -> None:
    async with contained(tmp_path, images) as cluster:
        fleet = cluster.local
        await cluster.fleet.create_function("vf1", "h1/nic0")
        await cluster.work("d1", "vf1", "h3")
        for daemon in fleet.daemons:
            await lose_packets(daemon)
        for host in fleet.hosts.values():
            await slow_down(host, fleet.fabric)
        done = 0
        for number in range(MOST_MOVES):
            over = await cluster.move(f"m{number}", {"vf1": f"h{1 + (number + 1) % 2}/nic0"})
            done += over.phase == Phase.PHASE_DONE
            await cluster.until_working()
            if done == 4:
                break
        assert done == 4
        await cluster.stop_workloads()
        assert sum([await lost_packets(daemon) for daemon in fleet.daemons])
        assert sum([await late_packets(host, fleet.fabric) for host in fleet.hosts.values()])
        await assert_nothing_left(cluster)
