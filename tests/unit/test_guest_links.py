"""Holders and hostds that part at the worst moment: what was said counts, once, and neither ends with the other."""

import asyncio
import contextlib
import socket
import threading
import time
from pathlib import Path

from support.bench import Bench
from support.fleet_store import FleetStore
from support.fleet_values import FleetValues
from support.local_cluster import eventually

from hostd.guest.frames import FRAME, HEADER, MAX_FRAME_BYTES, NO_REPLY, REGION_WRITE, Kind
from hostd.guest.guests import Guests
from hostd.guest.holder import Holder
from hostd.guest.holder_link import HolderLink
from vfleet.etcd.store import Listing
from vfleet.v1.host_records_pb2 import GuestRecord

PATIENCE_S = 10.0


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
