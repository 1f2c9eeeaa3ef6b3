"""Functions are rearranged under load, through the CLI on a real cluster, whatever interrupts it."""

import asyncio
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml
from support.local_cluster import Cluster, assert_nothing_left, eventually, running

HOSTS = ("h1", "h2", "h3", "h4")
VFLEET = (sys.executable, "-m", "vfleet.cli.main")


def topology() -> dict[str, object]:
    """Return four hosts with a nic of 16 slots each."""
    return {
        "hosts": [
            {
                "name": host,
                "segment": number,
                "bridges": [{"name": "port0", "secondary": 1, "subordinate": 1, "devices": [nic()]}],
            }
            for number, host in enumerate(HOSTS, start=1)
        ]
    }


def nic() -> dict[str, object]:
    return {
        "name": "nic0",
        "model": "checker",
        "manufacturer": {"vendor_id": 0x1AF4, "device_id": 1},
        "io_type": "network",
        "power_domain": "psu-a",
        "total_vfs": 16,
        "first_vf_offset": 8,
        "vf_stride": 1,
        "bars": {0: "4KiB", 2: "16KiB"},
    }


async def start(*arguments: str) -> asyncio.subprocess.Process:
    """Run the command as a shell does, without a terminal."""
    return await asyncio.create_subprocess_exec(
        *VFLEET,
        *arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ,
    )


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str, str]:
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


async def vfleet(*arguments: str) -> tuple[int | None, str, str]:
    return await ended(await start(*arguments))


async def counts(cluster: Cluster) -> list[int]:
    """Return how many functions each host has, the most first."""
    homes = Counter(home.partition("/")[0] for home in (await cluster.homes()).values())
    return sorted((homes[host] for host in HOSTS), reverse=True)


async def until_moved(cluster: Cluster, functions: int) -> None:
    async def moved() -> bool:
        migrations = await cluster.fleet.list_migrations()
        return len(migrations) >= functions

    await eventually(moved)


@pytest.mark.timeout(300)
async def test_functions_are_spread_and_packed_under_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "topology.yaml"
    path.write_text(yaml.safe_dump(topology()), encoding="utf-8")
    async with running(tmp_path, topology=path, coordinators=2, lease_ttl_s=2) as cluster:
        monkeypatch.setenv("VFLEET_COORDINATOR", ",".join(cluster.local.coordinator_addresses))
        monkeypatch.setenv("VFLEET_INSECURE", "1")
        await fill(cluster)

        code, out, err = await vfleet("rebalance")
        assert (code, out, len(err.splitlines())) == (2, "", 1)  # nobody is there to be asked
        code, out, _ = await vfleet("rebalance", "--tolerance", "1", "--dry-run", "-o", "json")
        planned = json.loads(out)
        assert code == 0
        assert (planned["before"]["highest_load"], planned["after"]["highest_load"]) == (0.75, 0.25)
        assert len(planned["plan"]["moves"]) == 8
        assert await counts(cluster) == [12, 2, 2, 0]

        # First the command is interrupted, then the coordinator that does it is killed.
        process = await start("rebalance", "--tolerance", "1", "--yes", "--parallel", "1")
        await until_moved(cluster, 1)
        process.send_signal(signal.SIGINT)
        code, out, err = await ended(process)
        assert code == 130, out + err
        assert "the same command goes on" in err
        process = await start("rebalance", "--tolerance", "1", "--yes", "--parallel", "2")
        await until_moved(cluster, 4)
        await cluster.local.coordinators["c1"].kill()
        code, out, err = await ended(process)
        assert code == 0, out + err
        assert await counts(cluster) == [4, 4, 4, 4]
        await cluster.local.coordinators["c1"].start()
        code, out, _ = await vfleet("rebalance", "--tolerance", "1", "--yes")
        assert (code, out) == (0, "nothing to do\n")

        await cluster.fleet.cordon("host", "h4")
        code, out, err = await vfleet("defragment", "--free", "hosts", "--yes", "--apart", "vf1,vf2")
        assert code == 0, out + err
        assert "4 moved, 0 stuck" in out
        assert await counts(cluster) == [8, 4, 4, 0]  # h4 is left alone, and two are to be apart
        homes = await cluster.homes()
        assert homes["vf1"] != homes["vf2"]
        assert (await vfleet("defragment", "--free", "hosts", "--yes", "--apart", "vf1,vf2"))[1] == "nothing to do\n"
        await cluster.until_working(operations=2)
        await cluster.stop_workloads()  # none has seen anything lost, repeated, reordered or wrong
        await assert_nothing_left(cluster)


async def fill(cluster: Cluster) -> None:
    """Make 12 functions on h1, two on h2 and two on h3, each with a driver at work on one of the hosts."""
    homes = ["h1"] * 12 + ["h2"] * 2 + ["h3"] * 2
    for number, home in enumerate(homes, start=1):
        await cluster.fleet.create_function(f"vf{number}", f"{home}/nic0")
        host = HOSTS[number % len(HOSTS)]
        await cluster.fleet.attach_driver(f"vf{number}", f"d{number}", host=host)
        await cluster.start(f"d{number}", f"vf{number}", host, accesses_per_second=10)
    await cluster.until_working(operations=2)
