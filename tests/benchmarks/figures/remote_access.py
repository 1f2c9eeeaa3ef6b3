"""Accesses a second to a function on another host, over the messages alone on a bare bidirectional stream.

Ours: a driver's queue and link in this process, and a real hostd as the function's home. Half of the accesses write,
half read, 8 bytes each; as many as a driver may have without an answer (64) are on their way, the rest waits in the
queue.

Floor: the same ExchangeRequests on one stream of grpc.aio to another process, which answers each access with a message
of the same size. Both ends make the messages anew each time, access by access, and read every answer; two messages of
32 are on their way, as in ours. No sequence is checked, nothing is stored, and nobody waits for a single access.
"""

import asyncio
from random import Random

import grpc
from benchmarks.measure import Figure, Size, alternate_async, at_least, seconds_of_async
from benchmarks.rig import bench

from hostd.access_queue import AccessQueue
from hostd.directory import Directory, Peer
from hostd.fabric import Fabric, Link
from hostd.reach import Reach
from hostd.translation import Entry
from hostd.waiting import Waiting
from vfleet.address import location_of, table_offset
from vfleet.clock import SystemClock
from vfleet.limits import WINDOW
from vfleet.rpc import Channels
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE, ACCESS_STATUS_OK, Session
from vfleet.v1.fabric_service_pb2 import ExchangeRequest
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceStub

VIRTUAL_ADDRESS = 1 << 40
LOCAL_MEMORY = 1 << 20
WORD = 8
BATCH = WINDOW // 2


class FixedDirectory(Directory):
    """Knows one host."""

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self._peer = peer

    def peer(self, segment: int) -> Peer | None:
        return self._peer


async def run(size: Size) -> list[Figure]:
    async with bench() as rig:
        function = await rig.cluster.fleet.create_function("vf1", "h2/nic0")
        host = await rig.cluster.fleet.get_host("h2")
        directory = FixedDirectory(Peer(host.address, host.incarnation, host.name))
        channels, clock, random = Channels(), SystemClock(), Random()
        fabric = Fabric(lambda segment: Link(segment, directory, channels, clock, random))
        offset = table_offset(function.base, VIRTUAL_ADDRESS)
        entry = Entry("d1", "vf1", VIRTUAL_ADDRESS, 2 << 20, offset, function.generation, "h1")
        assert location_of(function.base).segment == host.segment
        # A segment that isn't the function's: so the way leads through the fabric.
        queue = AccessQueue("d1", entry, Reach(host.segment + 1, 1, lambda: 1, None, fabric, clock, random))
        count = size.of(1024, 128)
        try:
            await queue.synchronized()
            floor = Stream(rig.channel(0), function.base)
            measured = await alternate_async(
                size.of(100, 2),
                lambda: seconds_of_async(lambda: accesses(queue, count)),
                lambda: seconds_of_async(lambda: floor.run(count)),
            )
        finally:
            floor.close()
            queue.close(ConnectionError("the benchmark ends"))
            await fabric.close()
            await channels.close()
    for times in (measured.ours, measured.floor):
        times[:] = [seconds / count * 1e6 for seconds in times]
    return [measured.speed("remote access, batched / bare stream", "µs an access", at_least(0.7))]


async def accesses(queue: AccessQueue, count: int) -> None:
    """Submit so many accesses at once, and check the last answer."""
    waiting = []
    for number in range(count):
        address = VIRTUAL_ADDRESS + LOCAL_MEMORY + number // 2 * WORD
        if number % 2:
            access = Waiting(ACCESS_KIND_READ, address, WORD, b"")
        else:
            access = Waiting(ACCESS_KIND_WRITE, address, WORD, number.to_bytes(WORD, "little"))
        waiting.append(access)
    queue.submit_many(waiting)
    await waiting[-1].answer
    assert waiting[-1].answer.result() == (ACCESS_STATUS_OK, (count - 2).to_bytes(WORD, "little"))


class Stream:
    """The floor: one stream, which lasts as ours does."""

    def __init__(self, channel: grpc.aio.Channel, base: int) -> None:
        self._stream = FabricServiceStub(channel).Exchange()
        self._base = base

    async def run(self, count: int) -> None:
        batches = range(0, count, BATCH)
        room = asyncio.Semaphore(WINDOW // BATCH)

        async def send() -> None:
            for first in batches:
                await room.acquire()
                await self._stream.write(self._batch(first))

        sending = asyncio.create_task(send())
        answered = 0
        for _ in batches:
            response = await self._stream.read()
            for answer in response.answers:
                assert answer.status == ACCESS_STATUS_OK
                answered += len(answer.data) // WORD
            room.release()
        await sending
        assert answered == count // 2

    def close(self) -> None:
        self._stream.cancel()

    def _batch(self, first: int) -> ExchangeRequest:
        request = ExchangeRequest(
            driver="d1", function="vf1", generation=1, acknowledged_sequence=first, session=Session(start=1)
        )
        for number in range(first, first + BATCH):
            access = request.accesses.add()
            access.sequence = number + 1
            access.kind = ACCESS_KIND_READ if number % 2 else ACCESS_KIND_WRITE
            access.address = self._base + LOCAL_MEMORY + number // 2 * WORD
            access.length_bytes = WORD
            if not number % 2:
                access.data = number.to_bytes(WORD, "little")
        return request
