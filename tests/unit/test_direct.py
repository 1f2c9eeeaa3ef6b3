"""Accesses done at once: what they leave, also after a kill at any instruction, and when they may not be done."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bench import BARS, MEMORY_BYTES, VIRTUAL_ADDRESS, Bench, reason_of
from support.fake_fabric import FakeFabric
from support.killed_image import MEMORY_BYTES as IMAGE_BYTES
from support.killed_image import content_of, new_image, snapshots_during, torn
from support.manual_clock import ManualClock, settle

from hostd.direct import Access, DirectAccess
from hostd.grant import Grant
from hostd.models import MODELS, checker, create_model
from hostd.translation import Entry, TranslationTable
from hostd.waiting import Waiting
from vfleet.address import BAR_INDICES, bar_layout, table_offset, translate
from vfleet.errors import Reason
from vfleet.limits import MAIN_MEMORY_VIRTUAL_ADDRESS, WINDOW
from vfleet.v1.access_pb2 import (
    ACCESS_KIND_READ,
    ACCESS_KIND_WRITE,
    ACCESS_STATUS_OK,
    ACCESS_STATUS_UNSUPPORTED_REQUEST,
)

LOCAL_OFFSET = bar_layout(BARS)[2]
LOCAL = VIRTUAL_ADDRESS + LOCAL_OFFSET
DOORBELL = VIRTUAL_ADDRESS + checker.channel_offset(0)
DONE = (ACCESS_STATUS_OK, b"")


def word(value: int) -> bytes:
    return value.to_bytes(8, "little")


class Rig:
    """Driver d1 on h1, attached to vf1, which is at home there; `other` is another host's driver of the function."""

    def __init__(self, path: Path) -> None:
        self.clock = ManualClock()
        self.h1 = Bench(path, "h1", self.clock, FakeFabric())
        self.instance = self.h1.create()
        self.h1.drivers.recorded("d1", 4096)
        self.h1.drivers.attach(self.h1.message(self.instance.about.base))

    @property
    def driver(self):
        return self.h1.drivers.require("d1")

    @property
    def direct(self) -> DirectAccess:
        return self.driver.direct

    @property
    def last(self) -> int:
        return self.h1.functions.require("vf1", 0).image.sequencer("d1").last

    def submit(self, kind: int, address: int, length: int, data: bytes = b"") -> Waiting:
        access = Waiting(kind, address, length, data)
        self.driver.queue("vf1").submit(access)
        return access

    def attach(self, function: str, number: int, driver: str = "d1") -> int:
        """Make another function, attach it, and return the address of its local memory."""
        address = VIRTUAL_ADDRESS + (number << 24)
        made = self.h1.create(function, vf_index=number + 1)
        entry = self.h1.message(made.about.base, driver=driver, function=function, virtual_address=address)
        self.h1.drivers.attach(entry)
        return address + LOCAL_OFFSET


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path)
    await settle()
    yield rig
    rig.h1.close()


# What they do


async def test_what_was_written_is_read_and_counted(rig: Rig):
    for length in (1, 2, 4, 8, 64, 4096):
        data = Random(length).randbytes(length)
        assert rig.direct.write(LOCAL + 4096, data)
        assert rig.direct.read(LOCAL + 4096, length) == data
    assert rig.last == rig.driver.queue("vf1").last_sequence == 12
    rig.h1.restart()
    await settle()
    assert rig.last == rig.driver.queue("vf1").last_sequence == 12
    assert rig.direct.read(LOCAL + 4096, 4096) == data


async def test_registers_are_accessed_in_order_with_memory(rig: Rig):
    for number in range(1, 20):
        assert rig.direct.write(DOORBELL, word(number))
        assert rig.direct.write(LOCAL, word(number))
        assert rig.direct.read(DOORBELL + checker.LAST, 8) == rig.direct.read(LOCAL, 8) == word(number)
    assert rig.last == 4 * 19


async def test_main_memory_is_accessed_without_a_sequence(rig: Rig):
    assert rig.direct.write(MAIN_MEMORY_VIRTUAL_ADDRESS, b"main")
    assert rig.direct.read(MAIN_MEMORY_VIRTUAL_ADDRESS, 4) == b"main"
    assert rig.last == 0


