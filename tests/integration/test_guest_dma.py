"""A guest whose memory came without a descriptor: its VMM is asked for it, wherever the function lives."""

import asyncio
import logging
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from support.guest import attach_guest
from support.local_cluster import Cluster, running
from support.nvme_guest import BUFFER, COMPLETIONS, PAGE, SUBMISSIONS, NvmeGuest
from support.vmm import DMA_MAP, DMA_READ, DMA_WRITE, HEADER, REGION_READ

from hostd.guest import holder_link
from hostd.guest.frames import SAID, Kind
from hostd.guest.holder_link import Frame, HolderLink
from vfleet.v1.records_pb2 import Phase

COMMANDS = 300
WRITES_A_COMMAND = 3
"""The page, the completion, and the interrupt."""
TOPOLOGY = Path(__file__).parents[1] / "guests" / "fleet.yaml"

_log = logging.getLogger(__name__)


async def do(work: Callable[[], object]) -> None:
    """Let the driver work while the cluster does."""
    async with asyncio.timeout(60):
        await asyncio.to_thread(work)


async def greeted(tmp_path: Path) -> tuple[HolderLink, int, int]:
    """Come to the holder as a hostd does, and return what it says of its VMM and of how much was said to that."""
    link = holder_link.connect(tmp_path / "cluster" / "h1" / "guests", "g1")
    assert link is not None
    frames: dict[bytes | Kind, Frame] = {}
    while b"connected" not in frames:
        for frame in await link.receive():
            frames[frame.key if frame.kind == Kind.KEPT else frame.kind] = frame
            frame.close()
    said, _ = SAID.unpack(frames[Kind.HELLO].key)
    return link, int.from_bytes(frames[b"connected"].data, "little"), said


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path, topology=TOPOLOGY) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nvme0")
        yield cluster


