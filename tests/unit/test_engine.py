"""The engine: whole steps or none, what they send in order and once, and faults on purpose."""

import asyncio
from collections.abc import Hashable, Sequence
from pathlib import Path

import pytest
from guests.fields import Field, writes_on_their_way
from support.bench import VIRTUAL_ADDRESS, Bench, reason_of
from support.fake_dma import FakeDmaLinks
from support.fake_fabric import FakeFabric
from support.manual_clock import ManualClock, settle

import hostd.models
from hostd.driver import Driver
from hostd.engine import Delivery
from hostd.engine_part import ENGINE_BYTES, MAX_SENDERS, RING_BYTES
from hostd.image import MAX_STEP_BYTES
from hostd.instance import Instance
from hostd.models.base import DmaRead, DmaWrite, Frame, Section, Step, Work
from vfleet.errors import Reason
from vfleet.limits import INTERRUPT_PAGE_ADDRESS, MAIN_MEMORY_VIRTUAL_ADDRESS
from vfleet.v1.access_pb2 import (
    ACCESS_KIND_FENCE,
    ACCESS_KIND_RESET,
    ACCESS_KIND_WRITE,
    ACCESS_STATUS_OK,
    AccessKind,
)
from vfleet.v1.function_service_pb2 import (
    FAULT_KIND_DEVICE,
    FAULT_KIND_DMA_DELAY,
    FAULT_KIND_DMA_READ,
    FAULT_KIND_DMA_WRITE,
    FAULT_KIND_MODEL,
    InjectFaultRequest,
    ResetFunctionRequest,
)
from vfleet.v1.types_pb2 import DEVICE_STATE_ERROR, DEVICE_STATE_RUNNING

MEMORY_BYTES = 1 << 16
MAIN = MAIN_MEMORY_VIRTUAL_ADDRESS
WANTED, DONE, READ_FROM, FRAMES, FAULTED = 0, 8, 16, 24, 32


def word(memory: memoryview, offset: int) -> int:
    return int.from_bytes(memory[offset : offset + 8], "little")


def put(offset: int, value: int) -> tuple[int, bytes]:
    return offset, value.to_bytes(8, "little")


class Counter:
    """A device that writes 1, 2, 3 … up to the register WANTED to main memory, each with an interrupt and a frame.

    If the register READ_FROM isn't 0, it reads 8 bytes there before each.
    """

    name = "counter"
    private_bytes = 0
    sections = (Section("registers", 0, 4096),)
    version = 1
    local_memory = plain_memory = range(0)
    keeps_local_memory = False

    def __init__(self, identity: int, bar_bytes: dict[int, int]) -> None:
        """Take anything."""

    def reset(self):
        return ()

    def read(self, memory, offset, length):
        return bytes(memory[offset : offset + length]), ()

    def write(self, memory, offset, data):
        return ((offset, data),)

    def work(self, memory) -> Work | None:
        done = word(memory, DONE)
        if word(memory, WANTED) <= done:
            return None
        at = word(memory, READ_FROM)
        what: Hashable = (done, at, word(memory, WANTED))
        return Work(what, (DmaRead(at, 8),) if at else ())

    def finish(self, memory, work, data: Sequence[bytes] | None) -> Step:
        number = word(memory, DONE) + 1
        stores = [put(DONE, number)]
        if data is None:
            return Step([*stores, put(FAULTED, word(memory, FAULTED) + 1)])
        seen = data[0] if data else b"no read."
        sends = [
            DmaWrite(MAIN + 16 * (number % 64), number.to_bytes(8, "little") + seen),
            DmaWrite(INTERRUPT_PAGE_ADDRESS, (1).to_bytes(4, "little")),
        ]
        if number == 13:
            raise RuntimeError("a defect")
        return Step(stores, [*sends, Frame(b"frame %8d" % number)] if number % 2 else sends)

    def receive(self, memory, frame: bytes) -> Step | None:
        if frame == b"no room":
            return None
        return Step([put(FRAMES, word(memory, FRAMES) + 1)])

    def inject(self, memory, name: str, count: int):
        return [put(FAULTED, count)] if name == "own" else None


