"""The queues of virtio-net: every path of a frame, and every way in which a ring can be wrong."""

from struct import pack_into

import pytest
from support.model_rig import Rig
from support.virtio_bench import BARS, NEXT, NO_VECTOR, WRITE, Bench, Ring, at

from hostd.models import virtio
from hostd.models.virtio_net import BACKLOG_FRAMES, COUNTERS, ISR, MSIX_PENDING

HEADER = bytes(10) + b"\x01\x00"


def frame(number: int, length: int = 60) -> bytes:
    return number.to_bytes(4, "big").rjust(14, b"\xaa").ljust(length, bytes([number % 251]))


@pytest.fixture
def bench() -> Bench:
    return Bench(Rig("virtio-net", BARS)).bind()


def dropped(bench: Bench) -> tuple[int | None, int | None]:
    return bench.rig.read(COUNTERS, 8), bench.rig.read(COUNTERS + 8, 8)


def needs_reset(bench: Bench) -> bool:
    return bool(bench.status & virtio.DEVICE_NEEDS_RESET)


def test_frames_are_sent_in_order_and_returned(bench: Bench) -> None:
    for number in range(8):
        bench.send(frame(number), number, kick=False)
    bench.transmit.kick()
    bench.rig.run()
    assert list(bench.rig.frames) == [frame(number) for number in range(8)]
    assert bench.transmit.take() == [(number, 0) for number in range(8)]
    assert bench.rig.interrupts == {2: 1}


@pytest.mark.parametrize("length", [14, 15, 60, 1518])
def test_frames_of_any_length_go_both_ways(bench: Bench, length: int) -> None:
    bench.send(frame(1, length)[:length])
    bench.rig.run()
    sent = bench.rig.frames.popleft()
    assert sent == frame(1, length)[:length]
    bench.give_buffer(0)
    assert bench.rig.receive(sent)
    bench.rig.run()
    assert bench.receive.take() == [(0, 12 + length)]
    assert bench.buffer(0, 12 + length) == HEADER + sent


def test_a_chain_may_split_header_and_frame_anywhere(bench: Bench) -> None:
    data = bytes(12) + frame(7, 200)
    bench.rig.memory[0x40000 : 0x40000 + len(data)] = data
    cuts = [0, 5, 5, 13, 100, 101, 212]
    order = [3, 1, 4, 0, 6, 2]
    for position, index in enumerate(order):
        following = order[position + 1] if position + 1 < len(order) else 0
        flags = NEXT if position + 1 < len(order) else 0
        start = cuts[position]
        bench.transmit.describe(index, at(0x40000 + start), cuts[position + 1] - start, flags, following)
    bench.transmit.give(3)
    bench.rig.run()
    assert list(bench.rig.frames) == [frame(7, 200)]
    assert bench.transmit.take() == [(3, 0)]


def test_a_frame_is_scattered_over_the_buffers_of_a_chain(bench: Bench) -> None:
    bench.receive.describe(2, at(0x80000), 12, WRITE | NEXT, 5)
    bench.receive.describe(5, at(0x80100), 30, WRITE | NEXT, 6)
    bench.receive.describe(6, at(0x80200), 100, WRITE | NEXT, 7)
    bench.receive.describe(7, at(0x80300), 100, WRITE)
    bench.receive.give(2)
    bench.rig.receive(frame(3))
    bench.rig.run()
    assert bench.receive.take() == [(2, 72)]
    memory = bench.rig.memory
    assert memory[0x80000:0x8000C] == HEADER
    assert bytes(memory[0x80100:0x8011E] + memory[0x80200:0x8021E]) == frame(3)
    assert not any(memory[0x80300:0x80364])


