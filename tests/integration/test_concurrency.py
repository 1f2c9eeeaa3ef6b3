"""Migrations at once: many beside each other, one a function, one a request ID; and those that are cancelled."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from support.local_cluster import Cluster, assert_nothing_left, refusal, running

from vfleet.client import FleetClient, move_request
from vfleet.errors import Reason, VfleetError
from vfleet.v1.records_pb2 import Phase, Step


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path, coordinators=2) as cluster:
        yield cluster


@pytest.fixture
async def coordinators(cluster: Cluster) -> AsyncIterator[list[FleetClient]]:
    """A client of each coordinator alone."""
    clients = [FleetClient([address]) for address in cluster.local.coordinator_addresses]
    yield clients
    for client in clients:
        await client.close()


async def at_step(cluster: Cluster, step: Step.ValueType) -> None:
    """Begin migration m1 of vf1, from h1 to h2 with drivers on h1 and h3, and let it get stuck at a step."""
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.fleet.attach_driver("vf1", "idle", host="h3")
    await cluster.work("d1", "vf1", "h1", accesses_per_second=400)
    cluster.local.hosts["h2" if step == Step.STEP_CREATE else "h3"].pause()
    await cluster.begin("m1", {"vf1": "h2/nic0"}, hold_timeout_ms=60_000)
    await cluster.until_step("m1", step)


def let_go(cluster: Cluster, step: Step.ValueType) -> None:
    cluster.local.hosts["h2" if step == Step.STEP_CREATE else "h3"].resume()


async def test_sixteen_functions_move_at_once(cluster: Cluster, coordinators: list[FleetClient]) -> None:
    hosts = ("h1", "h2", "h3")
    plans = []
    for number in range(16):
        home, target, driver_host = (hosts[(number + shift) % 3] for shift in (0, 1, number // 3))
        await cluster.fleet.create_function(f"vf{number}", f"{home}/nic0")
        await cluster.work(f"d{number}", f"vf{number}", driver_host, accesses_per_second=100)
        plans.append((f"m{number}", {f"vf{number}": f"{target}/nic1"}))
    done = await asyncio.gather(*(cluster.move(name, moves) for name, moves in plans))
    assert {migration.phase for migration in done} == {Phase.PHASE_DONE}, [m.abort_reason for m in done]
    assert await cluster.homes() == {function: device for _, moves in plans for function, device in moves.items()}
    assert {function.generation for function in await cluster.fleet.list_functions()} == {2}
    await cluster.until_working()
    await assert_nothing_left(cluster)
    await cluster.stop_workloads()


async def test_of_two_that_want_one_slot_one_gets_it(cluster: Cluster, coordinators: list[FleetClient]) -> None:
    for name in ("vf1", "vf2"):
        await cluster.fleet.create_function(name, "h1/nic0")
    results = await asyncio.gather(
        *(
            client.create_migration([move_request(name, "h2/nic0", 3)], name=f"m-{name}")
            for client, name in zip(coordinators, ("vf1", "vf2"), strict=True)
        ),
        return_exceptions=True,
    )
    (error,) = (result for result in results if isinstance(result, BaseException))
    (migration,) = (result for result in results if not isinstance(result, BaseException))
    assert isinstance(error, VfleetError)
    assert error.reason is Reason.SLOT_TAKEN
    assert (await cluster.over(migration.name)).phase == Phase.PHASE_DONE
    await assert_nothing_left(cluster)


async def test_of_two_migrations_of_one_function_one_starts_and_the_other_names_it(
    cluster: Cluster, coordinators: list[FleetClient]
) -> None:
    await at_step(cluster, Step.STEP_CREATE)  # m1 runs
    for client in coordinators:
        error = await refusal(client.create_migration([move_request("vf1", "h3/nic0")], name="m2"))
        assert (error.reason, error.code) == (Reason.IN_MIGRATION, grpc.StatusCode.FAILED_PRECONDITION)
        assert error.metadata["migration"] == "m1"
        assert "'m1'" in error.message
    assert [migration.name for migration in await cluster.fleet.list_migrations()] == ["m1"]
    let_go(cluster, Step.STEP_CREATE)
    assert (await cluster.over("m1")).phase == Phase.PHASE_DONE
    await assert_nothing_left(cluster)
    results = await asyncio.gather(
        *(
            client.create_migration([move_request("vf1", "h3/nic0")], name=f"at-once-{number}")
            for number, client in enumerate(coordinators)
        ),
        return_exceptions=True,
    )
    (loser,) = (result for result in results if isinstance(result, VfleetError))
    (winner,) = (result for result in results if not isinstance(result, BaseException))
    # Whoever loses by so much that the winner is over already finds the function at its target.
    assert loser.reason in (Reason.IN_MIGRATION, Reason.TARGET_IS_SOURCE)
    assert loser.reason is Reason.TARGET_IS_SOURCE or loser.metadata["migration"] == winner.name
    assert (await cluster.over(winner.name)).phase == Phase.PHASE_DONE
    await assert_nothing_left(cluster)
    await cluster.stop_workloads()


async def test_a_request_made_again_gets_the_same_migration(cluster: Cluster, coordinators: list[FleetClient]) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    same = [client.create_migration([move_request("vf1", "h2/nic0")], name="m1") for client in coordinators * 4]
    begun = await asyncio.gather(*same)
    assert len({(migration.name, migration.attempt.revision) for migration in begun}) == 1
    over = await cluster.over("m1")
    assert over.phase == Phase.PHASE_DONE
    for client in coordinators:
        assert await client.create_migration([move_request("vf1", "h2/nic0")], name="m1") == over
        other = client.create_migration([move_request("vf1", "h3/nic0")], name="m1")
        assert (await refusal(other)).reason is Reason.ALREADY_EXISTS
    assert (await cluster.fleet.get_function("vf1")).generation == 2
    await assert_nothing_left(cluster)


@pytest.mark.parametrize("step", [Step.STEP_CREATE, Step.STEP_HOLD], ids=["create", "hold"])
@pytest.mark.parametrize("asked", [0, 1])
async def test_a_running_migration_can_be_cancelled_and_the_driver_runs_on(
    cluster: Cluster, coordinators: list[FleetClient], step: Step.ValueType, asked: int
) -> None:
    await at_step(cluster, step)
    cancelled = await coordinators[asked].cancel_migration("m1")
    assert cancelled.phase in (Phase.PHASE_ABORTING, Phase.PHASE_ABORTED)
    assert "cancelled" in cancelled.abort_reason
    await cluster.until_working()  # while the host that kept it waiting is still frozen
    let_go(cluster, step)
    assert (await cluster.over("m1")).phase == Phase.PHASE_ABORTED
    await cluster.until_registered("h2" if step == Step.STEP_CREATE else "h3")
    await assert_nothing_left(cluster)
    again = await coordinators[asked].cancel_migration("m1")
    assert again.phase == Phase.PHASE_ABORTED
    assert (await cluster.move("m2", {"vf1": "h2/nic0"})).phase == Phase.PHASE_DONE
    await cluster.until_working()
    await assert_nothing_left(cluster)
    await cluster.stop_workloads()


async def test_a_committed_migration_can_not_be_cancelled(cluster: Cluster, coordinators: list[FleetClient]) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.work("d1", "vf1", "h1", accesses_per_second=400)
    assert (await cluster.move("m1", {"vf1": "h2/nic0"})).phase == Phase.PHASE_DONE
    for client in coordinators:
        error = await refusal(client.cancel_migration("m1"))
        assert error.reason is Reason.TOO_LATE
        assert "'m1'" in error.message
    await cluster.until_working()
    await assert_nothing_left(cluster)
    await cluster.stop_workloads()