class Rig:
    """Driver d1 on h1, and its counter vf1 on h1 or h2."""

    def __init__(self, path: Path, home: str) -> None:
        self.clock = ManualClock()
        self.fabric, self.links = FakeFabric(is_automatic=True), FakeDmaLinks(is_automatic=True)
        self.h1, self.h2 = (
            Bench(path / name, name, self.clock, self.fabric, self.links, "counter") for name in ("h1", "h2")
        )
        self.home = {"h1": self.h1, "h2": self.h2}[home]
        self.fabric.peers = {1: self.h1.functions, 2: self.h2.functions}
        self.links.peers = {1: self.h1.drivers}
        self.instance = self.home.create(bars={0: 4096})
        self.h1.drivers.recorded("d1", MEMORY_BYTES)
        self.h1.drivers.attach(self.h1.message(self.instance.about.base, length=4096))

    @property
    def memory(self) -> memoryview:
        return self.instance.image.memory

    @property
    def link(self):
        return self.links.to(1)

    async def write(self, offset: int, value: int, driver: Driver | None = None) -> None:
        driver = driver or self.h1.drivers.require("d1")
        await driver.queue("vf1").synchronized()
        submitted = await driver.submit(
            ACCESS_KIND_WRITE, VIRTUAL_ADDRESS + offset, 8, value.to_bytes(8, "little"), sequence=0
        )
        await submitted.result(1)

    async def run(self, seconds: float = 1.0) -> None:
        await self.clock.advance(seconds)

    def interrupts(self) -> int:
        return self.h1.drivers.require("d1").receivers["vf1"].interrupts(1)

    def written(self, number: int) -> bytes:
        memory = self.h1.drivers.require("d1").memory
        assert memory is not None
        return memory[16 * (number % 64) : 16 * (number % 64) + 16]

    def inject(self, kind, **more) -> Reason | None:
        request = InjectFaultRequest(function="vf1", generation=1, kind=kind, **more)
        return reason_of(self.home.engines.inject, request)

    def close(self) -> None:
        self.h1.close()
        self.h2.close()


@pytest.fixture(params=["h1", "h2"])
async def rig(tmp_path: Path, request, monkeypatch):
    monkeypatch.setattr(hostd.models, "MODELS", {**hostd.models.MODELS, "counter": Counter})
    found = Rig(tmp_path, request.param)
    await settle()
    yield found
    found.close()


def entry(number: int, seen: bytes = b"no read.") -> bytes:
    return number.to_bytes(8, "little") + seen


async def test_each_step_is_done_and_what_it_sends_arrives_once(rig: Rig):
    await rig.write(WANTED, 12)
    await rig.run()
    assert [rig.written(number) for number in range(1, 13)] == [entry(number) for number in range(1, 13)]
    assert (word(rig.memory, DONE), rig.interrupts()) == (12, 12)
    assert rig.instance.master is not None
    assert rig.instance.master.writes.head == rig.instance.master.writes.tail
    assert rig.home.engine().frames.peek() == [(n, b"frame %8d" % (2 * n - 1)) for n in range(1, 7)]


async def test_reads_see_main_memory_and_a_read_outside_is_a_fault(rig: Rig):
    memory = rig.h1.drivers.require("d1").memory
    assert memory is not None
    memory[4096:4104] = b"the data"
    await rig.write(READ_FROM, MAIN + 4096)
    await rig.write(WANTED, 2)
    await rig.run()
    assert rig.written(2) == entry(2, b"the data")
    await rig.write(READ_FROM, MAIN + MEMORY_BYTES - 4)
    await rig.write(WANTED, 3)
    await rig.run()
    assert (word(rig.memory, DONE), word(rig.memory, FAULTED), rig.instance.shown().dma_faults) == (3, 1, 1)
    assert rig.interrupts() == 2


async def test_a_function_that_is_stopped_does_nothing_and_goes_on_where_it_was(rig: Rig):
    await rig.write(WANTED, 5)
    rig.home.stop(1, 10)
    before = bytes(rig.memory)
    await rig.run()
    assert bytes(rig.memory) == before
    rig.home.resume(1, 10)
    await rig.run()
    assert (word(rig.memory, DONE), rig.interrupts()) == (5, 5)


