"""One function goes around the fleet under drivers at work: what it holds, where it is seen, and where it is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from random import Random

import pytest
from support.local_cluster import Cluster, assert_nothing_left, running

from hostd.checker_script import CheckerScript
from hostd.models.checker import LOCAL_MEMORY_BYTES, SCRATCH
from vfleet.address import PAGE_BYTES, location_of, table_offset
from vfleet.driver import DriverClient, Read, Write
from vfleet.v1.access_pb2 import ACCESS_KIND_WRITE, AccessStatus
from vfleet.v1.driver_service_pb2 import WorkloadOptions
from vfleet.v1.records_pb2 import Phase
from vfleet.v1.types_pb2 import TransferMode

REGISTERS_BYTES = 4096
MEMORY_BYTES = 1 << 20
MEMORY_OFFSET = 1 << 20  # BAR 2's natural alignment
WORKLOAD_BYTES = MEMORY_BYTES // 2
MODES = (TransferMode.TRANSFER_MODE_PRE_COPY, TransferMode.TRANSFER_MODE_POST_COPY)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path) as cluster:
        yield cluster


class Patterns:
    """A client driver that writes random pages to the upper half of local memory, and knows what is there."""

    def __init__(self, driver: DriverClient, virtual_address: int) -> None:
        self._driver = driver
        self._memory = virtual_address + MEMORY_OFFSET
        self._random = Random()
        self.content = bytearray(MEMORY_BYTES - WORKLOAD_BYTES)

    async def write(self, pages: list[int]) -> None:
        writes = []
        for page in pages:
            data = self._random.randbytes(PAGE_BYTES)
            self.content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = data
            writes.append(Write(self._memory + WORKLOAD_BYTES + page * PAGE_BYTES, data))
        async with aclosing(self._driver.stream(writes)) as answers:
            assert [answer.status async for answer in answers] == [AccessStatus.ACCESS_STATUS_OK] * len(writes)

    async def write_until(self, ended: asyncio.Event) -> int:
        """Write pages in random order until `ended`, and return how many."""
        count = 0
        while not ended.is_set():
            pages = self._random.sample(range(len(self.content) // PAGE_BYTES), 16)
            await self.write(pages)
            count += len(pages)
        return count

    async def read_all(self) -> bytes:
        reads = [Read(self._memory + offset, PAGE_BYTES) for offset in range(0, MEMORY_BYTES, PAGE_BYTES)]
        async with aclosing(self._driver.stream(reads)) as answers:
            return b"".join([answer.data async for answer in answers])


def replayed(script: CheckerScript, operations: int) -> bytes:
    """Return what a workload has left in its half of local memory after so many accesses."""
    memory = bytearray(WORKLOAD_BYTES)
    for step in (script.step(number) for number in range(operations)):
        if step.kind == ACCESS_KIND_WRITE and step.offset >= MEMORY_OFFSET:
            memory[step.offset - MEMORY_OFFSET : step.offset - MEMORY_OFFSET + len(step.data)] = step.data
    return bytes(memory)


async def test_a_function_goes_around_the_fleet_and_its_memory_stays_the_same(cluster: Cluster) -> None:
    made = await cluster.fleet.create_function("vf1", "h1/nic0")
    options = WorkloadOptions(memory_bytes=WORKLOAD_BYTES, seed=7)
    first = await cluster.work("d1", "vf1", "h1", accesses_per_second=0, memory_bytes=WORKLOAD_BYTES, seed=7)
    other = await cluster.fleet.attach_driver("vf1", "d2", host="h2")
    driver = DriverClient(cluster.hosts["h2"], "d2")
    patterns = Patterns(driver, other.virtual_address)
    await patterns.write(list(range(len(patterns.content) // PAGE_BYTES)))
    await driver.write(other.virtual_address + SCRATCH, b"scratch!")
    bases = [made.base]
    for target in ("h2/nic0", "h3/nic1", "h1/nic1"):
        ended = asyncio.Event()
        writing = asyncio.create_task(patterns.write_until(ended))
        migration = await cluster.move(f"to-{target.replace('/', '-')}", {"vf1": target})
        ended.set()
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
        assert await writing
        await cluster.until_working()
        await assert_nothing_left(cluster)
        bases.append(migration.moves[0].target.base)
    (function,) = await cluster.fleet.list_functions()
    assert (function.device, function.generation, function.base) == ("h1/nic1", 4, bases[-1])
    assert len({location_of(base).routing_id for base in bases}) == 4
    for name, before in (("d1", first), ("d2", other)):
        (entry,) = await cluster.hosts[before.host].get_table(name)
        assert entry.virtual_address == before.virtual_address
        assert entry.offset == table_offset(function.base, before.virtual_address) != before.offset
    report = (await cluster.stop_workloads())["d1", "vf1"]
    script = CheckerScript(function.identity, first.length_bytes, MEMORY_BYTES, options)
    assert await patterns.read_all() == replayed(script, report.operations) + patterns.content
    assert await driver.read(other.virtual_address + SCRATCH, 8) == b"scratch!"
    assert await driver.read(other.virtual_address + LOCAL_MEMORY_BYTES, 8) == MEMORY_BYTES.to_bytes(8, "little")


async def test_every_access_takes_effect_once_over_ten_moves_by_either_mode(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.work("d1", "vf1", "h1", accesses_per_second=4000, window=64, seed=5)
    for number in range(10):
        await cluster.until_working(operations=300)
        home = ("h2/nic0", "h3/nic0", "h1/nic0")[number % 3]
        migration = await cluster.move(f"m{number}", {"vf1": home}, mode=MODES[number % 2])
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
    await cluster.until_working(operations=300)
    assert (await cluster.stop_workloads())["d1", "vf1"].operations >= 3300
    await assert_nothing_left(cluster)


async def test_a_move_needs_no_driver(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    for number, target in enumerate(("h2/nic1", "h1/nic0", "h1/nic1")):
        assert (await cluster.move(f"m{number}", {"vf1": target})).phase == Phase.PHASE_DONE
        await assert_nothing_left(cluster)


async def test_a_slot_that_was_left_is_zero_for_the_next_function(cluster: Cluster) -> None:
    for name, target in (("vf1", "h2/nic0"), ("vf2", "h3/nic0")):
        made = await cluster.fleet.create_function(name, "h1/nic0", vf_index=5)
        entry = await cluster.fleet.attach_driver(name, f"d-{name}", host="h1")
        patterns = Patterns(DriverClient(cluster.hosts["h1"], f"d-{name}"), entry.virtual_address)
        assert await patterns.read_all() == bytes(MEMORY_BYTES)
        await patterns.write(list(range(len(patterns.content) // PAGE_BYTES)))
        migration = await cluster.move(f"m-{name}", {name: target})
        assert migration.phase == Phase.PHASE_DONE
        assert await patterns.read_all() == bytes(WORKLOAD_BYTES) + patterns.content
        assert made.base == migration.moves[0].source.base
    await assert_nothing_left(cluster)
