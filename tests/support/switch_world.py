"""Three hosts with a switch each, and functions that send frames to each other, move, and are killed with their hosts.

The functions are "recorders": a device whose state is the list of all frames that it took. Between the hosts is a
network that loses, delays and repeats calls; what etcd says comes to the hosts when the test lets it.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from struct import pack, pack_into, unpack_from

import pytest
from support.bench import SEGMENTS, Bench
from support.fake_dma import FakeDmaLinks
from support.fake_fabric import FakeFabric
from support.manual_clock import ManualClock

from hostd import models, stations, switch
from hostd.directory import Directory, Peer
from hostd.engine import Engine
from hostd.instance import Instance
from hostd.models.base import DmaWrite, Frame, Section, Step, Store, Work
from hostd.models.ethernet import mac_address
from hostd.stations import Stations
from hostd.switch import Switch, SwitchReach
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import function_key, host_key
from vfleet.etcd.records import encode
from vfleet.etcd.store import Changes, Event, KeyValue, Listing
from vfleet.v1.fabric_service_pb2 import DeliverFramesRequest, DeliverFramesResponse
from vfleet.v1.records_pb2 import (
    FUNCTION_STATUS_ACTIVE,
    FUNCTION_STATUS_LOST,
    Device,
    Function,
    Host,
)

BARS = {0: 4096}
BROADCAST = b"\xff" * 6
MOST = 4000
COUNT = 4096
LOG = 4104
FULL = 0


class Recorder:
    """A device that keeps of each frame the sender's number for it; while its first register isn't 0 it has no room."""

    name = "recorder"
    private_bytes = 9 * 4096
    version = 1
    local_memory = plain_memory = range(0)
    keeps_local_memory = False
    sections = (Section("all", 0, 10 * 4096),)

    def __init__(self, identity, bars) -> None:
        pass

    def reset(self) -> list[Store]:
        return []

    def read(self, memory, offset, length):
        return bytes(memory[offset : offset + length]), ()

    def write(self, memory, offset, data):
        return [(offset, data)]

    def work(self, memory) -> Work | None:
        return None

    def finish(self, memory, work, data) -> Step:
        return Step()

    def receive(self, memory, frame) -> Step | None:
        (count,) = unpack_from("<Q", memory, COUNT)
        if memory[FULL] or count >= MOST:
            return None
        stored = bytearray(8)
        pack_into("<Q", stored, 0, count + 1)
        # Each frame makes the device send something, too, which lies in the other ring.
        return Step([(COUNT, bytes(stored)), (LOG + 8 * count, frame[14:22])], [DmaWrite(0, b"x")])


@contextmanager
def recorders() -> Iterator[None]:
    """Let there be this model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "MODELS", {**models.MODELS, Recorder.name: Recorder})
        for user in (switch, stations):
            patch.setattr(user, "NETWORK_MODELS", frozenset((Recorder.name,)))
        yield


class FakeStore:
    """Tells a host's watches what etcd has, when it is let."""

    def __init__(self, world: "World") -> None:
        self.world = world
        self.changed = asyncio.Event()

    async def watch(self, prefix: str) -> AsyncIterator[Listing | Changes]:
        seen = dict(self.world.records)
        revision = self.world.revision
        yield Listing(revision, tuple(KeyValue(k, v, 1, revision) for k, v in seen.items() if k.startswith(prefix)))
        while True:
            changed = self.changed
            now = dict(self.world.records)
            keys = [key for key in {**seen, **now} if key.startswith(prefix) and seen.get(key) != now.get(key)]
            if keys:
                seen = now
                yield Changes(revision, tuple(Event(key, now.get(key), 1, revision) for key in keys))
            await changed.wait()

    def tell(self) -> None:
        """Let the host learn of all that is so."""
        self.changed.set()
        self.changed = asyncio.Event()


class Node(Bench):
    """A host with a switch."""

    def __init__(self, world: "World", path: Path, host: str) -> None:
        self.world = world
        super().__init__(path, host, world.clock, FakeFabric(), FakeDmaLinks(), Recorder.name)

    def start(self) -> None:
        super().start()
        self.store = FakeStore(self.world)
        self.directory = Directory()
        self.stations = Stations(self.directory)
        self.switch = Switch(
            SwitchReach(
                self.segment.number,
                self.functions,
                self.engines,
                self.stations,
                self.directory,
                self.world.deliver,
                self.clock,
                Random(self.world.random.random()),
            )
        )
        self.watches = [
            asyncio.create_task(followed.follow(self.store)) for followed in (self.directory, self.stations)
        ]

    def close(self) -> None:
        for task in (*self.watches, *self.switch._tasks):
            task.cancel()
        super().close()


