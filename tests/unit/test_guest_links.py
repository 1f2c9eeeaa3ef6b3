"""Holders and hostds that part at the worst moment: what was said counts, once, and neither ends with the other."""

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.bench import BARS, Bench
from support.fleet_store import FleetStore
from support.fleet_values import FleetValues
from support.local_cluster import eventually

from hostd.guest import holder_link
from hostd.guest.frames import FRAME, HEADER, HELLO_DATA, MAX_FRAME_BYTES, NO_REPLY, REGION_WRITE, SAID, VERSION, Kind
from hostd.guest.guests import Guests
from hostd.guest.holder import Holder
from hostd.guest.holder_link import HolderLink
from vfleet.etcd.store import Listing
from vfleet.v1.host_records_pb2 import GuestRecord
from vfleet.v1.types_pb2 import GUEST_STATE_LOST, Bar, Guest

PATIENCE_S = 10.0
MEMORY_BYTES = 1 << 20


class Store(FleetStore):
    """A store that nobody has told of a guest."""

    def __init__(self) -> None:
        super().__init__(FleetValues())

    async def list(self, prefix: str) -> Listing:
        return Listing(1, ())


class Watched(socket.socket):
    """A holder's end of a connection to `hostd`, which is killed before the first message comes, and has done one."""

    hostd: "Hostd | None" = None

    def sendmsg(self, buffers, ancillary=()):
        if self.hostd is not None and FRAME.unpack_from(buffers[0])[0] == Kind.MESSAGE:
            self.hostd.say(Kind.DONE, 1, 5)
            self.hostd.socket.close()
            self.hostd = None
        return super().sendmsg(buffers, ancillary)


class Control(socket.socket):
    """Where hostds connect: the next will be `dying`, if there is one."""

    dying: "Hostd | None" = None
    last: Watched

    def accept(self):
        connection, address = super().accept()
        watched = self.last = Watched(fileno=connection.detach())
        watched.hostd, self.dying = self.dying, None
        return watched, address


class Hostd:
    """A connection to a holder, of the test's own."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE_S)
        self.path = str(path)

    def connect(self) -> "Hostd":
        self.socket.connect(self.path)
        return self

    def say(self, kind: Kind, number: int = 0, position: int = 0) -> None:
        self.socket.send(FRAME.pack(kind, 0, number, position))

    def take(self, kind: Kind) -> tuple[int, int]:
        """Wait for a frame of this kind, and return its number and position."""
        while True:
            found, _, number, position = FRAME.unpack_from(self.socket.recv(MAX_FRAME_BYTES))
            if found == kind:
                return number, position


def test_a_hostd_that_is_killed_while_it_is_told_what_is_queued_takes_no_holder_with_it(tmp_path: Path):
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(tmp_path / "vm.sock"))
    control = Control(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control.bind(str(tmp_path / "control"))
    for server in (listener, control):
        server.listen(2)
    running = threading.Thread(target=Holder(listener, control, PATIENCE_S, time.monotonic).run, daemon=True)
    running.start()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as vmm:
        vmm.connect(str(tmp_path / "vm.sock"))
        for _ in range(2):
            vmm.sendall(HEADER.pack(1, REGION_WRITE, HEADER.size, NO_REPLY, 0))
        first = Hostd(tmp_path / "control").connect()
        assert [first.take(Kind.MESSAGE)[0] for _ in range(2)] == [2, 3]
        control.dying = Hostd(tmp_path / "control")
        control.dying.connect()
        last = Hostd(tmp_path / "control").connect()
        assert last.take(Kind.HELLO) == (1, 5)
        assert [last.take(Kind.MESSAGE)[0] for _ in range(2)] == [2, 3]
    last.take(Kind.GONE)
    last.say(Kind.QUIT)
    running.join(PATIENCE_S)
    assert not running.is_alive()
    for each in (first.socket, last.socket, control.last, listener, control):
        each.close()


async def test_an_interrupt_after_one_that_is_on_its_way_is_told_too():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for each in (ours, theirs):
        each.settimeout(0)
    link = HolderLink(ours)
    # More than a socket takes, before and after the interrupt.
    for _ in range(2):
        for _ in range(100):
            link.answer(1, bytes(8192))
        link.ring(b"vector:1")
    told = 0
    link.answer(2, b"")
    async with asyncio.timeout(PATIENCE_S):
        while True:
            with contextlib.suppress(BlockingIOError):
                kind, _, number, _ = FRAME.unpack_from(theirs.recv(MAX_FRAME_BYTES))
                if kind == Kind.RING:
                    told += 1
                    if told == 1:
                        link.ring(b"vector:1")
                        link.answer(3, b"")
                if number == 3:
                    break
            await asyncio.sleep(0)
    assert told == 2
    link.close()
    theirs.close()


async def test_what_can_not_be_deleted_ends_no_host(tmp_path: Path):
    """The path of a guest's socket is what somebody wrote: it may lie where hostd may not look."""
    bench = Bench(tmp_path, has_engines=False)
    bench.ledger.put("guest", "g1", GuestRecord(socket="/" + "x" * 300))
    guests = Guests("h1", bench.drivers, bench.ledger, Store(), bench.clock, tmp_path / "guests")
    running = asyncio.create_task(guests.run())

    async def is_forgotten() -> bool:
        return not bench.ledger.items("guest", GuestRecord)

    await eventually(is_forgotten)
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    bench.close()