async def test_what_nobody_claims_reads_as_ones(rig: Rig):
    hole = VIRTUAL_ADDRESS + 4096
    assert rig.direct.read(hole, 8) == b"\xff" * 8
    assert rig.direct.access_many([(hole, 8), (hole, b"x")]) == [
        (ACCESS_STATUS_UNSUPPORTED_REQUEST, b"\xff" * 8),
        (ACCESS_STATUS_UNSUPPORTED_REQUEST, b""),
    ]
    assert rig.last == rig.instance.unsupported_requests == 3


@pytest.mark.parametrize(
    ("address", "length", "reason"),
    [
        (LOCAL + 4, 8, Reason.INVALID_FIELD),
        (LOCAL, 3, Reason.INVALID_FIELD),
        (LOCAL, 0, Reason.INVALID_FIELD),
        (LOCAL, 8192, Reason.INVALID_FIELD),
        (VIRTUAL_ADDRESS + MEMORY_BYTES, 8, Reason.TRANSLATION_FAULT),
        (VIRTUAL_ADDRESS - 8, 8, Reason.TRANSLATION_FAULT),
        (LOCAL - (1 << 40), 8, Reason.TRANSLATION_FAULT),
        (LOCAL + (1 << 32), 8, Reason.TRANSLATION_FAULT),
        (LOCAL + (1 << 64), 8, Reason.TRANSLATION_FAULT),
        (0, 8, Reason.TRANSLATION_FAULT),
    ],
)
@pytest.mark.parametrize("warm", [0, 8, 4])
async def test_what_is_no_access_or_not_mapped_is_refused(rig: Rig, address: int, length: int, reason: Reason, warm):
    if warm:
        rig.direct.write(LOCAL, bytes(warm))
    assert reason_of(rig.direct.read, address, length) is reason
    assert reason_of(rig.direct.write, address, bytes(length)) is reason
    assert reason_of(rig.direct.access_many, [(address, length)]) is reason
    assert reason_of(rig.direct.access_many, [(address, bytes(length))]) is reason
    assert rig.last == bool(warm)


# Batches

batches = st.lists(
    st.tuples(st.integers(0, 15), st.sampled_from([1, 2, 4, 8, 16]), st.booleans(), st.booleans()), max_size=WINDOW
)


@settings(max_examples=60, deadline=None)
@given(st.lists(batches, max_size=6))
def test_a_batch_does_what_its_accesses_do_one_after_the_other(tmp_path_factory, history):
    async def play() -> None:
        rig = Rig(tmp_path_factory.mktemp("rig"))
        await settle()
        memory, registers, count = bytearray(512), 0, 0
        try:
            for batch in history:
                accesses, expected = [], []
                for place, length, is_read, is_register in batch:
                    count += 1
                    if is_register:
                        value = word(count)
                        accesses.append((VIRTUAL_ADDRESS + checker.SCRATCH, 8 if is_read else value))
                        expected.append((ACCESS_STATUS_OK, word(registers) if is_read else b""))
                        registers = registers if is_read else count
                        continue
                    offset = place * length
                    data = Random(count).randbytes(length)
                    accesses.append((LOCAL + offset, length if is_read else data))
                    expected.append((ACCESS_STATUS_OK, bytes(memory[offset : offset + length]) if is_read else b""))
                    if not is_read:
                        memory[offset : offset + length] = data
                assert rig.direct.access_many(accesses) == expected
                assert rig.last == count
            assert rig.direct.access_many([(LOCAL + offset, 8) for offset in range(0, 512, 8)]) == [
                (ACCESS_STATUS_OK, bytes(memory[offset : offset + 8])) for offset in range(0, 512, 8)
            ]
        finally:
            rig.h1.close()

    asyncio.run(play())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_plain_memory_is_a_whole_bar(name: str):
    bars = dict.fromkeys(BAR_INDICES[: 1 if name == "virtio-net" else 2], 1 << 16)
    plain = create_model(name, 1, bars).plain_memory
    whole = [range(start, start + bars[index]) for index, start in bar_layout(bars).items()]
    assert not plain or plain in whole


async def test_a_batch_has_64_accesses_at_most(rig: Rig):
    assert rig.direct.access_many([(LOCAL, b"x")] * WINDOW) == [DONE] * WINDOW
    assert reason_of(rig.direct.access_many, [(LOCAL, b"x")] * (WINDOW + 1)) is Reason.INVALID_FIELD
    assert rig.direct.access_many([]) == []
    assert rig.last == WINDOW


