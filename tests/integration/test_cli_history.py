"""What has happened on a real cluster, as the vfleet command tells it: one cluster, and commands in this process."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from support.local_cluster import Cluster, running

from vfleet.cli.main import run
from vfleet.v1.records_pb2 import Phase


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path) as cluster:
        yield cluster


async def test_what_has_happened_is_told(
    cluster: Cluster, tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VFLEET_COORDINATOR", ",".join(cluster.local.coordinator_addresses))
    monkeypatch.setenv("VFLEET_INSECURE", "1")

    async def vfleet(*arguments: str) -> str:
        assert await asyncio.to_thread(run, arguments) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.fleet.create_function("vf2", "h1/nic0")
    await cluster.fleet.attach_driver("vf1", "d1", host="h1")
    assert (await cluster.move("m1", {"vf1": "h2/nic0"})).phase == Phase.PHASE_DONE
    assert (await cluster.move("m2", {"vf2": "h3/nic0"})).phase == Phase.PHASE_DONE
    await cluster.fleet.cordon("host", "h3", reason="firmware")

    history = await vfleet("history", "vf1")
    assert re.search(r"^1 +h1/nic0 +1$", history, re.MULTILINE)
    assert re.search(r"^2 +h2/nic0 +1 +m1 +.*Z +done +at most [\d.]+ ms$", history, re.MULTILINE)
    assert "m2" not in history
    assert re.search(r" m2 .* done +none$", await vfleet("history", "vf2"), re.MULTILINE)  # it has no driver

    events = [json.loads(line) for line in (await vfleet("events", "-o", "json")).splitlines()]
    told = {(event["kind"].removeprefix("EVENT_KIND_"), event["name"], event["what"].split()[0]) for event in events}
    assert told >= {
        ("FUNCTION", "vf1", "creating"),
        ("FUNCTION", "vf1", "driver"),
        ("FUNCTION", "vf1", "moved"),
        ("MIGRATION", "m1", "preparing:"),
        ("MIGRATION", "m1", "committed"),
        ("MIGRATION", "m1", "done"),
        ("CORDON", "h3", "cordoned:"),
    }
    assert [int(event["revision"]) for event in events] == sorted(int(event["revision"]) for event in events)

    drawing = tmp_path / "m1.svg"
    assert "scrub" in await vfleet("describe", "migration", "m1", "--svg", str(drawing))
    assert "scrub" in drawing.read_text()
    assert re.search(r"^vf1 +active +h2/nic0, VF 1", await vfleet("top", "--once"), re.MULTILINE)

    async with aclosing(cluster.fleet.watch_events()) as following:
        async for event in following:
            if event.revision == int(events[-1]["revision"]):
                await cluster.fleet.uncordon("host", "h3")
            if event.what == "uncordoned":
                break

    await cluster.fleet.detach_driver("vf1", "d1")
    await cluster.fleet.delete_function("vf1")
    assert "vf1 is no more" in await vfleet("history", "vf1")
