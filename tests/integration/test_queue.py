"""Migrations that have to wait, on a real cluster: they begin in turn, can be cancelled, outlive their coordinator."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path

import pytest
from support.failpoints import Failpoints
from support.local_cluster import Cluster, assert_nothing_left, eventually, refusal, running

from vfleet.client import FleetClient, move_request
from vfleet.errors import Reason
from vfleet.etcd import keys
from vfleet.v1.records_pb2 import Migration, Phase

ONE = ("--max-migrations", "1")


@pytest.fixture
def failpoints(tmp_path: Path) -> Failpoints:
    return Failpoints(tmp_path / "failpoints")


@pytest.fixture
async def cluster(tmp_path: Path, failpoints: Failpoints) -> AsyncIterator[Cluster]:
    """Two coordinators of which each allows one migration, and vf1 to vf4."""
    async with running(tmp_path, coordinators=2, lease_ttl_s=2, failpoints=failpoints.directory) as cluster:
        await asyncio.gather(*(daemon.restart(*ONE) for daemon in cluster.local.coordinators.values()))
        for name in ("vf1", "vf2", "vf3", "vf4"):
            await cluster.fleet.create_function(name, "h1/nic0")
        yield cluster


def at(cluster: Cluster, coordinator: str) -> FleetClient:
    return FleetClient([cluster.local.coordinators[coordinator].address])


async def ask(client: FleetClient, name: str, function: str, device: str = "h2/nic0", **more: int) -> Migration:
    return await client.create_migration([move_request(function, device)], name=name, **more)


async def freeze(failpoints: Failpoints, coordinator: str, asking: Coroutine[None, None, Migration]) -> None:
    """Let a coordinator freeze in the migration that it is asked for, perhaps before it answers."""
    failpoints.arm(coordinator, "coordinator.create.before", "stop")
    asked = asyncio.create_task(asking)
    await failpoints.reached(coordinator, "coordinator.create.before")
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)


async def test_they_begin_by_priority_and_a_queued_one_can_be_cancelled_anywhere(cluster: Cluster) -> None:
    """They wait for one whose target is frozen."""
    async with at(cluster, "c1") as c1, at(cluster, "c2") as c2:
        cluster.local.hosts["h3"].pause()
        assert (await ask(c1, "first", "vf1", "h3/nic0")).phase == Phase.PHASE_PREPARING
        for name, function, priority in (("later", "vf2", 0), ("soon", "vf3", 9), ("not", "vf4", 50)):
            assert (await ask(c1, name, function, priority=priority)).phase == Phase.PHASE_QUEUED
        assert (await ask(c1, "soon", "vf3", priority=9)).phase == Phase.PHASE_QUEUED  # again: the same one
        assert (await refusal(ask(c1, "soon", "vf2"))).reason is Reason.ALREADY_EXISTS

        async def known() -> bool:
            return "not" in {each.name for each in await c2.list_migrations(active_only=True)}

        await eventually(known)
        assert (await c2.get_migration("not")).phase == Phase.PHASE_QUEUED
        for client in (c2, c1):
            cancelled = await client.cancel_migration("not")
            assert (cancelled.phase, "before it began" in cancelled.abort_reason) == (Phase.PHASE_ABORTED, True)
        cluster.local.hosts["h3"].resume()
        over = {name: await c1.wait_migration(name) for name in ("later", "soon", "not")}
        assert [each.phase for each in over.values()] == [Phase.PHASE_DONE, Phase.PHASE_DONE, Phase.PHASE_ABORTED]
        assert over["soon"].finish_time.ToNanoseconds() <= over["later"].begin_time.ToNanoseconds()
        assert (await c1.get_function("vf4")).device == "h1/nic0"
    assert (await cluster.store.list(keys.QUEUE)).items == ()
    await cluster.until_registered("h3")
    await assert_nothing_left(cluster)


async def test_a_queued_one_outlives_its_coordinator(cluster: Cluster, failpoints: Failpoints) -> None:
    async with at(cluster, "c1") as c1, at(cluster, "c2") as c2:
        await freeze(failpoints, "c1", ask(c1, "first", "vf1"))
        assert (await ask(c2, "mine", "vf2")).phase == Phase.PHASE_QUEUED
        await cluster.local.coordinators["c1"].kill()
        assert (await c2.wait_migration("mine")).phase == Phase.PHASE_DONE
        await cluster.local.coordinators["c1"].start(*ONE)
        await freeze(failpoints, "c2", ask(c2, "second", "vf3"))
        assert (await ask(c1, "orphan", "vf4")).phase == Phase.PHASE_QUEUED
        for name in ("c1", "c2"):
            await cluster.local.coordinators[name].kill()
        await cluster.local.coordinators["c2"].start(*ONE)
        assert (await cluster.over("orphan")).phase == Phase.PHASE_DONE
    await cluster.local.coordinators["c1"].start(*ONE)
    await assert_nothing_left(cluster)


async def test_what_never_gets_its_turn_ends_at_its_deadline(cluster: Cluster) -> None:
    async with at(cluster, "c1") as c1:
        cluster.local.hosts["h3"].pause()
        await ask(c1, "first", "vf1", "h3/nic0")
        await ask(c1, "late", "vf2", deadline_ms=300)
        late = await c1.wait_migration("late")
        assert late.phase == Phase.PHASE_ABORTED
        assert "before its deadline: 1 migration is under way in the fleet, which may have 1" in late.abort_reason
        cluster.local.hosts["h3"].resume()
        await c1.wait_migration("first")
    await cluster.until_registered("h3")
    await assert_nothing_left(cluster)
