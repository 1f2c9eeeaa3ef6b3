"""A driver's host's side of DMA: each write once and in order, from the right generation, whatever a kill leaves."""

import asyncio
import mmap
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from support import kills
from support.bench import Bench, reason_of
from support.driver_bench import told
from support.manual_clock import settle

import hostd.dma_receiver
from hostd.dma_exchange import exchange_dma
from hostd.dma_receiver import DmaReceiver
from hostd.memory import MappedMemory, MemoryBusyError
from vfleet.errors import Reason, VfleetError
from vfleet.limits import INTERRUPT_PAGE_ADDRESS
from vfleet.v1.driver_service_pb2 import NOTIFICATION_KIND_INTERRUPT
from vfleet.v1.fabric_service_pb2 import (
    DMA_REFUSAL_NOT_ATTACHED,
    DMA_REFUSAL_SEQUENCE_GAP,
    DMA_REFUSAL_UNSPECIFIED,
    DMA_REFUSAL_WRONG_GENERATION,
    DmaAttachment,
    DmaRead,
    DmaWindow,
    DmaWrite,
    ExchangeDmaRequest,
    ExchangeDmaResponse,
)

MEMORY_BYTES = 1 << 16
BASE = 1 << 48
PAGE = BASE | INTERRUPT_PAGE_ADDRESS
ATTACHED = DmaAttachment(fleet_generation=1, revision=1, session=1)
FIRST, LATER = 0x0001_0180 << 32, 0x0002_1110 << 32


class Host:
    """Driver d1 on h1 with main memory, attached to vf1 at generation 1."""

    def __init__(self, path: Path) -> None:
        self.bench = Bench(path)
        self.bench.drivers.recorded("d1", MEMORY_BYTES)
        self.bench.drivers.attach(self.bench.message(FIRST))

    @property
    def receiver(self) -> DmaReceiver:
        return self.bench.drivers.require("d1").receivers["vf1"]

    @property
    def memory(self) -> mmap.mmap:
        found = self.bench.drivers.require("d1").memory
        assert found is not None
        return found

    def send(self, first: int, *writes: tuple[int, bytes], generation: int = 1, attachment=ATTACHED, **more):
        request = ExchangeDmaRequest(
            driver="d1",
            function="vf1",
            generation=generation,
            attachment=attachment,
            first_sequence=first,
            writes=[DmaWrite(address=address, data=data) for address, data in writes],
            **more,
        )
        return exchange_dma(self.bench.drivers, request)

    def read(self, *reads: tuple[int, int], after: int = 0) -> ExchangeDmaResponse:
        messages = [DmaRead(address=address, length_bytes=length) for address, length in reads]
        return self.send(0, reads=messages, read_number=9, after_sequence=after)


@pytest.fixture
async def host(tmp_path: Path):
    found = Host(tmp_path)
    yield found
    found.bench.close()


def seen(response: ExchangeDmaResponse) -> tuple[int, int]:
    return response.last_sequence, response.refusal


async def test_writes_take_effect_once_and_in_order(host: Host):
    assert seen(host.send(1, (BASE, b"one"), (BASE + 8, b"two"))) == (2, DMA_REFUSAL_UNSPECIFIED)
    host.memory[:3] = b"own"
    assert seen(host.send(1, (BASE, b"one"), (BASE + 8, b"two"), (BASE, b"3"))) == (3, DMA_REFUSAL_UNSPECIFIED)
    assert host.memory[:11] == b"3wn\0\0\0\0\0two"
    assert seen(host.send(5, (BASE, b"five"))) == (3, DMA_REFUSAL_SEQUENCE_GAP)
    assert host.memory[:3] == b"3wn"
    host.bench.restart()
    assert host.receiver.last == 3
    assert seen(host.send(3, (BASE, b"again"))) == (3, DMA_REFUSAL_UNSPECIFIED)
    assert host.memory[:3] == b"3wn"


async def test_what_a_reset_has_cancelled_never_takes_effect(host: Host):
    """The function had sent three writes before it was reset; its driver's host has seen one of them by then."""
    host.send(1, (BASE, b"one"))
    host.receiver.is_cut_off = True
    assert seen(host.send(2, (BASE, b"two"))) == (0, DMA_REFUSAL_NOT_ATTACHED)
    assert host.read((BASE, 3)).refusal == DMA_REFUSAL_NOT_ATTACHED
    host.receiver.skip_to(3)
    host.receiver.is_cut_off = False
    assert seen(host.send(2, (BASE, b"two"), (BASE, b"3"), (BASE + 8, b"after"))) == (4, DMA_REFUSAL_UNSPECIFIED)
    assert host.memory[:13] == b"one\0\0\0\0\0after"
    host.receiver.skip_to(2)
    assert host.receiver.last == 4


