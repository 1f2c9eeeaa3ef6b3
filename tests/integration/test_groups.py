"""A group of three functions, of two drivers on two hosts, moves as one or not at all, and its drivers run on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest
from support.local_cluster import Cluster, assert_nothing_left, running

from vfleet.etcd.keys import function_key
from vfleet.etcd.records import decode, encode
from vfleet.etcd.store import Put, Transaction, unchanged
from vfleet.host_client import HostClient
from vfleet.v1.function_service_pb2 import CreateFunctionRequest, DestroyFunctionRequest
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.records_pb2 import Function, Phase, Step
from vfleet.v1.types_pb2 import Attempt, Decision, TableEntry

HOMES = {"vf1": "h1/nic0", "vf2": "h1/nic1", "vf3": "h2/nic0"}
TARGETS = {"vf1": "h2/nic0", "vf2": "h2/nic1", "vf3": "h3/nic0"}
RATE = 400
BEHIND_ETCD = Attempt(fleet_generation=1, revision=1)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path) as cluster:
        yield cluster


async def start_group(cluster: Cluster, homes: dict[str, str] = HOMES) -> None:
    for function, home in homes.items():
        await cluster.fleet.create_function(function, home)
    for driver, function, host in (("d1", "vf1", "h1"), ("d1", "vf2", "h1"), ("d2", "vf3", "h2")):
        await cluster.work(driver, function, host, accesses_per_second=RATE)


async def assert_stayed(cluster: Cluster, homes: dict[str, str] = HOMES) -> None:
    """Check that none has moved, that every driver runs on, and that nothing is left behind."""
    assert await cluster.homes() == homes
    assert {f.generation for f in await cluster.fleet.list_functions()} == {1}
    await cluster.until_working()
    await assert_nothing_left(cluster)


async def assert_moves(cluster: Cluster, targets: dict[str, str] = TARGETS) -> None:
    """Check that nothing keeps the group from moving, and that no driver has seen anything wrong."""
    assert (await cluster.move("again", targets)).phase == Phase.PHASE_DONE
    assert await cluster.homes() == targets
    await cluster.until_working()
    await assert_nothing_left(cluster)
    await cluster.stop_workloads()


async def follow_table(host: HostClient, driver: str, seen: list[list[TableEntry]]) -> None:
    async with aclosing(host.watch_table(driver)) as tables:
        async for table in tables:
            seen.append(table)  # noqa: PERF401  # seen while it goes on, not at its end


async def test_a_group_moves_as_one_and_no_driver_sees_it_half_moved(cluster: Cluster) -> None:
    await start_group(cluster)
    seen: list[list[TableEntry]] = []
    following = asyncio.create_task(follow_table(cluster.hosts["h1"], "d1", seen))
    for generation, (name, targets) in enumerate((("m1", TARGETS), ("m2", HOMES), ("m3", TARGETS)), start=2):
        migration = await cluster.move(name, targets)
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
        assert await cluster.homes() == targets
        assert {function.generation for function in await cluster.fleet.list_functions()} == {generation}
        await cluster.until_working()
        await assert_nothing_left(cluster)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    # What is held is seen by nobody: a half-moved group would be two entries that can be used and disagree.
    assert {entry.function for table in seen for entry in table} == {"vf1", "vf2"}
    assert sorted({entry.generation for table in seen for entry in table}) == [1, 2, 3, 4]
    for table in seen:
        assert len({(entry.generation, entry.held) for entry in table}) == 1, table
    await cluster.stop_workloads()


async def test_a_slot_taken_at_the_host_keeps_the_group_where_it_is(cluster: Cluster) -> None:
    await start_group(cluster)
    (planned,) = (move.target for move in (await cluster.plan(TARGETS)).moves if move.function == "vf3")
    (vf3,) = (function for function in await cluster.fleet.list_functions() if function.name == "vf3")
    squatter = CreateFunctionRequest(
        attempt=BEHIND_ETCD, function="squatter", generation=1, device=planned.device, vf_index=planned.vf_index,
        bars=vf3.bars, identity=1, model=vf3.model, fresh=True,
    )  # fmt: skip
    async with grpc.aio.insecure_channel(cluster.local.hosts["h3"].address) as channel:
        functions = FunctionServiceStub(channel)
        await functions.CreateFunction(squatter)
        migration = await cluster.move("m1", TARGETS)
        assert (migration.phase, migration.abort_step) == (Phase.PHASE_ABORTED, Step.STEP_CREATE)
        assert "in use by function 'squatter'" in migration.abort_reason
        assert "'h3'" in migration.abort_reason
        await functions.DestroyFunction(
            DestroyFunctionRequest(
                attempt=BEHIND_ETCD, function="squatter", generation=1, decision=Decision.DECISION_COMMITTED
            )
        )
    await assert_stayed(cluster)
    await assert_moves(cluster)


async def test_a_target_that_is_frozen_keeps_the_group_where_it_is(cluster: Cluster) -> None:
    await start_group(cluster)
    cluster.local.hosts["h3"].pause()
    await cluster.begin("m1", TARGETS, prepare_timeout_ms=500)
    await cluster.until_step("m1", Step.STEP_UNDO)
    await cluster.until_working()
    cluster.local.hosts["h3"].resume()
    migration = await cluster.over("m1")
    assert (migration.phase, migration.abort_step) == (Phase.PHASE_ABORTED, Step.STEP_CREATE)
    await cluster.until_registered("h3")
    await assert_stayed(cluster)
    await assert_moves(cluster)


async def test_a_target_that_is_killed_keeps_the_group_where_it_is(cluster: Cluster) -> None:
    await start_group(cluster)
    await cluster.local.hosts["h3"].kill()
    await cluster.begin("m1", TARGETS)
    await cluster.until_step("m1", Step.STEP_UNDO)
    await cluster.until_working()
    await cluster.local.hosts["h3"].start()
    migration = await cluster.over("m1")
    assert (migration.phase, migration.abort_step) == (Phase.PHASE_ABORTED, Step.STEP_CREATE)
    assert "'h3'" in migration.abort_reason
    await assert_stayed(cluster)
    await assert_moves(cluster)


async def test_state_that_the_target_refuses_keeps_the_group_where_it_is(cluster: Cluster) -> None:
    await start_group(cluster)
    key = function_key("vf3")
    record = await cluster.store.get(key)
    assert record is not None
    function = decode(Function, record)
    function.identity ^= 1  # so that the target's instance is made for a function that the source doesn't have
    forged = await cluster.store.commit(Transaction((), (Put(key, encode(function)),)))
    migration = await cluster.move("m1", TARGETS)
    assert (migration.phase, migration.abort_step) == (Phase.PHASE_ABORTED, Step.STEP_COPY)
    assert "'h3'" in migration.abort_reason
    assert "identity" in migration.abort_reason
    restored = Transaction((unchanged(key, forged.revision),), (Put(key, record.value),))
    assert (await cluster.store.commit(restored)).succeeded
    await assert_stayed(cluster)
    await assert_moves(cluster)


async def test_a_source_that_is_killed_during_the_import_keeps_the_group_where_it_is(cluster: Cluster) -> None:
    homes, targets = {**HOMES, "vf3": "h3/nic1"}, {**TARGETS, "vf3": "h1/nic1"}
    await start_group(cluster, homes)
    cluster.local.hosts["h3"].pause()  # so that the import waits for its source
    await cluster.begin("m1", targets)
    await cluster.until_step("m1", Step.STEP_COPY)
    await cluster.local.hosts["h3"].kill()
    await cluster.until_step("m1", Step.STEP_UNDO)
    await cluster.until_working([("d1", "vf1"), ("d1", "vf2")])  # d2's function is down with its home
    await cluster.local.hosts["h3"].start()
    migration = await cluster.over("m1")
    assert (migration.phase, migration.abort_step) == (Phase.PHASE_ABORTED, Step.STEP_COPY)
    await assert_stayed(cluster, homes)
    await assert_moves(cluster, targets)