def test_frames_wait_for_buffers_and_the_sender_for_the_backlog(bench: Bench) -> None:
    for number in range(BACKLOG_FRAMES):
        assert bench.rig.receive(frame(number))
    before = bytes(bench.rig.image)
    assert not bench.rig.receive(frame(BACKLOG_FRAMES))
    assert bench.rig.image == before
    bench.rig.run()
    got = []
    for start in range(0, BACKLOG_FRAMES, 8):
        for index in range(8):
            bench.give_buffer(index)
        bench.rig.run()
        assert len(bench.receive.take()) == 8
        got += [bench.buffer(index, 72)[12:] for index in range(8)]
        assert bench.rig.receive(frame(BACKLOG_FRAMES + start // 8))
    assert got == [frame(number) for number in range(BACKLOG_FRAMES)]
    assert dropped(bench) == (0, 0)


def test_receiving_goes_on_while_nothing_may_be_sent(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        bench.give_buffer(number)
        bench.send(frame(number), number)
        assert bench.rig.receive(frame(10 + number))
    with monkeypatch.context() as full:
        full.setattr(bench.rig.model, "work", bench.rig.model.work_without_frames)
        bench.rig.run()
    assert not bench.rig.frames
    assert [bench.buffer(index, 72)[12:] for index, _ in bench.receive.take()] == [frame(10 + n) for n in range(4)]
    bench.rig.run()
    assert list(bench.rig.frames) == [frame(number) for number in range(4)]


def test_without_a_driver_frames_are_dropped_and_counted() -> None:
    bench = Bench(Rig("virtio-net", BARS))
    assert bench.rig.receive(frame(1))
    bench.negotiate()
    bench.set_queue(bench.transmit, NO_VECTOR)
    bench.set_status(0x0F)
    assert bench.rig.receive(frame(2)), "no receive queue"
    assert dropped(bench) == (2, 0)
    bench.set_status(0)
    bench.bind()
    bench.give_buffer(0)
    bench.rig.run()
    assert bench.receive.take() == []
    assert dropped(bench) == (2, 0), "a reset by the driver leaves the counters"


@pytest.mark.parametrize("length", [0, 11, 71])
def test_a_buffer_that_is_too_small_goes_back_empty(bench: Bench, length: int) -> None:
    bench.give_buffer(0, length)
    bench.give_buffer(1, 72)
    bench.rig.receive(frame(1))
    bench.rig.receive(frame(2))
    bench.rig.run()
    assert bench.receive.take() == [(0, 0), (1, 72)]
    assert bench.buffer(1, 72)[12:] == frame(2)
    assert dropped(bench) == (1, 0)


@pytest.mark.parametrize(("pieces", "written"), [(56, 72), (57, 0)])
def test_a_frame_in_more_than_56_pieces_is_dropped(pieces: int, written: int) -> None:
    bench = Bench(Rig("virtio-net", BARS), size=64).bind()
    for index in range(pieces):
        last = index == pieces - 1
        length = 72 - index if last else 1
        bench.receive.describe(index, at(0x80000 + index), length, WRITE | (0 if last else NEXT), index + 1)
    bench.receive.give(0)
    bench.receive.describe(60, at(0x90000), 72, WRITE)
    bench.receive.give(60)
    for number in (1, 2):
        bench.rig.receive(frame(number))
    bench.rig.run()
    assert bench.receive.take() == [(0, written), (60, 72)]
    assert bench.rig.memory[0x90000:0x90048] == HEADER + frame(2)
    assert dropped(bench) == (int(not written), 0)


@pytest.mark.parametrize("length", [0, 11, 12, 25, 12 + 1519, 0x40000, 0xFFFF_FFFF])
def test_a_chain_without_a_frame_in_it_goes_back_unsent(bench: Bench, length: int) -> None:
    bench.transmit.describe(0, at(0x40000), length)
    bench.transmit.give(0)
    bench.send(frame(2), 1)
    bench.rig.run()
    assert list(bench.rig.frames) == [frame(2)]
    assert bench.transmit.take() == [(0, 0), (1, 0)]
    assert dropped(bench) == (0, 1)


def test_indices_wrap(bench: Bench) -> None:
    # A ring of one entry, so that 2**16 frames would be needed; the index begins just below.
    for ring in (bench.receive, bench.transmit):
        ring.given = ring.seen = 0xFFFA
        pack_into("<H", bench.rig.memory, ring.available + 2, 0xFFFA)
        pack_into("<H", bench.rig.memory, ring.used + 2, 0xFFFA)
    _begin_at(bench, 0xFFFA)
    for number in range(12):
        bench.send(frame(number), number % 8)
        bench.give_buffer(number % 8)
        bench.rig.receive(frame(number))
        bench.rig.run()
        assert bench.transmit.take() == [(number % 8, 0)]
        assert bench.receive.take() == [(number % 8, 72)]
    assert len(bench.rig.frames) == 12
    assert bench.transmit.used_index == 6


def _begin_at(bench: Bench, index: int) -> None:
    """Put both queues where 2**16 - 6 frames would have brought them."""
    for virtqueue in bench.rig.model._queues:
        view = memoryview(bench.rig.image)
        queue = virtqueue.load(view)._replace(last=index, available=index, used=index)
        offset, data = virtqueue.store(queue)
        bench.rig.image[offset : offset + len(data)] = data


def test_more_chains_than_are_taken_at_once() -> None:
    bench = Bench(Rig("virtio-net", BARS), size=64).bind()
    for number in range(64):
        bench.send(frame(number), number, kick=False)
    bench.transmit.kick()
    bench.rig.run()
    assert list(bench.rig.frames) == [frame(number) for number in range(64)]
    assert bench.rig.interrupts[2] == 4, "one for the chains that are taken at once"


def test_more_segments_than_are_taken_at_once() -> None:
    bench = Bench(Rig("virtio-net", BARS), size=256).bind()
    for chain in range(4):
        for index in range(64 * chain, 64 * chain + 64):
            last = index % 64 == 63
            bench.transmit.describe(index, at(0x40000 + index), 1, 0 if last else NEXT, 0 if last else index + 1)
    bench.rig.memory[0x40000:0x40100] = bytes(range(256))
    # The same chains again: 8 of 64 segments, of which 4 fit.
    bench.transmit.give(*(64 * (number % 4) for number in range(8)))
    bench.rig.run()
    assert list(bench.rig.frames) == [bytes(range(64 * n + 12, 64 * n + 64)) for n in (0, 1, 2, 3)] * 2


def test_the_driver_is_told_not_to_kick_while_there_is_work(bench: Bench) -> None:
    bench.send(frame(1))
    for _ in range(2):
        bench.rig.step()
    bench.rig.flush()
    assert not bench.transmit.wants_kicks
    bench.send(frame(2), 1, kick=False)
    bench.rig.run()
    assert bench.transmit.wants_kicks
    assert len(bench.rig.frames) == 2, "what came without a kick is found before the queue falls idle"


def test_a_kick_between_the_reading_and_the_end_of_a_poll_is_not_lost(bench: Bench) -> None:
    bench.transmit.kick()
    view = memoryview(bench.rig.image)
    while (work := bench.rig.model.work(view)) is not None:
        data = bench.rig._read(work.reads)
        if not bench.transmit.given:
            bench.send(frame(1))
        if bench.rig.model.work(view) == work:
            step = bench.rig.model.finish(view, work, data)
            bench.rig._apply(step.stores)
            bench.rig._posted.extend(step.sends[1:] if work.what[0] == "send" else step.sends)
    bench.rig.flush()
    assert bench.transmit.take() == [(0, 0)]


def test_what_was_read_before_a_reset_is_not_believed_after_it(bench: Bench) -> None:
    bench.send(frame(1))
    view = memoryview(bench.rig.image)
    before = bench.rig.model.work(view)
    bench.set_status(0)
    bench.bind()
    bench.transmit.kick()
    assert bench.rig.model.work(view) is not None
    assert bench.rig.model.work(view) != before


def test_interrupts_are_suppressed_by_the_driver_and_by_the_mask(bench: Bench) -> None:
    bench.transmit.want_interrupts(wanted=False)
    bench.send(frame(1))
    bench.rig.run()
    assert not bench.rig.interrupts
    bench.transmit.want_interrupts(wanted=True)
    bench.unmask(2, masked=True)
    for index in (1, 2):
        bench.send(frame(2), index)
        bench.rig.run()
    assert not bench.rig.interrupts
    assert bench.rig.read(MSIX_PENDING, 8) == 1 << 2
    bench.unmask(2)
    bench.rig.run()
    assert bench.rig.interrupts == {2: 1}
    assert bench.rig.read(MSIX_PENDING, 8) == 0


def test_without_a_vector_the_isr_status_tells(bench: Bench) -> None:
    bench.set_common(virtio.QUEUE_SELECT, 1, 2)
    bench.set_common(virtio.QUEUE_VECTOR, NO_VECTOR, 2)
    bench.send(frame(1))
    bench.rig.run()
    assert not bench.rig.interrupts
    assert [bench.rig.read(ISR, 1), bench.rig.read(ISR, 1)] == [virtio.ISR_QUEUE, 0]


def test_both_queues_get_their_turn() -> None:
    bench = Bench(Rig("virtio-net", BARS), size=64).bind()
    for index in range(64):
        bench.give_buffer(index, kick=False)
        bench.send(frame(index), index, kick=False)
    bench.receive.kick()
    bench.transmit.kick()
    for number in range(60):
        bench.rig.receive(frame(number))
    for _ in range(16):
        bench.rig.step()
    bench.rig.flush()
    assert bench.rig.frames
    assert bench.receive.used_index


BROKEN = {
    "head out of the table": lambda ring: ring.give(8),
    "next out of the table": lambda ring: (_describe(ring, 0, NEXT, 8), ring.give(0)),
    "loop of one": lambda ring: (_describe(ring, 0, NEXT, 0), ring.give(0)),
    "loop of two": lambda ring: (_describe(ring, 0, NEXT, 1), _describe(ring, 1, NEXT, 0), ring.give(0)),
    "wrong direction": lambda ring: (ring.describe(0, at(0x40000), 100, 0 if not ring.index else WRITE), ring.give(0)),
    "indirect": lambda ring: (_describe(ring, 0, 4, 0), ring.give(0)),
    "beyond the address space": lambda ring: (
        ring.describe(0, (1 << 64) - 8, 9, WRITE if not ring.index else 0),
        ring.give(0),
    ),
    "more than the ring holds": lambda ring: ring.give(*range(8), 0),
    "index that jumps": lambda ring: (pack_into("<H", ring.rig.memory, ring.available + 2, 40000), ring.kick()),
}


def _describe(ring: Ring, index: int, flags: int, following: int) -> None:
    ring.describe(index, at(0x40000), 100, flags | (0 if ring.index else WRITE), following)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_ring_needs_a_reset(bench: Bench, how: str, index: int) -> None:
    BROKEN[how]((bench.receive, bench.transmit)[index])
    bench.rig.run()
    assert needs_reset(bench)
    assert bench.rig.interrupts == {0: 1}, "the driver is told"
    assert not bench.rig.frames
    assert bench.rig.receive(frame(1)), "nobody waits for a device that is broken"
    bench.send(frame(1))
    assert not bench.rig.step()
    bench.rig.memory[:0x8000] = bytes(0x8000)
    again = Bench(bench.rig).bind()
    again.send(frame(5))
    bench.rig.run()
    assert list(bench.rig.frames) == [frame(5)]


@pytest.mark.parametrize("address", [0x1000, (1 << 64) - 4096, at((1 << 20) - 2), at(0x4001), (1 << 64) - 2])
@pytest.mark.parametrize("register", [virtio.QUEUE_DESCRIPTORS, virtio.QUEUE_DRIVER, virtio.QUEUE_DEVICE])
def test_rings_that_cannot_be_there_never_raise(register: int, address: int) -> None:
    bench = Bench(Rig("virtio-net", BARS))
    bench.negotiate()
    bench.set_common(virtio.CONFIGURATION_VECTOR, NO_VECTOR, 2)
    bench.set_common(virtio.QUEUE_SELECT, 1, 2)
    ring = bench.transmit
    addresses = {0x20: at(ring.descriptors), 0x28: at(ring.available), 0x30: at(ring.used), register: address}
    bench.set_common(virtio.QUEUE_SIZE, 8, 2)
    for field, value in addresses.items():
        bench.set_common(field, value, 8)
    bench.set_common(virtio.QUEUE_ENABLE, 1, 2)
    bench.set_status(0x0F)
    bench.send(frame(1))
    bench.rig.run()
    if register == virtio.QUEUE_DEVICE and not address % 4:
        # Posted writes to nowhere: the frame has gone out.
        assert bench.rig.stray_writes
    else:
        assert needs_reset(bench)
        assert bench.rig.read(ISR, 1) == virtio.ISR_CONFIGURATION


def test_a_frame_that_cannot_be_read_needs_a_reset(bench: Bench) -> None:
    bench.transmit.describe(0, 0x1000, 72)
    bench.transmit.give(0)
    bench.rig.run()
    assert needs_reset(bench)


def test_a_buffer_that_cannot_be_written_is_the_drivers_loss(bench: Bench) -> None:
    bench.receive.describe(0, 0x1000, 1530, WRITE)
    bench.receive.give(0)
    bench.rig.receive(frame(1))
    bench.rig.run()
    assert bench.receive.take() == [(0, 72)]
    assert [write.address for write in bench.rig.stray_writes] == [0x1000]