@pytest.mark.parametrize("length", [8, 512, 4096])
async def test_a_batch_that_is_too_long_for_one_record_is_done_as_well(rig: Rig, length: int):
    writes = [(LOCAL + number % 8 * length, bytes([number]) * length) for number in range(WINDOW)]
    assert rig.direct.access_many(writes) == [DONE] * WINDOW
    for number in range(WINDOW - 8, WINDOW):
        assert rig.direct.read(LOCAL + number % 8 * length, length) == bytes([number]) * length


@pytest.mark.parametrize(
    "bad",
    [
        (LOCAL + 1, b"xx"),
        (LOCAL, b"xxx"),
        (0, b"x"),
        (0, 8),
        (LOCAL + 4, 8),
        (LOCAL + (1 << 32), b"x"),
        (LOCAL + (1 << 64), b"x"),
        (LOCAL + (1 << 64), 1),
    ],
)
async def test_a_batch_ends_before_what_is_refused(rig: Rig, bad: Access):
    done = rig.direct.access_many([(LOCAL, b"x"), (LOCAL, 1), bad, (LOCAL, b"y")])
    assert done == [DONE, (ACCESS_STATUS_OK, b"x")]
    assert rig.direct.access_many([(LOCAL, b"z")] * 3 + [bad]) == [DONE] * 3
    assert reason_of(rig.direct.access_many, [bad]) in (Reason.INVALID_FIELD, Reason.TRANSLATION_FAULT)
    assert (rig.last, rig.direct.read(LOCAL, 1)) == (5, b"z")


async def test_a_batch_goes_over_several_functions_and_ends_before_one_that_is_held(rig: Rig):
    second = rig.attach("vf2", 1)
    await settle()
    await rig.h1.hold(20, ("d1", "vf2", 1))
    batch: list[Access] = [(LOCAL, b"a"), (LOCAL + 1, b"b"), (second, b"c"), (LOCAL + 2, b"d")]
    assert rig.direct.access_many(batch) == [DONE] * 2
    rig.h1.lift(20, ("d1", "vf2", 1))
    assert rig.direct.access_many(batch[2:]) == [DONE] * 2
    assert rig.direct.read(LOCAL, 1) == b"a"
    assert rig.direct.read(second, 1) == b"c"
    assert rig.last == 4


# A kill


class Killed:
    """Driver d1's direct accesses to a bare image, all of whose memory is plain."""

    def __init__(self, content: bytes = b"") -> None:
        self.image = new_image(content)
        self.sequencer = self.image.sequencer("d1")
        self.direct = DirectAccess(self)

    def grant(self, virtual_address: int, length: int) -> Grant | None:
        return self.image.grant(self.sequencer, VIRTUAL_ADDRESS, IMAGE_BYTES, range(IMAGE_BYTES))

    def access(self, kind: int, virtual_address: int, length: int, data: bytes) -> None:
        raise AssertionError("all of it is plain")


BATCHES: list[list[Access]] = [
    [(0, b"\x11")],
    [(8, b"\x22" * 8)],
    [(4096, b"\x33" * 4096)],
    [(8, 8)],
    [(number * 8, 8) for number in range(WINDOW)],
    [(number * 8, word(number + 1000)) for number in range(WINDOW)],
    [(number % 3 * 64, bytes([number + 1]) * 64) for number in range(40)],
    [(0, b"\x44" * 4096), (4096, b"\x55" * 4096), (0, b"\x66" * 4096)],
]


