"""The vfleet command and a real cluster: `up` and what it leaves, a migration by hand, the demo."""

import asyncio
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from vfleet.etcd.server import EtcdServer

TOPOLOGY = Path(__file__).parents[2] / "vfleet" / "topologies" / "demo.yaml"
VFLEET = (sys.executable, "-m", "vfleet.cli.main")


@dataclass
class Result:
    code: int
    out: str
    err: str


Vfleet = Callable[..., Awaitable[Result]]


@pytest.fixture
def vfleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Vfleet:
    """Run the vfleet command as a shell does, with its own place for state."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("VFLEET_COORDINATOR", raising=False)

    async def command(*arguments: str) -> Result:
        process = await asyncio.create_subprocess_exec(
            *VFLEET, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, err = await process.communicate()
        assert process.returncode is not None
        return Result(process.returncode, out.decode(), err.decode())

    return command


Up = asyncio.subprocess.Process


@pytest.fixture
async def up(vfleet: Vfleet, tmp_path: Path) -> AsyncIterator[Up]:
    """A cluster that `vfleet up` runs."""
    process = await asyncio.create_subprocess_exec(
        *VFLEET, "up", str(TOPOLOGY), "--data-dir", str(tmp_path / "data"), stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    lines = []
    async with asyncio.timeout(60):
        while (lines or [b""])[-1] != b"Ctrl-C ends it.\n":
            lines.append(await process.stdout.readline())
            assert lines[-1], lines
    yield process
    if process.returncode is None:
        process.kill()
        await process.wait()


def pids_using(directory: Path) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if os.fsencode(directory) in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def etcd_endpoint(directory: Path) -> str:
    for pid in pids_using(directory):
        found = re.search(rb"--listen-client-urls=http://([\d.:]+)", Path(f"/proc/{pid}/cmdline").read_bytes())
        if found:
            return found[1].decode()
    raise AssertionError(f"no etcd in {directory}")


async def test_a_migration_by_hand(vfleet: Vfleet, up: Up) -> None:
    assert (await vfleet("create", "function", "vf1", "--on", "h1/nic0")).code == 0
    assert (
        await vfleet("attach", "vf1", "--driver", "d1", "--host", "h1", "--virtual-address", "0x10000000")
    ).code == 0
    assert (await vfleet("workload", "start", "d1", "vf1", "--rate", "500")).code == 0
    plan = await vfleet("migrate", "vf1", "--to", "h2/nic0:3", "--dry-run", "-o", "json")
    (move,) = json.loads(plan.out)["moves"]
    result = await vfleet("migrate", "vf1", "--to", "h2/nic0:3", "--wait", "--request-id", "first")
    assert result.code == 0, result.err
    assert "done" in result.out
    function = json.loads((await vfleet("describe", "function", "vf1", "-o", "json")).out)
    assert (function["device"], function["vf_index"], function["generation"]) == ("h2/nic0", 3, "2")
    assert function["base"] == move["target"]["base"]
    driver = json.loads((await vfleet("describe", "driver", "d1", "-o", "json")).out)
    (entry,) = driver["entries"]
    assert entry["virtual_address"] == str(0x10000000)
    assert int(entry["offset"]) == (int(function["base"]) - 0x10000000) % 2**64
    report = json.loads((await vfleet("workload", "stop", "d1", "vf1", "-o", "json")).out)
    assert int(report["operations"]) > 0
    assert [report[name] for name in ("lost", "repeated", "reordered", "misrouted", "mismatches", "errors")] == [
        "0"
    ] * 6
    again = await vfleet("migrate", "vf1", "--to", "h2/nic0")
    assert (again.code, len(again.err.splitlines())) == (2, 1)
    assert (await vfleet("cancel", "first")).code == 1
    assert (await vfleet("watch", "first")).code == 0
    assert (await vfleet("detach", "vf1", "--driver", "d1")).code == 0
    assert (await vfleet("delete", "function", "vf1")).code == 0
    assert (await vfleet("delete", "driver", "d1")).code == 0
    assert json.loads((await vfleet("get", "functions", "-o", "json")).out) == {"functions": [], "next_page_token": ""}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_up_ends_cleanly(vfleet: Vfleet, up: Up, tmp_path: Path, number: signal.Signals) -> None:
    assert len(pids_using(tmp_path / "data")) == 5  # itself, etcd, three hosts
    up.send_signal(number)
    async with asyncio.timeout(20):
        assert await up.wait() == 0
    assert pids_using(tmp_path / "data") == []
    result = await vfleet("get", "hosts")
    assert result.code == 2
    assert "no cluster" in result.err


async def test_up_that_is_killed_leaves_no_process(vfleet: Vfleet, up: Up, tmp_path: Path) -> None:
    up.kill()
    await up.wait()
    async with asyncio.timeout(20):
        while pids_using(tmp_path / "data"):
            await asyncio.sleep(0.02)
    result = await vfleet("get", "hosts")
    assert result.code == 1
    assert re.search(r"127\.0\.0\.1:\d+, tried for \d\.\d s", result.err)


async def test_etcd_knows_the_coordinators(vfleet: Vfleet, up: Up, tmp_path: Path) -> None:
    endpoint = etcd_endpoint(tmp_path / "data")
    result = await vfleet("--insecure", "get", "hosts", "--etcd", endpoint, "-o", "json")
    assert [host["name"] for host in json.loads(result.out)["hosts"]] == ["h1", "h2", "h3"]


async def test_an_etcd_without_coordinators_is_an_error(vfleet: Vfleet, etcd: EtcdServer) -> None:
    result = await vfleet("--insecure", "get", "hosts", "--etcd", etcd.endpoint)
    assert result.code == 1
    # A line before it may warn of an etcd that can lose data.
    assert result.err.splitlines()[-1] == f"vfleet: no coordinator is registered in etcd at {etcd.endpoint}"


async def test_a_bad_topology_is_bad_input(vfleet: Vfleet, tmp_path: Path) -> None:
    topology = tmp_path / "fleet.yaml"
    topology.write_text("hosts: [{name: h1, segment: 70000}]")
    result = await vfleet("up", str(topology))
    assert (result.code, result.out, len(result.err.splitlines())) == (2, "", 1)


@pytest.mark.timeout(300)
async def test_the_demo_shows_what_it_promises(vfleet: Vfleet) -> None:
    result = await vfleet("demo")
    assert result.code == 0, result.err
    for figure in ("lost", "repeated", "reordered", "misrouted", "mismatches", "errors"):
        assert re.search(rf"^{figure}\s+0$", result.out, re.MULTILINE)
    assert int(re.search(r"during the two migrations\s+([\d,]+)", result.out)[1].replace(",", "")) > 0
    before, after = (
        re.findall(r"0x[0-9a-f]{16}", line) for line in re.findall(r"^virtual address.*", result.out, re.M)
    )
    assert len({*before, *after}) == 1
    sums = re.findall(
        r"base   (0x\w+) = (0x\w+) << 48 \| (0x\w+) << 32\n.*offset (0x\w+) = \((0x\w+) - (0x\w+)\)", result.out
    )
    assert len(sums) == 3
    for numbers in sums:
        base, segment, routing_id, offset, base_again, virtual_address = (int(number, 16) for number in numbers)
        assert base == base_again == segment << 48 | routing_id << 32
        assert offset == (base - virtual_address) % 2**64


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_demo_that_is_interrupted_leaves_no_process(
    vfleet: Vfleet, tmp_path: Path, number: signal.Signals
) -> None:
    command = (*VFLEET, "demo", "--keep", str(tmp_path / "data"))
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    process.send_signal(number)
    async with asyncio.timeout(20):
        _, err = await process.communicate()
    assert (process.returncode, err.decode()) == (130, "")
    assert pids_using(tmp_path / "data") == []


@pytest.mark.timeout(300)
async def test_the_demo_runs_twice_on_an_etcd_of_the_users(vfleet: Vfleet, etcd: EtcdServer) -> None:
    for _ in range(2):
        result = await vfleet("demo", "--etcd", etcd.endpoint)
        assert result.code == 0, result.err
