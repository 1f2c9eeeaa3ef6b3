"""Post-copy on real processes: the driver goes on at once, the rest follows, whoever dies; or the function is LOST."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from support.failpoints import Failpoints, go_on
from support.local_cluster import DEMO, Cluster, assert_nothing_left, eventually, refusal, running

from vfleet.address import PAGE_BYTES
from vfleet.driver import DriverClient, Read, Write
from vfleet.errors import Reason
from vfleet.v1.driver_service_pb2 import NotificationKind, WatchNotificationsRequest
from vfleet.v1.driver_service_pb2_grpc import DriverServiceStub
from vfleet.v1.records_pb2 import FunctionStatus, Phase, Step
from vfleet.v1.types_pb2 import TransferMode

ACTIVE, LOST = FunctionStatus.FUNCTION_STATUS_ACTIVE, FunctionStatus.FUNCTION_STATUS_LOST
POST_COPY = TransferMode.TRANSFER_MODE_POST_COPY
LOCAL_BYTES = 2 << 20
WORKLOAD_BYTES = 64 << 10
SLOW = {"mode": POST_COPY, "bandwidth_mib_per_s": 1}  # two seconds for all of it


@dataclass
class Stage:
    """vf1 on h1, a workload of d1 on h3 on the first part of its local memory, and d2 on h3, which fills the rest."""

    cluster: Cluster
    failpoints: Failpoints
    driver: DriverClient
    place: int
    pages: list[bytes]

    async def check(self) -> None:
        reads = [Read(self.place + number * PAGE_BYTES, PAGE_BYTES) for number in range(len(self.pages))]
        async with aclosing(self.driver.stream(reads)) as answers:
            assert [answer.data async for answer in answers] == self.pages

    async def begin_slowly(self) -> None:
        """Begin a migration to h2, and return in the middle of the arrival."""
        await self.cluster.begin("m1", {"vf1": "h2/nic0"}, **SLOW)
        await eventually(self.is_arriving)

    async def is_arriving(self) -> bool:
        # Before COMMIT, which follows at once, a migration that loses its coordinator is aborted.
        if (await self.cluster.fleet.get_migration("m1")).phase == Phase.PHASE_PREPARING:
            return False
        return any(instance.arriving for instance in await self.cluster.hosts["h2"].list_functions())


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    topology = tmp_path / "topology.yaml"
    topology.write_text(DEMO.read_text().replace("2: 1MiB", "2: 2MiB"))
    failpoints = Failpoints(tmp_path / "failpoints")
    async with running(tmp_path, topology=topology, lease_ttl_s=2, failpoints=failpoints.directory) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nic0")
        await cluster.work("d1", "vf1", "h3", memory_bytes=WORKLOAD_BYTES)
        entry = await cluster.fleet.attach_driver("vf1", "d2", host="h3")
        driver = DriverClient(cluster.hosts["h3"], "d2")
        place = entry.virtual_address + LOCAL_BYTES + WORKLOAD_BYTES
        random = Random(5)
        pages = [random.randbytes(PAGE_BYTES) for _ in range((LOCAL_BYTES - WORKLOAD_BYTES) // PAGE_BYTES)]
        writes = [Write(place + number * PAGE_BYTES, page) for number, page in enumerate(pages)]
        async with aclosing(driver.stream(writes)) as answers:
            assert len([answer async for answer in answers]) == len(pages)
        yield Stage(cluster, failpoints, driver, place, pages)


async def test_a_function_under_load_goes_there_and_back(stage: Stage) -> None:
    for number, device in enumerate(("h2/nic0", "h3/nic0", "h1/nic0")):
        migration = await stage.cluster.move(f"m{number}", {"vf1": device}, mode=POST_COPY)
        assert (migration.phase, migration.mode) == (Phase.PHASE_DONE, POST_COPY)
    await stage.check()
    await stage.cluster.stop_workloads()
    await assert_nothing_left(stage.cluster)


async def test_what_is_touched_comes_at_once_and_the_rest_in_its_time(stage: Stage) -> None:
    await stage.begin_slowly()
    last = len(stage.pages) - 1
    assert await stage.driver.read(stage.place + last * PAGE_BYTES, PAGE_BYTES) == stage.pages[last]
    assert await stage.is_arriving()
    # Nothing else may move it meanwhile, and it is too late to cancel.
    assert (await refusal(stage.cluster.begin("m2", {"vf1": "h3/nic0"}))).reason is Reason.IN_MIGRATION
    assert (await refusal(stage.cluster.fleet.cancel_migration("m1"))).reason is Reason.TOO_LATE
    missing = []
    async with aclosing(stage.cluster.fleet.watch_migration("m1")) as updates:
        async for update in updates:
            missing += [copy.missing_bytes for copy in update.copies if update.step == Step.STEP_SCRUB]
    assert missing == sorted(missing, reverse=True)
    assert missing[-1] < missing[0] <= LOCAL_BYTES
    assert (await stage.cluster.over("m1")).phase == Phase.PHASE_DONE
    await stage.check()
    await stage.cluster.stop_workloads()
    await assert_nothing_left(stage.cluster)


@pytest.mark.parametrize("victim", ["h1", "h2", "h3", "c1"])
async def test_whichever_daemon_is_killed_meanwhile_all_arrives(stage: Stage, victim: str) -> None:
    await stage.begin_slowly()
    local = stage.cluster.local
    daemon = {**local.hosts, **local.coordinators}[victim]
    await daemon.kill()
    await daemon.start()
    assert (await stage.cluster.over("m1")).phase == Phase.PHASE_DONE
    await stage.check()
    await stage.cluster.until_working()
    await stage.cluster.stop_workloads()
    await assert_nothing_left(stage.cluster)


async def told_of_loss(cluster: Cluster, listening: asyncio.Event) -> str:
    request = WatchNotificationsRequest(driver="d2")
    caller = cluster.hosts["h3"].caller
    async with aclosing(caller.stream(lambda channel: DriverServiceStub(channel).WatchNotifications, request)) as told:
        async for notification in told:
            listening.set()
            if notification.kind == NotificationKind.NOTIFICATION_KIND_LOST:
                return notification.function
    raise AssertionError("the stream ended")


@pytest.mark.parametrize("also", ["nobody else", "hostd.lose.before", "hostd.lose.after"])
async def test_if_the_sources_machine_dies_before_all_has_arrived_the_function_is_lost(stage: Stage, also: str) -> None:
    cluster, listening = stage.cluster, asyncio.Event()
    telling = asyncio.create_task(told_of_loss(cluster, listening))
    await listening.wait()
    await stage.begin_slowly()
    if also != "nobody else":
        stage.failpoints.arm("h2", also, "kill")
    await cluster.local.hosts["h1"].kill()
    # It waits for a page that will never come.
    waiting = asyncio.create_task(stage.driver.read(stage.place + (len(stage.pages) - 1) * PAGE_BYTES, PAGE_BYTES))
    await cluster.local.hosts["h1"].start("--power-cycle")
    if also != "nobody else":
        await stage.failpoints.reached("h2", also)
        await cluster.local.hosts["h2"].kill()
        await cluster.local.hosts["h2"].start()

    async def lost() -> bool:
        return (await cluster.fleet.get_function("vf1")).status == LOST

    await eventually(lost)
    assert (await refusal(waiting)).reason is Reason.FUNCTION_LOST
    async with asyncio.timeout(5):
        assert await telling == "vf1"
        assert (await refusal(stage.driver.read(stage.place, 8))).reason is Reason.FUNCTION_LOST
    assert (await cluster.over("m1")).phase == Phase.PHASE_DONE

    async def nothing_there() -> bool:
        return not await cluster.hosts["h2"].list_functions()

    await eventually(nothing_there)
    cluster.workloads.clear()
    await cluster.fleet.detach_driver("vf1", "d1")
    await cluster.fleet.detach_driver("vf1", "d2")
    await cluster.fleet.delete_function("vf1")
    await assert_nothing_left(cluster)


async def test_with_pre_copy_the_same_death_loses_nothing(stage: Stage) -> None:
    cluster = stage.cluster
    stage.failpoints.arm("c1", "coordinator.commit.after", "stop")
    await cluster.begin("m1", {"vf1": "h2/nic0"})
    await stage.failpoints.reached("c1", "coordinator.commit.after")
    await cluster.local.hosts["h1"].kill()
    await cluster.local.hosts["h1"].start("--power-cycle")
    await go_on(cluster.local.coordinators["c1"])
    assert (await cluster.over("m1")).phase == Phase.PHASE_DONE
    assert (await cluster.fleet.get_function("vf1")).status == ACTIVE
    await stage.check()
    await cluster.until_working()
    await cluster.stop_workloads()
    await cluster.until_registered("h1")
    await assert_nothing_left(cluster)
