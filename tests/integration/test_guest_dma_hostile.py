"""A hostile virtual machine whose memory has to be asked for: what it answers, or doesn't, is its own loss."""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.hostile_world import World, do, hostile_world, until_free
from support.nvme_guest import NvmeGuest
from support.vmm import DMA_READ, DMA_WRITE, HEADER, Reply

from vfleet.v1.records_pb2 import Phase


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with hostile_world(tmp_path) as found:
        yield found


@pytest.mark.parametrize("home", ["h1", "h2"])
async def test_a_vmm_that_never_answers_waits_alone(world: World, home: str):
    """Its memory is to be asked for, and it says nothing: its own function stops, wherever that is."""
    if home != "h1":
        await world.cluster.move("m0", {"vf1": f"{home}/nvme0", "vf2": f"{home}/nvme0"})
    world.hostile.close()
    await until_free(world)
    world.hostile = NvmeGuest(world.folder / "hostile.sock", messages="whole")
    hostile = world.hostile
    await do(hostile.begin)
    await do(hostile.identify)
    hostile.vmm.is_silent = True
    await do(hostile.submit)

    def until_fatal() -> None:
        while not hostile.status() & 2:
            pass

    failing = asyncio.create_task(do(until_fatal))
    before = len(hostile.vmm.dma)
    while not failing.done():
        await world.neighbour_goes_on()
    await failing
    assert len(hostile.vmm.dma) - before <= 2
    # It isn't asked any more, and a function that waits for its memory can move, and be detached.
    hostile.vmm.is_silent = False
    await do(lambda: hostile.vmm.write(0, 0x14, bytes(4)))
    await do(hostile.enable)
    hostile.vmm.is_silent = True
    await do(hostile.submit)
    other = "h2" if home == "h1" else "h1"
    assert (await world.cluster.move("m1", {"vf1": f"{other}/nvme0"})).phase == Phase.PHASE_DONE
    await world.neighbour_goes_on()
    await world.cluster.fleet.detach_driver("vf1", "hostile")


async def test_answers_that_nobody_has_asked_for(world: World):
    vmm = world.hostile.vmm
    chance = random.Random(2)
    vmm.socket.settimeout(2)

    def send() -> None:
        for number in range(2000):
            for command in (DMA_READ, DMA_WRITE, chance.randrange(1 << 16)):
                body = chance.randbytes(chance.choice((0, 1, 16, 4112)))
                header = HEADER.pack(number & 0xFFFF, command, HEADER.size + len(body), chance.choice((1, 0x21)), 5)
                vmm.send_raw(header + body)

    await do(send)
    await world.neighbour_goes_on()
    await world.hostile_begins_anew()


async def test_a_vmm_that_answers_each_question_wrongly(world: World):
    """Too much, too little, of another command, twice, with another's identifier."""
    world.hostile.close()
    await until_free(world)
    hostile = world.hostile = NvmeGuest(world.folder / "hostile.sock", messages="whole")
    await do(hostile.begin)
    await do(hostile.identify)
    chance = random.Random(3)

    def lie(request: Reply) -> None:
        identifier = request.identifier + chance.choice((0, 0, 1)) & 0xFFFF
        wrong = Reply(identifier, request.command + chance.choice((0, 0, 1)), 0, 0, b"")
        for _ in range(2):
            hostile.vmm.reply(wrong, chance.randbytes(chance.choice((0, 16, 80, 4112))), error=chance.choice((0, 0, 5)))

    hostile.vmm.serve = lie  # type: ignore[method-assign]

    def work() -> None:
        for _ in range(30):
            hostile.submit()
            hostile.status()
            hostile.vmm.write(0, 0x14, bytes(4))
            for register, value in ((0x24, 15 << 16 | 15), (0x28, 1 << 16), (0x30, 2 << 16), (0x14, 0x00460001)):
                hostile.vmm.write(0, register, value.to_bytes(4, "little"))

    await do(work)
    await world.neighbour_goes_on()
    await world.hostile_begins_anew()
