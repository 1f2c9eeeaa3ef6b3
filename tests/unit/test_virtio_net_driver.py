"""The virtio-net workload's driver, two of them in rigs on a wire: how they meet, end, and go on after a kill."""

import sys
import types
from collections.abc import Callable, Coroutine, Generator
from random import Random
from types import FrameType

import pytest
from support.bus_master_rig import Rig
from support.rig_port import CountingTally, RigPort

from hostd.models import create_model
from hostd.models.virtio_net import VirtioNet
from hostd.workloads import virtio_net as workload
from hostd.workloads.virtio_net import ACKNOWLEDGED, PEER, RECEIVED, SENDING, VirtioNetDriver
from hostd.workloads.virtio_queues import MAIN_MEMORY_BYTES
from vfleet.address import bar_span
from vfleet.v1.driver_service_pb2 import WorkloadOptions

BARS = {0: 0x8000}
MAIN_ADDRESS = 1 << 32
WINDOW = 8


class KilledError(BaseException):
    """The daemon is no more."""


@types.coroutine
def turn_over() -> Generator[None, None, None]:
    """Let the other driver, and the wire, have their turn."""
    yield


class Port(RigPort):
    """A port at which a driver that waits lets others go on."""

    async def interrupt(self, data: int, timeout_s: float | None = None) -> int:
        assert timeout_s is not None
        self.deliver()
        await turn_over()
        count = self.rig.interrupts[data] - self._seen[data]
        self._seen[data] += count
        self.clock_s += 0.001 if count else timeout_s
        return count

    async def pause(self, seconds: float) -> None:
        self.deliver()
        self.clock_s += 0.001
        await turn_over()


class Station:
    """A driver with its device, and what it told of."""

    def __init__(self, identity: int, random: Random | None = None) -> None:
        def new_model() -> VirtioNet:
            model = create_model("virtio-net", identity, BARS)
            assert isinstance(model, VirtioNet)
            return model

        image_bytes = bar_span(BARS) + VirtioNet.private_bytes
        self.rig = Rig(new_model, image_bytes, MAIN_MEMORY_BYTES, MAIN_ADDRESS)
        self.random = random
        self.tally = CountingTally()
        self.is_running = self.is_stopping = False
        self.new_driver()

    def new_driver(self) -> None:
        """Make the driver anew over its main memory."""
        self.port = Port(self.rig, bar_span(BARS), self.random)
        self.port.stopping = self.is_stopping
        self.driver = VirtioNetDriver(self.port, self.tally, WorkloadOptions(window=WINDOW))
        self.running: Coroutine[None, None, None] = self.driver.run()

    def start(self) -> None:
        with pytest.raises(StopIteration):
            self.driver.start().send(None)
        self.port.deliver()
        self.is_running = True

    def turn(self) -> None:
        """Let the driver go on until it waits."""
        if self.is_running:
            try:
                self.running.send(None)
            except StopIteration:
                self.is_running = False

    def turn_until(self, is_time: Callable[[], bool]) -> None:
        """Let the driver go on until it waits; its daemon is killed before the first line at which it is time."""

        def trace(frame: FrameType, event: str, _: object):
            if frame.f_code.co_filename != workload.__file__:
                return None
            if event == "line" and is_time():
                raise KilledError
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            self.turn()
        except KilledError:
            self.port.die()
            self.new_driver()
        finally:
            sys.settrace(before)

    @property
    def words(self) -> memoryview:
        return memoryview(self.rig.main).cast("Q")


class Pair:
    """Two stations on a wire."""

    def __init__(self, random: Random | None = None) -> None:
        self.random = random
        self.a, self.b = self.stations = (Station(1, random), Station(2, random))

    def carry(self) -> None:
        """Let devices and wire do all that they can."""
        busy = True
        while busy:
            busy = False
            for sender, receiver in (self.stations, self.stations[::-1]):
                busy |= bool(sender.rig.run())
                while sender.rig.frames and receiver.rig.receive(sender.rig.frames[0]):
                    sender.rig.frames.pop(0)
                    busy = True

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            for station in self.stations:
                station.turn()
                self.carry()

    def end(self) -> None:
        """Let both end, and check that frames sent equal frames received."""
        for station in self.stations:
            station.is_stopping = station.port.stopping = True
        self.run(100)
        assert not any(station.is_running for station in self.stations)
        for own, other in (self.stations, self.stations[::-1]):
            sent = own.words[SENDING] >> 17
            assert sent == own.words[ACKNOWLEDGED] == other.words[RECEIVED] >> 16
            assert own.tally.wrong == []


@pytest.mark.parametrize("rounds", [0, 1, 5])
def test_frames_go_both_ways_though_one_driver_is_started_later(rounds: int) -> None:
    pair = Pair()
    pair.a.start()
    # Nobody hears what it says meanwhile.
    pair.run(rounds)
    pair.b.start()
    pair.run(20)
    assert min(station.tally.done for station in pair.stations) >= 10 * WINDOW
    pair.end()


def test_frames_go_both_ways_though_a_driver_hears_of_the_other_before_it_has_said_anything() -> None:
    pair = Pair()
    pair.a.start()
    pair.b.start()
    pair.a.turn()
    pair.carry()
    pair.b.turn()
    pair.run(20)
    assert min(station.tally.done for station in pair.stations) >= 10 * WINDOW
    pair.end()


def test_a_driver_that_is_killed_when_it_has_heard_of_the_other_lets_itself_be_known() -> None:
    pair = Pair()
    pair.a.start()
    pair.b.start()
    pair.a.turn()
    pair.carry()
    pair.b.turn_until(lambda: bool(pair.b.words[RECEIVED]))
    assert pair.b.words[PEER]
    assert not pair.b.words[SENDING]
    pair.run(20)
    assert min(station.tally.done for station in pair.stations) >= 10 * WINDOW
    pair.end()


@pytest.mark.parametrize("seed", range(10))
def test_drivers_that_are_killed_at_any_line_while_they_meet_go_on(seed: int) -> None:
    random = Random(seed)
    pair = Pair(random)
    pair.a.start()
    pair.run(random.randrange(3))
    pair.b.start()
    for _ in range(12):
        lines = iter(range(random.randrange(1, 500)))
        random.choice(pair.stations).turn_until(lambda lines=lines: next(lines, None) is None)
        if random.random() < 0.7:
            pair.carry()
    before = [station.words[ACKNOWLEDGED] for station in pair.stations]
    pair.run(20)
    for station, acknowledged in zip(pair.stations, before, strict=True):
        assert station.words[ACKNOWLEDGED] >= acknowledged + 5 * WINDOW
    pair.end()


@pytest.mark.parametrize("seed", range(10))
def test_drivers_that_are_killed_at_any_line_while_they_end_have_all_frames(seed: int) -> None:
    random = Random(seed)
    pair = Pair(random)
    for station in pair.stations:
        station.start()
    pair.run(5)
    for station in pair.stations:
        station.is_stopping = station.port.stopping = True
    for _ in range(60):
        lines = iter(range(random.randrange(1, 200)))
        random.choice(pair.stations).turn_until(lambda lines=lines: next(lines, None) is None)
        if random.random() < 0.7:
            pair.carry()
    pair.end()
