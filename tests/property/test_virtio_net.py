"""virtio-net under random traffic, moves and hostile drivers: every frame once and in order; nothing raises."""

from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from support.model_rig import Rig
from support.virtio_bench import BARS, Bench, at
from support.virtio_wire import Pair, Station

from hostd.models import virtio

seeds = st.integers(0, (1 << 32) - 1)


def act(pair: Pair, random: Random, index: int) -> None:
    """Let a station, its driver or the wire to it do something."""
    station: Station = pair.stations[index]
    match random.choices(range(7), (8, 4, 4, 40, 20, 4, 4))[0]:
        case 0:
            station.send(random.randrange(1, 9))
        case 1:
            station.give_buffers(random.randrange(1, 9))
        case 2:
            station.look()
        case 3:
            for _ in range(random.randrange(1, 8)):
                station.rig.step()
        case 4:
            pair.carry(index, random.randrange(1, 30))
        case 5:
            station.rig.move()
        case 6:
            ring = random.choice((station.bench.receive, station.bench.transmit))
            ring.kick()


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([1, 4, 8, 64]))
def test_every_frame_arrives_once_and_in_order_whatever_moves(seed: int, size: int) -> None:
    random = Random(seed)
    pair = Pair(random, size)
    for _ in range(200):
        act(pair, random, random.randrange(2))
    pair.settle()
    assert pair.faults() == []
    assert all(station.rig.read(0x2100, 8) == 0 for station in pair.stations), "none was dropped"


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_a_full_backlog_holds_frames_back_and_loses_none(seed: int) -> None:
    random = Random(seed)
    pair = Pair(random)
    sender, receiver = pair.stations
    for _ in range(60):
        sender.send(8)
        sender.rig.run()
        sender.look()
        pair.carry(1, 100)
        if random.random() < 0.2:
            receiver.rig.move()
    assert len(sender.wire) > 100, "the backlog was full"
    pair.settle()
    assert pair.faults() == []


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_hostile_driver_breaks_the_device_at_most(seed: int) -> None:
    random = Random(seed)
    rig = Rig("virtio-net", BARS, random=random)
    bench = Bench(rig, random.choice((1, 8, 256))).bind()
    # Addresses near main memory, so that garbage is often followed for a while.
    rig.memory[:0x8000] = random.randbytes(0x8000)
    for index in range(256):
        flags = random.choice((0, 1, 2, 3, 3, 1, 7))
        for ring in (bench.receive, bench.transmit):
            ring.describe(index, at(random.randrange(1 << 19)), random.randrange(2000), flags, random.randrange(260))
    for _ in range(40):
        register = random.choice((random.randrange(0x40), 0x3000, 0x3004, random.randrange(0x8000)))
        length = random.choice((1, 2, 4, 8))
        value = random.choice((0, 1, 2, 0x0F, random.getrandbits(64))) & (1 << 8 * length) - 1
        if random.random() < 0.5:
            for ring in (bench.receive, bench.transmit):
                rig.memory[ring.available + 2 : ring.available + 4] = random.choice((1, 3, 9, 300)).to_bytes(
                    2, "little"
                )
        rig.write(register & -length, value, length)
        rig.read(register & -length, length)
        rig.receive(random.randbytes(random.choice((14, 60, 1518))))
        for _ in range(20):
            rig.step()
        if random.random() < 0.1:
            rig.move()
    rig.run()


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_no_image_makes_it_raise(seed: int) -> None:
    random = Random(seed)
    rig = Rig("virtio-net", BARS)
    Bench(rig).bind()
    view = memoryview(rig.image)
    private = len(rig.image) - rig.model.private_bytes
    for start, end in ((private, private + 256), (private + 4096, private + 3 * 4096)):
        if random.random() < 0.7:
            rig.image[start:end] = random.randbytes(end - start)
    rig.image[private + 28] = random.choice((virtio.DRIVER_OK, 0x0F, random.randrange(256)))
    for _ in range(20):
        work = rig.model.work(view)
        if work is None:
            break
        reads = [random.randbytes(read.length) for read in work.reads if read.length < 1 << 20]
        data = reads if len(reads) == len(work.reads) and random.random() < 0.9 else None
        rig._apply(rig.model.finish(view, work, data).stores)
        step = rig.model.receive(view, random.randbytes(60))
        rig._apply(step.stores if step else ())
    for offset in range(0, 0x8000, 8):
        assert rig.model.read(view, offset, 8) is not None
        assert rig.model.write(view, offset, random.randbytes(8)) is not None
