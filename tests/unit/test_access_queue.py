"""One driver's queue: order and single effect through holds, refusals, broken links and moves."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.bench import IDENTITY, VIRTUAL_ADDRESS, reason_of
from support.manual_clock import settle
from support.queue_rig import ENDED, Rig, all_rung, done

from hostd.access_queue import MAX_WAITING
from hostd.fabric import MAX_JOINED
from hostd.models import checker
from hostd.waiting import Waiting
from vfleet.errors import Reason
from vfleet.limits import WINDOW
from vfleet.v1.access_pb2 import (
    ACCESS_KIND_WRITE,
    ACCESS_STATUS_OK,
    ACCESS_STATUS_UNSUPPORTED_REQUEST,
)
from vfleet.v1.fabric_service_pb2 import REFUSAL_NOT_SERVING


@pytest.fixture(params=["h1", "h2"], ids=["local", "remote"])
async def rig(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rig]:
    found = Rig(tmp_path, request.param)
    await found.run()
    yield found
    found.close()


@pytest.fixture
async def remote(tmp_path: Path) -> AsyncIterator[Rig]:
    found = Rig(tmp_path, "h2")
    await found.run()
    yield found
    found.close()


# Order


async def test_accesses_are_answered_in_their_order(rig: Rig):
    order: list[int] = []
    accesses = [rig.write(number) for number in range(1, 201)]
    for access in accesses:
        access.answer.add_done_callback(lambda _, access=access: order.append(access.sequence))
    await all_rung(rig, accesses)
    assert order == list(range(1, 201))
    assert rig.queue.last_sequence == 200


async def test_a_read_returns_what_the_function_has(rig: Rig):
    identity, nothing = rig.read(checker.IDENTITY), rig.read(8192)
    await rig.run()
    assert identity.answer.result() == (ACCESS_STATUS_OK, IDENTITY.to_bytes(8, "little"))
    assert nothing.answer.result() == (ACCESS_STATUS_UNSUPPORTED_REQUEST, b"\xff" * 8)


async def test_at_most_a_window_is_on_its_way(remote: Rig):
    accesses = [remote.write(number) for number in range(1, 3 * WINDOW)]
    assert sum(len(batch.accesses) for batch in remote.link.batches) == WINDOW
    remote.link.carry_request()
    assert sum(len(batch.accesses) for batch in remote.link.batches) == WINDOW
    await all_rung(remote, accesses)


def rings(count: int) -> list[Waiting]:
    """Return accesses that ring the doorbell with 1, 2, and so on."""
    address = VIRTUAL_ADDRESS + checker.channel_offset(0)
    return [Waiting(ACCESS_KIND_WRITE, address, 8, number.to_bytes(8, "little")) for number in range(1, count + 1)]


async def test_accesses_that_are_submitted_together_share_messages(remote: Rig):
    accesses = rings(100)
    remote.queue.submit_many(accesses)
    assert [len(batch.accesses) for batch in remote.link.batches] == [MAX_JOINED] * (WINDOW // MAX_JOINED)
    await all_rung(remote, accesses)


@pytest.mark.parametrize("answered", [0, 1, 2])
async def test_a_hold_in_the_middle_of_a_batch_repeats_nothing(remote: Rig, answered: int):
    accesses = rings(100)
    remote.queue.submit_many(accesses)
    for _ in range(answered):
        remote.link.carry_request()
        remote.link.carry_response()
    remote.link.carry_request()
    remote.hold()
    assert sum(done(accesses)) == answered * MAX_JOINED
    remote.link.break_off()
    remote.link.come_back()
    remote.hold(held=False)
    await all_rung(remote, accesses)


async def test_a_batch_is_submitted_whole_or_not_at_all(rig: Rig):
    rig.hold()
    accesses = rings(MAX_WAITING - 1)
    rig.queue.submit_many(accesses)
    assert reason_of(rig.queue.submit_many, rings(2)) is Reason.LIMIT_EXCEEDED
    assert rig.queue.unanswered == MAX_WAITING - 1
    rig.hold(held=False)
    await all_rung(rig, accesses)
    rig.queue.close(ENDED)
    assert reason_of(rig.queue.submit_many, rings(2)) is ENDED.reason


async def test_a_full_queue_refuses_and_goes_on(rig: Rig):
    rig.hold()
    accesses = [rig.write(number) for number in range(1, MAX_WAITING + 1)]
    assert reason_of(rig.write, 0) is Reason.LIMIT_EXCEEDED
    rig.hold(held=False)
    for _ in range(MAX_WAITING // WINDOW // 4):
        await rig.run()
    await all_rung(rig, accesses)


# Holds


async def test_nothing_is_sent_while_held_and_all_in_order_after_the_lift(rig: Rig):
    accesses = [rig.write(1), rig.write(2)]
    await rig.run()
    rig.hold()
    accesses += [rig.write(number) for number in range(3, 10)]
    await rig.run()
    assert rig.last == 2
    assert done(accesses) == [True] * 2 + [False] * 7
    rig.hold(held=False)
    await all_rung(rig, accesses)


async def test_what_was_sent_before_a_hold_is_sent_again_after_it(remote: Rig):
    accesses = [remote.write(number) for number in range(1, 6)]
    remote.link.carry_request()
    remote.hold()
    remote.link.responses.clear()
    remote.hold(held=False)
    await all_rung(remote, accesses)


async def test_an_answer_that_comes_during_a_hold_counts(remote: Rig):
    accesses = [remote.write(1), remote.write(2)]
    remote.link.carry_request()
    remote.hold()
    remote.link.carry_response()
    assert done(accesses) == [True, False]
    remote.hold(held=False)
    await all_rung(remote, accesses)


async def test_a_queue_made_while_held_asks_nothing_before_the_lift(rig: Rig):
    rig.queue.close(ENDED)
    rig.start(replace(rig.entry, held=True))
    accesses = [rig.write(1)]
    await rig.run()
    assert rig.last == 0
    assert not rig.queue.is_synchronized
    rig.hold(held=False)
    await all_rung(rig, accesses)


# Refusals


async def test_what_a_stopped_function_refuses_is_sent_again_until_it_runs(rig: Rig):
    accesses = [rig.write(1)]
    await rig.run()
    rig.home.stop(1, 10)
    accesses += [rig.write(number) for number in range(2, 6)]
    await rig.run()
    assert done(accesses) == [True] + [False] * 4
    rig.home.resume(1, 10)
    await all_rung(rig, accesses)


async def test_a_refusal_in_the_middle_keeps_the_order_of_what_is_on_its_way(remote: Rig):
    accesses = [remote.write(number) for number in range(1, 4)]
    assert len(remote.link.requests) == 3
    remote.home.stop(1, 10)
    remote.link.carry_request()
    remote.home.resume(1, 10)
    remote.link.carry_request()
    remote.link.carry_request()
    assert [r.expected_sequence for r in remote.link.responses] == [0, 1, 1]
    accesses.append(remote.write(4))
    await all_rung(remote, accesses)


async def test_retries_become_rarer(remote: Rig):
    remote.home.stop(1, 10)
    remote.write(1)
    for _ in range(600):
        remote.link.carry_all()
        await remote.clock.advance(0.01)
    assert 20 < len(remote.link.batches) < 80


async def test_a_refusal_of_another_generation_is_not_heard(remote: Rig):
    access = remote.write(1)
    remote.link.carry_request()
    remote.link.responses[0].ClearField("answers")
    remote.link.responses[0].refusal = REFUSAL_NOT_SERVING
    remote.link.responses[0].generation = 7
    batches = len(remote.link.batches)
    remote.link.carry_response()
    await remote.run()
    assert len(remote.link.batches) == batches
    assert not access.answer.done()


# Links


async def test_a_broken_link_loses_and_repeats_nothing(remote: Rig):
    accesses = []
    for number in range(1, 41, 4):
        accesses += [remote.write(n) for n in range(number, number + 4)]
        remote.link.carry_request()
        remote.link.carry_request()
        remote.link.carry_response()
        remote.link.break_off()
        await settle()
        accesses_so_far = remote.last
        remote.link.carry_late()
        assert remote.last >= accesses_so_far
        remote.link.come_back()
        remote.link.carry_late()
    await all_rung(remote, accesses)


async def test_what_is_submitted_while_the_link_is_down_waits(remote: Rig):
    remote.link.break_off()
    accesses = [remote.write(number) for number in range(1, 4)]
    await remote.run()
    assert done(accesses) == [False] * 3
    remote.link.come_back()
    await all_rung(remote, accesses)


# Moves


@pytest.mark.parametrize("held", [False, True])
async def test_accesses_go_on_at_the_next_home(rig: Rig, held: bool):
    accesses = [rig.write(number) for number in range(1, 4)]
    if rig.link.requests:
        rig.link.carry_request()
    rig.hold(held=held)
    source = rig.instance
    rig.home.stop(1, 10)
    accesses.append(rig.write(4))
    target = (rig.h2 if rig.home is rig.h1 else rig.h1).create(generation=2, revision=10, fresh=False)
    target.image.store([(0, bytes(source.image.memory))])
    for sequencer in source.image.sequencers():
        target.image.sequencer(sequencer.driver).load(sequencer.export())
    (rig.h2 if rig.home is rig.h1 else rig.h1).functions.complete_import(target)
    rig.instance = target
    rig.follow(rig.entry_at(target))
    accesses.append(rig.write(5))
    await all_rung(rig, accesses)
