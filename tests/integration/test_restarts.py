"""Daemons and etcd killed and started again, at rest and amid migrations: drivers notice a pause and no more."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import pytest
from support.local_cluster import (
    Cluster,
    assert_nothing_left,
    eventually,
    over_in_etcd,
    running,
    when_possible,
)

from vfleet.driver import DriverClient
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.client import can_lose_data
from vfleet.v1.records_pb2 import FunctionStatus, Migration, Phase, Step

DRIVER_HOST, SOURCE, TARGET = "h1", "h2", "h3"
HOSTS = (DRIVER_HOST, SOURCE, TARGET)
DEVICES = (f"{SOURCE}/nic0", f"{TARGET}/nic0")
LEASE_TTL_S = 1
# Where a migration gets stuck while h3 is frozen: as its target, or as the host of a driver that is to be held.
STUCK = [(f"{TARGET}/nic0", Step.STEP_CREATE), (f"{SOURCE}/nic1", Step.STEP_HOLD)]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path, lease_ttl_s=LEASE_TTL_S) as cluster:
        yield cluster


async def start_work(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", DEVICES[0])
    await cluster.work("d1", "vf1", DRIVER_HOST)


async def assert_well(cluster: Cluster) -> None:
    """Check that the fleet is whole, that nothing is left, and that the driver has seen nothing wrong and runs on."""
    for host in cluster.hosts:
        await cluster.until_registered(host)
    await cluster.until_working()
    await assert_nothing_left(cluster)
    await cluster.stop_workloads()


async def moved(cluster: Cluster, name: str) -> Migration:
    """Move the function to the other of its devices, and return the migration, DONE or ABORTED."""
    home = (await when_possible(cluster.homes))["vf1"]
    (target,) = (device for device in DEVICES if device != home)
    try:
        await when_possible(lambda: cluster.begin(name, {"vf1": target}))
    except VfleetError as error:
        # The coordinator that was asked had not heard yet where the function is by now.
        if error.reason is not Reason.TARGET_IS_SOURCE:
            raise
        return await moved(cluster, name)
    return await over_in_etcd(cluster, name)


@asynccontextmanager
async def migrations_to_and_fro(cluster: Cluster) -> AsyncIterator[list[Migration]]:
    """Move the function to and fro until left; what is over is in the list."""
    over: list[Migration] = []
    leaving = False

    async def move_all() -> None:
        for number in count():
            if leaving:
                return
            over.append(await moved(cluster, f"m{number}"))

    moving = asyncio.create_task(move_all())
    try:
        yield over
    finally:
        leaving = True
        await moving


async def until_more(over: list[Migration]) -> None:
    """Wait until the function has moved there and back once more."""
    before = len(over)

    async def more() -> bool:
        return sum(migration.phase == Phase.PHASE_DONE for migration in over[before:]) >= 2

    await eventually(more)


async def restart_etcd(cluster: Cluster) -> None:
    """Kill etcd and start it over the same data. A version that a kill can make lose data is ended in order."""
    server = cluster.local.etcd_server
    assert server is not None
    if can_lose_data((await cluster.store.status()).version):
        await server.stop()
    else:
        await server.kill()
    await server.start()


async def begin_stuck(cluster: Cluster, device: str, step: Step.ValueType) -> Migration:
    """Begin a migration that gets stuck at a step, since h3 is frozen."""
    await start_work(cluster)
    await cluster.fleet.attach_driver("vf1", "idle", host=TARGET)
    cluster.local.hosts[TARGET].pause()
    begun = await cluster.begin("m1", {"vf1": device}, hold_timeout_ms=60_000)
    await cluster.until_step("m1", step)
    return begun


async def assert_aborted_by_another(cluster: Cluster, by: str) -> None:
    """Check that the stuck migration is aborted for want of its coordinator, and the driver runs before all is over."""
    await cluster.until_working()
    cluster.local.hosts[TARGET].resume()
    migration = await over_in_etcd(cluster, "m1")
    assert (migration.phase, migration.finished_by) == (Phase.PHASE_ABORTED, by)
    assert "coordinator ended" in migration.abort_reason
    assert (await moved(cluster, "m2")).phase == Phase.PHASE_DONE
    await assert_well(cluster)


@pytest.mark.parametrize("host", HOSTS)
async def test_a_host_killed_at_rest_goes_on(cluster: Cluster, host: str) -> None:
    await cluster.fleet.create_function("vf1", DEVICES[0])
    await cluster.work("d1", "vf1", DRIVER_HOST, memory_bytes=4096)
    driver = DriverClient(cluster.hosts[TARGET], "d2")
    entry = await cluster.fleet.attach_driver("vf1", "d2", host=TARGET)
    last_word = entry.virtual_address + entry.length_bytes - 8
    await driver.write(last_word, b"keep me!")
    await cluster.local.hosts[host].restart()
    await cluster.until_working()
    assert await driver.read(last_word, 8) == b"keep me!"
    await cluster.until_registered(host)
    assert (await moved(cluster, "m1")).phase == Phase.PHASE_DONE
    assert await driver.read(last_word, 8) == b"keep me!"
    await assert_well(cluster)


@pytest.mark.parametrize("host", HOSTS)
async def test_a_host_killed_during_migrations_goes_on(cluster: Cluster, host: str) -> None:
    await start_work(cluster)
    async with migrations_to_and_fro(cluster) as over:
        for _ in range(2):
            await until_more(over)
            await cluster.local.hosts[host].restart()
        await until_more(over)
    await assert_well(cluster)


async def test_a_coordinator_killed_during_migrations_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path, coordinators=2, lease_ttl_s=LEASE_TTL_S) as cluster:
        await start_work(cluster)
        async with migrations_to_and_fro(cluster) as over:
            for _ in range(2):
                await until_more(over)
                await cluster.local.coordinators[over[-1].coordinator].restart()
            await until_more(over)
        await assert_well(cluster)


@pytest.mark.parametrize(("device", "step"), STUCK, ids=["create", "hold"])
async def test_a_coordinator_started_again_ends_what_it_left(
    cluster: Cluster, device: str, step: Step.ValueType
) -> None:
    begun = await begin_stuck(cluster, device, step)
    await cluster.local.coordinators[begun.coordinator].restart()
    await assert_aborted_by_another(cluster, begun.coordinator)


@pytest.mark.parametrize(("device", "step"), STUCK, ids=["create", "hold"])
async def test_another_coordinator_ends_what_one_left(tmp_path: Path, device: str, step: Step.ValueType) -> None:
    async with running(tmp_path, coordinators=2, lease_ttl_s=LEASE_TTL_S) as cluster:
        begun = await begin_stuck(cluster, device, step)
        await cluster.local.coordinators[begun.coordinator].kill()
        (other,) = cluster.local.coordinators.keys() - {begun.coordinator}
        await assert_aborted_by_another(cluster, other)


async def test_etcd_killed_during_migrations_is_waited_for(cluster: Cluster) -> None:
    await start_work(cluster)
    async with migrations_to_and_fro(cluster) as over:
        for _ in range(2):
            await until_more(over)
            await restart_etcd(cluster)
        await until_more(over)
    await assert_well(cluster)


async def test_a_machine_started_anew_takes_nothing_with_it_but_its_own(cluster: Cluster) -> None:
    await start_work(cluster)
    await cluster.fleet.create_function("vf2", f"{TARGET}/nic0")
    await cluster.fleet.attach_driver("vf2", "d2", host=SOURCE)
    await cluster.local.hosts[TARGET].restart("--power-cycle")

    async def lost() -> bool:
        return (await cluster.fleet.get_function("vf2")).status == FunctionStatus.FUNCTION_STATUS_LOST

    await eventually(lost)
    assert (await cluster.fleet.get_function("vf1")).status == FunctionStatus.FUNCTION_STATUS_ACTIVE
    await cluster.until_registered(TARGET)
    assert (await moved(cluster, "m1")).phase == Phase.PHASE_DONE  # to the very machine
    await assert_well(cluster)
