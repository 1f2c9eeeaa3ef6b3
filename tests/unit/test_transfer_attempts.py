"""Whose export and import it is, and what becomes of them when another attempt, or the end, comes between."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path

import pytest
from support.bench import attempt
from support.fake_transfer import Network
from support.manual_clock import settle
from support.transfer_pair import BARS, LOCAL, Pair, Parts, receive, stopped_at_end

from hostd import transfer
from hostd.rounds import Throttle
from vfleet.errors import Reason, VfleetError
from vfleet.v1.transfer_service_pb2 import (
    CopyOptions,
    ExportStateResponse,
    ImportStateRequest,
)
from vfleet.v1.types_pb2 import (
    DEVICE_STATE_PRE_COPY,
    DEVICE_STATE_RUNNING,
)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    found = Pair(tmp_path)
    yield found
    found.close()


async def refusal(stream) -> Reason | None:
    """Return why a stream is refused at its beginning."""
    async with aclosing(stream) as parts:
        try:
            await anext(parts)
        except VfleetError as error:
            return error.reason
    return None


@pytest.mark.parametrize("max_rounds", [0, 1001])
async def test_rounds_are_bounded(pair: Pair, max_rounds: int):
    assert await refusal(pair.export(max_rounds=max_rounds)) is Reason.INVALID_FIELD
    assert await refusal(pair.pull(max_rounds=max_rounds)) is Reason.INVALID_FIELD


async def test_a_source_must_be_named(pair: Pair):
    options = CopyOptions(max_rounds=1)
    request = ImportStateRequest(attempt=attempt(10), function="vf1", generation=2, options=options)
    stream = transfer.import_state(pair.h2.functions, Network(pair.h1), request)
    assert await refusal(stream) is Reason.INVALID_FIELD


async def test_one_export_and_one_import_at_a_time(pair: Pair):
    async with aclosing(pair.pull()) as first:
        await anext(first)
        assert pair.source.state == DEVICE_STATE_PRE_COPY
        assert await refusal(pair.pull()) is Reason.ILLEGAL_STATE
        assert await refusal(pair.export()) is Reason.ILLEGAL_STATE
        assert pair.source.state == DEVICE_STATE_PRE_COPY
        pair.h1.stop(1, 10)
        assert [step.complete async for step in first] == [True]
    pair.assert_moved()


def breaking(*parts_before: int):
    """Return what breaks the connection of each export in turn after so many parts; later ones stand."""
    ends = list(parts_before)

    async def tamper(parts: AsyncGenerator[ExportStateResponse]) -> AsyncIterator[ExportStateResponse]:
        left = ends.pop(0) if ends else -1
        async with aclosing(parts):
            while left:
                left -= 1
                try:
                    yield await anext(parts)
                except StopAsyncIteration:
                    return
        metadata = {"address": "source:1", "code": "UNAVAILABLE"}
        raise VfleetError(Reason.UNREACHABLE, "Stream removed", metadata=metadata)

    return tamper


async def test_a_source_whose_connection_broke_before_it_said_anything_is_asked_once_more(pair: Pair):
    steps = await pair.pull_all(Network(pair.h1, breaking(0)))
    assert steps[-1].complete
    pair.assert_moved()


@pytest.mark.parametrize("breaks", [(0, 0), (0, 1), (1,), (3,)])
async def test_a_source_that_is_not_there_or_has_begun_is_not_asked_for_ever(pair: Pair, breaks):
    with pytest.raises(VfleetError) as caught:
        await pair.pull_all(Network(pair.h1, breaking(*breaks)))
    assert (caught.value.reason, pair.target.about.complete) == (Reason.UNREACHABLE, False)
    assert (await pair.pull_all())[-1].complete
    pair.assert_moved()


async def test_a_source_that_has_not_noticed_what_broke_is_out_of_reach_still(pair: Pair):
    async with aclosing(pair.export()) as lingering:
        await anext(lingering)
        with pytest.raises(VfleetError) as caught:
            await pair.pull_all(Network(pair.h1, breaking(0)))
    assert caught.value.reason is Reason.UNREACHABLE


async def test_an_export_that_ends_early_lets_the_function_run_untracked(pair: Pair):
    async with aclosing(pair.export()) as export:
        await anext(export)
        await anext(export)
    assert pair.source.state == DEVICE_STATE_RUNNING
    assert [part async for part in stopped_at_end(pair)][-1].HasField("end")


@pytest.mark.parametrize("how", ["another attempt", "destroyed"])
async def test_a_source_that_is_stopped_by_another_attempt_or_destroyed_has_no_last_state(pair: Pair, how: str):
    async with aclosing(pair.export()) as export:
        async for part in export:
            if part.HasField("round_end"):
                break
        last = asyncio.create_task(anext(export))
        await settle()
        if how == "destroyed":
            pair.h1.destroy(1, 10, 1)
        else:
            pair.h1.stop(1, 11)
        with pytest.raises(VfleetError) as caught:
            await last
    assert caught.value.reason is Reason.ILLEGAL_STATE


@pytest.mark.parametrize("parts_before", range(1, 8))
async def test_a_source_that_is_destroyed_in_the_middle_ends_its_export(pair: Pair, parts_before: int):
    pair.h1.stop(1, 10)
    async with aclosing(pair.export()) as export:
        try:
            for _ in range(parts_before):
                part = await anext(export)
            pair.h1.destroy(1, 10, 1)
            with pytest.raises(VfleetError) as caught:
                await anext(export)
            assert caught.value.reason is Reason.ILLEGAL_STATE
        except StopAsyncIteration:
            assert part.HasField("end")


async def test_an_export_of_a_stop_by_another_attempt_is_refused(pair: Pair):
    pair.h1.stop(1, 11)
    assert await refusal(pair.export(12)) is Reason.ILLEGAL_STATE


async def test_a_target_that_is_destroyed_during_its_import_takes_nothing_more(pair: Pair):
    async with aclosing(pair.pull()) as steps:
        await anext(steps)
        pair.h2.destroy(2, 10, 2)
        pair.h1.stop(1, 10)
        with pytest.raises(VfleetError) as caught:
            await anext(steps)
    assert caught.value.reason is Reason.STALE_ATTEMPT


@pytest.mark.parametrize("when", ["copying", "waiting", "stopped"])
async def test_an_abort_ends_the_copy_though_the_target_is_cut_off(pair: Pair, when: str):
    async def linger() -> None:
        async for _ in lingering:
            pass

    lingering = pair.export(10)
    await anext(lingering)
    first: asyncio.Task[None] | None = None
    if when == "waiting":
        first = asyncio.create_task(linger())
        await settle()
    elif when == "stopped":
        pair.h1.stop(1, 10)
    pair.source.throttle = Throttle(pair.h1.clock)
    pair.h1.resume(1, 10)
    assert (pair.source.state, pair.source.throttle) == (DEVICE_STATE_RUNNING, None)
    parts = [part async for part in stopped_at_end(pair, 20)]
    assert parts[-1].HasField("end")
    with pytest.raises(VfleetError) as caught:
        await (first or linger())
    assert caught.value.reason is Reason.ILLEGAL_STATE


async def test_an_abort_of_another_attempt_ends_no_copy(pair: Pair):
    async with aclosing(pair.export(10)) as export:
        await anext(export)
        pair.h1.resume(1, 11)
        assert pair.source.state == DEVICE_STATE_PRE_COPY


@pytest.mark.parametrize("how", ["ends", "goes on"])
@pytest.mark.parametrize("parts_before", [1, 2, 3, 100])
async def test_an_aborted_attempts_export_that_lingers_takes_nothing_from_the_next(pair: Pair, parts_before, how):
    """Its target is cut off, so that it ends, or goes on, only after the next attempt's export has begun."""
    lingering = pair.export(10)
    for _ in range(parts_before):
        if (await anext(lingering)).round_end.last_before_stop:
            break
    pair.h1.stop(1, 10)
    pair.h1.resume(1, 10)
    target = pair.h2.create(generation=2, revision=20, fresh=False, bars=BARS, vf_index=2, migration="m2")

    async def linger() -> None:
        async for _ in lingering:
            pass

    parts: Parts = []
    async for part in stopped_at_end(pair, 20):
        parts.append(part)
        if len(parts) == 2:
            pair.write(LOCAL + 3, b"changed after it was sent")
            first = asyncio.create_task(linger() if how == "goes on" else lingering.aclose())
            await settle()
            pair.write(LOCAL + 4, b"changed after it was sent")
    await asyncio.wait([first])
    assert how == "ends" or isinstance(first.exception(), VfleetError)
    receive(target, parts)
    assert target.image.memory == pair.source.image.memory