@pytest.mark.parametrize("is_batch", [True, False])
@pytest.mark.parametrize("batch", BATCHES)
def test_a_kill_at_any_instruction_leaves_all_of_a_batch_or_nothing(batch: list[Access], is_batch: bool):
    """One by one, what is left is a beginning; in either case sequences and memory agree."""
    random = Random(1)
    rig = Killed()
    for number in range(WINDOW + 3):
        rig.image.apply(rig.sequencer, number + 1, ACCESS_STATUS_OK, b"%d" % number, [(number * 8, b"%08d" % number)])
    other = rig.image.sequencer("d2")
    rig.image.apply(other, 1, ACCESS_STATUS_OK, b"other", [(0, b"other")])
    accesses = [(VIRTUAL_ADDRESS + offset, what) for offset, what in batch]
    rig.direct.access_many(accesses[:1])
    began = rig.sequencer.last
    memory = bytearray(rig.image.memory)
    memories = {began: bytes(memory)}
    for sequence, (offset, what) in enumerate(batch, began + 1):
        if not isinstance(what, int):
            memory[offset : offset + len(what)] = what
        memories[sequence] = bytes(memory)

    def work() -> None:
        for part in [accesses] if is_batch else [[access] for access in accesses[:5]]:
            rig.direct.access_many(part)

    steps = snapshots_during(rig.image, work)
    ended = rig.sequencer.last
    assert ended == began + (len(batch) if is_batch else min(len(batch), 5))
    assert len(steps) >= 2
    reached = set()
    for content in [*steps, *(torn_content for a, b in pairwise(steps) for torn_content in torn(a, b, random))]:
        again = Killed(content)
        reached.add(again.sequencer.last)
        assert again.image.memory == memories[again.sequencer.last]
        assert again.image.sequencer("d2").answer(1) == (ACCESS_STATUS_OK, b"other")
        kept = range(WINDOW, WINDOW + 4)
        assert [again.sequencer.answer(n) for n in kept] == [(ACCESS_STATUS_OK, b"%d" % (n - 1)) for n in kept]
        rest = accesses[again.sequencer.last - began :]
        assert len(again.direct.access_many(rest)) == len(rest)
        assert again.image.memory == memories[began + len(batch)]
        again.image.close()
    assert reached == ({began, ended} if is_batch else set(range(began, ended + 1)))
    rig.image.close()


def test_the_last_writes_of_a_forgotten_driver_are_never_anothers():
    """Their record names a sequencer and a sequence that the next driver there has yet to reach."""
    rig = Killed()
    rig.direct.access_many([(VIRTUAL_ADDRESS + number, b"x") for number in range(20)])
    rig.image.forget("d1")
    taken = rig.image.sequencer("d2")
    assert taken is rig.sequencer
    rig.image.store([(0, b"newer")])
    again = new_image(content_of(rig.image))
    assert (again.sequencer("d2").last, bytes(again.memory[:5])) == (0, b"newer")
    again.close()


def test_what_was_done_is_not_done_again():
    """Another driver may have changed the memory since."""
    rig = Killed()
    assert rig.direct.write(VIRTUAL_ADDRESS, word(1))
    other = rig.image.sequencer("d2")
    rig.image.apply(other, 1, ACCESS_STATUS_OK, b"", [(0, word(2))])
    again = Killed(content_of(rig.image))
    assert again.image.memory[:8] == word(2)
    assert again.sequencer.last == 1


# When they may not be done


async def refused(rig: Rig) -> None:
    """Check that nothing is done at once, neither one by one nor as a batch, and nothing counted."""
    before = rig.last
    assert rig.direct.read(LOCAL, 8) is None
    assert not rig.direct.write(LOCAL, b"x" * 8)
    assert rig.direct.access_many([(LOCAL, 8)] * 3) == rig.direct.access_many([(LOCAL, b"x" * 8)] * 3) == []
    assert rig.direct.access_many([(DOORBELL, word(1))]) == []
    assert rig.last == before


async def test_during_a_hold_nothing_is_done(rig: Rig):
    assert rig.direct.write(LOCAL, word(7))
    await rig.h1.hold(20, ("d1", "vf1", 1))
    await refused(rig)
    waiting = rig.submit(ACCESS_KIND_READ, LOCAL, 8)
    rig.h1.lift(20, ("d1", "vf1", 1))
    assert waiting.answer.result() == (ACCESS_STATUS_OK, word(7))
    assert rig.direct.read(LOCAL, 8) == word(7)
    assert rig.last == waiting.sequence + 1 == 3


async def test_a_stop_that_comes_before_the_hold_ends_it(rig: Rig):
    assert rig.direct.write(LOCAL, word(7))
    rig.h1.stop(1, 20)
    await refused(rig)
    rig.h1.resume(1, 20)
    assert rig.direct.read(LOCAL, 8) == word(7)


async def test_nothing_overtakes_what_waits(rig: Rig):
    assert rig.direct.write(LOCAL, word(1))
    rig.h1.stop(1, 20)
    waiting = rig.submit(ACCESS_KIND_WRITE, LOCAL, 8, word(2))
    rig.h1.resume(1, 20)
    assert rig.direct.read(LOCAL, 8) is None
    await rig.clock.advance(1)
    assert waiting.answer.done()
    assert rig.direct.read(LOCAL, 8) == word(2)
    assert rig.last == 3


