"""The holder of a guest's socket: what it keeps for a hostd that comes anew, and what it answers when none does."""

import asyncio
import contextlib
import os
import select
import signal
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.local_cluster import eventually
from support.vmm import DMA_READ, DMA_WRITE, HEADER, REGION_READ, REGION_WRITE, RESET, VERSION, SharedMemory, Vmm

from hostd.guest import holder_link, message_queue
from hostd.guest.frames import SAID, Kind
from hostd.guest.holder_link import Frame, HolderGoneError, HolderLink
from hostd.memory import MemoryBusyError
from vfleet.clock import SystemClock
from vfleet.errors import VfleetError

SOON_MS, LATE_MS = 50, 60_000


class Bench:
    """A holder, and hostds and VMMs of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "vm.sock"
        self.link: HolderLink
        self.links: list[HolderLink] = []
        self.vmms: list[Vmm] = []

    async def start(self, answer_within_ms: int = LATE_MS) -> "Bench":
        self.link = await holder_link.start(
            self.folder / "guests", "g1", str(self.socket), answer_within_ms, SystemClock()
        )
        self.links.append(self.link)
        return self

    def connect(self) -> HolderLink:
        self.link.close()
        found = holder_link.connect(self.folder / "guests", "g1")
        assert found is not None
        self.link = found
        self.links.append(found)
        return found

    async def vmm(self) -> Vmm:
        self.vmms.append(await asyncio.to_thread(Vmm, self.socket))
        return self.vmms[-1]

    async def frames(self, until: int, count: int = 1) -> list[Frame]:
        """Return the frames up to and with so many of a kind."""
        found: list[Frame] = []
        async with asyncio.timeout(30):
            while sum(frame.kind == until for frame in found) < count:
                found += await self.link.receive()
        return found


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    found = Bench(tmp_path)
    yield found
    link = holder_link.connect(tmp_path / "guests", "g1")
    if link is not None:
        await link.quit()
        link.close()
    for each in (*found.links, *found.vmms):
        each.close()


def command_of(frame: Frame) -> int:
    return int(HEADER.unpack_from(frame.data)[1])


def send_without_end(vmm: Vmm, size: int) -> None:
    while True:
        vmm.write(0, 0, bytes(size), posted=True)


def connect_without_end(bench: Bench) -> None:
    while True:
        bench.connect()


def say_without_end(bench: Bench, connected: int, message: bytes) -> None:
    while True:
        bench.link.say(connected, message)


async def test_a_hostd_that_comes_anew_gets_what_is_not_done(bench: Bench):
    await bench.start()
    vmm = await bench.vmm()
    for number in range(5):
        vmm.write(0, 8 * number, bytes(8), posted=True)
    await bench.frames(Kind.MESSAGE, 5)
    bench.link.done(3, 77)  # that the VMM came, and two writes
    bench.link.close()
    vmm.write(0, 40, bytes(8), posted=True)
    bench.connect()
    frames = await bench.frames(Kind.MESSAGE, 4)
    assert [frame.kind for frame in frames] == [Kind.HELLO, Kind.READY] + [Kind.MESSAGE] * 4
    assert (frames[0].number, frames[0].position) == (3, 77)
    assert [frame.number for frame in frames[2:]] == [4, 5, 6, 7]
    assert [struct.unpack_from("<Q", frame.data, HEADER.size)[0] for frame in frames[2:]] == [16, 24, 32, 40]


async def test_descriptors_that_are_kept_are_handed_over(bench: Bench):
    await bench.start()
    await bench.frames(Kind.READY)
    memory = SharedMemory(4096)
    memory.content[:5] = b"hello"
    bench.link.keep(b"a", b"one", memory.descriptor)
    bench.link.keep(b"b", b"two")
    bench.link.keep(b"c", b"three", memory.descriptor)
    bench.link.keep(b"b", b"instead")
    bench.link.drop(b"c")
    memory.close()
    bench.connect()
    kept = [frame for frame in await bench.frames(Kind.READY) if frame.kind == Kind.KEPT]
    assert {frame.key: frame.data for frame in kept} == {b"a": b"one", b"b": b"instead"}
    descriptor = next(frame.descriptors[0] for frame in kept if frame.descriptors)
    assert os.pread(descriptor, 5, 0) == b"hello"
    for frame in kept:
        frame.close()


async def test_what_a_vmm_sends_with_a_message_comes_with_it_each_time(bench: Bench):
    await bench.start()
    vmm = await bench.vmm()
    memory = SharedMemory(4096)
    vmm.send(VERSION)
    vmm.send(2, b"x" * 100, (memory.descriptor, memory.descriptor))
    for _ in range(2):
        first, second = [frame for frame in await bench.frames(Kind.MESSAGE, 2) if frame.kind == Kind.MESSAGE]
        assert (len(first.descriptors), len(second.descriptors)) == (0, 2)
        second.close()
        bench.connect()
    memory.close()


async def test_a_read_that_nobody_answers_reads_all_ones(bench: Bench):
    await bench.start(SOON_MS)
    bench.link.close()
    vmm = await bench.vmm()
    assert await asyncio.to_thread(vmm.read, 0, 0x1C, 4) == b"\xff" * 4
    await asyncio.to_thread(vmm.write, 0, 0x14, bytes(4))
    assert (await asyncio.to_thread(vmm.try_to_ask, RESET)).error
    # An answer that comes after that is nobody's.
    bench.connect()
    frames = await bench.frames(Kind.MESSAGE, 3)
    bench.link.answer(frames[-1].number, b"late")
    assert await asyncio.to_thread(vmm.read, 0, 0, 8) == b"\xff" * 8


async def test_an_answer_goes_to_its_question(bench: Bench):
    await bench.start()
    vmm = await bench.vmm()
    first = vmm.send(REGION_READ, struct.pack("<QII", 0, 0, 4))
    second = vmm.send(REGION_READ, struct.pack("<QII", 4, 0, 4))
    frames = [frame for frame in await bench.frames(Kind.MESSAGE, 2) if frame.kind == Kind.MESSAGE]
    asked = {HEADER.unpack_from(frame.data)[0]: frame.number for frame in frames}
    for identifier in (second, first):
        bench.link.answer(asked[identifier], HEADER.pack(identifier, REGION_READ, HEADER.size, 1, 0))
        assert (await asyncio.to_thread(vmm.receive)).identifier == identifier


async def test_what_is_said_to_a_vmm_is_said_once_and_to_no_other(bench: Bench):
    await bench.start()
    vmm = await bench.vmm()
    connected = (await bench.frames(Kind.CONNECTED))[-1].number
    message = HEADER.pack(0, DMA_READ, HEADER.size, 0, 0)
    assert [bench.link.say(connected, message), bench.link.say(connected, message, write=7)] == [1, 2]
    assert [(await asyncio.to_thread(vmm.receive_any)).identifier for _ in range(2)] == [1, 2]
    # What a hostd has said before it was killed is said, and its successor is told of it.
    bench.link.say(connected, message)
    bench.connect()
    hello = (await bench.frames(Kind.READY))[0]
    assert SAID.unpack(hello.key) == (3, 7)
    assert (await asyncio.to_thread(vmm.receive_any)).identifier == 3
    vmm.close()
    await bench.frames(Kind.GONE)
    other = await bench.vmm()
    found = (await bench.frames(Kind.CONNECTED))[-1].number
    bench.link.say(connected, message)
    bench.link.said = 9
    bench.link.say(found, message)
    assert (await asyncio.to_thread(other.receive_any)).identifier == 10


async def test_what_can_not_be_said_is_not_said(bench: Bench):
    """A VMM keeps its holder from work: nothing that the function is told to be written may wait in hostd."""
    await bench.start()
    connected = (await bench.frames(Kind.READY))[-1].number
    message = HEADER.pack(0, DMA_WRITE, HEADER.size + 4096, 0, 0) + bytes(4096)
    pid = int((bench.folder / "guests" / "g1.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(MemoryBusyError):
            say_without_end(bench, connected, message)
        said = bench.link.said
    finally:
        os.kill(pid, signal.SIGCONT)
    bench.connect()
    hello = (await bench.frames(Kind.READY))[0]
    assert SAID.unpack(hello.key)[0] == said


@pytest.mark.parametrize("length", [0, HEADER.size - 1, 1 << 16 | 1, 0xFFFFFFFF])
async def test_a_vmm_that_can_not_be_understood_is_let_go(bench: Bench, length: int):
    await bench.start()
    vmm = await bench.vmm()
    vmm.send_raw(HEADER.pack(1, REGION_WRITE, length, 0, 0))
    with pytest.raises((EOFError, ConnectionResetError)):
        await asyncio.to_thread(vmm.receive)
    kinds = [frame.kind for frame in await bench.frames(Kind.GONE)]
    assert kinds == [Kind.HELLO, Kind.READY, Kind.CONNECTED, Kind.GONE]
    await bench.vmm()
    await bench.frames(Kind.CONNECTED)


async def test_a_vmm_that_says_half_a_message_keeps_its_holder_from_nothing(bench: Bench):
    await bench.start()
    vmm = await bench.vmm()
    vmm.send_raw(HEADER.pack(1, REGION_WRITE, HEADER.size + 8, 0, 0))
    await bench.frames(Kind.CONNECTED)
    for number in range(3):
        bench.link.keep(b"a", bytes([number]))
        bench.connect()
        await bench.frames(Kind.CONNECTED)
    vmm.send_raw(bytes(8))
    assert [frame.kind for frame in await bench.frames(Kind.MESSAGE)] == [Kind.MESSAGE]


async def test_a_device_has_one_vmm(bench: Bench):
    await bench.start()
    vmm = await bench.vmm()
    await bench.frames(Kind.CONNECTED)
    other = await bench.vmm()
    with pytest.raises((EOFError, ConnectionResetError)):
        await asyncio.to_thread(other.receive)
    vmm.send(VERSION)
    await bench.frames(Kind.MESSAGE)


@pytest.mark.parametrize(
    ("size", "count"),
    [(4, message_queue.MAX_QUEUED - 1), (4096, message_queue.MAX_QUEUED_BYTES // (HEADER.size + 16 + 4096) + 1)],
)
async def test_a_vmm_that_sends_without_end_waits(bench: Bench, size: int, count: int):
    await bench.start()
    bench.link.close()
    vmm = await bench.vmm()
    vmm.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):
        send_without_end(vmm, size)
    bench.connect()
    frames = await bench.frames(Kind.MESSAGE, count)
    assert len([frame for frame in frames if frame.kind == Kind.MESSAGE]) == count
    # Once some are done there is room for others.
    bench.link.done(frames[-1].number, 0)
    await bench.frames(Kind.MESSAGE)


async def test_vmms_that_come_and_go_while_there_is_no_room_are_not_queued(bench: Bench):
    await bench.start()
    bench.link.close()
    vmm = await bench.vmm()
    vmm.socket.settimeout(0.5)
    with pytest.raises(TimeoutError):
        send_without_end(vmm, 4)
    vmm.close()
    for _ in range(20):
        with pytest.raises((EOFError, ConnectionResetError)):
            await asyncio.to_thread((await bench.vmm()).receive)
    bench.connect()
    frames = await bench.frames(Kind.MESSAGE, message_queue.MAX_QUEUED - 1)
    async with asyncio.timeout(30):
        while frames[-1].kind != Kind.GONE:
            bench.link.done(frames[-1].number, 0)
            frames += await bench.link.receive()
    assert sum(frame.kind == Kind.CONNECTED for frame in frames) == 1
    await bench.vmm()
    await bench.frames(Kind.CONNECTED)


async def test_messages_that_nobody_takes_wake_nobody(bench: Bench):
    await bench.start()
    vmm = await bench.vmm()
    await bench.frames(Kind.CONNECTED)
    waiting = asyncio.create_task(bench.link.receive())
    await asyncio.sleep(0)
    for _ in range(2):
        vmm.write(0, 0, bytes(4), posted=True)
        await waiting
    connection = bench.link._socket

    async def is_readable() -> bool:
        return bool(select.select([connection], [], [], 0)[0])

    await eventually(is_readable)
    await asyncio.sleep(0)
    # hostd has no room for it, as during a hold: the event loop does not turn for its sake.
    assert not asyncio.get_running_loop().remove_reader(connection)
    await bench.frames(Kind.MESSAGE)


async def test_a_holder_that_has_no_time_keeps_no_hostd_waiting(bench: Bench):
    """A VMM keeps it from all work, and hostd is restarted again and again."""
    await bench.start()
    pid = int((bench.folder / "guests" / "g1.pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(VfleetError, match="takes no connection"):
            connect_without_end(bench)
        assert holder_link.is_there(bench.folder / "guests", "g1")
    finally:
        os.kill(pid, signal.SIGCONT)
    for each in bench.links:
        each.close()

    async def is_free() -> bool:
        with contextlib.suppress(VfleetError):
            bench.connect()
            return True
        return False

    await eventually(is_free)
    await bench.frames(Kind.READY)


async def test_what_is_no_socket_of_its_own_is_not_deleted(bench: Bench, tmp_path: Path):
    other = tmp_path / "other"
    other.write_text("another's")
    holder_link.forget(tmp_path / "guests", "g2", str(other))
    assert other.read_text() == "another's"
    await bench.start()
    holder_link.forget(tmp_path / "others", "g2", str(bench.socket))
    await bench.vmm()
    await bench.frames(Kind.CONNECTED)


async def test_it_ends_when_told_to_and_leaves_no_socket(bench: Bench):
    await bench.start()
    await bench.link.quit()
    with pytest.raises(HolderGoneError):
        await bench.frames(Kind.GONE)
    assert not bench.socket.exists()
    assert holder_link.connect(bench.folder / "guests", "g1") is None


async def test_one_that_has_ended_leaves_no_zombie(bench: Bench):
    await bench.start()
    pid = int((bench.folder / "guests" / "g1.pid").read_text())
    await bench.link.quit()
    await holder_link.until_reaped(bench.folder / "guests", "g1", SystemClock())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    # Nor is one waited for that isn't this process's.
    (bench.folder / "guests" / "g1.pid").write_text("1")
    await holder_link.until_reaped(bench.folder / "guests", "g1", SystemClock())


async def test_one_that_nobody_waits_for_any_more_is_not_left_behind(bench: Bench):
    starting = asyncio.create_task(bench.start())
    pid_file = bench.folder / "guests" / "g1.pid"

    async def is_spawned() -> bool:
        return pid_file.exists() and bool(pid_file.read_text())

    await eventually(is_spawned)
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


async def test_a_socket_that_was_left_is_taken_and_one_in_use_is_not(bench: Bench, tmp_path: Path):
    await bench.start()
    other = Bench(tmp_path)
    with pytest.raises(VfleetError, match="can't listen"):
        await holder_link.start(other.folder / "others", "g2", str(bench.socket), LATE_MS, SystemClock())
    os.kill(int((bench.folder / "guests" / "g1.pid").read_text()), 9)
    with pytest.raises(HolderGoneError):
        await bench.frames(Kind.READY, 2)
    assert bench.socket.exists()

    async def has_ended() -> bool:
        return not holder_link.is_there(bench.folder / "guests", "g1")

    # Its connections end before it listens no more.
    await eventually(has_ended)
    await bench.start()
    await bench.vmm()
    await bench.frames(Kind.CONNECTED)
