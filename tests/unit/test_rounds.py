"""When rounds end, what they are expected to cost, and how a driver that is too fast is slowed down."""

import asyncio

import pytest
from support.manual_clock import ManualClock, settle

from hostd.rounds import (
    ASSUMED_BYTES_PER_S,
    FEW_DIRTY_BYTES,
    PACE_LONGEST_PAUSE_S,
    THROTTLE_SLICE_S,
    THROTTLE_STEPS_PERCENT,
    Pace,
    Rounds,
    Throttle,
)
from vfleet.v1.transfer_service_pb2 import CopyOptions

MIB = 1 << 20


def rounds(max_rounds: int = 100, limit_us: int | None = None) -> Rounds:
    options = CopyOptions(max_rounds=max_rounds, has_limit=limit_us is not None, last_copy_limit_us=limit_us or 0)
    found = Rounds(options)
    found.sent(100 * MIB, 1.0)
    return found


def ended(found: Rounds, *dirty_mib: float) -> list[tuple[bool, int]]:
    """Return whether it was ready after each round, and by how much the function was slowed down."""
    seen = []
    for dirty in dirty_mib:
        found.end(round(dirty * MIB), 0.5, is_serving=True)
        seen.append((found.is_ready, found.throttle_percent))
    return seen


def test_the_estimate_is_what_is_dirty_over_the_rate_of_the_copy():
    found = rounds()
    ended(found, 25)
    assert (found.last_copy_us, found.dirty_bytes_per_s) == (250_000, 50 * MIB)
    untried = Rounds(CopyOptions(max_rounds=1))
    untried.end(ASSUMED_BYTES_PER_S, 0.0, is_serving=True)
    assert (untried.last_copy_us, untried.dirty_bytes_per_s) == (1_000_000, 0)


def test_rounds_go_on_while_they_get_shorter_and_end_when_few_pages_are_left():
    assert ended(rounds(), 64, 32, 16, FEW_DIRTY_BYTES / MIB) == [(False, 0), (False, 0), (False, 0), (True, 0)]


def test_without_a_limit_they_end_when_they_get_no_shorter():
    assert ended(rounds(), 64, 60) == [(False, 0), (True, 0)]


def test_they_end_when_they_are_used_up_or_the_function_stops():
    assert ended(rounds(max_rounds=2), 64, 32) == [(False, 0), (True, 0)]
    found = rounds()
    found.end(64 * MIB, 0.5, is_serving=False)
    assert found.is_ready


def test_a_limit_that_is_met_is_not_overdone():
    # 20 MiB take 200 ms. They still get shorter after the second round, so it goes on; after the third they don't.
    assert ended(rounds(limit_us=300_000), 64, 20, 19) == [(False, 0), (False, 0), (True, 0)]


def test_a_limit_that_is_not_met_slows_the_function_down_step_by_step_and_no_further():
    seen = ended(rounds(max_rounds=9, limit_us=10_000), 64, 64, 64, 64, 64, 64, 64, 64, 64)
    assert [percent for _, percent in seen] == [0, *THROTTLE_STEPS_PERCENT, 90, 90, 90]
    assert [is_ready for is_ready, _ in seen] == [False] * 8 + [True]


def test_few_pages_are_not_enough_for_a_limit_of_nothing():
    assert ended(rounds(max_rounds=3, limit_us=0), 64, 0.25, 0) == [(False, 0), (False, 0), (True, 0)]


def test_what_is_ready_stays_ready():
    assert ended(rounds(), 0, 64) == [(True, 0), (True, 0)]


@pytest.mark.parametrize("percent", [0, 20, 90])
async def test_a_throttled_function_works_in_its_share_of_each_slice(percent: int):
    clock = ManualClock(0.0)
    throttle = Throttle(clock)
    throttle.percent = percent
    blocked = 0
    for step in range(1000):
        clock.now = THROTTLE_SLICE_S * (step / 100 + 0.005)
        blocked += throttle.blocks()
    assert blocked == percent * 10


async def test_who_is_throttled_goes_on_with_the_next_slice():
    clock = ManualClock(0.019)
    throttle = Throttle(clock)
    throttle.percent = 20
    waiting = asyncio.create_task(throttle.opened())
    await settle()
    assert not waiting.done()
    await clock.advance(0.0011)
    assert waiting.done()


async def test_a_slice_ends_though_its_end_is_no_exact_number():
    clock = ManualClock(0.06)
    throttle = Throttle(clock)
    throttle.percent = 20
    assert clock.now % 0.02 > 0.019
    waiting = asyncio.create_task(throttle.opened())
    async with asyncio.timeout(5):
        await clock.advance(0.001)
    assert waiting.done()


@pytest.mark.parametrize("chunk", [MIB // 4, 4 * MIB])
@pytest.mark.parametrize("bandwidth", [MIB, 64 * MIB])
async def test_a_copy_keeps_below_its_bandwidth_and_comes_close(bandwidth: int, chunk: int):
    clock = ManualClock(0.0)
    pace = Pace(clock, bandwidth)
    ended_s = []

    async def send() -> None:
        for _ in range(16 * MIB // chunk):
            await pace.sent(chunk)
        ended_s.append(clock.now)

    sending = asyncio.create_task(send())
    await clock.advance(1000.0)
    assert sending.done()
    assert 0 <= ended_s[0] - (16 * MIB / bandwidth - PACE_LONGEST_PAUSE_S) <= PACE_LONGEST_PAUSE_S + 1e-6


async def test_without_a_bandwidth_a_copy_waits_for_nothing():
    clock = ManualClock(0.0)
    await Pace(clock, 0).sent(1 << 30)
    assert clock.now == 0.0


async def test_a_bandwidth_does_not_hold_up_what_has_become_urgent():
    clock, bound = ManualClock(0.0), True
    pacing = asyncio.create_task(Pace(clock, MIB).sent(1 << 30, lambda: bound))
    await clock.advance(10.0)
    assert not pacing.done()
    bound = False
    await clock.advance(PACE_LONGEST_PAUSE_S)
    assert pacing.done()