async def test_what_was_sent_and_has_no_answer_is_sent_again_and_arrives_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hostd.models, "MODELS", {**hostd.models.MODELS, "counter": Counter})
    rig = Rig(tmp_path, "h2")
    await settle()
    rig.link.is_automatic = False
    await rig.write(WANTED, 6)
    await rig.run()
    rig.link.carry_request()  # it takes effect, and the answer gets lost
    rig.link.break_off()
    rig.link.come_back()
    rig.link.carry_late()
    rig.link.carry_all()
    await rig.run()
    rig.link.carry_all()
    assert (rig.interrupts(), rig.written(6)) == (6, entry(6))
    assert rig.instance.master is not None
    assert rig.instance.master.writes.head == rig.instance.master.writes.tail
    # A daemon that comes back sends what it may have sent.
    await rig.write(WANTED, 8)
    await rig.run()
    rig.link.carry_request()
    rig.link.break_off()
    rig.h2.restart()
    rig.link.come_back()
    await rig.run()
    rig.link.carry_all()
    assert rig.interrupts() == 8
    rig.close()


@pytest.mark.parametrize("falsified", [None, *writes_on_their_way(Counter.private_bytes + 4096)])
async def test_each_field_of_what_was_not_sent_counts(tmp_path: Path, monkeypatch, falsified: Field | None):
    monkeypatch.setattr(hostd.models, "MODELS", {**hostd.models.MODELS, "counter": Counter})
    rig = Rig(tmp_path, "h2")
    await settle()
    rig.link.break_off()
    await rig.write(WANTED, 6)
    await rig.run()
    assert falsified is None or falsified.falsify(rig.memory)
    rig.h2.restart()
    rig.link.come_back()
    await rig.run()
    is_well = rig.interrupts() == 6 and [rig.written(n) for n in range(1, 7)] == [entry(n) for n in range(1, 7)]
    assert is_well == (falsified is None)
    rig.close()


async def test_no_work_is_taken_while_what_was_sent_has_no_room(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hostd.models, "MODELS", {**hostd.models.MODELS, "counter": Counter})
    monkeypatch.setattr(Counter, "finish", lambda self, memory, work, data: large_step(memory))
    rig = Rig(tmp_path, "h2")
    await settle()
    rig.link.is_automatic = False
    await rig.write(WANTED, 40)
    await rig.run()
    assert rig.instance.master is not None
    writes = rig.instance.master.writes
    assert RING_BYTES - MAX_STEP_BYTES < writes.tail - writes.head <= RING_BYTES
    stuck = word(rig.memory, DONE)
    assert 0 < stuck < 40
    for _ in range(20):
        rig.link.carry_all()
        await rig.run()
    assert (word(rig.memory, DONE), writes.last, writes.head) == (40, 80, writes.tail)
    memory = rig.h1.drivers.require("d1").memory
    assert memory is not None
    assert memory[4096:12288] == bytes([40]) * 8192
    rig.close()


def large_step(memory: memoryview) -> Step:
    number = word(memory, DONE) + 1
    page = bytes([number]) * 4096
    return Step([put(DONE, number)], [DmaWrite(MAIN + 4096, page), DmaWrite(MAIN + 8192, page)])


async def test_work_whose_read_took_long_is_not_done_without_room(tmp_path: Path, monkeypatch):
    pages = [DmaWrite(MAIN + 4096 * number, bytes([number]) * 4096) for number in range(1, 4)]
    monkeypatch.setattr(hostd.models, "MODELS", {**hostd.models.MODELS, "counter": Counter})
    monkeypatch.setattr(Counter, "receive", lambda self, memory, frame: Step((), pages))
    monkeypatch.setattr(Counter, "finish", lambda self, memory, work, data: Step([put(DONE, 1)], pages))
    rig = Rig(tmp_path, "h2")
    await settle()
    rig.link.is_automatic = False
    await rig.write(READ_FROM, MAIN)
    await rig.write(WANTED, 1)
    await rig.run(0.01)
    engine, part = rig.home.engine(), rig.instance.master
    assert part is not None
    for _ in range(12):
        engine._apply(Step((), [DmaWrite(MAIN, b"x" * 4000)]))
    assert engine.deliver(b"a frame", 77, 1) is Delivery.TAKEN
    rig.link.carry_request()
    rig.link.carry_response()
    await rig.run(0.01)
    assert (word(rig.memory, DONE), part.writes.tail - part.writes.head <= RING_BYTES) == (0, True)
    for _ in range(5):
        rig.link.carry_all()
        await rig.run()
    assert (word(rig.memory, DONE), part.writes.head, part.writes.last) == (1, part.writes.tail, 18)
    rig.close()


