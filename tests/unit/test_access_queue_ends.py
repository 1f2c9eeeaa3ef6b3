"""A queue that begins where another one ended; clients that ask again; what is taken back, and what ends."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.bench import reason_of
from support.manual_clock import settle
from support.queue_rig import ENDED, LONG_S, OK, Rig, all_rung

from hostd.fabric import MAX_JOINED
from hostd.home import exchange, forget_driver
from hostd.models import checker
from vfleet.errors import Reason, VfleetError
from vfleet.v1.access_pb2 import ACCESS_STATUS_OK, Session
from vfleet.v1.fabric_service_pb2 import ForgetDriverRequest


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


# A daemon that comes back


async def test_a_new_queue_goes_on_where_the_function_is(rig: Rig):
    for number in range(1, 4):
        rig.write(number)
    await rig.run()
    rig.queue.close(ENDED)
    rig.start(rig.entry)
    await rig.queue.synchronized()
    assert rig.queue.last_sequence == 3
    access = rig.write(4)
    await rig.run()
    assert (access.sequence, access.answer.result()) == (4, OK)
    assert rig.counters() == [4, 4, 0, 0, 0]


async def test_what_the_daemon_before_had_sent_comes_too_late(remote: Rig):
    remote.write(1)
    await remote.run()
    remote.write(2)
    remote.queue.close(ENDED)
    remote.link.break_off()
    remote.start(remote.entry)
    remote.link.come_back()
    await remote.queue.synchronized()
    remote.link.carry_late()
    assert remote.last == 1
    access = remote.write(2)
    await remote.run()
    assert (access.sequence, access.answer.result()) == (2, OK)
    assert remote.counters() == [2, 2, 0, 0, 0]


async def test_a_new_queue_asks_until_the_home_can_be_reached_and_serves(remote: Rig):
    remote.queue.close(ENDED)
    remote.link.break_off()
    remote.start(remote.entry)
    accesses = [remote.write(1)]
    await remote.clock.advance(LONG_S)
    remote.home.stop(1, 10)
    remote.link.come_back()
    await remote.run()
    assert not remote.queue.is_synchronized
    remote.home.resume(1, 10)
    await all_rung(remote, accesses)


# Clients that give sequences themselves


async def test_a_client_may_ask_again_for_an_answer(rig: Rig):
    first = [rig.read(checker.IDENTITY, 1), rig.write(1, 2)]
    await rig.run()
    again = [rig.read(checker.IDENTITY, 1), rig.write(1, 2), rig.write(1, 2)]
    await rig.run()
    assert [access.answer.result() for access in again] == [a.answer.result() for a in (first[0], first[1], first[1])]
    assert rig.counters() == [1, 1, 0, 0, 0]
    assert rig.write(2, 3).sequence == 3


async def test_a_client_asks_again_for_what_is_not_answered_yet(rig: Rig):
    rig.hold()
    first, again = rig.write(1, 1), rig.write(1, 1)
    rig.hold(held=False)
    await rig.run()
    assert (first.answer.result(), again.answer.result()) == (OK, OK)
    assert rig.counters() == [1, 1, 0, 0, 0]


async def test_what_many_clients_ask_for_again_is_on_its_way_once_and_in_messages_of_bounded_size(remote: Rig):
    count = 6 * MAX_JOINED
    for number in range(1, count + 1):
        remote.write(number, number)
    await remote.run()
    remote.link.break_off()
    asked = [remote.write(number, number) for number in range(1, count)]
    remote.link.batches.clear()
    remote.link.come_back()
    asked.append(remote.write(count, count))
    await remote.run()
    assert [access.answer.done() for access in asked] == [True] * count
    sent = [access.sequence for batch in remote.link.batches for access in batch.accesses]
    assert sent == list(range(1, count + 1))
    assert max(len(batch.accesses) for batch in remote.link.batches) == MAX_JOINED
    assert remote.counters() == [count, count, 0, 0, 0]


async def test_a_sequence_ahead_of_its_turn_is_refused_and_leaves_no_trace(rig: Rig):
    with pytest.raises(VfleetError) as caught:
        rig.write(1, 2)
    assert caught.value.reason is Reason.SEQUENCE_GAP
    assert caught.value.metadata["expected"] == "1"
    await all_rung(rig, [rig.write(1, 1), rig.write(2, 2)])


async def test_a_sequence_before_the_home_was_asked_is_refused(tmp_path: Path):
    rig = Rig(tmp_path, "h2")
    assert reason_of(rig.write, 1, 1) is Reason.SEQUENCE_GAP
    await rig.run()
    await all_rung(rig, [rig.write(1, 1)])
    rig.close()


async def test_those_without_a_sequence_keep_their_places_before_one_with_one(rig: Rig):
    rig.hold()
    accesses = [rig.write(1), rig.write(2)]
    assert reason_of(rig.write, 9, 4) is Reason.SEQUENCE_GAP
    accesses.append(rig.write(3, 3))
    accesses.append(rig.write(4))
    rig.hold(held=False)
    await all_rung(rig, accesses)


# Giving up, ending


async def test_what_was_never_sent_can_be_taken_back(rig: Rig):
    rig.hold()
    first, second = rig.write(7), rig.write(1)
    assert rig.queue.give_up(first)
    assert not rig.queue.give_up(first)
    rig.hold(held=False)
    await all_rung(rig, [second])


async def test_what_was_sent_can_not_be_taken_back(remote: Rig):
    access = remote.write(1)
    assert not remote.queue.give_up(access)
    await all_rung(remote, [access])


async def test_an_ended_queue_fails_what_waits_and_takes_nothing_more(rig: Rig):
    rig.hold()
    waiting = rig.write(1)
    rig.queue.close(ENDED)
    assert waiting.answer.exception() is ENDED
    with pytest.raises(VfleetError) as caught:
        rig.write(2)
    assert caught.value is ENDED
    await rig.run()
    assert rig.last == 0


async def test_an_ended_queue_lets_those_go_who_wait_for_its_sequence(remote: Rig):
    remote.queue.close(ENDED)
    remote.link.break_off()
    remote.start(remote.entry)
    waiting = asyncio.create_task(remote.queue.synchronized())
    await settle()
    assert not waiting.done()
    remote.queue.close(ENDED)
    await waiting


async def test_a_detached_driver_is_forgotten_by_the_function(rig: Rig):
    await all_rung(rig, [rig.write(1)])
    rig.queue.detach(ENDED)
    assert rig.instance.image.sequencers() == []
    rig.start(rig.entry)
    await rig.run()
    assert rig.queue.last_sequence == 0


async def test_a_driver_of_a_later_session_is_not_forgotten(remote: Rig):
    remote.start(remote.entry)
    await remote.run()
    request = ForgetDriverRequest(driver="d1", function="vf1", generation=1, session=Session(start=9))
    remote.link.forget_driver(request)
    assert [s.driver for s in remote.instance.image.sequencers()] == ["d1"]


# One attachment after another. What is left of the earlier comes late, twice or never.


def attach_again(rig: Rig, *, session: int | None = None) -> None:
    """Detach the driver, and attach it once more: in the same session, or at a host that is in another one."""
    rig.queue.detach(ENDED)
    rig.session = session or rig.session
    rig.attach(replace(rig.entry, revision=rig.entry.revision + 10))


@pytest.mark.parametrize(("is_forgotten", "has_asked"), [(True, True), (True, False), (False, True)])
async def test_what_was_sent_before_a_detach_has_no_effect_after_it(remote: Rig, is_forgotten: bool, has_asked: bool):
    remote.link.loses_forgettings = not is_forgotten
    remote.write(9)
    late = remote.link.requests.popleft()
    attach_again(remote)
    if has_asked:
        await remote.run()
    exchange(remote.h2.functions, late)
    await remote.run()
    await all_rung(remote, [remote.write(1), remote.write(2)])


async def test_what_took_effect_before_a_detach_does_not_again_after_it(remote: Rig):
    first = remote.write(1)
    late = remote.link.requests[0]
    await remote.run()
    assert first.answer.result() == OK
    remote.queue.detach(ENDED)
    exchange(remote.h2.functions, late)
    assert remote.counters() == [1, 1, 0, 0, 0]
    assert remote.instance.image.sequencers() == [], "nor is anything kept for it"


async def test_an_answer_of_before_a_detach_is_none_to_what_follows(remote: Rig):
    remote.read(checker.IDENTITY)
    remote.link.carry_request()
    answer = remote.link.responses.popleft()
    attach_again(remote)
    await remote.clock.advance(LONG_S)
    access = remote.read(checker.SCRATCH)
    remote.link.responses.append(answer)
    remote.link.carry_response()
    await remote.run()
    assert access.answer.result() == (ACCESS_STATUS_OK, bytes(8))


async def test_a_forgetting_that_comes_late_or_again_forgets_nothing_of_the_next_attachment(remote: Rig):
    await all_rung(remote, [remote.write(1)])
    remote.link.loses_forgettings = True
    attach_again(remote)
    await remote.run()
    accesses = [remote.write(2)]
    await remote.run()
    forget_driver(remote.h2.functions, remote.link.forgettings[0])
    accesses.append(remote.write(3))
    await remote.run()
    assert [access.answer.result() for access in accesses] == [OK, OK]
    assert remote.counters() == [3, 3, 0, 0, 0]


@pytest.mark.parametrize("is_late", [False, True])
async def test_a_driver_that_is_attached_at_another_host_is_served_though_it_was_not_forgotten(
    remote: Rig, is_late: bool
):
    """Hosts count their sessions each for itself."""
    remote.start(remote.entry)
    remote.start(remote.entry)
    await all_rung(remote, [remote.write(1)])
    remote.link.loses_forgettings = True
    attach_again(remote, session=1)
    await remote.run()
    accesses = [remote.write(2)]
    if is_late:
        await remote.run()
        forget_driver(remote.h2.functions, remote.link.forgettings[0])
        accesses.append(remote.write(3))
    await remote.run()
    assert [access.answer.result() for access in accesses] == [OK] * len(accesses)
    assert remote.counters() == [1 + len(accesses)] * 2 + [0, 0, 0]
