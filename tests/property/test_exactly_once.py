"""Every access takes effect exactly once, in the driver's order, whatever happens between a driver and its function.

A driver on h1 follows the checker's script while vf1 moves among three hosts: migrations are committed and aborted,
requests come twice and late, links break and let things through afterwards, daemons are killed. In the end the
function's memory is what the script leaves when nothing happens at all.
"""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bench import (
    ABORTED,
    BARS,
    COMMITTED,
    IDENTITY,
    MEMORY_BYTES,
    SEGMENTS,
    VIRTUAL_ADDRESS,
    Bench,
    attempt,
    reason_of,
)
from support.fake_dma import FakeDmaLinks
from support.fake_fabric import FakeFabric, FakeLink
from support.fake_transfer import Network
from support.manual_clock import ManualClock, settle

from hostd import transfer
from hostd.checker_script import WORD_BYTES, CheckerScript, Step
from hostd.instance import Instance
from hostd.models import create_model
from hostd.waiting import Waiting
from vfleet.address import bar_layout, bar_span
from vfleet.errors import Reason, VfleetError
from vfleet.limits import WINDOW
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE, ACCESS_STATUS_OK
from vfleet.v1.driver_service_pb2 import WorkloadOptions
from vfleet.v1.transfer_service_pb2 import CopyOptions, ImportStateRequest

SCRIPT = CheckerScript(IDENTITY, MEMORY_BYTES, BARS[2], WorkloadOptions(memory_bytes=1024))
BURST_OFFSET = bar_layout(BARS)[2] + 4096
REFUSALS = {Reason.STALE_ATTEMPT, Reason.NOT_FOUND, Reason.WRONG_GENERATION, Reason.ILLEGAL_STATE, Reason.SLOT_TAKEN}

Request = Callable[[], object]


SCRIPTED = 12
BURST = 8


def scripted(sequence: int) -> Step:
    """Return the access with this sequence, from 1: the script's, with a burst of writes to plain memory in between."""
    if sequence == 1:
        return SCRIPT.first()
    block, part = divmod(sequence - 2, SCRIPTED + BURST)
    if part < SCRIPTED:
        return SCRIPT.step(block * SCRIPTED + part)
    return Step(ACCESS_KIND_WRITE, BURST_OFFSET + part * WORD_BYTES, sequence)


def left_of_burst(sequence: int) -> int:
    """Return how many accesses from this one on are of a burst."""
    part = (sequence - 2) % (SCRIPTED + BURST)
    return SCRIPTED + BURST - part if sequence > 1 and part >= SCRIPTED else 0


def memory_after(accesses: int) -> bytes:
    """Return the function's memory after so many accesses, one after the other, in one place."""
    model, memory = create_model("checker", IDENTITY, BARS), bytearray(MEMORY_BYTES)

    def put(stores: Sequence[tuple[int, bytes]] | None) -> None:
        for offset, data in stores or ():
            memory[offset : offset + len(data)] = data

    put(model.reset())
    for step in map(scripted, range(1, accesses + 1)):
        if step.kind != ACCESS_KIND_READ:
            put(model.write(memoryview(memory), step.offset, step.data))
    return bytes(memory)


@dataclass
class Move:
    """One migration under way. `prepared` says what has been done, `left` what its decision still demands."""

    revision: int
    source: str
    target: str
    generation: int
    vf_index: int
    prepared: set[str] = field(default_factory=set)
    left: dict[str, Request] | None = None


