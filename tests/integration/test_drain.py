"""A host is emptied under load, through the CLI on a real cluster, whatever happens to the coordinator meanwhile."""

import asyncio
import re
from pathlib import Path

import pytest
import yaml
from support.local_cluster import Cluster, assert_nothing_left, eventually, running

from vfleet.cli.main import run

HOSTS = ("h1", "h2", "h3", "h4")
FUNCTIONS = [f"vf{number}" for number in range(1, 40)]


def device(name: str, number: int, device_id: int, total_vfs: int) -> dict[str, object]:
    return {
        "name": name,
        "function": number,
        "model": "checker",
        "manufacturer": {"vendor_id": 0x1AF4, "device_id": device_id},
        "io_type": "network",
        "power_domain": "psu-a",
        "total_vfs": total_vfs,
        "first_vf_offset": 8 + 120 * number,
        "vf_stride": 1,
        "bars": {0: "4KiB", 2: "16KiB"},
    }


def topology() -> dict[str, object]:
    """Return four hosts with a nic each; only the first two have a device of the rare kind as well."""
    return {
        "hosts": [
            {
                "name": host,
                "segment": segment,
                "bridges": [
                    {
                        "name": "port0",
                        "secondary": 1,
                        "subordinate": 1,
                        "devices": [
                            device("nic0", 0, 1, 96),
                            *([device("rare0", 1, 2, 4)] if segment < 3 else []),
                        ],
                    }
                ],
            }
            for segment, host in enumerate(HOSTS, start=1)
        ]
    }


async def on(cluster: Cluster, host: str) -> set[str]:
    return {name for name, home in (await cluster.homes()).items() if home.startswith(f"{host}/")}


@pytest.mark.timeout(400)
async def test_a_host_of_40_functions_is_emptied_under_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """First while the coordinator that does it is killed half way; then with one function that has nowhere to go."""
    path = tmp_path / "topology.yaml"
    path.write_text(yaml.safe_dump(topology()), encoding="utf-8")
    async with running(tmp_path, topology=path, coordinators=2, lease_ttl_s=2) as cluster:
        monkeypatch.setenv("VFLEET_COORDINATOR", ",".join(cluster.local.coordinator_addresses))
        monkeypatch.setenv("VFLEET_INSECURE", "1")

        async def vfleet(*arguments: str) -> tuple[int, str, str]:
            code = await asyncio.to_thread(run, arguments)
            return code, *capsys.readouterr()

        await fill(cluster)
        draining = asyncio.create_task(vfleet("drain", "host", "h1", "--prefer", "pack", "--parallel", "8"))

        async def half_way() -> bool:
            return len(await on(cluster, "h1")) <= 20

        await eventually(half_way)
        await cluster.local.coordinators["c1"].kill()
        code, out, err = await draining
        assert (code, out.count(" moved ")) == (0, 40), out + err
        assert "host h1: 40 moved, 0 stuck" in out
        assert re.search(r"^vf\d+ moved to h2/nic0, drivers held for \d+\.\d ms$", re.sub(r"\d+/40 ", "", err), re.M)
        assert await on(cluster, "h2") == {*FUNCTIONS, "rare"}
        await cluster.local.coordinators["c1"].start()
        await cluster.until_working(operations=2)

        code, out, err = await vfleet("drain", "host", "h2", "--parallel", "8")
        assert code == 1
        assert "host h2: 39 moved, 1 stuck" in out
        assert "uncordon host h1" in out
        assert err.endswith("vfleet: can't move rare\n")
        assert await on(cluster, "h2") == {"rare"}

        assert (await vfleet("uncordon", "host", "h1"))[0] == 0
        assert (await vfleet("drain", "host", "h2"))[0] == 0
        assert await on(cluster, "h2") == set()
        await cluster.until_working(operations=2)
        reports = await cluster.stop_workloads()  # none has seen anything lost, repeated, reordered or wrong
        longest = sorted(report.longest_gap.ToMilliseconds() for report in reports.values())
        capsys.readouterr()
        print(f"gaps of 40 drivers in two moves each: median {longest[20]} ms, longest {longest[-1]} ms")  # noqa: T201
        await assert_nothing_left(cluster)


async def fill(cluster: Cluster) -> None:
    """Make 40 functions on h1, each with a driver at work on one of the hosts."""
    homes = {**dict.fromkeys(FUNCTIONS, "h1/nic0"), "rare": "h1/rare0"}
    for number, (name, home) in enumerate(homes.items()):
        await cluster.fleet.create_function(name, home)
        host = HOSTS[number % len(HOSTS)]
        await cluster.fleet.attach_driver(name, f"d-{name}", host=host)
        await cluster.start(f"d-{name}", name, host, accesses_per_second=10)
    await cluster.until_working(operations=2)