async def test_what_was_read_before_a_reset_is_thrown_away_though_the_same_work_comes_again(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(hostd.models, "MODELS", {**hostd.models.MODELS, "counter": Counter})
    rig = Rig(tmp_path, "h2")
    await settle()
    memory = rig.h1.drivers.require("d1").memory
    assert memory is not None
    rig.link.is_automatic = False
    for now in (b"before  ", b"after   "):
        memory[4096:4104] = now
        await rig.write(READ_FROM, MAIN + 4096)
        await rig.write(WANTED, 1)
        await rig.run(0.01)
        if now == b"before  ":
            rig.link.carry_request()
            rig.home.functions.reset(ResetFunctionRequest(function="vf1", generation=1))
    rig.link.carry_response()
    await rig.run(0.01)
    rig.link.carry_all()
    await rig.run()
    rig.link.carry_all()
    assert (rig.written(1), rig.interrupts()) == (entry(1, b"after   "), 1)
    rig.close()


async def test_a_defect_of_the_model_is_a_fault_of_the_device_that_a_reset_ends(rig: Rig):
    await rig.write(WANTED, 13)
    await rig.run()
    assert (rig.instance.state, word(rig.memory, DONE), rig.interrupts()) == (DEVICE_STATE_ERROR, 12, 12)
    rig.home.functions.reset(ResetFunctionRequest(function="vf1", generation=1))
    assert (rig.instance.state, word(rig.memory, DONE)) == (DEVICE_STATE_RUNNING, 0)
    await rig.run()
    await rig.write(WANTED, 2)
    await rig.run()
    assert (word(rig.memory, DONE), rig.interrupts()) == (2, 14)


async def test_a_fence_says_what_was_sent_and_of_a_broken_function_nothing(rig: Rig):
    sequencer, base = rig.instance.image.sequencer("another"), rig.instance.about.base

    def fence(kind: AccessKind.ValueType) -> int:
        status, sent = rig.instance.access(sequencer, sequencer.last + 1, kind, base, 8, b"")
        assert (status, len(sent)) == (ACCESS_STATUS_OK, 8)
        return int.from_bytes(sent, "little")

    assert fence(ACCESS_KIND_FENCE) == 0
    await rig.write(WANTED, 3)
    await rig.run()
    assert fence(ACCESS_KIND_FENCE) == 6
    rig.home.functions.fail(rig.instance)
    assert fence(ACCESS_KIND_FENCE) == 0
    assert fence(ACCESS_KIND_RESET) == 6
    assert fence(ACCESS_KIND_FENCE) == 6


async def test_a_reset_cancels_what_was_not_sent_and_its_sequences_go_on(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hostd.models, "MODELS", {**hostd.models.MODELS, "counter": Counter})
    rig = Rig(tmp_path, "h2")
    await settle()
    rig.link.break_off()
    await rig.write(WANTED, 3)
    await rig.run()
    rig.home.functions.reset(ResetFunctionRequest(function="vf1", generation=1))
    await rig.write(WANTED, 1)
    await rig.run()
    rig.link.come_back()
    await rig.run()
    assert (rig.interrupts(), rig.written(1), rig.written(2)) == (1, entry(1), bytes(16))
    assert rig.h1.drivers.require("d1").receivers["vf1"].last == 8
    rig.close()


# Frames


async def test_a_frame_is_taken_once_and_offered_again_while_there_is_no_room(rig: Rig):
    engine = rig.home.engine()
    assert engine.deliver(b"no room", 77, 5) is Delivery.NO_ROOM
    assert [engine.deliver(b"a frame", sender, 5) for sender in (77, 77, 78)] == [
        Delivery.TAKEN,
        Delivery.REPEATED,
        Delivery.TAKEN,
    ]
    assert engine.deliver(b"a frame", 77, 4) is Delivery.REPEATED
    assert engine.deliver(b"a frame", 77, 9) is Delivery.TAKEN
    assert word(rig.memory, FRAMES) == 3
    rig.home.stop(1, 10)
    assert engine.deliver(b"a frame", 77, 10) is Delivery.NOT_RUNNING


def fill_frames(rig: Rig) -> None:
    part = rig.instance.master
    assert part is not None
    while part.frames.has_room:
        rig.home.engine()._apply(Step((), [Frame(bytes(1518))]))


async def test_frames_are_taken_while_those_sent_have_no_room_unless_they_make_more(rig: Rig, monkeypatch):
    fill_frames(rig)
    engine = rig.home.engine()
    assert engine.deliver(b"a frame", 77, 1) is Delivery.TAKEN
    monkeypatch.setattr(Counter, "receive", lambda self, memory, frame: Step((), [Frame(bytes(14))]))
    before = bytes(rig.memory)
    assert engine.deliver(b"a frame", 77, 2) is Delivery.NO_ROOM
    assert rig.memory == before
    engine.frames.acknowledge(engine.frames.peek()[-1][0])
    assert engine.deliver(b"a frame", 77, 2) is Delivery.TAKEN


async def test_work_that_sends_no_frame_goes_on_while_those_sent_have_no_room(rig: Rig, monkeypatch):
    # Each second number is without a frame.
    monkeypatch.setattr(
        Counter,
        "work_without_frames",
        lambda self, memory: self.work(memory) if word(memory, DONE) % 2 else None,
        raising=False,
    )
    fill_frames(rig)
    rig.instance.image.store([put(DONE, 1)])
    await rig.write(WANTED, 4)
    await rig.run()
    assert (word(rig.memory, DONE), rig.interrupts()) == (2, 1)
    frames = rig.home.engine().frames
    frames.acknowledge(frames.peek()[-1][0])
    await rig.run()
    assert (word(rig.memory, DONE), rig.interrupts()) == (4, 3)


async def test_frames_are_told_of_again_after_a_stop_that_a_read_outlasted(rig: Rig):
    rig.inject(FAULT_KIND_DMA_DELAY, count=1, delay_ms=500)
    rig.instance.image.store([put(DONE, 1)])
    await rig.write(READ_FROM, MAIN)
    await rig.write(WANTED, 2)
    await rig.run(0.1)
    told: list[bool] = []
    rig.home.engine().frames.on_frames = lambda: told.append(True)
    rig.home.stop(1, 10)
    rig.home.resume(1, 10)
    await rig.run(0.1)
    assert not told
    await rig.run()
    assert told
    assert word(rig.memory, DONE) == 2


async def test_256_senders_are_known_and_one_that_is_forgotten_makes_room(rig: Rig):
    engine = rig.home.engine()
    for sender in range(1, MAX_SENDERS + 1):
        assert engine.deliver(b"a frame", sender, 1) is Delivery.TAKEN
    assert engine.deliver(b"a frame", 1000, 1) is Delivery.NO_ROOM
    engine.forget_sender(3)
    assert engine.deliver(b"a frame", 1000, 1) is Delivery.TAKEN
    assert engine.deliver(b"a frame", 4, 1) is Delivery.REPEATED


async def test_frames_stay_until_they_are_acknowledged(rig: Rig):
    await rig.write(WANTED, 6)
    await rig.run()
    frames = rig.home.engine().frames
    assert [sequence for sequence, _ in frames.peek()] == [1, 2, 3]
    frames.acknowledge(2)
    assert frames.peek() == [(3, b"frame        5")]
    assert frames.peek(3) == []
    rig.home.restart()
    rig.instance = rig.home.functions.require("vf1", 1)
    assert rig.home.engine().frames.peek() == [(3, b"frame        5")]


# Faults


async def test_injected_faults_happen_as_often_as_was_said(rig: Rig):
    assert rig.inject(FAULT_KIND_DMA_READ, count=2) is None
    await rig.write(READ_FROM, MAIN)
    await rig.write(WANTED, 4)
    await rig.run()
    assert (word(rig.memory, DONE), word(rig.memory, FAULTED), rig.interrupts()) == (4, 2, 2)
    assert rig.inject(FAULT_KIND_DMA_WRITE, count=3) is None
    await rig.write(WANTED, 6)
    await rig.run()
    assert (word(rig.memory, DONE), rig.interrupts()) == (6, 3)
    assert rig.instance.shown().dma_faults == 5
    assert rig.inject(FAULT_KIND_MODEL, name="own", count=70) is None
    assert word(rig.memory, FAULTED) == 70
    assert rig.inject(FAULT_KIND_DEVICE) is None
    assert rig.instance.state == DEVICE_STATE_ERROR
    assert rig.inject(FAULT_KIND_DEVICE) is Reason.ILLEGAL_STATE


async def test_what_was_read_before_an_access_is_thrown_away(rig: Rig):
    memory = rig.h1.drivers.require("d1").memory
    assert memory is not None
    memory[4096:4112] = b"first   second  "
    assert rig.inject(FAULT_KIND_DMA_DELAY, count=1, delay_ms=50) is None
    await rig.write(READ_FROM, MAIN + 4096)
    await rig.write(WANTED, 1)
    await rig.run(0.02)
    assert word(rig.memory, DONE) == 0
    await rig.write(READ_FROM, MAIN + 4104)
    await rig.run(0.1)
    assert rig.written(1) == entry(1, b"second  ")
    assert rig.interrupts() == 1


@pytest.mark.parametrize(
    ("request_of", "reason"),
    [
        ({"kind": FAULT_KIND_DMA_READ}, Reason.INVALID_FIELD),
        ({"kind": FAULT_KIND_DMA_DELAY, "count": 1}, Reason.INVALID_FIELD),
        ({"kind": FAULT_KIND_MODEL, "count": 1, "name": "none"}, Reason.INVALID_FIELD),
        ({"kind": 0, "count": 1}, Reason.INVALID_FIELD),
    ],
)
async def test_a_fault_that_cannot_be_is_refused(rig: Rig, request_of: dict, reason: Reason):
    assert rig.inject(**request_of) is reason


async def test_no_faults_without_leave(rig: Rig):
    rig.home.engines._allows_faults = False
    assert rig.inject(FAULT_KIND_DEVICE) is Reason.ILLEGAL_STATE
    assert rig.instance.state == DEVICE_STATE_RUNNING


async def test_the_engines_part_is_a_section_of_its_own(rig: Rig):
    assert [(section.name, section.start, section.length) for section in rig.instance.sections] == [
        ("registers", 0, 4096),
        ("engine", 4096, ENGINE_BYTES),
    ]
    assert len(rig.memory) == 4096 + ENGINE_BYTES


async def test_an_instance_that_is_removed_ends_its_engine(rig: Rig):
    instance: Instance = rig.instance
    rig.home.functions.remove(instance)
    async with asyncio.timeout(5):
        while rig.home.engines._tasks:
            await asyncio.sleep(0)
    assert rig.home.engines.all() == []


async def test_an_instance_that_is_removed_during_a_read_is_no_defect(rig: Rig, caplog):
    rig.inject(FAULT_KIND_DMA_DELAY, count=1, delay_ms=500)
    await rig.write(READ_FROM, MAIN)
    await rig.write(WANTED, 2)
    await rig.run(0.1)
    rig.home.functions.remove(rig.instance)
    await rig.run()
    assert rig.home.engines.all() == []
    assert caplog.records == []


async def test_an_instance_that_is_removed_waits_for_no_driver_that_is_out_of_reach(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hostd.models, "MODELS", {**hostd.models.MODELS, "counter": Counter})
    rig = Rig(tmp_path, "h2")
    await settle()
    rig.link.is_automatic = False
    await rig.write(READ_FROM, MAIN)
    await rig.write(WANTED, 1)
    await rig.run(0.01)
    rig.link.break_off()
    rig.home.functions.remove(rig.instance)
    await rig.run()
    assert (rig.home.engines.all(), rig.home.engines._tasks, rig.link.senders) == ([], set(), {})
    rig.close()


async def test_a_host_whose_driver_was_detached_is_left_for_that_of_the_next(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(hostd.models, "MODELS", {**hostd.models.MODELS, "counter": Counter})
    rig = Rig(tmp_path, "h2")
    h3 = Bench(tmp_path / "h3", "h3", rig.clock, rig.fabric, rig.links, "counter")
    rig.links.peers[3] = h3.drivers
    await rig.write(WANTED, 2)
    await rig.run()
    assert (len(rig.links.to(1).senders), len(rig.links.to(3).senders)) == (1, 0)
    rig.h1.drivers.detach("d1", "vf1", 1)
    h3.drivers.recorded("d3", MEMORY_BYTES)
    h3.drivers.attach(h3.message(rig.instance.about.base, driver="d3", revision=2, length=4096))
    await rig.write(WANTED, 4, h3.drivers.require("d3"))
    await rig.run()
    assert h3.drivers.require("d3").receivers["vf1"].interrupts(1) == 2
    assert (len(rig.links.to(1).senders), len(rig.links.to(3).senders)) == (0, 1)
    h3.close()
    rig.close()