class World:
    """Three hosts, a driver, a function, and one who moves it. Each event is a method."""

    model = "checker"
    bars: ClassVar[dict[int, int]] = BARS
    main_memory_bytes = 0

    def __init__(self, path: Path, random: Random) -> None:
        self.random = random
        self.clock = ManualClock()
        self.fabric = FakeFabric()
        self.dma_links = FakeDmaLinks()
        self.hosts = {
            name: Bench(path / name, name, self.clock, self.fabric, self.dma_links, self.model) for name in SEGMENTS
        }
        self.driver_host = self.hosts["h1"]
        self.home, self.generation = random.choice(sorted(SEGMENTS)), 1
        self.revision = 10
        self.move: Move | None = None
        self.importing: asyncio.Task[None] | None = None
        self.past: list[Request] = []
        self.next = 0  # sequence of the next access; 0 until the queue tells it
        self.submitted: list[tuple[Step, Waiting]] = []
        first = self.hosts[self.home].create(bars=self.bars)
        self.connect()
        self.driver_host.drivers.recorded("d1", self.main_memory_bytes)
        self.driver_host.drivers.attach(self.driver_host.message(first.about.base, length=bar_span(self.bars)))

    def connect(self) -> None:
        """Join the hosts' daemons by the fabric, as they are now."""
        for name, segment in SEGMENTS.items():
            self.fabric.peers[segment] = self.hosts[name].functions

    # The driver

    def submit(self) -> None:
        driver = self.driver_host.drivers.require("d1")
        queue = driver.queue("vf1")
        for _ in range(self.random.choice([1, 4, 30, 100])):
            if not queue.is_synchronized or queue.unanswered > 150:
                return
            self.next = self.next or queue.last_sequence + 1
            step = scripted(self.next)
            access = Waiting(step.kind, VIRTUAL_ADDRESS + step.offset, WORD_BYTES, step.data)
            queue.submit(access)
            self.submitted.append((step, access))
            self.next += 1

    def do_at_once(self) -> None:
        """Let the driver do a batch of accesses, of which each may be the first that has to wait."""
        driver = self.driver_host.drivers.require("d1")
        queue = driver.queue("vf1")
        if not queue.is_synchronized:
            return
        first = queue.last_sequence + 1
        count = left_of_burst(first) or self.random.choice([1, 3, 16, WINDOW])
        steps = [scripted(first + number) for number in range(count)]
        batch = [
            (VIRTUAL_ADDRESS + step.offset, WORD_BYTES if step.kind == ACCESS_KIND_READ else step.data)
            for step in steps
        ]
        results = driver.direct.access_many(batch)
        assert not results or not self.submitted, "it overtook what waits"
        for step, (status, data) in zip(steps, results, strict=False):
            assert status == ACCESS_STATUS_OK
            assert step.kind != ACCESS_KIND_READ or int.from_bytes(data, "little") == step.value, step
        if results:
            self.next = queue.last_sequence + 1

    def check_answers(self) -> None:
        """Check what has been answered; what a killed daemon had in its queue is nobody's any more."""
        waiting = []
        for step, access in self.submitted:
            if not access.answer.done():
                waiting.append((step, access))
            elif access.answer.exception() is None:
                status, data = access.answer.result()
                assert status == ACCESS_STATUS_OK
                assert step.kind != ACCESS_KIND_READ or int.from_bytes(data, "little") == step.value, step
        self.submitted = waiting

    # The fabric

    def link(self) -> FakeLink:
        return self.fabric.to(self.random.choice([2, 3]))

    def carry_request(self) -> None:
        self.link().carry_request()

    def carry_response(self) -> None:
        self.link().carry_response()

    def carry_all(self) -> None:
        self.link().carry_all()

    def carry_late(self) -> None:
        self.link().carry_late()

    def break_link(self) -> None:
        self.link().break_off()

    def mend_link(self) -> None:
        self.link().come_back()

    async def wait(self) -> None:
        await self.clock.advance(self.random.choice([0.003, 0.3]))

    # Daemons

    async def kill(self) -> None:
        name = self.random.choice(sorted(self.hosts))
        if self.importing is not None:
            self.importing.cancel()
            await asyncio.gather(self.importing, return_exceptions=True)
            self.importing = None
        if name == "h1":
            for link in self.fabric.links.values():
                link.break_off()
                link.senders.clear()
            for link in self.dma_links.links.values():
                link.break_off()
            self.next = 0
        elif SEGMENTS[name] in self.fabric.links:
            self.fabric.links[SEGMENTS[name]].break_off()
        self.hosts[name].restart()
        self.connect()
        for link in (*self.fabric.links.values(), *self.dma_links.links.values()):
            link.come_back()

    # Migrations

    def ask(self, request: Request) -> bool:
        """Send a request, which will also come late. Return whether it was carried out."""
        self.past.append(request)
        refused = reason_of(request)
        assert refused is None or refused in REFUSALS
        return refused is None

    def repeat(self) -> None:
        """Let a request of long ago, or of just now, arrive once more."""
        if self.past:
            self.ask(self.random.choice(self.past))
            self.past.pop()

    def begin(self) -> None:
        if self.move is None:
            self.revision += 1
            target = self.random.choice([name for name in sorted(self.hosts) if name != self.home])
            self.move = Move(self.revision, self.home, target, self.generation + 1, self.random.randrange(1, 9))

    async def prepare(self) -> None:
        """Do one of the things that come before a decision. Holds and stops come in any order."""
        move = self.move
        if move is None or move.left is not None:
            return
        target, source = self.hosts[move.target], self.hosts[move.source]
        await settle()
        if "create" not in move.prepared:
            if self.ask(
                lambda: target.create(
                    "vf1", move.generation, move.revision, fresh=False, vf_index=move.vf_index, bars=self.bars
                )
            ):
                move.prepared.add("create")
            else:
                self.decide()
        elif self.importing is None and "import" not in move.prepared:
            self.importing = asyncio.create_task(self.pull(move))
        elif "hold" not in move.prepared and self.random.random() < 0.5:
            generation = move.generation - 1
            self.past.append(lambda: run_now(self.driver_host.hold(move.revision, ("d1", "vf1", generation))))
            await self.driver_host.hold(move.revision, ("d1", "vf1", generation))
            move.prepared.add("hold")
        elif "stop" not in move.prepared and self.ask(lambda: source.stop(move.generation - 1, move.revision)):
            move.prepared.add("stop")
        await settle()

    async def pull(self, move: Move) -> None:
        """Import, once, what the source has."""
        target = self.hosts[move.target]
        request = ImportStateRequest(
            attempt=attempt(move.revision),
            function="vf1",
            generation=move.generation,
            source_address="source:1",
            source_generation=move.generation - 1,
            source_host="source",
            options=CopyOptions(max_rounds=self.random.randrange(1, 4)),
        )
        try:
            async for step in transfer.import_state(target.functions, Network(self.hosts[move.source]), request):
                if step.complete:
                    move.prepared.add("import")
        except VfleetError as error:
            if error.reason not in REFUSALS:
                raise
        finally:
            self.importing = None

    def decide(self) -> None:
        """Commit what is prepared, in part of the cases; abort else. What follows is sent in any order."""
        move = self.move
        if move is None or move.left is not None:
            return
        target, source, h1 = self.hosts[move.target], self.hosts[move.source], self.driver_host
        if move.prepared == {"create", "import", "hold", "stop"} and self.random.random() < 0.8:
            self.revision += 1
            self.home, self.generation = move.target, move.generation
            base = target.segment.place(f"{move.target}/nic0", move.vf_index).base
            length = bar_span(self.bars)
            entry = h1.message(base, generation=move.generation, revision=self.revision, length=length)
            revision = self.revision
            move.left = {
                "update": lambda: h1.update(move.revision, entry, lift=True),
                "destroy": lambda: source.destroy(move.generation - 1, move.revision, COMMITTED),
            }
            if self.random.random() < 0.5:
                move.left["watch"] = lambda: h1.drivers.follow([entry], revision, complete=False)
        elif self.random.random() < 0.3 or "create" not in move.prepared:
            move.left = {
                "destroy": lambda: target.destroy(move.generation, move.revision, ABORTED),
                "resume": lambda: source.resume(move.generation - 1, move.revision),
                "lift": lambda: h1.lift(move.revision, ("d1", "vf1", move.generation - 1)),
            }

    def conclude(self) -> None:
        """Send one of the consequences; after the last, the migration is over."""
        move = self.move
        if move is None or move.left is None:
            return
        name = self.random.choice(sorted(move.left))
        assert self.ask(move.left.pop(name)) or name == "watch", f"{name} is true whenever it comes"
        if not move.left:
            self.move = None

    # What must hold

    def instances(self) -> list[tuple[str, Instance]]:
        return [(name, instance) for name, host in self.hosts.items() for instance in host.functions.instances()]

    def check(self) -> None:
        serving = [(name, i.about.generation) for name, i in self.instances() if i.is_serving]
        assert len(serving) <= 1, f"two homes: {serving}"
        assert all(generation <= self.generation for _, generation in serving), "a home that nobody decided on"
        self.check_answers()

    async def finish(self) -> None:
        """Let the migration end, everything arrive, and check what is left."""
        while self.move is not None:
            for _ in range(8):
                await self.prepare()
            self.decide()
            self.conclude()
        for _ in range(300):
            for link in self.fabric.links.values():
                link.come_back()
                link.carry_late()
                link.carry_all()
            await self.clock.advance(0.3)
            self.check()
            if not self.submitted:
                break
        assert not self.submitted, "some accesses were never answered"
        assert self.driver_host.drivers.holds() == []
        ((name, home),) = self.instances()
        assert (name, home.about.generation) == (self.home, self.generation)
        (sequencer,) = home.image.sequencers() or [home.image.sequencer("d1")]
        assert home.image.memory == memory_after(sequencer.last)

    def close(self) -> None:
        for host in self.hosts.values():
            host.close()


