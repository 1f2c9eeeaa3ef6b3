"""A hostile virtual machine: it harms its own device at most, and a neighbour on the same host goes on."""

import asyncio
import fcntl
import logging
import mmap
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.hostile_world import World, do, hostile_world
from support.local_cluster import eventually
from support.nvme_guest import runs
from support.vmm import (
    CONFIGURATION,
    DMA_MAP,
    DMA_UNMAP,
    HEADER,
    POSTED,
    REGION_READ,
    REGION_WRITE,
    RESET,
    SET_INTERRUPTS,
    SharedMemory,
)

PAGE = 4096
MIB = 1 << 20
FULL = (1 << 64) - 2
"""As much as an eventfd can count: the next write waits until somebody has read."""
MAY_GROW_BYTES = 48 * MIB

_log = logging.getLogger(__name__)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with hostile_world(tmp_path) as found:
        yield found


async def test_an_eventfd_that_is_full_keeps_nobody_waiting_but_its_own_device(world: World):
    await do(world.hostile.identify)
    os.eventfd_write(world.hostile.eventfd, FULL)
    os.set_blocking(world.hostile.eventfd, True)
    await do(world.hostile.submit)
    await world.neighbour_goes_on()
    # The function moves, and the driver can be detached, whatever its holder does.
    assert (await world.cluster.move("m1", {"vf1": "h2/nvme0"})).name == "m1"
    await world.cluster.fleet.detach_driver("vf1", "hostile")
    holder = int((world.folder / "cluster" / "h1" / "guests" / "hostile.pid").read_text())

    async def has_ended() -> bool:
        return not runs(holder)

    await eventually(has_ended)
    await world.neighbour_goes_on()


@pytest.mark.parametrize("size", [0, 1, 8, PAGE])
async def test_messages_of_any_content(world: World, size: int):
    vmm = world.hostile.vmm
    chance = random.Random(size)

    def send() -> None:
        for command in range(32):
            for _ in range(8):
                vmm.try_to_ask(command, chance.randbytes(size))
        for kind in (1, 2, 15):
            vmm.send(RESET, flags=kind)

    await do(send)
    await world.neighbour_goes_on()
    await world.hostile_begins_anew()


async def test_regions_of_memory_that_can_not_be(world: World):
    memory, open_memory = SharedMemory(16 * PAGE), SharedMemory(PAGE, is_sealed=False)
    try:
        vmm = world.hostile.vmm

        def region(address: int, length: int, offset: int = 0, *descriptors: int) -> int:
            body = struct.pack("<IIQQQ", 32, 3, offset, address, length)
            return vmm.try_to_ask(DMA_MAP, body, descriptors).error

        def map_them() -> None:
            whole = 4 * MIB
            assert region(PAGE, PAGE, 0, memory.descriptor), "within another"
            assert region(whole - PAGE, 2 * PAGE, 0, memory.descriptor), "over the end of another"
            assert region(whole, 32 * PAGE, 0, memory.descriptor), "over the end of its descriptor"
            assert region(whole, PAGE, 1 << 63, memory.descriptor), "far beyond it"
            assert region(whole, 100, 0, memory.descriptor), "no whole page"
            assert region(whole, 0, 0, memory.descriptor), "nothing"
            assert region(1 << 40, PAGE, 0, memory.descriptor), "beyond the memory that it may have"
            assert region((1 << 64) - PAGE, 2 * PAGE), "beyond all addresses"
            assert region(whole, PAGE, 0, open_memory.descriptor), "of what can be taken away"
            assert not region((1 << 64) - PAGE, PAGE), "the last that there is"
            found = [region(whole + 2 * PAGE * number, PAGE, 0, memory.descriptor) for number in range(300)]
            assert not found[0], "what is right"
            assert found[-1], "too many"
            unmap = struct.pack("<IIQQ", 24, 0, PAGE, PAGE)
            assert vmm.try_to_ask(DMA_UNMAP, unmap).error, "a part of one"

        await do(map_them)
        await do(world.hostile.identify)
        await world.neighbour_goes_on()
        await world.hostile_begins_anew()
    finally:
        memory.close()
        open_memory.close()


