"""Two virtio-net functions on a wire, with drivers that verify every frame, and need kicks and interrupts.

A driver kicks only when it is told to, and looks at a ring only after an interrupt: so one that is missing shows, as
frames that never come.
"""

import zlib
from collections import deque
from random import Random

from support.model_rig import Rig
from support.virtio_bench import BARS, Bench, Ring

from hostd.models import virtio
from hostd.models.ethernet import mac_address
from hostd.models.virtio import DEVICE_NEEDS_RESET
from hostd.models.virtio_net import COUNTERS, ISR, MSIX_TABLE


class Station:
    """A function and its driver. `bad` collects what should not have been seen."""

    def __init__(self, identity: int, peer: int, random: Random, size: int, *, kind: bool = False) -> None:
        self.rig = Rig("virtio-net", BARS, identity, random=None if kind else random)
        self.bench = Bench(self.rig, size).bind()
        self.random = random
        self.wire: deque[bytes] = deque()
        self.sent = self.received = 0
        self.bad: list[str] = []
        self.refills = False
        self._header = mac_address(peer) + mac_address(identity) + b"\x88\xb5"
        self._from_peer = mac_address(identity) + mac_address(peer) + b"\x88\xb5"
        self._free = deque(range(size))
        self.lent: deque[int] = deque()
        self._empty = deque(range(size))
        self._given: deque[int] = deque()
        self._seen = {self.bench.receive: 0, self.bench.transmit: 0}
        self._registers = self.registers()

    def send(self, count: int) -> None:
        """Put up to so many frames into the transmit ring."""
        for _ in range(min(count, len(self._free))):
            index = self._free.popleft()
            body = self.sent.to_bytes(4, "big") + bytes([self.sent % 251]) * self.random.choice((0, 40, 500, 1490))
            self.bench.send(self._header + body + zlib.crc32(body).to_bytes(4, "big"), index, kick=False)
            self.lent.append(index)
            self.sent += 1
        self._kick(self.bench.transmit)

    def give_buffers(self, count: int) -> None:
        """Put up to so many buffers into the receive ring."""
        for _ in range(min(count, len(self._empty))):
            index = self._empty.popleft()
            self.bench.give_buffer(index, kick=False)
            self._given.append(index)
        self._kick(self.bench.receive)

    def look(self) -> bool:
        """Look at the rings of which there was an interrupt; return whether there was one."""
        found = False
        for vector, ring in ((1, self.bench.receive), (2, self.bench.transmit)):
            if self.rig.interrupts[vector] != self._seen[ring]:
                self._seen[ring] = self.rig.interrupts[vector]
                ring.want_interrupts(wanted=False)
                self._reap(ring)
                ring.want_interrupts(wanted=True)
                self._reap(ring)
                found = True
        return found

    def take_from(self, wire: deque[bytes]) -> bool:
        """Take the wire's first frame, if there is room for it."""
        if wire and self.rig.receive(wire[0]):
            wire.popleft()
            return True
        return False

    def put_on_wire(self) -> None:
        """Let what the device has sent leave."""
        while self.rig.frames:
            self.wire.append(self.rig.frames.popleft())

    def check(self) -> None:
        """Note what is wrong with the registers: all are as the driver left them."""
        if self.bench.status & DEVICE_NEEDS_RESET:
            self.bad.append("the device needs a reset")
        if self.rig.stray_writes:
            self.bad.append("the device wrote outside main memory")
        if self.registers() != self._registers:
            self.bad.append("the registers have changed")

    def registers(self) -> list[int | None]:
        """Return what all registers have that only a driver changes."""
        common = [self.rig.read(offset, 4) for offset in range(0, 0x3C, 4)]
        queues = []
        for index in (0, 1):
            self.bench.set_common(virtio.QUEUE_SELECT, index, 2)
            queues += [self.rig.read(offset, 4) for offset in range(0x18, 0x3C, 4)]
        others = [self.rig.read(ISR, 1), self.rig.read(COUNTERS, 8), self.rig.read(COUNTERS + 8, 8)]
        return common + queues + others + [self.rig.read(MSIX_TABLE + offset, 4) for offset in range(0, 48, 4)]

    def _kick(self, ring: Ring) -> None:
        if ring.wants_kicks:
            ring.kick()

    def _reap(self, ring: Ring) -> None:
        for index, length in ring.take() if (ring.used_index - ring.seen) & 0xFFFF <= ring.size else self._jumped():
            outstanding, idle = (self._given, self._empty) if ring is self.bench.receive else (self.lent, self._free)
            if index not in outstanding:
                self.bad.append(f"descriptor {index} came back that was not given")
                continue
            if index != outstanding[0]:
                self.bad.append(f"descriptor {index} came back before {outstanding[0]}")
            outstanding.remove(index)
            idle.append(index)
            if ring is self.bench.receive:
                self._verify(self.bench.buffer(index, length))
        if ring is self.bench.receive and self.refills:
            self.give_buffers(len(self._empty))

    def _jumped(self) -> list[tuple[int, int]]:
        self.bad.append("a used index jumped")
        return []

    def _verify(self, packet: bytes) -> None:
        body = packet[26:-4]
        number = int.from_bytes(body[:4], "big")
        if (
            packet[:26] != bytes(10) + b"\x01\x00" + self._from_peer
            or zlib.crc32(body).to_bytes(4, "big") != packet[-4:]
        ):
            self.bad.append(f"a frame is damaged, after {self.received}")
        elif number != self.received:
            self.bad.append(f"frame {number} came; expected {self.received}")
        self.received += 1


class Pair:
    """Two stations on a wire."""

    def __init__(self, random: Random, size: int = 8, *, kind: bool = False) -> None:
        self.random = random
        self.stations = [Station(1, 2, random, size, kind=kind), Station(2, 1, random, size, kind=kind)]

    def carry(self, to: int, count: int) -> None:
        """Carry up to so many frames to a station."""
        sender = self.stations[1 - to]
        sender.put_on_wire()
        for _ in range(count):
            if not self.stations[to].take_from(sender.wire):
                return

    def settle(self, rounds: int = 200) -> None:
        """Let all that can happen happen, led by kicks and interrupts alone."""
        for station in self.stations:
            station.refills = True
            station.give_buffers(256)
        for _ in range(rounds):
            busy = False
            for to, station in enumerate(self.stations):
                for _ in range(500):
                    if not station.rig.step():
                        break
                    busy = True
                busy |= station.look()
                before = station.rig.image[:]
                self.carry(to, 1000)
                busy |= before != station.rig.image
            if not busy:
                break
        else:
            self.stations[0].bad.append("it never comes to rest")
        for station in self.stations:
            station.check()

    def faults(self) -> list[str]:
        """Return all that is wrong, by now that all is settled."""
        found = [fault for station in self.stations for fault in station.bad]
        for receiver, sender in (self.stations, self.stations[::-1]):
            if receiver.received != sender.sent:
                found.append(f"{sender.sent} frames sent, {receiver.received} received")
            if sender.lent:
                found.append(f"descriptors {sender.lent} never came back")
        return found
