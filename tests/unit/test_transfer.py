"""A function's state, out of its source and into its target: all of it, or nothing."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from random import Random

import pytest
from support.fake_transfer import Network
from support.manual_clock import settle
from support.transfer_pair import BARS, LOCAL, PAGES, Pair, Parts, exported, receive

from hostd.instance import Instance
from hostd.rounds import FEW_DIRTY_BYTES
from hostd.state_stream import BYTES_WITH_END, CHUNK_PAGES, end_crc, pages_crc
from hostd.transfer import REFRESH_S
from vfleet.address import MAX_ACCESS_BYTES, PAGE_BYTES
from vfleet.errors import Reason, VfleetError
from vfleet.limits import MAX_DRIVERS, WINDOW
from vfleet.names import MAX_NAME_LENGTH
from vfleet.rpc import MAX_MESSAGE_BYTES
from vfleet.v1.access_pb2 import ACCESS_STATUS_OK, Answer
from vfleet.v1.transfer_service_pb2 import (
    ExportStateResponse,
    StatePages,
)
from vfleet.v1.types_pb2 import (
    DECISION_ABORTED,
    DEVICE_STATE_RESUMING,
    DEVICE_STATE_RUNNING,
    TRANSFER_MODE_POST_COPY,
    TRANSFER_MODE_PRE_COPY,
    Bar,
    TransferMode,
)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    found = Pair(tmp_path)
    yield found
    found.close()


# All of it


async def test_all_that_a_function_is_moves(pair: Pair):
    steps = await pair.pull_all()
    pair.assert_moved()
    assert pair.target.image.sequencer("d1").answer(2) == (ACCESS_STATUS_OK, b"two")
    assert pair.target.image.sequencer("d2").session == (1, 2, 4)
    assert [(step.rounds, step.ready_to_stop, step.complete) for step in steps] == [(1, True, False), (1, True, True)]
    pair.h2.restart()
    pair.assert_moved(pair.h2.functions.require("vf1", 2))


async def test_a_stopped_function_is_sent_at_once_and_again_if_asked(pair: Pair):
    pair.h1.stop(1, 10)
    assert [step.complete for step in await pair.pull_all()] == [True]
    pair.assert_moved()
    assert [part.WhichOneof("part") async for part in pair.export()][-1] == "end"


async def test_an_import_that_is_complete_says_so_again_and_asks_nobody(pair: Pair):
    await pair.pull_all()
    pair.h1.destroy(1, 10, 1)
    assert [step.complete for step in await pair.pull_all()] == [True]


async def test_zero_pages_are_left_out_and_come_out_zero(pair: Pair):
    parts = await pair.parts()
    pages = [part.pages for part in parts if part.HasField("pages")]
    assert sum(len(page.data) for page in pages) < 4 * CHUNK_PAGES * PAGE_BYTES
    assert all(any(page.data) for page in pages)
    receive(pair.target, parts)
    assert pair.target.image.memory == pair.source.image.memory


async def test_a_page_that_became_zero_during_the_copy_is_sent_as_zeros(pair: Pair):
    async with aclosing(pair.export()) as export:
        parts = []
        async for part in export:
            parts.append(part)
            if part.HasField("round_end"):
                pair.source.image.store([(300 * PAGE_BYTES, bytes(PAGE_BYTES))])
                pair.h1.stop(1, 10)
    assert pages_of(parts)[-1].data == bytes(PAGE_BYTES)
    receive(pair.target, parts)
    assert pair.target.image.memory == pair.source.image.memory


def pages_of(parts: Parts) -> list[StatePages]:
    return [pages for part in parts for pages in ([part.pages] if part.HasField("pages") else part.end.pages)]


async def with_last_pages(pair: Pair, *pages: int, **options) -> Parts:
    """Return a stream during which these pages were written to at the last moment before the stop."""
    parts = []
    async with aclosing(pair.export(**options)) as export:
        async for part in export:
            parts.append(part)
            if part.round_end.last_before_stop:
                for page in pages:
                    pair.write(page, b"last")
                pair.h1.stop(1, 10)
    return parts


async def test_a_few_last_pages_need_no_messages_of_their_own(pair: Pair):
    parts = await with_last_pages(pair, LOCAL + 9, LOCAL + 11)
    assert parts[-2].HasField("round_end")
    assert [pages.image_offset for pages in parts[-1].end.pages] == [
        (LOCAL + 9) * PAGE_BYTES,
        (LOCAL + 11) * PAGE_BYTES,
    ]
    receive(pair.target, parts)
    assert pair.target.image.memory == pair.source.image.memory


async def test_many_last_pages_are_sent_before_the_end_but_for_the_last_of_them(pair: Pair):
    written = range(LOCAL, LOCAL + 200)
    parts = await with_last_pages(pair, *written)
    with_end = sum(len(pages.data) for pages in parts[-1].end.pages)
    assert 0 < with_end <= BYTES_WITH_END
    ended = next(i for i, part in enumerate(parts) if part.round_end.last_before_stop)
    assert sum(len(pages.data) for pages in pages_of(parts[ended:])) == len(written) * PAGE_BYTES
    receive(pair.target, parts)
    assert pair.target.image.memory == pair.source.image.memory


async def test_the_end_with_all_that_may_come_along_is_no_larger_than_a_message_may_be(pair: Pair):
    image = pair.source.image
    for number in range(MAX_DRIVERS - len(image.sequencers())):
        image.sequencer(f"{number}".rjust(MAX_NAME_LENGTH, "d"))
    for sequencer in image.sequencers():
        sequencer.set_session((1 << 40, 1 << 60, 1 << 40))
        sequencer.skip_to(1 << 48)
        for sequence in range(sequencer.last + 1, sequencer.last + 1 + WINDOW):
            sequencer.advance(sequence, ACCESS_STATUS_OK, bytes(MAX_ACCESS_BYTES))
    end = (await with_last_pages(pair, *range(LOCAL, LOCAL + 2 * CHUNK_PAGES, 2)))[-1]
    assert sum(len(sequence.answers) for sequence in end.end.sequences) == MAX_DRIVERS * WINDOW
    assert sum(len(pages.data) for pages in end.end.pages) == BYTES_WITH_END
    assert end.ByteSize() <= MAX_MESSAGE_BYTES


async def test_in_post_copy_local_memory_comes_with_the_end_alone(pair: Pair):
    parts = await with_last_pages(pair, LOCAL + 9, 0, LOCAL + 11, mode=TRANSFER_MODE_POST_COPY)
    last = parts[-1].end.pages
    assert [pages.image_offset // PAGE_BYTES for pages in last] == [0, LOCAL + 9, LOCAL + 11]
    memory = pair.source.image.memory
    early = [(pages.image_offset, bytes(memory[pages.image_offset :][:PAGE_BYTES])) for pages in last[1:]]
    assert receive(pair.target, parts, TRANSFER_MODE_POST_COPY).early == early
    pair.target.image.clear()
    parts[-1:-1] = [ExportStateResponse(pages=last[1])]
    del last[1]
    assert_refused(pair.target, parts, TRANSFER_MODE_POST_COPY)


@pytest.mark.parametrize("damage", ["changed", "left out", "moved"])
async def test_damaged_last_pages_are_refused(pair: Pair, damage: str):
    parts = await with_last_pages(pair, LOCAL + 9, LOCAL + 11)
    pages = parts[-1].end.pages
    if damage == "changed":
        pages[0].data = flip_bit(pages[0].data)
    elif damage == "left out":
        del pages[0]
    else:
        pages[0].image_offset += PAGE_BYTES
    assert_refused(pair.target, parts)


@pytest.mark.parametrize("seed", range(8))
async def test_no_page_that_changes_during_the_copy_is_missed(pair: Pair, seed: int):
    """Accesses fall between any two parts, anywhere; the stop comes at any moment, also before it is asked for."""
    random = Random(seed)
    stop_at = random.randrange(3, 30)
    count = 0
    async with aclosing(pair.export(max_rounds=random.randrange(1, 6))) as export:
        parts: Parts = []
        async for part in export:
            parts.append(part)
            count += 1
            if not pair.source.is_serving:
                continue
            for _ in range(random.choice([0, 1, 5, 2 * FEW_DIRTY_BYTES // PAGE_BYTES])):
                length = random.choice([1, 8, PAGE_BYTES])
                section = random.choice(pair.source.model.sections)
                offset = section.start + random.randrange(section.length - length + 1)
                pair.source.image.store([(offset, random.randbytes(length))])
            pair.access("d1", random.randbytes(8))
            if count >= stop_at or part.round_end.last_before_stop:
                pair.h1.stop(1, 10)
    receive(pair.target, parts)
    assert pair.target.image.memory == pair.source.image.memory
    assert exported(pair.target.image) == exported(pair.source.image)


async def test_rounds_go_on_until_few_pages_are_left_or_the_rounds_are_used_up(pair: Pair):
    async def ends(max_rounds: int, dirty_in_round: list[int]) -> list[tuple[int, int, bool]]:
        found = []
        async with aclosing(pair.export(max_rounds=max_rounds)) as export:
            async for part in export:
                if part.HasField("pages") and dirty_in_round:
                    for page in range(dirty_in_round.pop(0)):
                        pair.write(LOCAL + page, b"again")
                if part.HasField("round_end"):
                    end = part.round_end
                    found.append((end.round, end.dirty_bytes // PAGE_BYTES, end.last_before_stop))
                    if end.last_before_stop:
                        break
        return found

    assert await ends(5, []) == [(1, 0, True)]
    many = FEW_DIRTY_BYTES // PAGE_BYTES + 1
    assert await ends(5, [many]) == [(1, many, False), (2, 0, True)]
    assert await ends(1, [many]) == [(1, many, True)]
    assert await ends(5, [many - 1]) == [(1, many - 1, True)]
    assert pair.source.state == DEVICE_STATE_RUNNING


async def test_a_driver_that_outruns_a_limit_is_slowed_down_until_the_function_is_stopped(pair: Pair):
    seen = []
    async with aclosing(pair.export(max_rounds=4, has_limit=True)) as export:
        async for part in export:
            if part.HasField("pages") and pair.source.is_serving:
                for page in range(4):
                    pair.write(LOCAL + page, b"again")
            if part.HasField("round_end"):
                throttle = pair.source.throttle
                seen.append((part.round_end.throttle_percent, 0 if throttle is None else throttle.percent))
                if part.round_end.last_before_stop:
                    pair.h1.stop(1, 10)
    assert seen == [(0, 0), (20, 20), (40, 40), (40, 40)]
    assert pair.source.throttle is None


async def test_while_it_waits_for_the_stop_the_source_keeps_the_difference_small(pair: Pair):
    many = FEW_DIRTY_BYTES // PAGE_BYTES + 1
    parts: Parts = []

    async def take() -> None:
        async with aclosing(pair.export()) as export:
            parts.extend([part async for part in export])

    taking = asyncio.create_task(take())
    await pair.h1.clock.advance(1.0)
    for _ in range(3):
        for page in range(many):
            pair.write(LOCAL + page, b"again")
        await pair.h1.clock.advance(REFRESH_S)
        await settle(200)
    pair.h1.stop(1, 10)
    await taking
    ends = [part.round_end for part in parts if part.HasField("round_end")]
    assert [end.round for end in ends] == [1, 2, 3, 4]
    assert all(end.last_before_stop for end in ends)
    assert parts[-2].HasField("round_end")
    receive(pair.target, parts)
    assert pair.target.image.memory == pair.source.image.memory


# Or nothing


def flipped(message: ExportStateResponse, path: str, change: Callable) -> ExportStateResponse:
    """Return the part with one field, given by its path, changed."""
    changed = ExportStateResponse.FromString(message.SerializeToString())
    *parents, name = path.split(".")
    at = changed
    for parent in parents:
        at = getattr(at, parent)
        at = at[0] if not hasattr(at, "DESCRIPTOR") else at
    value = change(getattr(at, name))
    if isinstance(value, list):
        at.ClearField(name)
        getattr(at, name).extend(value)
    else:
        setattr(at, name, value)
    return changed


def flip_bit(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


# Which field of which part (the first that has it) is changed, and how.
DAMAGE = {
    "version": ("header.format_version", lambda v: v + 1),
    "model": ("header.model", lambda v: v + "x"),
    "bars": ("header.bars", lambda bars: [Bar(index=0, size_bytes=4096)]),
    "bar size": ("header.bars.size_bytes", lambda size: size * 2),
    "identity": ("header.identity", lambda v: v ^ 1 << 63),
    "the model's version": ("header.model_version", lambda v: v + 1),
    "the sections": ("header.sections", lambda s: list(s)[:1]),
    "a section's name": ("header.sections.name", lambda v: v + "x"),
    "a section's size": ("header.sections.length_bytes", lambda v: v + PAGE_BYTES),
    "the mode": ("header.mode", lambda v: TRANSFER_MODE_POST_COPY),
    "image size": ("header.image_bytes", lambda v: v + PAGE_BYTES),
    "a bit of the pages": ("pages.data", flip_bit),
    "pages cut short": ("pages.data", lambda data: data[:-1]),
    "pages without a page": ("pages.data", lambda data: data[:-PAGE_BYTES]),
    "no pages": ("pages.data", lambda data: b""),
    "the pages' checksum": ("pages.crc", lambda v: v ^ 1),
    "the pages' place": ("pages.image_offset", lambda v: v + PAGE_BYTES),
    "an odd place": ("pages.image_offset", lambda v: v + 1),
    "a place beyond the end": ("pages.image_offset", lambda v: PAGES * PAGE_BYTES),
    "another section": ("pages.image_offset", lambda v: LOCAL * PAGE_BYTES),
    "zeros instead": ("pages.zero_bytes", lambda v: PAGE_BYTES),
    "the number of a section's parts": ("end.sections.page_messages", lambda v: v + 1),
    "the checksum of a section": ("end.sections.crc", lambda v: v ^ 1),
    "a section left out": ("end.sections", lambda s: list(s)[:1]),
    "the checksum of the end": ("end.crc", lambda v: v ^ 1),
    "a sequence": ("end.sequences.last_sequence", lambda v: v + 1),
    "a session": ("end.sequences.session.start", lambda v: v + 1),
    "a driver": ("end.sequences.driver", lambda v: "d3"),
    "an answer": ("end.sequences.answers", lambda a: [Answer(sequence=1, status=ACCESS_STATUS_OK, data=b"else")]),
    "answers left out": ("end.sequences.answers", lambda a: []),
    "sequences left out": ("end.sequences", lambda s: list(s)[:1]),
    "sequences in another order": ("end.sequences", lambda s: list(s)[::-1]),
}


def assert_refused(instance: Instance, parts: Parts, mode: TransferMode.ValueType = TRANSFER_MODE_PRE_COPY) -> None:
    with pytest.raises(VfleetError) as caught:
        receive(instance, parts, mode)
    assert caught.value.reason is Reason.BAD_STATE
    assert caught.value.metadata["function"] == "vf1"


@pytest.mark.parametrize("name", DAMAGE)
async def test_damage_is_refused(pair: Pair, name: str):
    parts = await pair.parts()
    path, change = DAMAGE[name]
    kind = path.partition(".")[0]
    index = next(index for index, part in enumerate(parts) if part.HasField(kind))
    damaged = [*parts[:index], flipped(parts[index], path, change), *parts[index + 1 :]]
    assert damaged != parts
    assert_refused(pair.target, damaged)


async def test_any_bit_of_any_page_and_of_its_place_counts(pair: Pair):
    (first, *_) = pages_of(await pair.parts())
    random = Random(5)
    for _ in range(50):
        data = bytearray(first.data)
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        assert pages_crc(first.image_offset, bytes(data)) != first.crc
    for bit in range(64):
        assert pages_crc(first.image_offset ^ 1 << bit, first.data) != first.crc


async def test_parts_that_are_lost_repeated_or_out_of_order_are_refused(pair: Pair):
    parts = await pair.parts()
    assert len(parts) > 4
    for index in range(len(parts)):
        assert_refused(pair.target, parts[:index])
        assert_refused(pair.target, parts[:index] + parts[index + 1 :])
        assert_refused(pair.target, [*parts[: index + 1], *parts[index:]])
        if index:
            swapped = [*parts[: index - 1], parts[index], parts[index - 1], *parts[index + 1 :]]
            assert_refused(pair.target, swapped)
    assert_refused(pair.target, [parts[0], ExportStateResponse(), *parts[1:]])


async def test_another_image_with_the_right_checksums_is_still_not_this_functions(pair: Pair):
    parts = await pair.parts()
    pages = StatePages(image_offset=PAGES * PAGE_BYTES, data=bytes(PAGE_BYTES))
    pages.crc = pages_crc(pages.image_offset, pages.data)
    assert_refused(pair.target, [parts[0], ExportStateResponse(pages=pages), *parts[1:]])


async def test_the_order_of_sequences_counts(pair: Pair):
    end = (await pair.parts())[-1].end
    assert end_crc(end.sequences, end.sections, 0) != end_crc(list(end.sequences)[::-1], end.sections, 0)


@pytest.mark.parametrize("is_restarted", [False, True])
async def test_after_an_import_that_broke_at_any_part_the_next_is_right(tmp_path: Path, is_restarted: bool):
    for broken_after in range(100):
        pair = Pair(tmp_path / str(broken_after))
        # What the broken import leaves must not show: a page and a driver that the source has no more.
        pair.write(LOCAL + 7, b"gone")
        pair.access("d0", b"gone")

        async def break_off(parts, left=broken_after):
            async for part in parts:
                if not left:
                    raise VfleetError(Reason.UNREACHABLE, "the source is gone")
                yield part
                left -= 1

        try:
            await pair.pull_all(Network(pair.h1, break_off))
        except VfleetError as error:
            if error.reason is not Reason.UNREACHABLE:
                raise
        else:
            pair.close()
            break
        assert (pair.target.state, pair.target.about.complete) == (DEVICE_STATE_RESUMING, False)
        await settle()
        pair.source.image.store([((LOCAL + 7) * PAGE_BYTES, bytes(PAGE_BYTES))])
        pair.source.image.forget("d0")
        if is_restarted:
            pair.h2.restart()
            pair.target = pair.h2.functions.require("vf1", 2)
        await pair.pull_all()
        pair.assert_moved()
        pair.close()
    assert broken_after > 4


@pytest.mark.parametrize("mode", [TRANSFER_MODE_PRE_COPY, TRANSFER_MODE_POST_COPY])
@pytest.mark.parametrize(
    "damaged", ["header.bars", "header.model_version", "pages.data", "end.crc", "nothing: it ends"]
)
async def test_after_an_import_that_is_refused_the_source_runs_on(
    pair: Pair, damaged: str, mode: TransferMode.ValueType
):
    """What comes after it is the coordinator's ABORT: the source resumes, the target goes."""
    changes = {
        "header.bars": lambda bars: [Bar(index=0, size_bytes=4096)],
        "header.model_version": lambda version: version + 1,
        "pages.data": flip_bit,
        "end.crc": lambda crc: crc ^ 1,
    }

    async def damage(parts):
        async for part in parts:
            if damaged not in changes:
                if part.HasField("end"):
                    return
                yield part
            else:
                yield flipped(part, damaged, changes[damaged]) if part.HasField(damaged.split(".")[0]) else part

    before = bytes(pair.source.image.memory)
    with pytest.raises(VfleetError) as caught:
        await pair.pull_all(Network(pair.h1, damage), mode=mode)
    assert caught.value.reason is Reason.BAD_STATE
    pair.h1.resume(1, 10, migration="m1")
    pair.h2.destroy(2, 10, DECISION_ABORTED)
    await settle()
    assert (pair.source.state, pair.source.about.HasField("stopped_by")) == (DEVICE_STATE_RUNNING, False)
    assert (bytes(pair.source.image.memory), pair.h2.functions.instances()) == (before, [])
    pair.access("d1", b"on")
    pair.target = pair.h2.create(generation=2, revision=20, fresh=False, bars=BARS, migration="m2")
    pair.write(LOCAL + 8, b"since then")
    async with aclosing(pair.pull(revision=20)) as progress:
        async for step in progress:
            if step.ready_to_stop and not step.complete:
                pair.h1.stop(1, 20, migration="m2")
    pair.assert_moved()


async def test_a_damaged_import_leaves_the_instance_incomplete(pair: Pair):
    async def damage(parts):
        async for part in parts:
            yield flipped(part, "pages.data", flip_bit) if part.HasField("pages") else part

    with pytest.raises(VfleetError) as caught:
        await pair.pull_all(Network(pair.h1, damage))
    assert caught.value.reason is Reason.BAD_STATE
    assert (pair.target.state, pair.target.about.complete) == (DEVICE_STATE_RESUMING, False)
    assert not isinstance(pair.h2.functions.admit("d1", "vf1", 2, (1, 1, 1), pair.target.about.base), tuple)
    await settle()
    await pair.pull_all()
    pair.assert_moved()
