"""DMA from the fabric to memory that has to be asked for: what waits, and what does not wait for it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from support.bench import Bench
from support.manual_clock import settle

from hostd.dma_exchange import MAX_FETCHING, exchange_all
from hostd.memory import MemoryBusyError
from vfleet.v1.fabric_service_pb2 import (
    DMA_REFUSAL_NOT_ATTACHED,
    DMA_REFUSAL_UNSPECIFIED,
    DmaAttachment,
    DmaRead,
    DmaWrite,
    ExchangeDmaRequest,
    ExchangeDmaResponse,
)
from vfleet.v1.types_pb2 import Guest

PAGE = 4096
FIRST = 0x0001_0180 << 32
ATTACHED = DmaAttachment(fleet_generation=1, revision=1, session=1)


class Vmm:
    """A VMM that answers when the test says so, and takes a number of writes."""

    def __init__(self) -> None:
        self.room = 1 << 10
        self.reads: list[tuple[int, Callable[[bytes | None], None]]] = []
        self.writes: list[tuple[int, bytes, bool]] = []

    def read(self, address: int, length: int, answered: Callable[[bytes | None], None]) -> None:
        if not self.room:
            raise MemoryBusyError
        self.reads.append((length, answered))

    def write(self, address: int, data: bytes, *, completes: bool) -> None:
        if not self.room:
            raise MemoryBusyError
        self.room -= 1
        self.writes.append((address, data, completes))


class Stream:
    """The stream of a function's home to host h1, where its driver is a guest."""

    def __init__(self, path: Path) -> None:
        self.bench = Bench(path)
        self.vmm = self.attach("d1", "vf1")
        self.sent: asyncio.Queue[ExchangeDmaRequest | None] = asyncio.Queue()
        self.answers: list[ExchangeDmaResponse] = []
        self.task = asyncio.create_task(self._run())

    def attach(self, name: str, function: str) -> Vmm:
        """Attach a guest, and return its VMM."""
        driver = self.bench.drivers.recorded(name, 16 * PAGE, Guest(socket="/s", model="nvme"))
        self.bench.drivers.attach(self.bench.message(FIRST, driver=name, function=function))
        assert driver.guest_memory is not None
        driver.guest_memory.messages = vmm = Vmm()
        driver.guest_memory.is_present = True
        driver.guest_memory.add(0, 8 * PAGE, None, 0, 16 * PAGE, is_writable=True)
        return vmm

    async def _run(self) -> None:
        async for answer in exchange_all(self.bench.drivers, self._requests(), lambda _: None):
            self.answers.append(answer)

    async def _requests(self) -> AsyncIterator[ExchangeDmaRequest]:
        while (request := await self.sent.get()) is not None:
            yield request

    async def send(
        self, *, driver: str = "d1", function: str = "vf1", first: int = 0, writes: int = 0, read_number: int = 0
    ) -> None:
        base = self.bench.drivers.require(driver).receivers[function].window.base
        request = ExchangeDmaRequest(
            driver=driver,
            function=function,
            generation=1,
            attachment=ATTACHED,
            first_sequence=first,
            writes=[DmaWrite(address=base + 64, data=b"data")] * writes,
            read_number=read_number,
            reads=[DmaRead(address=base, length_bytes=8)] if read_number else [],
        )
        self.sent.put_nowait(request)
        await settle()

    async def end(self) -> None:
        self.sent.put_nowait(None)
        await self.task
        self.bench.close()


@pytest.fixture
async def stream(tmp_path: Path) -> AsyncIterator[Stream]:
    found = Stream(tmp_path)
    yield found
    await found.end()


async def test_what_waits_for_a_vmm_keeps_nothing_else_waiting(stream: Stream):
    await stream.send(read_number=1)
    await stream.send(read_number=2)
    await stream.send(first=1, writes=3)
    assert [(answer.read_number, answer.last_sequence) for answer in stream.answers] == [(0, 3)]
    for _, answered in reversed(stream.vmm.reads):
        answered(b"12345678")
        await settle()
    assert [(answer.read_number, list(answer.data)) for answer in stream.answers[1:]] == [
        (2, [b"12345678"]),
        (1, [b"12345678"]),
    ]
    await stream.send(first=4, writes=1)
    assert stream.answers[-1].last_sequence == 4


async def test_what_the_vmm_refuses_is_a_fault(stream: Stream):
    await stream.send(read_number=1)
    stream.vmm.reads[0][1](None)
    await settle()
    assert [(answer.refusal, len(answer.data)) for answer in stream.answers] == [(DMA_REFUSAL_UNSPECIFIED, 0)]


async def test_a_write_that_finds_no_room_is_the_next_still(stream: Stream):
    stream.vmm.room = 2
    await stream.send(first=1, writes=4)
    assert (stream.answers[-1].last_sequence, stream.answers[-1].refusal) == (2, DMA_REFUSAL_NOT_ATTACHED)
    await stream.send(read_number=1)
    assert (stream.answers[-1].read_number, stream.answers[-1].refusal) == (1, DMA_REFUSAL_NOT_ATTACHED)
    stream.vmm.room = 9
    await stream.send(first=1, writes=4)
    assert (stream.answers[-1].last_sequence, stream.answers[-1].refusal) == (4, DMA_REFUSAL_UNSPECIFIED)
    assert stream.vmm.writes == [(64, b"data", True)] * 4


async def test_only_so_many_reads_wait_and_none_of_another_guest_for_want_of_room(stream: Stream):
    other = stream.attach("d2", "vf2")
    for number in range(1, MAX_FETCHING + 2):
        await stream.send(read_number=number)
    assert [(answer.read_number, answer.refusal) for answer in stream.answers] == [
        (MAX_FETCHING + 1, DMA_REFUSAL_NOT_ATTACHED)
    ]
    await stream.send(driver="d2", function="vf2", read_number=1)
    other.reads[0][1](b"12345678")
    await settle()
    assert [(answer.driver, list(answer.data)) for answer in stream.answers[1:]] == [("d2", [b"12345678"])]


async def test_a_stream_that_ends_waits_for_nothing(stream: Stream):
    await stream.send(read_number=1)
    stream.sent.put_nowait(None)
    await stream.task
    assert stream.answers == []