async def test_descriptors_that_are_neither_memory_nor_eventfds(world: World, tmp_path: Path):
    vmm = world.hostile.vmm
    ends = os.pipe()
    pair = socket.socketpair()
    with (tmp_path / "file").open("wb+") as file:
        file.truncate(PAGE)
        map_body = struct.pack("<IIQQQ", 32, 3, 0, 1 << 24, PAGE)
        interrupts_body = struct.pack("<IIIII", 20, 1 << 2 | 1 << 5, 2, 0, 1)

        def send() -> None:
            for descriptor in (*ends, pair[0].fileno(), file.fileno()):
                assert vmm.try_to_ask(DMA_MAP, map_body, (descriptor,)).error
                assert vmm.try_to_ask(SET_INTERRUPTS, interrupts_body, (descriptor,)).error
            assert vmm.try_to_ask(SET_INTERRUPTS, interrupts_body, (world.hostile.memory.descriptor,)).error
            assert vmm.try_to_ask(DMA_MAP, map_body, (world.hostile.eventfd,)).error

        await do(send)
    await do(world.hostile.identify)
    await world.neighbour_goes_on()
    for each in (*ends, *pair):
        os.close(each) if isinstance(each, int) else each.close()


async def test_more_descriptors_than_a_message_may_have(world: World):
    with pytest.raises((EOFError, ConnectionError)):
        await do(lambda: world.hostile.vmm.try_to_ask(DMA_MAP, bytes(32), (world.hostile.eventfd,) * 17))
    await world.neighbour_goes_on()
    await world.hostile_begins_anew()


async def test_descriptors_without_end(world: World):
    """Each message that waits keeps its descriptors, and a daemon can't have many."""
    vmm = world.hostile.vmm
    world.cluster.local.hosts["h1"].pause()
    vmm.socket.settimeout(1)
    body = struct.pack("<QII", 0, 0, 4) + bytes(4)
    with pytest.raises(TimeoutError):
        await do(lambda: [vmm.send(REGION_WRITE, body, (world.hostile.eventfd,) * 16, POSTED) for _ in range(10_000)])
    world.cluster.local.hosts["h1"].resume()
    await world.neighbour_goes_on()
    await world.hostile_begins_anew()


@pytest.mark.parametrize(
    ("region", "offset", "length"),
    [
        (0, 16 << 10, 4),
        (0, (16 << 10) - 4, 8),
        (0, (1 << 64) - 4, 4),
        (0, 2, 4),
        (0, 0, 0),
        (0, 0, 3),
        (0, 0, (1 << 32) - 1),
        (1, 0, 4),
        (2, 0, 4),
        (CONFIGURATION, 0, PAGE + 1),
        (8, 0, 4),
        (9, 0, 4),
        ((1 << 32) - 1, 0, 4),
    ],
)
async def test_accesses_that_go_nowhere(world: World, region: int, offset: int, length: int):
    vmm = world.hostile.vmm

    def access() -> None:
        assert vmm.try_to_ask(REGION_READ, struct.pack("<QII", offset, region, length)).error
        data = bytes(min(length, PAGE))
        assert vmm.try_to_ask(REGION_WRITE, struct.pack("<QII", offset, region, length) + data).error
        assert vmm.try_to_ask(REGION_WRITE, struct.pack("<QII", 0, 0, 8) + bytes(4)).error

    await do(access)
    await do(world.hostile.identify)


@pytest.mark.parametrize("part", [HEADER.pack(1, REGION_WRITE, 64, 0, 0)[:7], HEADER.pack(1, REGION_WRITE, 64, 0, 0)])
async def test_half_a_message(world: World, part: bytes):
    world.hostile.vmm.send_raw(part)
    await world.neighbour_goes_on()
    await world.hostile_begins_anew()