def run_now(work) -> None:
    """Run a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration:
        return
    work.close()
    raise AssertionError("it waits")


EVENTS = {
    "submit": World.submit,
    "do at once": World.do_at_once,
    "carry a request": World.carry_request,
    "carry a response": World.carry_response,
    "carry all": World.carry_all,
    "carry something late": World.carry_late,
    "break a link": World.break_link,
    "mend a link": World.mend_link,
    "wait": World.wait,
    "kill a daemon": World.kill,
    "begin": World.begin,
    "prepare": World.prepare,
    "decide": World.decide,
    "conclude": World.conclude,
    "repeat a request": World.repeat,
}
OFTEN = ["submit", "do at once", "carry all", "begin", "prepare", "prepare", "prepare", "decide", "conclude", "wait"]


async def live(events: list[str], seed: int) -> None:
    with tempfile.TemporaryDirectory() as path:
        world = World(Path(path), Random(seed))
        await settle()
        try:
            for event in events:
                happened = EVENTS[event](world)
                if happened is not None:
                    await happened
                await settle(8)
                world.check()
            await world.finish()
        finally:
            if world.importing is not None:
                world.importing.cancel()
                await asyncio.gather(world.importing, return_exceptions=True)
            world.close()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([*EVENTS, *OFTEN]), max_size=120), st.integers(0, 1 << 32))
def test_every_access_takes_effect_once_in_order(events: list[str], seed: int):
    asyncio.run(live(events, seed))


@pytest.mark.parametrize("seed", range(6))
def test_every_access_takes_effect_once_in_order_in_a_long_life(seed: int):
    random = Random(seed)
    asyncio.run(live(random.choices([*EVENTS, *OFTEN], k=1500), seed))