class Host:
    """A host with a driver g1 for a guest, and holders that the test plays."""

    def __init__(self, folder: Path) -> None:
        self.bench = Bench(folder, has_engines=False)
        self.folder = folder / "guests"
        self.folder.mkdir()
        self.sockets: list[socket.socket] = []
        instance = self.bench.create()
        self.base = instance.about.base
        bars = [Bar(index=index, size_bytes=size) for index, size in BARS.items()]
        guest = Guest(socket=str(folder / "g1.sock"), model="checker", bars=bars, message_timeout_ms=5000)
        self.driver = self.bench.drivers.recorded("g1", MEMORY_BYTES, guest)

    def attach(self) -> None:
        self.bench.drivers.attach(self.bench.message(self.base, driver="g1"))

    def note(self, driver: str, *, connected: bool = False) -> GuestRecord:
        """Remember that a holder was started for a driver's guest."""
        record = GuestRecord(socket=str(self.folder / f"{driver}.sock"), connected=connected)
        self.bench.ledger.put("guest", driver, record)
        return record

    def holder(self, driver: str, backlog: int = 8) -> socket.socket:
        """Listen as a driver's holder does."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(self.folder / f"{driver}.control"))
        listener.listen(backlog)
        listener.settimeout(0)
        self.sockets.append(listener)
        return listener

    async def accept(self, listener: socket.socket) -> socket.socket:
        connection, _ = await asyncio.get_running_loop().sock_accept(listener)
        connection.settimeout(0)
        self.sockets.append(connection)
        return connection

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run a hostd, and kill it."""
        guests = Guests("h1", self.bench.drivers, self.bench.ledger, Store(), self.bench.clock, self.folder)
        running = asyncio.create_task(guests.run())
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield
            assert not running.done()
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    found = Host(tmp_path)
    yield found
    found.bench.close()
    for each in found.sockets:
        each.close()


async def kind_of(connection: socket.socket) -> int:
    """Wait for a frame, and return its kind; 0 for the end of the connection."""
    frame = await asyncio.get_running_loop().sock_recv(connection, MAX_FRAME_BYTES)
    return int(FRAME.unpack_from(frame)[0]) if frame else 0


async def test_a_holder_that_does_not_end_keeps_no_other_waiting(host: Host, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(holder_link, "QUIT_TIMEOUT_S", 3600.0)
    hung = host.holder("a")
    for driver in ("a", "b"):
        host.note(driver)
    async with host.running():
        assert await kind_of(await host.accept(hung)) == Kind.QUIT

        async def is_forgotten() -> bool:
            return [name for name, _ in host.bench.ledger.items("guest", GuestRecord)] == ["a"]

        await eventually(is_forgotten)


@pytest.mark.parametrize("is_killed", [False, True], ids=["hostd lives", "hostd is killed"])
async def test_a_holder_that_could_not_be_told_to_end_is_not_that_of_the_next_attachment(
    host: Host, *, is_killed: bool
):
    busy = host.holder("g1", backlog=0)
    host.note("g1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.connect(busy.getsockname())
        async with host.running():
            await host.bench.clock.advance(0.5)
            host.attach()
            await host.bench.clock.advance(0.5)
            if not is_killed:
                await host.accept(busy)
                await host.bench.clock.advance(1)
                assert await kind_of(await host.accept(busy)) == Kind.QUIT
        if is_killed:
            await host.accept(busy)
            async with host.running():
                assert await kind_of(await host.accept(busy)) == Kind.QUIT


@pytest.mark.parametrize("data", [(7).to_bytes(8, "little"), HELLO_DATA.pack(7, VERSION + 1)], ids=["none", "another"])
@pytest.mark.parametrize("connected", [False, True])
async def test_a_holder_of_another_version_is_not_taken_for_one_of_this(host: Host, data: bytes, *, connected: bool):
    other = host.holder("g1")
    record = host.note("g1", connected=connected)
    host.attach()
    async with host.running():
        connection = await host.accept(other)
        connection.send(FRAME.pack(Kind.HELLO, SAID.size, 5, 9) + SAID.pack(3, 4) + data)
        if not connected:
            # Nobody loses anything by its end.
            assert await kind_of(await host.accept(other)) == Kind.QUIT
            return
        assert await kind_of(connection) == 0
        assert host.driver.guest_state == GUEST_STATE_LOST
    # One of its own version goes on with it.
    assert host.bench.ledger.get("guest", "g1", GuestRecord) == record


def test_vmms_are_told_apart_when_one_comes_as_another_goes(tmp_path: Path):
    """Both are seen at the same moment, and time stands still: the next waits all the same."""
    vmms = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2)]
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control = Control(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for server, name in ((listener, "vm.sock"), (control, "control")):
        server.bind(str(tmp_path / name))
        server.listen(2)
    must_change = threading.Event()
    now_s = 1.0

    def clock() -> float:
        if must_change.is_set():
            must_change.clear()
            vmms[0].close()
            vmms[1].connect(str(tmp_path / "vm.sock"))
        return now_s

    running = threading.Thread(target=Holder(listener, control, PATIENCE_S, clock).run, daemon=True)
    running.start()
    vmms[0].connect(str(tmp_path / "vm.sock"))
    first = Hostd(tmp_path / "control").connect()
    vmms[0].sendall(HEADER.pack(1, REGION_WRITE, HEADER.size, NO_REPLY, 0))
    assert first.take(Kind.MESSAGE)[0] == 2
    must_change.set()
    first.say(Kind.DONE, 1, 1)
    assert first.take(Kind.GONE)[0] == 3
    last = Hostd(tmp_path / "control").connect()
    queued, _ = HELLO_DATA.unpack(last.socket.recv(MAX_FRAME_BYTES)[-HELLO_DATA.size :])
    assert queued == 3
    now_s = 2.0
    assert last.take(Kind.CONNECTED)[0] == 4
    vmms[1].close()
    last.take(Kind.GONE)
    last.say(Kind.QUIT)
    running.join(PATIENCE_S)
    assert not running.is_alive()
    for each in (first.socket, last.socket, control.last, listener, control):
        each.close()