@pytest.fixture(params=["whole", "short"])
async def driver(cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[NvmeGuest]:
    found = NvmeGuest(await attach_guest(cluster, "vf1", "g1", "h1", tmp_path), messages=request.param)
    await do(found.begin)
    yield found
    found.close()


async def test_commands_complete_wherever_the_function_lives(cluster: Cluster, driver: NvmeGuest):
    await do(driver.identify)
    for number, home in enumerate(("h2/nvme0", "h3/nvme0", "h1/nvme0")):
        await do(driver.submit)
        migration = await cluster.move(f"m{number}", {"vf1": home})
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
        await do(driver.completed)
        for _ in range(20):
            await do(driver.identify)
    # What the controller read and wrote: commands, completions, and a page each.
    done = driver.vmm.dma
    assert {(DMA_READ, SUBMISSIONS, 64), (DMA_WRITE, COMPLETIONS, 16), (DMA_WRITE, BUFFER, PAGE)} <= set(done)


@pytest.mark.parametrize("home", ["h1", "h2"])
async def test_hostd_is_killed_behind_the_guest(cluster: Cluster, driver: NvmeGuest, home: str):
    if home != "h1":
        await cluster.move("m0", {"vf1": f"{home}/nvme0"})
    for _ in range(3):
        await do(driver.identify)
        await do(driver.submit)
        await cluster.local.hosts["h1"].kill()
        await cluster.local.hosts["h1"].start()
        await do(driver.completed)
        await do(driver.identify)
        assert driver.status() == 1


async def test_a_connection_to_the_holder_that_breaks_takes_nothing_with_it(
    cluster: Cluster, driver: NvmeGuest, tmp_path: Path
):
    await do(driver.identify)
    for _ in range(3):
        await do(driver.submit)
        (await greeted(tmp_path))[0].close()
        await do(driver.completed)
        await do(driver.identify)
        assert driver.status() == 1


async def test_a_write_that_was_said_and_not_noted_is_not_said_again(
    cluster: Cluster, driver: NvmeGuest, tmp_path: Path
):
    await do(driver.identify)
    await cluster.local.hosts["h1"].kill()
    link, connected, said = await greeted(tmp_path)
    # As a hostd does that is killed then: this page is what the command would write first.
    page = struct.pack("<QQ", BUFFER, PAGE) if not driver.vmm.is_short else struct.pack("<QI", BUFFER, PAGE)
    body = page + bytes(516) + (1).to_bytes(4, "little") + bytes(PAGE - 520) + bytes(16 - len(page))
    link.said = said
    link.say(connected, HEADER.pack(0, DMA_WRITE, HEADER.size + len(body), 0, 0) + body, write=WRITES_A_COMMAND + 1)
    link.close()
    before = len(driver.vmm.dma)
    await do(driver.submit)
    await cluster.local.hosts["h1"].start()
    await do(driver.completed)
    writes = [(address, count) for command, address, count in driver.vmm.dma[before:] if command == DMA_WRITE]
    assert writes == [(BUFFER, PAGE), (COMPLETIONS + 16, 16)]
    await do(driver.identify)


async def test_a_register_that_is_read_waits_for_no_answer_of_the_vmm(cluster: Cluster, driver: NvmeGuest):
    """A VMM answers nothing while it waits for a read itself; what was written before the read, it has before it."""
    vmm = driver.vmm
    before = len(vmm.dma)
    await do(driver.submit)

    def read() -> None:
        # Until the command, which has to be read first, is done.
        while not any(command == DMA_WRITE for command, _, _ in vmm.dma[before:]):
            vmm.serve(vmm.receive_any())
        vmm.send(REGION_READ, struct.pack("<QII", 0x1C, 0, 4))
        waiting = []
        while (message := vmm.receive_any()).command != REGION_READ:
            waiting.append(message)
        assert message.body[16:] == (1).to_bytes(4, "little")
        for each in waiting:
            vmm.serve(each)

    await do(read)
    await do(driver.completed)


async def test_pieces_with_and_without_descriptors(cluster: Cluster, tmp_path: Path):
    """The queues are mapped, the buffer is asked for."""
    driver = NvmeGuest(await attach_guest(cluster, "vf1", "g1", "h1", tmp_path))
    vmm = driver.vmm
    try:

        def begin() -> None:
            vmm.begin()
            vmm.content = driver.memory.content
            assert not vmm.map(driver.memory, 0, length=BUFFER).error
            body = struct.pack("<IIQQQ", 32, 3, 0, BUFFER, driver.memory.size - BUFFER)
            assert not vmm.try_to_ask(DMA_MAP, body).error
            assert not vmm.set_eventfds(0, (driver.eventfd,)).error
            driver.enable()
            driver.identify()

        await do(begin)
        assert {command for command, _, _ in vmm.dma} == {DMA_READ, DMA_WRITE}
        assert {address for _, address, _ in vmm.dma} == {BUFFER}
    finally:
        driver.close()


async def test_a_vmm_that_refuses_fails_its_own_device(cluster: Cluster, driver: NvmeGuest):
    await do(driver.identify)
    content, driver.vmm.content = driver.vmm.content, None
    await do(driver.submit)

    def until_fatal() -> None:
        while not driver.status() & 2:
            pass

    await do(until_fatal)
    driver.vmm.content = content
    await do(lambda: driver.vmm.write(0, 0x14, bytes(4)))
    await do(driver.enable)
    await do(driver.identify)


@pytest.mark.parametrize("home", ["h1", "h2"])
@pytest.mark.parametrize("messages", ["", "whole"])
async def test_a_command_costs_three_messages(cluster: Cluster, tmp_path: Path, home: str, messages: str):
    """It is read, and its answer and its completion are written. The log says how long that takes."""
    if home != "h1":
        await cluster.move("m0", {"vf1": f"{home}/nvme0"})
    driver = NvmeGuest(await attach_guest(cluster, "vf1", "g1", "h1", tmp_path), messages=messages)
    await do(driver.begin)
    await do(driver.identify)
    before = len(driver.vmm.dma)
    took: list[float] = []

    def work() -> None:
        for _ in range(COMMANDS):
            begun = time.monotonic()
            driver.identify()
            took.append(time.monotonic() - begun)

    await do(work)
    assert len(driver.vmm.dma) - before == (3 * COMMANDS if messages else 0)
    median_us = sorted(took)[COMMANDS // 2] * 1e6
    _log.info("a command at %s, memory %s: %.0f us", home, "asked for" if messages else "mapped", median_us)
    driver.close()