async def test_changes_that_are_tracked_are_seen(rig: Rig):
    """While pages are tracked a direct write would tell nobody: the long way does."""
    assert rig.direct.write(LOCAL, word(1))
    image = rig.instance.image
    dirty = image.track()
    assert rig.direct.write(LOCAL, word(2))
    assert rig.direct.access_many([(LOCAL + 8192, b"x"), (LOCAL + 8193, b"y")]) == [DONE] * 2
    page = LOCAL_OFFSET // 4096
    assert dirty == {page, page + 2}
    image.untrack(dirty)
    assert rig.direct.write(LOCAL + 4096, word(2))
    assert dirty == {page, page + 2}


async def test_a_detached_function_is_not_mapped(rig: Rig):
    assert rig.direct.write(LOCAL, word(1))
    rig.h1.drivers.detach("d1", "vf1", 30)
    assert reason_of(rig.direct.read, LOCAL, 8) is Reason.TRANSLATION_FAULT
    assert reason_of(rig.direct.write, LOCAL, word(2)) is Reason.TRANSLATION_FAULT
    assert bytes(rig.instance.image.memory[LOCAL_OFFSET:][:8]) == word(1)


async def test_an_instance_that_goes_takes_it_along(rig: Rig):
    assert rig.direct.write(LOCAL, word(1))
    rig.h1.functions.remove(rig.instance)
    assert rig.direct.read(LOCAL, 8) is None
    assert not rig.direct.write(LOCAL, word(2))


async def test_what_was_done_at_once_and_what_was_submitted_share_one_order(rig: Rig):
    random, value, sequence = Random(5), 0, 0
    for _ in range(300):
        value += 1
        how = random.randrange(4)
        if how == 0:
            rig.direct.write(LOCAL, word(value))
        elif how == 1:
            assert rig.submit(ACCESS_KIND_WRITE, LOCAL, 8, word(value)).answer.done()
        elif how == 2:
            rig.direct.access_many([(LOCAL, word(value))] * 3)
            sequence += 2
        else:
            value -= 1
            assert rig.direct.read(LOCAL, 8) == word(value)
        sequence += 1
        assert rig.last == rig.driver.queue("vf1").last_sequence == sequence


# The lookaside


def moved_to(entry: Entry, virtual_address: int) -> Entry:
    """Return the entry of the same place, seen at another virtual address."""
    base = translate(entry.virtual_address, entry.offset)
    return replace(entry, virtual_address=virtual_address, offset=table_offset(base, virtual_address))


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["swap", "hold", "lift", "read", "read", "write", "batch"]), st.integers(0, 3)),
        max_size=60,
    )
)
def test_no_access_goes_by_a_table_that_is_over(tmp_path_factory, events):
    """Functions change places in the table; every access lands where the present table says."""

    async def play() -> None:
        rig = Rig(tmp_path_factory.mktemp("rig"))
        locals_ = [LOCAL, *(rig.attach(f"vf{number + 1}", number) for number in range(1, 4))]
        names = [f"vf{number + 1}" for number in range(4)]
        await settle()
        at, revision, marks, held = list(range(4)), 100, dict.fromkeys(names, 0), set()
        try:
            for event, number in events:
                revision += 1
                function = names[at[number]]
                if event == "swap":
                    other = (number + 1) % 4
                    at[number], at[other] = at[other], at[number]
                    moved = {names[at[place]]: locals_[place] - LOCAL_OFFSET for place in (number, other)}
                    entries = [moved_to(e, moved.get(e.function, e.virtual_address)) for e in rig.driver.table.entries]
                    rig.driver.swap(TranslationTable(entries))
                elif event in ("hold", "lift"):
                    rig.driver.swap(rig.driver.table.with_held([function], held=event == "hold"))
                    (held.add if event == "hold" else held.discard)(function)
                elif function in held:
                    assert rig.direct.read(locals_[number], 8) is None
                    assert not rig.direct.write(locals_[number], word(revision))
                elif event == "read":
                    assert rig.direct.read(locals_[number], 8) == word(marks[function])
                else:
                    marks[function] = revision
                    if event == "write":
                        assert rig.direct.write(locals_[number], word(revision))
                    else:
                        assert rig.direct.access_many([(locals_[number], word(revision))] * 2) == [DONE] * 2
                for name in names:
                    memory = rig.h1.functions.require(name, 0).image.memory
                    assert memory[LOCAL_OFFSET : LOCAL_OFFSET + 8] == word(marks[name])
        finally:
            rig.h1.close()

    asyncio.run(play())
