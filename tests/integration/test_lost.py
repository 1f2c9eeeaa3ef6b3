"""Machines that are gone: started anew, with nothing in their devices, or never to come back."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from support.local_cluster import Cluster, assert_nothing_left, eventually, refusal, running

from vfleet.driver import DriverClient
from vfleet.errors import Reason
from vfleet.etcd import keys
from vfleet.v1.driver_service_pb2 import NotificationKind, WatchNotificationsRequest
from vfleet.v1.driver_service_pb2_grpc import DriverServiceStub
from vfleet.v1.fleet_service_pb2 import DifferenceKind
from vfleet.v1.records_pb2 import FunctionStatus, Phase, Step

ACTIVE, LOST = FunctionStatus.FUNCTION_STATUS_ACTIVE, FunctionStatus.FUNCTION_STATUS_LOST
MEMORY_BYTES = 1 << 20


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path) as cluster:
        yield cluster


async def until_status(cluster: Cluster, function: str, status: FunctionStatus.ValueType) -> None:
    async def reached() -> bool:
        return (await cluster.fleet.get_function(function)).status == status

    await eventually(reached)


async def until_away(cluster: Cluster, host: str) -> None:
    async def away() -> bool:
        return not (await cluster.fleet.get_host(host)).registered

    await eventually(away)


async def told_of_loss(cluster: Cluster, driver: str, host: str, listening: asyncio.Event) -> str:
    """Listen for a driver, and return the function that it is told is lost."""
    caller = cluster.hosts[host].caller
    request = WatchNotificationsRequest(driver=driver)
    async with aclosing(caller.stream(lambda channel: DriverServiceStub(channel).WatchNotifications, request)) as told:
        async for notification in told:
            listening.set()
            if notification.kind == NotificationKind.NOTIFICATION_KIND_LOST:
                return notification.function
    raise AssertionError("the stream ended")


async def test_what_was_in_a_machine_that_was_started_anew_is_lost_and_its_drivers_know(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.work("d1", "vf1", "h2")
    entry = await cluster.fleet.attach_driver("vf1", "d2", host="h3")
    driver, listening = DriverClient(cluster.hosts["h3"], "d2"), asyncio.Event()
    telling = asyncio.create_task(told_of_loss(cluster, "d2", "h3", listening))
    await listening.wait()
    await cluster.local.hosts["h1"].kill()
    # It waits for its answer when the loss becomes known.
    waiting = asyncio.create_task(driver.read(entry.virtual_address, 8))
    await cluster.local.hosts["h1"].start("--power-cycle")
    await until_status(cluster, "vf1", LOST)

    async with asyncio.timeout(5):
        assert (await refusal(waiting)).reason is Reason.FUNCTION_LOST
        assert (await refusal(driver.read(entry.virtual_address, 8))).reason is Reason.FUNCTION_LOST
        assert await telling == "vf1"

    async def failed() -> bool:
        return not (await cluster.report("d1", "vf1")).running

    await eventually(failed)
    assert "lost" in (await cluster.report("d1", "vf1")).failure
    (difference,) = (await cluster.fleet.check_fleet(repair=True)).differences
    assert (difference.kind, difference.function) == (DifferenceKind.DIFFERENCE_KIND_LOST_FUNCTION, "vf1")
    assert (await refusal(cluster.begin("m1", {"vf1": "h2/nic0"}))).reason is Reason.FUNCTION_LOST

    for name in ("d1", "d2"):
        await cluster.fleet.detach_driver("vf1", name)
    await cluster.fleet.delete_function("vf1")
    await assert_nothing_left(cluster)
    made = await cluster.fleet.create_function("vf1", "h1/nic0")
    assert made.status == ACTIVE
    await cluster.work("d1", "vf1", "h2")
    await cluster.stop_workloads()


async def test_a_drivers_machine_that_was_started_anew_has_its_drivers_back_with_empty_memory(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    entry = await cluster.fleet.attach_driver("vf1", "d1", host="h2", main_memory_bytes=MEMORY_BYTES)
    driver = DriverClient(cluster.hosts["h2"], "d1")
    memory = (await cluster.hosts["h2"].get_driver("d1")).main_memory_virtual_address
    await driver.write(memory, b"\xff" * 8)
    before = await driver.read(entry.virtual_address, 8)
    await cluster.local.hosts["h2"].restart("--power-cycle")
    await cluster.until_registered("h2")
    again = DriverClient(cluster.hosts["h2"], "d1")
    assert await again.read(memory, 8) == bytes(8)
    assert await again.read(entry.virtual_address, 8) == before
    assert (await cluster.fleet.get_function("vf1")).status == ACTIVE
    assert list((await cluster.fleet.check_fleet()).differences) == []
    await assert_nothing_left(cluster)


async def test_a_migration_whose_source_is_started_anew_is_aborted_and_the_function_lost(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.fleet.attach_driver("vf1", "d1", host="h3")
    cluster.local.hosts["h2"].pause()
    await cluster.begin("m1", {"vf1": "h2/nic0"})
    await cluster.until_step("m1", Step.STEP_CREATE)
    await cluster.local.hosts["h1"].restart("--power-cycle")
    cluster.local.hosts["h2"].resume()
    assert (await cluster.over("m1")).phase == Phase.PHASE_ABORTED
    await until_status(cluster, "vf1", LOST)
    await cluster.fleet.detach_driver("vf1", "d1")
    await cluster.fleet.delete_function("vf1")
    for host in cluster.hosts:
        await cluster.until_registered(host)
    await assert_nothing_left(cluster)


async def test_a_host_that_never_comes_back_is_forgotten(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h3/nic0")
    await cluster.fleet.create_function("vf2", "h1/nic0")
    entry = await cluster.fleet.attach_driver("vf1", "d1", host="h1")
    await cluster.fleet.attach_driver("vf2", "d3", host="h3")
    await cluster.work("d2", "vf2", "h2")
    assert (await refusal(cluster.fleet.forget_host("h3"))).reason is Reason.ILLEGAL_STATE
    assert (await refusal(cluster.fleet.forget_host("h9"))).reason is Reason.NOT_FOUND
    await cluster.local.hosts["h3"].kill()
    await until_away(cluster, "h3")
    refused = await refusal(cluster.fleet.forget_host("h3"))
    assert refused.reason is Reason.IN_USE
    assert "vf1" in refused.message
    assert "d3" in refused.message

    forgotten = await cluster.fleet.forget_host("h3", force=True)
    assert (list(forgotten.lost_functions), list(forgotten.deleted_drivers)) == (["vf1"], ["d3"])
    assert [host.name for host in await cluster.fleet.list_hosts()] == ["h1", "h2"]
    assert await cluster.store.get(keys.segment_key(3)) is None
    async with asyncio.timeout(5):
        driver = DriverClient(cluster.hosts["h1"], "d1")
        assert (await refusal(driver.read(entry.virtual_address, 8))).reason is Reason.FUNCTION_LOST
    assert list((await cluster.fleet.get_function("vf2")).drivers) == ["d2"]
    assert (await cluster.move("m1", {"vf2": "h2/nic0"})).phase == Phase.PHASE_DONE
    await cluster.fleet.detach_driver("vf1", "d1")
    await cluster.fleet.delete_function("vf1")
    assert list((await cluster.fleet.check_fleet()).differences) == []

    # It comes back after all, as a host that is new to the fleet.
    await cluster.local.hosts["h3"].start()
    await cluster.until_registered("h3")
    checked = await cluster.fleet.check_fleet()
    assert sorted((each.host, each.function or each.driver, each.repairable) for each in checked.differences) == [
        ("h3", "d3", True),
        ("h3", "vf1", True),
    ]
    assert list((await cluster.fleet.check_fleet(repair=True)).differences) == []
    await cluster.stop_workloads()
    await assert_nothing_left(cluster)


async def test_a_committed_migration_that_waits_for_a_forgotten_source_ends(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.work("d1", "vf1", "h2")
    await cluster.begin("m1", {"vf1": "h2/nic0"})
    await cluster.until_step("m1", Step.STEP_COMMIT)
    await cluster.local.hosts["h1"].kill()
    await until_away(cluster, "h1")
    migration = await cluster.fleet.get_migration("m1")
    if migration.phase in (Phase.PHASE_PREPARING, Phase.PHASE_COMMITTED, Phase.PHASE_ABORTING):
        assert (await refusal(cluster.fleet.forget_host("h1"))).reason is Reason.IN_USE
    await cluster.fleet.forget_host("h1", force=True)
    migration = await cluster.over("m1")
    function = await cluster.fleet.get_function("vf1")
    assert function.status == (ACTIVE if migration.phase == Phase.PHASE_DONE else LOST)
    assert "m1" not in [active.name for active in await cluster.fleet.list_migrations(active_only=True)]
    assert await cluster.store.get(keys.lock_key("vf1")) is None