async def test_who_waits_for_a_write_goes_on_once_it_is_there_or_cancelled(host: Host):
    waiting = [asyncio.create_task(host.receiver.reached(sequence)) for sequence in (1, 2, 4)]
    await settle()
    assert [task.done() for task in waiting] == [False] * 3
    host.send(1, (BASE, b"one"))
    await settle()
    assert [task.done() for task in waiting] == [True, False, False]
    host.receiver.skip_to(4)
    await settle()
    assert all(task.done() for task in waiting)
    await host.receiver.reached(3)


async def test_only_the_generation_that_the_entry_names_may_write(host: Host):
    bench = host.bench
    assert seen(host.send(1, (BASE, b"x"), generation=2)) == (0, DMA_REFUSAL_WRONG_GENERATION)
    await bench.hold(10, ("d1", "vf1", 1))
    assert seen(host.send(1, (BASE, b"held"))) == (1, DMA_REFUSAL_UNSPECIFIED)
    bench.update(10, bench.message(LATER, generation=2, revision=20), lift=True)
    assert seen(host.send(2, (BASE, b"late"))) == (0, DMA_REFUSAL_WRONG_GENERATION)
    assert host.read((BASE, 4)).refusal == DMA_REFUSAL_WRONG_GENERATION
    assert host.memory[:4] == b"held"
    assert seen(host.send(1, (BASE, b"sent"), (BASE, b"home"), generation=2)) == (2, DMA_REFUSAL_UNSPECIFIED)
    assert host.memory[:4] == b"home"


async def test_a_lost_function_and_one_that_is_detached_write_nothing_any_more(host: Host):
    bench = host.bench
    lost = bench.message(FIRST, revision=5)
    lost.lost = True
    bench.drivers.follow([lost], 5, complete=False)
    assert host.send(1, (BASE, b"x")).refusal == DMA_REFUSAL_NOT_ATTACHED
    with pytest.raises(VfleetError) as caught:
        await host.receiver.interrupted_since(0, 0)
    assert caught.value.reason is Reason.FUNCTION_LOST
    bench.drivers.detach("d1", "vf1", 9)
    assert host.send(1, (BASE, b"x")).refusal == DMA_REFUSAL_NOT_ATTACHED
    assert bench.drivers.files() == {"d1.memory"}
    assert bench.ledger.files() == ["d1.memory"]


async def test_an_attachment_that_is_over_is_not_taken_for_the_next(host: Host):
    host.send(1, (BASE, b"old"), (PAGE, (3).to_bytes(4, "little")))
    over = host.receiver
    host.bench.drivers.detach("d1", "vf1", 9)
    # A workload that has not noticed yet.
    assert reason_of(over.interrupts, 3) is Reason.TRANSLATION_FAULT
    host.bench.drivers.attach(host.bench.message(FIRST, revision=12))
    assert (host.receiver.last, host.receiver.interrupts(3)) == (0, 0)
    assert host.send(1, (BASE, b"late")).refusal == DMA_REFUSAL_NOT_ATTACHED
    later = DmaAttachment(fleet_generation=1, revision=12, session=1)
    assert seen(host.send(1, (BASE, b"new"), attachment=later)) == (1, DMA_REFUSAL_UNSPECIFIED)
    assert host.memory[:4] == b"new\0"


async def test_reads_wait_for_the_writes_before_them_and_have_no_effect(host: Host):
    host.send(1, (BASE + 100, b"written"))
    assert host.read((BASE + 100, 7), (BASE + 100, 1), after=1).data == [b"written", b"w"]
    assert host.read((BASE, 1), after=2).refusal == DMA_REFUSAL_SEQUENCE_GAP
    assert host.receiver.last == 1


@pytest.mark.parametrize("address", [BASE - 1, BASE + MEMORY_BYTES - 7, PAGE, (2 << 48)])
async def test_what_is_not_the_drivers_is_neither_read_nor_written(host: Host, address: int):
    assert seen(host.send(1, (address, b"8 bytes."))) == (1, DMA_REFUSAL_UNSPECIFIED)
    assert host.receiver.faults == 1
    assert host.memory[:] == bytes(MEMORY_BYTES)
    answer = host.read((BASE, 8), (address, 8))
    assert (answer.data, answer.refusal, answer.read_number) == ([], DMA_REFUSAL_UNSPECIFIED, 9)


async def test_an_interrupt_is_counted_once_and_told(host: Host):
    news = told(host.bench)
    seven = (PAGE, (7).to_bytes(4, "little"))
    assert seen(host.send(1, seven, (BASE, b"x"), seven)) == (3, DMA_REFUSAL_UNSPECIFIED)
    host.send(1, seven, (BASE, b"x"), seven)
    assert host.receiver.interrupts(7) == await host.receiver.interrupted_since(7, 1) == 2
    assert news == [(NOTIFICATION_KIND_INTERRUPT, "vf1")] * 2
    host.bench.restart()
    assert host.receiver.interrupts(7) == 2
    assert seen(host.send(4, (PAGE, (256).to_bytes(4, "little")))) == (4, DMA_REFUSAL_UNSPECIFIED)
    assert host.receiver.faults == 1


