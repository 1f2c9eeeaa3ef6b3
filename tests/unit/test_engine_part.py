"""The engine's part of an image: rings that wrap, and which attachment its DMA is of."""

import mmap
from collections import deque
from random import Random

import pytest

from hostd.engine_part import ENGINE_BYTES, RING_BYTES, EnginePart, Fifo
from hostd.image import FunctionImage, image_bytes
from vfleet.limits import INTERRUPT_PAGE_ADDRESS, MAIN_MEMORY_VIRTUAL_ADDRESS
from vfleet.v1.fabric_service_pb2 import DmaAttachment, DmaWindow

MODEL_BYTES = 4096
MAIN = MAIN_MEMORY_VIRTUAL_ADDRESS


def opened(content: bytes = b"") -> tuple[FunctionImage, EnginePart]:
    mapped = mmap.mmap(-1, image_bytes(MODEL_BYTES + ENGINE_BYTES))
    mapped[: len(content)] = content
    image = FunctionImage(mapped, MODEL_BYTES)
    return image, EnginePart(image, MODEL_BYTES)


@pytest.fixture
def part() -> EnginePart:
    return opened()[1]


def window(revision: int, base: int = 5 << 48, *, generation: int = 1, session: int = 1) -> DmaWindow:
    attachment = DmaAttachment(fleet_generation=generation, revision=revision, session=session)
    return DmaWindow(attachment=attachment, base=base, length_bytes=8192)


def send(part: EnginePart, fifo: Fifo, *data: bytes) -> None:
    part._image.step(fifo.put([(number, each) for number, each in enumerate(data)]))


def kept(fifo: Fifo) -> list[tuple[int, int, bytes]]:
    return [(entry.sequence, entry.address, entry.data) for entry in fifo.entries(fifo.head)]


@pytest.mark.parametrize("seed", range(5))
def test_a_ring_keeps_what_was_sent_in_order_until_it_is_acknowledged(seed: int):
    random, (image, part) = Random(seed), opened()
    expected: dict[str, deque[tuple[int, int, bytes]]] = {"writes": deque(), "frames": deque()}
    for _ in range(400):
        name = random.choice(["writes", "frames"])
        fifo, queue = getattr(part, name), expected[name]
        if fifo.has_room and random.random() < 0.6:
            data = [random.randbytes(random.choice([1, 4, 60, 1518, 4096])) for _ in range(random.randrange(3))]
            first = fifo.last + 1
            send(part, fifo, *data)
            queue.extend((first + n, n, each) for n, each in enumerate(data))
        elif queue:
            upto = random.choice(queue)[0]
            fifo.acknowledge(upto)
            while queue and queue[0][0] <= upto:
                queue.popleft()
        assert fifo.tail - fifo.head <= RING_BYTES
        assert kept(fifo) == list(queue)
    # As another home, or the daemon that comes back, finds it.
    again = opened(bytes(image.memory.obj))[1]
    assert (kept(again.writes), kept(again.frames)) == (list(expected["writes"]), list(expected["frames"]))


def test_what_is_cancelled_keeps_its_sequence(part: EnginePart):
    send(part, part.writes, b"one", b"two")
    part.writes.acknowledge(1)
    part.writes.cancel()
    send(part, part.writes, b"three")
    assert kept(part.writes) == [(2, 1, b""), (3, 0, b"three")]


def test_the_dma_table_maps_main_memory_and_the_interrupt_page_and_nothing_else(part: EnginePart):
    assert part.translate(MAIN, 1) is None
    part.attach("d1", window(5))
    assert part.translate(MAIN, 8192) == 5 << 48
    assert part.translate(MAIN + 8191, 1) == (5 << 48) + 8191
    assert part.translate(INTERRUPT_PAGE_ADDRESS + 4, 4) == 5 << 48 | INTERRUPT_PAGE_ADDRESS + 4
    for address, length in ((MAIN - 1, 1), (MAIN + 8191, 2), (INTERRUPT_PAGE_ADDRESS + 4095, 2), (0, 4)):
        assert part.translate(address, length) is None


def test_a_guest_has_its_memory_at_its_own_addresses(part: EnginePart):
    guest = window(5)
    guest.from_zero = True
    part.attach("g1", guest)
    assert part.translate(0, 8192) == 5 << 48
    assert part.translate(8191, 1) == (5 << 48) + 8191
    assert part.translate(INTERRUPT_PAGE_ADDRESS, 4) == 5 << 48 | INTERRUPT_PAGE_ADDRESS
    assert part.translate(8191, 2) is part.translate(MAIN, 1) is None
    part.detach(guest.attachment)
    assert part.translate(0, 1) is None
    part.attach("d1", window(6, 6 << 48))
    assert part.translate(MAIN, 8192) == 6 << 48
    assert part.translate(0, 1) is None


def test_a_later_attachment_begins_anew_and_an_earlier_one_is_refused(part: EnginePart):
    assert part.attach("d1", window(5))
    send(part, part.writes, b"for d1")
    send(part, part.frames, b"a frame")
    assert part.attach("d1", window(5))
    assert kept(part.writes) == [(1, 0, b"for d1")]
    assert not part.attach("late", window(4, generation=1, session=9))
    assert (part.driver, part.window_base) == ("d1", 5 << 48)
    for later in (window(5, session=2), window(6), window(1, 9 << 48, generation=2)):
        assert part.attach("d2", later)
        assert (part.driver, part.attachment, part.window_base) == ("d2", later.attachment, later.base)
        assert (kept(part.writes), part.writes.last) == ([], 0)
        send(part, part.writes, b"for d2")
    assert kept(part.frames) == [(1, 0, b"a frame")]


def test_only_the_attachment_that_has_ended_is_detached(part: EnginePart):
    part.attach("d1", window(5))
    send(part, part.writes, b"x")
    part.detach(window(4).attachment)
    part.detach(DmaAttachment())
    assert (part.driver, kept(part.writes)) == ("d1", [(1, 0, b"x")])
    part.detach(window(5).attachment)
    assert (part.driver, kept(part.writes), part.translate(MAIN, 1)) == ("", [], None)
    assert part.attach("d0", window(3))


def test_what_is_known_of_senders_outlives_a_restart():
    image, part = opened()
    for sender, sequence in ((1 << 63, 4), (7, 1), (1 << 63, 9)):
        noted = part.took_from(sender, sequence)
        assert noted is not None
        image.step(noted)
    again = opened(bytes(image.memory.obj))[1]
    assert [again.last_from(sender) for sender in (1 << 63, 7, 8)] == [9, 1, 0]