async def test_queues_that_lead_nowhere(world: World):
    """Queue entries, and queues, in memory that isn't there; doorbells past the queue's end."""
    hostile = world.hostile
    chance = random.Random(1)

    def command() -> None:
        hostile.memory.content[:] = chance.randbytes(hostile.memory.size)
        for doorbell in (1, 15, 16, 0xFFFF, 0xFFFFFFFF):
            for register in (0x1000, 0x1004, 0x1008, 0x1FFC, 0x2FF8):
                hostile.vmm.write(0, register, doorbell.to_bytes(4, "little"), posted=True)
        hostile.status()

    def nowhere() -> None:
        hostile.vmm.write(0, 0x14, bytes(4))
        for address in (1 << 40, (1 << 64) - PAGE, 0xFEE00000):
            hostile.vmm.write(0, 0x28, (address & 0xFFFFFFFF).to_bytes(4, "little"))
            hostile.vmm.write(0, 0x2C, (address >> 32).to_bytes(4, "little"))
            hostile.vmm.write(0, 0x14, (0x00460001).to_bytes(4, "little"))
            hostile.vmm.write(0, 0x1000, (5).to_bytes(4, "little"), posted=True)
            hostile.status()
            hostile.vmm.write(0, 0x14, bytes(4))

    await do(command)
    await world.neighbour_goes_on()
    await do(nowhere)
    await world.neighbour_goes_on()
    await world.hostile_begins_anew()


async def test_a_flood_leaves_the_neighbour_its_turn_and_memory_bounded(world: World):
    """Writes, reads and resets as fast as they go, and nobody takes the answers; also while hostd stands still."""
    before = world.memory_bytes()
    vmm = world.hostile.vmm
    vmm.socket.settimeout(2)
    write = struct.pack("<QII", 0x1000, 0, 4) + bytes(4)
    reset = struct.pack("<QII", 0x48, CONFIGURATION, 2) + b"\0\x80"
    space = struct.pack("<QII", 0, CONFIGURATION, PAGE)

    def flood() -> None:
        try:
            for number in range(100_000):
                vmm.send(REGION_WRITE, write, flags=POSTED)
                vmm.send(REGION_WRITE, reset, flags=POSTED)
                vmm.send(REGION_READ, space)
                vmm.send(RESET)
                vmm.send(99, bytes(PAGE) if number % 8 == 0 else b"")
        except OSError:
            return

    flooding = asyncio.create_task(do(flood))
    while not flooding.done():
        await world.neighbour_goes_on()
    await flooding
    grown = [after - was for after, was in zip(world.memory_bytes(), before, strict=True)]
    _log.info("hostd and the holder have grown by %s bytes from %s", grown, before)
    assert all(each < MAY_GROW_BYTES for each in grown), grown
    await world.hostile_begins_anew()


async def test_a_hold_during_a_flood_of_resets(world: World):
    """Each reset is many accesses: those that wait are bounded too, and none is lost."""
    vmm = world.hostile.vmm
    reset = struct.pack("<QII", 0x48, CONFIGURATION, 2) + b"\0\x80"
    vmm.socket.settimeout(0.2)

    def flood() -> None:
        try:
            for _ in range(400):
                vmm.send(REGION_WRITE, reset, flags=POSTED)
        except TimeoutError:
            return

    flooding = asyncio.create_task(do(flood))
    await world.cluster.move("m1", {"vf1": "h2/nvme0"})
    await world.neighbour_goes_on()
    await flooding
    await world.hostile_begins_anew()


async def test_huge_pages_are_no_guest_memory(world: World):
    try:
        huge = os.memfd_create("huge", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    except OSError:
        pass  # a VMM on this kernel has none either; what hostd says to them, tests/unit/test_guest_memory.py sees
    else:
        os.ftruncate(huge, 2 * MIB)
        fcntl.fcntl(huge, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        body = struct.pack("<IIQQQ", 32, 3, 0, 1 << 24, 2 * MIB)
        assert world.hostile.vmm.try_to_ask(DMA_MAP, body, (huge,)).error
        os.close(huge)
    await do(world.hostile.identify)
    await world.neighbour_goes_on()


async def test_memory_that_is_taken_away_reads_as_nothing(world: World):
    """A hole is punched into memory that is mapped: nobody is killed by it."""
    hostile = world.hostile
    await do(hostile.identify)
    hostile.memory.content.madvise(mmap.MADV_REMOVE)
    await do(hostile.submit)
    await world.neighbour_goes_on()
    await world.hostile_begins_anew()
