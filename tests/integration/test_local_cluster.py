"""A whole cluster on this machine: it comes up, survives kills, and leaves no process."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vfleet.errors import Reason, VfleetError
from vfleet.local import LocalCluster, read_host_names

TOPOLOGY = Path(__file__).parents[2] / "vfleet" / "topologies" / "demo.yaml"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    async with LocalCluster(TOPOLOGY, tmp_path / "cluster", coordinators=2, lease_ttl_s=2) as cluster:
        yield cluster


def pids_using(directory: Path) -> list[int]:
    """Processes whose command line names the directory: all of a cluster's, etcd included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(directory) in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


async def until_registered(cluster: LocalCluster, *, registered: bool, name: str) -> None:
    async with cluster.fleet() as fleet, asyncio.timeout(30):
        while (await fleet.get_host(name)).registered != registered:
            await asyncio.sleep(0.02)


async def test_it_is_ready_when_entered_and_gone_when_left(tmp_path: Path) -> None:
    async with LocalCluster(TOPOLOGY, tmp_path) as cluster:
        async with cluster.fleet() as fleet:
            hosts = await fleet.list_hosts()
        assert {host.name: host.address for host in hosts} == {n: d.address for n, d in cluster.hosts.items()}
        assert all(host.registered for host in hosts)
        assert len(pids_using(tmp_path)) == 1 + len(cluster.hosts)  # a coordinator has no directory
        coordinator = cluster.coordinators["c1"].process.pid
    assert pids_using(tmp_path) == []
    with pytest.raises(ProcessLookupError):
        os.kill(coordinator, 0)


async def test_a_killed_daemon_comes_back_at_its_address(cluster: LocalCluster) -> None:
    host = cluster.hosts["h2"]
    address, pid = host.address, host.process.pid
    async with cluster.fleet() as fleet:
        before = await fleet.get_host("h2")
    await host.kill()
    await until_registered(cluster, registered=False, name="h2")
    with pytest.raises(VfleetError, match="h2 is not running"):
        host.pause()
    await host.start()
    await until_registered(cluster, registered=True, name="h2")
    async with cluster.fleet() as fleet:
        after = await fleet.get_host("h2")
    assert (host.address, after.incarnation) == (address, before.incarnation)
    assert host.process.pid != pid


async def test_a_power_cycle_is_a_new_incarnation(cluster: LocalCluster) -> None:
    async with cluster.fleet() as fleet:
        before = await fleet.get_host("h1")
        await cluster.hosts["h1"].restart("--power-cycle")
        async with asyncio.timeout(30):
            while (await fleet.get_host("h1")).incarnation == before.incarnation:
                await asyncio.sleep(0.02)


async def test_a_paused_daemon_loses_its_lease_and_a_resumed_one_gets_it_back(cluster: LocalCluster) -> None:
    cluster.hosts["h3"].pause()
    await until_registered(cluster, registered=False, name="h3")
    cluster.hosts["h3"].resume()
    await until_registered(cluster, registered=True, name="h3")


async def test_clients_go_on_with_another_coordinator(cluster: LocalCluster) -> None:
    async with cluster.fleet() as fleet:
        await fleet.list_hosts()
        await cluster.coordinators["c1"].kill()
        assert len(await fleet.list_hosts()) == 3


async def test_a_daemon_that_ends_is_started_again(cluster: LocalCluster) -> None:
    lines: asyncio.Queue[str] = asyncio.Queue()
    keeping = asyncio.create_task(cluster.keep_running(lines.put_nowait))
    await asyncio.sleep(0)
    pid = cluster.hosts["h1"].process.pid
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        assert (await lines.get()).startswith("h1 ended (SIGKILL")
        while cluster.hosts["h1"]._process is None or cluster.hosts["h1"]._process.pid == pid:
            await asyncio.sleep(0.02)
    keeping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await keeping


async def test_a_segment_of_another_clusters_host_is_refused(cluster: LocalCluster, tmp_path: Path) -> None:
    topology = tmp_path / "fleet.yaml"
    topology.write_text("hosts: [{name: other, segment: 2}]")
    with pytest.raises(VfleetError, match="segment 2 of host 'other' is claimed by host 'h2'"):
        async with LocalCluster(topology, tmp_path / "second", etcd=cluster.etcd):
            pass
    assert pids_using(tmp_path / "second") == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("hosts: []", "hosts, each with a name"),
        ("[1, 2", "YAML"),
        ("hosts: [{name: 'H 1'}]", "H 1"),
        ("hosts: [{segment: 1}]", "None"),
        ("hosts: [{name: h1, segment: 70000}]", "segment"),
        ("hosts: [{name: h1, segment: 1}, {name: h1, segment: 2}]", "h1"),
    ],
)
async def test_a_bad_topology_is_one_clear_error(tmp_path: Path, content: str, words: str) -> None:
    topology = tmp_path / "fleet.yaml"
    topology.write_text(content)
    with pytest.raises(VfleetError, match=words) as caught:
        async with LocalCluster(topology, tmp_path / "data"):
            pass
    assert caught.value.reason is Reason.INVALID_FIELD
    assert pids_using(tmp_path / "data") == []


def test_a_topology_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(VfleetError, match=r"nothing\.yaml"):
        read_host_names(tmp_path / "nothing.yaml")