async def test_a_cancelled_write_is_passed_over(host: Host):
    assert seen(host.send(1, (BASE, b""), (BASE, b"x"))) == (2, DMA_REFUSAL_UNSPECIFIED)
    assert (host.memory[:1], host.receiver.faults) == (b"x", 0)


@pytest.mark.parametrize(
    ("request_of", "field"),
    [
        (lambda host: host.send(0, (BASE, b"x")), "first_sequence"),
        (lambda host: host.send(1, (BASE, bytes(4097))), "writes[0].data"),
        (lambda host: host.read((BASE, 4097)), "reads[0].length_bytes"),
        (lambda host: host.read((BASE, 0)), "reads[0].length_bytes"),
        (lambda host: host.read(), "read_number"),
    ],
)
async def test_what_no_hostd_sends_is_refused(host: Host, request_of, field: str):
    with pytest.raises(VfleetError) as caught:
        request_of(host)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_FIELD, field)
    assert host.receiver.last == 0


async def test_a_machine_that_was_started_anew_has_another_attachment(host: Host):
    before = host.receiver.attachment
    host.bench.restart()
    assert host.receiver.attachment == before
    path = host.bench.path
    host.bench.ledger.erase()
    host.bench.close()
    for name in (path / "memory").iterdir():
        name.unlink()
    host.bench.start()
    host.bench.drivers.recorded("d1", MEMORY_BYTES)
    host.bench.drivers.attach(host.bench.message(FIRST))
    assert host.receiver.attachment.session > before.session
    assert host.receiver.last == 0


# A kill


def receiver(content: bytes, memory: bytes) -> tuple[DmaReceiver, mmap.mmap, mmap.mmap]:
    mapped, main = mmap.mmap(-1, 3 * 4096), mmap.mmap(-1, 4 * 4096)
    mapped[: len(content)] = content
    main[: len(memory)] = memory
    window = DmaWindow(base=BASE, length_bytes=len(main))
    return DmaReceiver(mapped, MappedMemory(main), window, ATTACHED), mapped, main


@pytest.mark.parametrize("write", [(BASE + 100, b"\x11" * 4096), (BASE, b"x"), (PAGE, b"\5\0\0\0")])
def test_a_kill_at_any_instruction_leaves_a_write_done_or_not_begun(write: tuple[int, bytes]):
    opened, mapped, main = receiver(b"", b"")
    opened.write(1, BASE + 4000, b"before" * 50)
    opened.write(2, PAGE, b"\5\0\0\0")
    before = (main[:], opened.interrupts(5))
    steps = kills.snapshots_during(
        [hostd.dma_receiver.__file__], lambda: mapped[:] + main[:], lambda: opened.write(3, *write)
    )
    after = (main[:], opened.interrupts(5))
    assert before != after
    random = Random(5)
    torn = [content for a, b in pairwise(steps) for content in kills.torn(a, b, random)]
    done = set()
    for content in [*steps, *torn]:
        again, _, memory = receiver(content[: 3 * 4096], content[3 * 4096 :])
        done.add(again.last)
        assert (memory[:], again.interrupts(5)) == (before if again.last == 2 else after)
    assert done == {2, 3}


def test_what_is_done_is_not_done_again_over_what_the_driver_has_put_there():
    opened, mapped, main = receiver(b"", b"")
    opened.write(1, BASE, b"device")
    main[:6] = b"driver"
    again, _, memory = receiver(mapped[:], main[:])
    assert (again.last, memory[:6]) == (1, b"driver")


class Late(MappedMemory):
    """A virtual machine's memory, which isn't there before the machine is, and takes writes when it likes."""

    is_present = False
    is_busy = False

    def write(self, offset: int, data: bytes) -> bool:
        if self.is_busy:
            raise MemoryBusyError
        return super().write(offset, data)


async def test_who_waits_for_a_write_that_a_kill_left_begun_goes_on_once_it_is_done():
    memory, mapped = Late(mmap.mmap(-1, 4096)), mmap.mmap(-1, 3 * 4096)
    window = DmaWindow(base=BASE, length_bytes=4096)
    memory.is_busy = True
    with pytest.raises(MemoryBusyError):
        DmaReceiver(mapped, memory, window, ATTACHED).write(1, BASE, b"begun")
    again = DmaReceiver(mapped, memory, window, ATTACHED)
    waiting = asyncio.create_task(again.reached(1))
    await settle()
    memory.is_present, memory.is_busy = True, False
    assert again.accepts
    await settle()
    assert (waiting.done(), again.last, memory.read(0, 5)) == (True, 1, b"begun")
