"""Limits on a copy, on real processes: what can't be met is said, before anybody is held."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from support.local_cluster import Cluster, assert_nothing_left, running

from vfleet.v1.migration_service_pb2 import CopyProgress, LimitPolicy
from vfleet.v1.records_pb2 import Phase, Step

MEMORY_BYTES = 1 << 20


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nic0")
        await cluster.work("d1", "vf1", "h3", accesses_per_second=0)
        yield cluster


async def progress_of(cluster: Cluster, name: str) -> list[CopyProgress]:
    found: list[CopyProgress] = []
    async with aclosing(cluster.fleet.watch_migration(name)) as updates:
        async for update in updates:
            found += update.copies
    return found


async def test_a_limit_that_no_copy_can_meet_aborts_before_any_driver_is_held(cluster: Cluster) -> None:
    migration = await cluster.move("m1", {"vf1": "h2/nic0"}, downtime_limit_ms=1)
    assert (migration.phase, migration.abort_step) == (Phase.PHASE_ABORTED, Step.STEP_COPY)
    assert "the driver of function 'vf1' would be on hold for" in migration.abort_reason
    assert "expected at most 1 ms" in migration.abort_reason
    assert Step.STEP_HOLD not in [step.step for step in migration.steps]
    await cluster.until_working()
    await cluster.stop_workloads()
    await assert_nothing_left(cluster)


async def test_a_limit_that_no_copy_can_meet_may_be_passed_and_the_progress_shows_what_is_expected(
    cluster: Cluster,
) -> None:
    options = {"downtime_limit_ms": 1, "limit_policy": LimitPolicy.LIMIT_POLICY_FORCE, "bandwidth_mib_per_s": 1}
    await cluster.begin("m1", {"vf1": "h2/nic0"}, max_rounds=4, **options)
    progress = await progress_of(cluster, "m1")
    assert (await cluster.over("m1")).phase == Phase.PHASE_DONE
    assert max(copy.rounds for copy in progress) >= 1
    assert {copy.total_bytes for copy in progress if copy.rounds} == {2 * MEMORY_BYTES}
    assert all(copy.estimated_blackout.ToMicroseconds() > 1000 for copy in progress if copy.rounds)
    await cluster.until_working()
    await cluster.stop_workloads()
    await assert_nothing_left(cluster)
