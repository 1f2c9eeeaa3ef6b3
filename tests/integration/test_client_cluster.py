"""A program that is a driver itself, on a real cluster: its function moves, its host's daemon is killed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from vfleet.client import move_request
from vfleet.driver import DriverClient, Read, Write
from vfleet.errors import Reason, VfleetError
from vfleet.host_client import HostClient
from vfleet.local import LocalCluster
from vfleet.v1.access_pb2 import AccessStatus
from vfleet.v1.driver_service_pb2 import NotificationKind
from vfleet.v1.records_pb2 import Phase

TOPOLOGY = Path(__file__).parents[2] / "vfleet" / "topologies" / "demo.yaml"
VIRTUAL_ADDRESS = 0x1000_0000
MEMORY = VIRTUAL_ADDRESS + 0x100000  # local memory: BAR 2, at its natural alignment
PATIENCE_S = 20.0


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    """A cluster in which driver d1 on h1 has function vf1, at home on h2."""
    async with LocalCluster(TOPOLOGY, tmp_path / "cluster", lease_ttl_s=2) as cluster:
        async with cluster.fleet() as fleet:
            await fleet.create_function("vf1", "h2/nic0")
            await fleet.attach_driver("vf1", "d1", host="h1", virtual_address=VIRTUAL_ADDRESS)
        yield cluster


@pytest.fixture
async def host(cluster: LocalCluster) -> AsyncIterator[HostClient]:
    async with HostClient(cluster.hosts["h1"].address, patience_s=PATIENCE_S) as host:
        yield host


async def test_its_memory_moves_and_it_is_told(cluster: LocalCluster, host: HostClient) -> None:
    driver = DriverClient(host, "d1")
    told = []

    async def listen() -> None:
        async with aclosing(driver.notifications()) as notifications:
            async for notification in notifications:
                told.append(NotificationKind.Name(notification.kind).removeprefix("NOTIFICATION_KIND_"))
                if told[-1] == "LIFTED":
                    return

    listening = asyncio.create_task(listen())
    async with asyncio.timeout(20):
        while told != ["LISTENING"]:
            await asyncio.sleep(0.01)
    await driver.write(MEMORY, b"kept for")
    async with cluster.fleet() as fleet:
        begun = await fleet.create_migration([move_request("vf1", "h3/nic1")])
        assert (await fleet.wait_migration(begun.name)).phase == Phase.PHASE_DONE
    await asyncio.wait_for(listening, 20)
    assert told == ["LISTENING", "HELD", "LIFTED"]
    assert await driver.read(MEMORY, 8) == b"kept for"


@pytest.mark.parametrize("victim", ["h1", "h2"])
async def test_a_stream_outlives_a_killed_daemon(cluster: LocalCluster, host: HostClient, victim: str) -> None:
    driver = DriverClient(host, "d1")
    # Each write is read back: one that is repeated or reordered shows.
    accesses = [access for n in range(300) for access in (Write(MEMORY, n.to_bytes(8, "little")), Read(MEMORY, 8))]
    answers = []
    async with aclosing(driver.stream(accesses)) as stream:
        async for answer in stream:
            answers.append(answer)
            if len(answers) == 100:
                await cluster.hosts[victim].restart()
    assert {answer.status for answer in answers} == {AccessStatus.ACCESS_STATUS_OK}
    assert [int.from_bytes(answer.data, "little") for answer in answers[1::2]] == list(range(300))


async def test_accesses_that_can_not_be(host: HostClient) -> None:
    driver = DriverClient(host, "d1")
    with pytest.raises(VfleetError) as caught:
        await driver.read(0x2000_0000, 8)
    assert caught.value.reason is Reason.TRANSLATION_FAULT
    assert await driver.read(VIRTUAL_ADDRESS + 0x8000, 4) == b"\xff" * 4  # between the BARs: nobody claims it
    await driver.write(MEMORY, b"goes on!")
    assert await driver.read(MEMORY, 8) == b"goes on!"


async def test_a_frozen_coordinator_is_passed(tmp_path: Path) -> None:
    async with LocalCluster(TOPOLOGY, tmp_path / "cluster", coordinators=2) as cluster, cluster.fleet() as fleet:
        await fleet.create_function("vf1", "h1/nic0")
        asked_first = fleet.caller.address
        (frozen,) = (daemon for daemon in cluster.coordinators.values() if daemon.address == asked_first)
        frozen.pause()
        try:
            assert [function.name for function in await fleet.list_functions()] == ["vf1"]
            assert fleet.caller.address != asked_first
        finally:
            frozen.resume()


async def test_batches_take_effect_once_in_order_while_the_function_moves(
    cluster: LocalCluster, host: HostClient
) -> None:
    driver = DriverClient(host, "d1")
    words = [MEMORY + 8 * number for number in range(20)]
    rounds = 0

    async def work() -> None:
        nonlocal rounds
        while True:
            value = (rounds + 1).to_bytes(8, "little")
            before = rounds.to_bytes(8, "little")
            batch = [access for word in words for access in (Read(word, 8), Write(word, value), Read(word, 8))]
            assert await driver.access_many(batch) == [before, b"", value] * len(words)
            rounds += 1

    working = asyncio.create_task(work())
    async with cluster.fleet() as fleet:
        for target in ("h1/nic0", "h3/nic1", "h1/nic1"):
            reached = rounds
            begun = await fleet.create_migration([move_request("vf1", target)])
            assert (await fleet.wait_migration(begun.name)).phase == Phase.PHASE_DONE
            async with asyncio.timeout(20):
                while rounds < reached + 3:
                    assert not working.done(), working.exception()
                    await asyncio.sleep(0.01)
    working.cancel()
    await asyncio.wait([working])
    assert working.cancelled()


async def test_a_batch_ends_at_what_fails(host: HostClient) -> None:
    driver = DriverClient(host, "d1")
    with pytest.raises(VfleetError) as caught:
        await driver.access_many(
            [Write(MEMORY, b"done"), Read(MEMORY, 4), Read(0x3000_0000, 4), Write(MEMORY, b"lost")]
        )
    assert caught.value.reason is Reason.TRANSLATION_FAULT
    assert await driver.access_many([Read(MEMORY, 4), Write(MEMORY, b"next"), Read(MEMORY, 4)]) == [
        b"done",
        b"",
        b"next",
    ]
