"""A guest behind a hostd that was killed: what its successor takes from the holder, and in whose time."""

import asyncio
import logging
import os
import struct
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.bench import Bench
from support.guest_port import BARS
from support.manual_clock import settle
from support.vmm import (
    COMMAND,
    DMA_WRITE,
    HEADER,
    POSTED,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    SET_INTERRUPTS,
    SharedMemory,
)

from hostd.guest.frames import HELLO_DATA, SAID, VERSION, Kind
from hostd.guest.guest import ACCESSES_AT_ONCE, MAX_IN_PROGRESS, LiveGuest
from hostd.guest.holder_link import Frame
from hostd.models.nvme_layout import VECTORS
from vfleet.address import bar_span
from vfleet.v1.types_pb2 import Bar, Guest

PAGE = 4096
CSTS, AQA = 0x1C, 0x24
DONE = 1
"""The message that the predecessor has done: that a VMM came."""


class Link:
    """A holder's link that has all there is to say, and remembers what it is told."""

    def __init__(self) -> None:
        self.said = 0
        self.answers: dict[int, bytes] = {}
        self.rings = 0
        self._frames: deque[Frame] = deque()

    def greet(self, *kept: Frame, messages: list[bytes]) -> None:
        """Say what the predecessor has left, and which messages it hasn't done."""
        data = HELLO_DATA.pack(DONE + len(messages), VERSION)
        self._frames.append(Frame(Kind.HELLO, DONE, 1, SAID.pack(0, 0), data, []))
        self._frames += [*kept, Frame(Kind.READY, 0, 0, b"", b"", [])]
        self._number = DONE
        for each in messages:
            self.bring(each)

    def bring(self, message: bytes, *descriptors: int) -> None:
        """Say that the VMM has sent a message."""
        self._number += 1
        self._frames.append(Frame(Kind.MESSAGE, self._number, 0, b"", message, [*descriptors]))

    def take(self) -> list[Frame]:
        return [self._frames.popleft() for _ in range(min(len(self._frames), 32))]

    async def readable(self) -> None:
        await asyncio.Event().wait()

    def answer(self, number: int, message: bytes) -> None:
        self.answers[number] = message

    def done(self, number: int, position: int) -> None:
        pass

    def keep(self, key: bytes, data: bytes, descriptor: int = -1) -> None:
        pass

    def ring(self, key: bytes) -> None:
        self.rings += 1


class World:
    """A host with a guest's driver, attached to an NVMe function there, and a link to the guest's holder."""

    def __init__(self, path: Path) -> None:
        self.bench = Bench(path, model="nvme")
        self.instance = self.bench.create(bars=BARS["nvme"])
        bars = [Bar(index=index, size_bytes=size) for index, size in BARS["nvme"].items()]
        self.bench.drivers.recorded("g1", 1 << 20, Guest(model="nvme", bars=bars, message_timeout_ms=5000))
        entry = self.bench.message(self.instance.about.base, driver="g1", length=bar_span(BARS["nvme"]))
        self.bench.drivers.attach(entry)
        self.driver = self.bench.drivers.require("g1")
        self.link = Link()
        self.live = LiveGuest(self.driver, "vf1", self.link, lambda state: None)

    def has_written(self, data: bytes) -> None:
        """Let the function have written to the beginning of guest memory before hostd was killed."""
        master = self.instance.master
        assert master is not None
        self.instance.image.step(master.writes.put([(self.driver.receivers["vf1"].window.base, data)]))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        running = asyncio.create_task(self.live.run())
        try:
            async with asyncio.timeout(30):
                yield
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            self.live.end()
            self.bench.close()


def message(command: int, body: bytes, flags: int = COMMAND) -> bytes:
    return HEADER.pack(1, command, HEADER.size + len(body), flags, 0) + body


def kept_memory(memory: SharedMemory) -> Frame:
    body = struct.pack("<IIQQQ", 32, 3, 0, 0, PAGE)
    return Frame(Kind.KEPT, 0, 0, b"map:0:1000", body, [memory.descriptor])


@pytest.mark.parametrize("is_held", [False, True], ids=["free", "held"])
async def test_more_messages_than_are_taken_at_a_time_wait_behind_a_read_that_waits_for_dma(
    tmp_path: Path, *, is_held: bool
):
    world = World(tmp_path)
    await world.driver.queue("vf1").synchronized()
    world.has_written(b"12345678")
    if is_held:
        await world.bench.hold(2, ("g1", "vf1", 1))
    memory = SharedMemory(PAGE)
    read = message(REGION_READ, struct.pack("<QII", CSTS, 0, 4))
    write = message(REGION_WRITE, struct.pack("<QII", AQA, 0, 4) + bytes(4), POSTED)
    world.link.greet(kept_memory(memory), messages=[read, *[write] * (MAX_IN_PROGRESS + 100)])
    async with world.running():
        if is_held:
            await settle(100)
            world.bench.lift(2, ("g1", "vf1", 1))
        while DONE + 1 not in world.link.answers:
            await world.bench.clock.advance(0.1)
    assert memory.content[:8] == b"12345678"
    memory.content.close()


@pytest.mark.parametrize("are_queued", [False, True], ids=["done", "queued"])
async def test_an_interrupt_that_came_while_its_vector_had_no_eventfd_is_told_after_a_kill(
    tmp_path: Path, *, are_queued: bool
):
    """A VMM takes all eventfds back before it gives more; the predecessor was killed in between, or just after."""
    world = World(tmp_path)
    none = message(SET_INTERRUPTS, struct.pack("<IIIII", 20, 1 << 0 | 1 << 5, 2, 0, 0))
    eventfd = os.eventfd(0)
    some = message(SET_INTERRUPTS, struct.pack("<IIIII", 20, 1 << 2 | 1 << 5, 2, 0, 1))
    world.link.greet(messages=[none] if are_queued else [])
    world.link.bring(some, eventfd)
    async with world.running():
        while not world.link.rings:
            await asyncio.sleep(0)


async def test_who_is_detached_while_it_waits_for_an_answer_gets_one(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    world = World(tmp_path)
    await world.driver.queue("vf1").synchronized()
    await world.bench.hold(2, ("g1", "vf1", 1))
    world.link.greet(messages=[message(REGION_READ, struct.pack("<QII", CSTS, 0, 4))])
    async with world.running():
        await settle()
        world.bench.drivers.detach("g1", "vf1", 3)
        await settle()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_answers_to_nothing_leave_others_their_turn(tmp_path: Path):
    """Each tells of all interrupts, since it may be to what a predecessor has asked."""
    world = World(tmp_path)
    kept = [Frame(Kind.KEPT, 0, 0, b"vector:%d" % vector, b"", []) for vector in range(VECTORS)]
    answers = 10 * ACCESSES_AT_ONCE
    world.link.greet(*kept, messages=[message(DMA_WRITE, b"", REPLY)] * answers)
    most = before = 0
    async with world.running():
        while world.link.rings < (answers + 1) * VECTORS:
            await asyncio.sleep(0)
            most, before = max(most, world.link.rings - before), world.link.rings
    assert most < ACCESSES_AT_ONCE + 2 * VECTORS