class World:
    """The fleet. `sent` is, by sender and receiver, the numbers of the frames that the sender's device has sent."""

    def __init__(self, path: Path, random: Random, functions: dict[str, str]) -> None:
        self.random = random
        self.clock = ManualClock()
        self.records: dict[str, bytes] = {}
        self.revision = 1
        self.kindness = 1.0
        self.cut: set[str] = set()
        self.late: list[tuple[Node, DeliverFramesRequest]] = []
        self.identities = {name: number for number, name in enumerate(functions, 0x5000)}
        self.generations = dict.fromkeys(functions, 1)
        self.homes: dict[str, str] = {}
        self.slots = dict.fromkeys(functions, 1)
        self.numbers = dict.fromkeys(functions, 0)
        self.sent: dict[tuple[str, str], list[int]] = {(a, b): [] for a in functions for b in functions if a != b}
        self.nodes: dict[str, Node] = {}
        for name in SEGMENTS:
            self.nodes[name] = Node(self, path / name, name)
            self.record_host(name)
        for slot, (function, host) in enumerate(functions.items()):
            self.slots[function] = slot
            self.nodes[host].create(function, vf_index=slot + 1, bars=BARS, identity=self.identities[function])
            self.settle_home(function, host)
        self.tell()

    # What etcd says

    def record_host(self, name: str, attachments: tuple[str, ...] = ("lan",)) -> None:
        devices = [Device(name=f"{name}/nic0", host=name, attachments=attachments)]
        record = Host(name=name, segment=SEGMENTS[name], address=name, incarnation=name, devices=devices)
        self.records[host_key(name)] = encode(record)

    def settle_home(self, function: str, host: str, status=FUNCTION_STATUS_ACTIVE) -> None:
        self.homes[function] = host
        instance = self.instance(function)
        record = Function(
            name=function,
            identity=self.identities[function],
            generation=self.generations[function],
            device=f"{host}/nic0",
            base=instance.about.base,
            model=Recorder.name,
            status=status,
        )
        self.records[function_key(function)] = encode(record)
        self.revision += 1

    def lose(self, function: str) -> None:
        self.settle_home(function, self.homes[function], FUNCTION_STATUS_LOST)
        self.tell()

    def tell(self, *hosts: str) -> None:
        for host in hosts or self.nodes:
            self.nodes[host].store.tell()

    # The network

    async def deliver(self, peer: Peer, request: DeliverFramesRequest) -> DeliverFramesResponse:
        """A call over the network: lost, late, done twice, or its answer lost, unless `kindness` is 1."""
        await asyncio.sleep(0)
        node = self.nodes[peer.address]
        copy = DeliverFramesRequest.FromString(request.SerializeToString())
        if peer.address in self.cut:
            raise VfleetError(Reason.UNREACHABLE, "the network is cut")
        if self.random.random() >= self.kindness:
            if self.random.random() < 0.5:
                self.late.append((node, copy))
                raise VfleetError(Reason.UNREACHABLE, "lost, or late")
            node.switch.take(copy)
            raise VfleetError(Reason.UNREACHABLE, "the answer was lost")
        return node.switch.take(copy)

    def arrive_late(self) -> None:
        if self.late:
            node, request = self.late.pop(self.random.randrange(len(self.late)))
            node.switch.take(request)

    # The functions

    def instance(self, function: str) -> Instance:
        return self.nodes[self.homes[function]].functions.require(function, self.generations[function])

    def engine(self, function: str) -> Engine:
        return self.nodes[self.homes[function]].engine(self.generations[function], function=function)

    def send(self, function: str, destination: str | None, count: int = 1) -> int:
        """Let a device send frames to another's address, or to all; return how many there was room for."""
        engine = self.engine(function)
        for done in range(count):
            part = engine.instance.master
            if not engine.instance.is_serving or not part.frames.has_room:
                return done
            number = self.numbers[function]
            self.numbers[function] += 1
            mac = mac_address(self.identities[destination]) if destination else BROADCAST
            source = self.identities[function]
            frame = mac + mac_address(source) + b"\x88\xb5" + pack("<II", number, source) + bytes(40)
            engine._apply(Step((), [Frame(frame)]))
            for sender, receiver in self.sent:
                if sender == function and destination in (None, receiver):
                    self.sent[sender, receiver].append(number)
        return count

    def received(self, function: str) -> list[int]:
        """Return the numbers of all frames that a function took, with the senders' identities above 32 bits."""
        memory = self.instance(function).image.memory
        (count,) = unpack_from("<Q", memory, COUNT)
        return list(unpack_from(f"<{count}Q", memory, LOG))

    def fill(self, function: str, *, full: bool) -> None:
        self.instance(function).image.store([(FULL, bytes([full]))])

    async def move(self, function: str, target: str, *, commits: bool = True, tells: bool = True) -> None:
        """Move a function; frames that it had not sent yet go along. Without a commit it runs on where it was."""
        self.revision += 10
        source, generation = self.nodes[self.homes[function]], self.generations[function]
        source.functions.prove(self.instance(function))
        self.slots[function] = (self.slots[function] + len(self.slots)) % (7 * len(self.slots))
        moved = self.nodes[target].create(
            function,
            generation + 1,
            self.revision,
            fresh=False,
            vf_index=self.slots[function] + 1,
            bars=BARS,
            identity=self.identities[function],
        )
        source.stop(generation, self.revision, function=function)
        await asyncio.sleep(0)
        if not commits:
            source.resume(generation, self.revision, function=function)
            self.nodes[target].destroy(generation + 1, self.revision, 2, function=function)
            return
        moved.image.store([(0, bytes(self.instance(function).image.memory))])
        self.nodes[target].functions.complete_import(moved)
        self.generations[function] += 1
        self.settle_home(function, target)
        if tells:
            self.tell()
        self.nodes[target].functions.prove(moved)
        await asyncio.sleep(0)
        source.destroy(generation, self.revision, 1, function=function)

    def restart(self, host: str) -> None:
        self.nodes[host].restart()

    async def until_quiet(self) -> None:
        """Wait until no function has frames left to be carried. The network is kind."""
        async with asyncio.timeout(20):
            while any(self.engine(function).frames.peek() for function in self.homes):
                await asyncio.sleep(0.002)

    async def close(self) -> None:
        for node in self.nodes.values():
            tasks = (*node.watches, *node.switch._tasks, *node.engines._tasks)
            node.close()
            await asyncio.gather(*tasks, return_exceptions=True)
