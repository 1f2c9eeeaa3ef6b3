"""One trace a migration, from the command to the hosts and etcd, also when another coordinator ends it."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.collector import Collector, Received, collecting
from support.failpoints import Failpoints
from support.local_cluster import Cluster, eventually, running

from vfleet.v1.records_pb2 import Phase

BY_THE_WAY = {"OTEL_BSP_SCHEDULE_DELAY": "20"}  # milliseconds from the end of a span until it is sent, at most


@pytest.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    """A collector that all daemons and commands send to."""
    async with collecting() as collector:
        for name, value in {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, **BY_THE_WAY}.items():
            monkeypatch.setenv(name, value)
        yield collector


@pytest.fixture
def failpoints(tmp_path: Path) -> Failpoints:
    return Failpoints(tmp_path / "failpoints")


async def ready(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", device="h1/nic0")
    await cluster.work("d1", "vf1", "h3")


async def migrate(cluster: Cluster, *arguments: str) -> tuple[int, str]:
    """Run `vfleet migrate` and return its exit code and what it says."""
    coordinators = ",".join(cluster.local.coordinator_addresses)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vfleet.cli.main", "--insecure", "migrate", *arguments, "--coordinator", coordinators),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    out, _ = await process.communicate()
    return process.returncode, out.decode()


async def of_one_trace(collector: Collector, migration: str, *last: str) -> list[Received]:
    """Return the spans of a migration's trace once those are there that end `last`, checked: all of one tree."""

    def spans() -> list[Received]:
        trace = next((s.trace for s in collector.spans if s.attributes.get("vfleet.migration") == migration), "")
        return [span for span in collector.spans if span.trace == trace]

    async def complete() -> bool:
        found = spans()
        names, known = {span.name for span in found}, {span.span for span in found}
        return set(last) <= names and all(span.parent in known for span in found if span.parent)

    await eventually(complete)
    found = spans()
    of_the_migration = {span.trace for span in collector.spans if span.attributes.get("vfleet.migration") == migration}
    assert len(of_the_migration) == 1
    assert [span.name for span in found if not span.parent] == [found_root(found)]
    return found


def found_root(spans: list[Received]) -> str:
    return next(span.name for span in spans if not span.parent)


async def test_a_migration_is_one_trace_from_the_command_to_etcd(tmp_path, collector):
    async with running(tmp_path) as cluster:
        await ready(cluster)
        code, said = await migrate(cluster, "vf1", "--to", "h2/nic0", "--wait", "--request-id", "m-1")
        assert code == 0, said
        spans = await of_one_trace(collector, "m-1", "vfleet migrate", "drive m-1")
        assert found_root(spans) == "vfleet migrate"
        assert {span.service for span in spans} == {
            "vfleet",
            "vfleet-coordinator/c1",
            *(f"vfleet-hostd/{host}" for host in ("h1", "h2", "h3")),
        }
        by_service = {(span.service, span.name) for span in spans}
        assert by_service >= {
            ("vfleet", "CreateMigration"),
            ("vfleet", "WatchMigration"),
            ("vfleet-coordinator/c1", "CreateMigration"),
            ("vfleet-coordinator/c1", "begin m-1"),
            ("vfleet-coordinator/c1", "step COPY"),
            ("vfleet-coordinator/c1", "step HOLD"),
            ("vfleet-hostd/h1", "ChangeState"),
            ("vfleet-hostd/h1", "ExportState"),
            ("vfleet-hostd/h2", "ExportState"),
            ("vfleet-hostd/h2", "ImportState"),
            ("vfleet-hostd/h3", "PlaceHold"),
            ("vfleet-hostd/h3", "UpdateTable"),
        }
        assert [span.service for span in spans if span.name == "etcd commit"] == ["vfleet-coordinator/c1"] * 3
        assert not [span for span in spans if span.failed]
        # Whatever else goes on belongs to no trace: renewals of leases, watches, accesses.
        assert {span.trace for span in collector.spans} == {spans[0].trace}


async def test_who_adopts_a_migration_goes_on_with_its_trace(tmp_path, collector, failpoints):
    async with running(tmp_path, coordinators=2, lease_ttl_s=2, failpoints=failpoints.directory) as cluster:
        await ready(cluster)
        for coordinator in cluster.local.coordinators:
            failpoints.arm(coordinator, "coordinator.commit.after", "kill")
        moving = asyncio.create_task(migrate(cluster, "vf1", "--to", "h2/nic0", "--wait", "--request-id", "m-1"))
        await failpoints.reached_by_any(cluster.local.coordinators, "coordinator.commit.after")
        survivor = next(
            name for name in cluster.local.coordinators if failpoints.disarm(name, "coordinator.commit.after")
        )
        code, said = await moving
        assert code == 0, said

        async def adopted() -> bool:
            return bool(collector.named("adopt m-1"))

        await eventually(adopted)
        [adoption] = collector.named("adopt m-1")
        [root] = collector.named("vfleet migrate")
        assert (adoption.service, adoption.trace) == (f"vfleet-coordinator/{survivor}", root.trace)
        assert collector.services(root.trace) >= {"vfleet", "vfleet-hostd/h1", "vfleet-hostd/h2", "vfleet-hostd/h3"}


async def test_one_that_waits_in_the_queue_keeps_its_trace_and_one_of_nobody_has_its_own(tmp_path, collector):
    async with running(tmp_path) as cluster:
        await ready(cluster)
        await cluster.fleet.create_function("vf2", device="h1/nic0")
        await cluster.local.coordinators["c1"].restart("--max-migrations", "1")
        cluster.local.hosts["h2"].pause()
        # Asked for by this test, which makes no traces.
        await cluster.begin("m-first", {"vf1": "h2/nic0"})
        code, said = await migrate(cluster, "vf2", "--to", "h3/nic0", "--request-id", "m-queued")
        assert (code, "is queued" in said) == (0, True), said
        cluster.local.hosts["h2"].resume()
        assert (await cluster.over("m-queued")).phase == Phase.PHASE_DONE
        queued = await of_one_trace(collector, "m-queued", "vfleet migrate", "drive m-queued")
        assert found_root(queued) == "vfleet migrate"
        first = await of_one_trace(collector, "m-first", "begin m-first", "drive m-first")
        assert found_root(first) == "begin m-first"


async def test_a_call_that_fails_is_seen_in_the_trace(tmp_path, collector):
    async with running(tmp_path) as cluster:
        await ready(cluster)
        code, _ = await migrate(cluster, "vf1", "--to", "h9/nic0", "--wait", "--request-id", "m-1")
        assert code == 2

        async def there() -> bool:
            return bool(collector.named("vfleet migrate"))

        await eventually(there)
        failed = {
            (span.service, span.name): span.attributes.get("vfleet.reason") for span in collector.spans if span.failed
        }
        assert (
            failed[("vfleet", "CreateMigration")] == failed[("vfleet-coordinator/c1", "CreateMigration")] == "NOT_FOUND"
        )


async def test_without_a_collector_everything_works_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    async with running(tmp_path) as cluster:
        await ready(cluster)
        code, said = await migrate(cluster, "vf1", "--to", "h2/nic0", "--wait", "--request-id", "m-1")
        assert code == 0, said
        assert (await cluster.fleet.get_migration("m-1")).phase == Phase.PHASE_DONE
