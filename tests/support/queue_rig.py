"""One driver's queue for one function, with the function at home here or across the fabric."""

from dataclasses import replace
from pathlib import Path
from random import Random

from support.bench import MEMORY_BYTES, VIRTUAL_ADDRESS, Bench
from support.fake_fabric import FakeFabric, FakeLink
from support.manual_clock import ManualClock, settle

from hostd.access_queue import AccessQueue
from hostd.instance import Instance
from hostd.models import checker
from hostd.reach import Reach
from hostd.translation import Entry
from hostd.waiting import Waiting
from vfleet.address import table_offset
from vfleet.errors import Reason, VfleetError
from vfleet.v1.access_pb2 import (
    ACCESS_KIND_READ,
    ACCESS_KIND_WRITE,
    ACCESS_STATUS_OK,
)

OK = (ACCESS_STATUS_OK, b"")
ENDED = VfleetError(Reason.TRANSLATION_FAULT, "ended")
LONG_S = 10.0  # longer than any retry


class Rig:
    """A driver on h1, its queue for vf1, and vf1's home: `home`, on h1 itself or on h2."""

    def __init__(self, path: Path, home: str) -> None:
        self.clock = ManualClock()
        self.h1 = Bench(path / "h1", "h1", self.clock)
        self.h2 = Bench(path / "h2", "h2", self.clock)
        self.fabric = FakeFabric()
        self.fabric.peers = {1: self.h1.functions, 2: self.h2.functions}
        self.home = self.h1 if home == "h1" else self.h2
        self.instance = self.home.create()
        self.session = 0
        self.queue = self.start(self.entry_at(self.instance))

    def start(self, entry: Entry) -> AccessQueue:
        """Make the queue as a daemon does that has just been started."""
        self.session += 1
        return self.attach(entry)

    def attach(self, entry: Entry) -> AccessQueue:
        """Make the queue as a daemon does that learns of the entry."""
        reach = Reach(1, self.session, lambda: 1, self.h1.functions, self.fabric, self.clock, Random(3))
        self.queue = AccessQueue("d1", entry, reach)
        self.entry = entry
        return self.queue

    @property
    def link(self) -> FakeLink:
        return self.fabric.to(2)

    @property
    def last(self) -> int:
        """The last sequence that the home has applied."""
        return self.instance.image.sequencer("d1").last

    def entry_at(self, instance: Instance, **more) -> Entry:
        offset = table_offset(instance.about.base, VIRTUAL_ADDRESS)
        generation = instance.about.generation
        return Entry("d1", "vf1", VIRTUAL_ADDRESS, MEMORY_BYTES, offset, generation, "h1", **more)

    def follow(self, entry: Entry) -> None:
        self.entry = entry
        self.queue.follow(entry)

    def hold(self, *, held: bool = True) -> None:
        self.follow(replace(self.entry, held=held))

    def write(self, value: int, sequence: int = 0) -> Waiting:
        """Ring the doorbell of channel 0."""
        address = VIRTUAL_ADDRESS + checker.channel_offset(0)
        waiting = Waiting(
            ACCESS_KIND_WRITE, address, 8, value.to_bytes(8, "little"), sequence, may_ask_again=bool(sequence)
        )
        self.queue.submit(waiting)
        return waiting

    def read(self, offset: int, sequence: int = 0) -> Waiting:
        waiting = Waiting(ACCESS_KIND_READ, VIRTUAL_ADDRESS + offset, 8, b"", sequence, may_ask_again=bool(sequence))
        self.queue.submit(waiting)
        return waiting

    async def run(self, seconds: float = LONG_S) -> None:
        """Let everything happen that can."""
        for _ in range(4):
            self.link.carry_all()
            await self.clock.advance(seconds / 4)
        self.link.carry_all()
        await settle()

    def counters(self) -> list[int]:
        """Return LAST, ACCEPTED, LOST, REPEATED and REORDERED of channel 0."""
        start = checker.channel_offset(0) + checker.LAST
        memory = self.instance.image.memory
        return [int.from_bytes(memory[start + 8 * n : start + 8 * n + 8], "little") for n in range(5)]

    def close(self) -> None:
        self.queue.close(ENDED)
        self.h1.close()
        self.h2.close()


def done(accesses: list[Waiting]) -> list[bool]:
    return [access.answer.done() for access in accesses]


async def all_rung(rig: Rig, accesses: list[Waiting]) -> None:
    """Check that the accesses, in whose order the doorbell was rung from 1, took effect once each."""
    await rig.run()
    assert [access.answer.result() for access in accesses] == [OK] * len(accesses)
    assert [access.sequence for access in accesses] == list(range(1, len(accesses) + 1))
    assert rig.counters() == [len(accesses), len(accesses), 0, 0, 0]
    assert rig.queue.unanswered == 0
