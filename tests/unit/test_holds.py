"""Holds: placed, lifted, taken over and resolved, for one function and for a group, and acknowledged by drivers."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.bench import RESOLVE_MS, VIRTUAL_ADDRESS, Bench, attempt, reason_of
from support.driver_bench import D1, OLD, attached, holds, new, old, read, seen, told
from support.full_disk import full_disk
from support.manual_clock import settle

from hostd.translation import TranslationTable
from vfleet.errors import Reason, VfleetError
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_STATUS_OK
from vfleet.v1.driver_service_pb2 import (
    NOTIFICATION_KIND_HELD,
    NOTIFICATION_KIND_LIFTED,
    WatchNotificationsResponse,
)
from vfleet.v1.hold_service_pb2 import Hold


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    found = attached(tmp_path)
    await settle()
    yield found
    found.close()


async def test_a_held_driver_waits_and_goes_on_after_the_lift(bench: Bench):
    assert await bench.hold(10, D1) == []
    assert holds(bench) == [(*D1, 10)]
    assert bench.drivers.holds()[0].resolve_time == bench.clock.time() + RESOLVE_MS / 1000
    waiting = await read(bench)
    await settle()
    assert not waiting.access.answer.done()
    bench.lift(10, D1)
    assert (await waiting.result(1))[1] == 1
    assert (seen(bench), holds(bench)) == ((1, False), [])


@pytest.mark.parametrize(
    ("names", "more", "reason"),
    [
        ([D1, ("d1", "vf1", 2)], {}, Reason.WRONG_GENERATION),
        ([D1, ("d1", "vf2", 1)], {}, Reason.NOT_FOUND),
        ([D1, ("d9", "vf1", 1)], {}, Reason.NOT_FOUND),
        ([D1, ("d1", "", 1)], {}, Reason.INVALID_FIELD),
        ([D1], {"migration": ""}, Reason.INVALID_FIELD),
        ([], {}, Reason.INVALID_FIELD),
        ([D1] * 129, {}, Reason.INVALID_FIELD),
        ([D1], {"revision": 0}, Reason.INVALID_FIELD),
    ],
)
async def test_a_hold_with_one_thing_wrong_holds_nothing(bench: Bench, names, more, reason):
    table = bench.drivers.require("d1").table
    listened = told(bench)
    with pytest.raises(VfleetError) as caught:
        await bench.hold(more.pop("revision", 10), *names, **more)
    assert caught.value.reason is reason
    assert bench.drivers.require("d1").table is table
    assert (holds(bench), listened) == ([], [])
    bench.restart()
    assert seen(bench) == (1, False)


async def test_a_hold_of_an_attempt_that_ended_or_is_lower_is_refused(bench: Bench):
    bench.lift(10, D1)
    for revision in (9, 10):
        with pytest.raises(VfleetError) as caught:
            await bench.hold(revision, D1)
        assert caught.value.reason is Reason.STALE_ATTEMPT
    assert seen(bench) == (1, False)


async def test_a_repeated_hold_is_one_hold(bench: Bench):
    await bench.hold(10, D1)
    await bench.hold(10, D1, D1)
    assert holds(bench) == [(*D1, 10)]
    bench.lift(10, D1, D1)
    bench.lift(10, D1)
    assert (seen(bench), holds(bench)) == ((1, False), [])


async def test_another_attempt_lifts_nothing(bench: Bench):
    await bench.hold(10, D1)
    assert reason_of(bench.lift, 9, D1) is Reason.STALE_ATTEMPT
    bench.lift(11, D1)
    bench.update(11, old(bench), lift=True)
    assert (seen(bench), holds(bench)) == ((1, True), [(*D1, 10)])


async def test_a_later_attempt_takes_the_hold_over_and_the_earlier_lift_comes_too_late(bench: Bench):
    await bench.hold(10, D1)
    await bench.hold(11, D1)
    assert reason_of(bench.lift, 10, D1) is Reason.STALE_ATTEMPT
    assert (seen(bench), holds(bench)) == ((1, True), [(*D1, 11)])
    bench.lift(11, D1)
    assert seen(bench) == (1, False)


async def test_a_hold_that_could_not_be_placed_or_lifted_on_a_full_disk_is_when_that_is_asked_for_again(bench: Bench):
    # The attempt is known here, so that nothing but the hold is to be written.
    await bench.hold(10, D1)
    bench.lift(10, ("d9", "vf1", 1))
    with full_disk():
        assert reason_of(bench.lift, 10, D1) is Reason.LIMIT_EXCEEDED
    assert (seen(bench), holds(bench)) == ((1, True), [(*D1, 10)])
    bench.lift(10, D1)
    assert (seen(bench), holds(bench)) == ((1, False), [])
    bench.functions.fence_for_export("vf1", 1, attempt(11))
    with full_disk(), pytest.raises(VfleetError):
        await bench.hold(11, D1)
    assert (seen(bench), holds(bench)) == ((1, False), [])
    await bench.hold(11, D1)
    assert (seen(bench), holds(bench)) == ((1, True), [(*D1, 11)])


async def test_lifting_what_is_not_here_does_nothing(bench: Bench):
    bench.lift(10, D1, ("d1", "vf7", 1), ("d9", "vf1", 1))
    assert seen(bench) == (1, False)


@pytest.mark.parametrize("is_restarted", [False, True])
@pytest.mark.parametrize("way", ["update", "watch", "listing", "update, then lift", "watch, then lift", "resolved"])
async def test_a_commit_ends_the_hold_whichever_way_it_comes(bench: Bench, way: str, is_restarted: bool):
    await bench.hold(10, D1)
    if is_restarted:
        bench.restart()
        await settle()
    if way == "update":
        bench.update(10, new(bench), lift=True)
    elif way == "watch":
        bench.drivers.follow([new(bench)], 20, complete=False)
    elif way == "listing":
        bench.drivers.follow([new(bench)], 20, complete=True)
    elif way == "resolved":
        bench.drivers.resolve_holds("m1", [new(bench)])
    else:
        bench.update(10, new(bench), lift=False)
        assert seen(bench) == (2, True)
        if way == "watch, then lift":
            bench.drivers.follow([new(bench)], 20, complete=False)
        bench.update(10, new(bench), lift=True)
    assert (seen(bench), holds(bench)) == ((2, False), [])
    for _ in range(2):
        bench.update(10, new(bench), lift=True)
        bench.drivers.follow([new(bench)], 20, complete=True)
    bench.restart()
    assert (seen(bench), holds(bench)) == ((2, False), [])


async def test_the_next_attempts_hold_is_not_ended_by_the_commit_before_it(bench: Bench):
    bench.drivers.follow([new(bench)], 20, complete=False)
    await bench.hold(30, ("d1", "vf1", 2), migration="m2")
    assert reason_of(bench.update, 10, new(bench), lift=True) is Reason.STALE_ATTEMPT
    bench.drivers.follow([new(bench)], 25, complete=True)
    assert (seen(bench), holds(bench)) == ((2, True), [("d1", "vf1", 2, 30)])


async def test_a_resolved_abort_lifts_and_leaves_the_entry(bench: Bench):
    await bench.hold(10, D1)
    bench.drivers.resolve_holds("m1", [old(bench)])
    assert (seen(bench), holds(bench)) == ((1, False), [])


async def test_an_entry_that_is_written_anew_at_its_generation_is_lifted_by_the_resolution(bench: Bench):
    await bench.hold(10, D1)
    bench.drivers.resolve_holds("m1", [bench.message(OLD, revision=15)])
    assert (seen(bench), holds(bench), bench.entry().revision) == ((1, False), [], 15)


async def test_a_resolution_takes_over_nothing_that_its_migration_does_not_hold(bench: Bench):
    bench.drivers.recorded("d2", 0)
    bench.drivers.attach(old(bench, driver="d2"))
    await bench.hold(10, D1)
    await bench.hold(11, ("d2", "vf1", 1), migration="m2")
    others = [new(bench, driver="d2"), new(bench, function="vf2", virtual_address=2 << 40)]
    bench.drivers.resolve_holds("m1", [old(bench), *others])
    assert (seen(bench), seen(bench, "vf2")) == ((1, False), None)
    assert holds(bench) == [("d2", "vf1", 1, 11)]
    assert (bench.entry("d2").generation, bench.entry("d2").held) == (1, True)


async def test_a_resolution_of_an_earlier_hold_leaves_a_later_one(bench: Bench):
    await bench.hold(10, D1)
    await bench.hold(11, D1, migration="m2")
    bench.drivers.resolve_holds("m1", [old(bench)])
    bench.drivers.postpone("m1", 1.0)
    assert (seen(bench), holds(bench)) == ((1, True), [(*D1, 11)])
    assert bench.drivers.holds()[0].resolve_time != 1.0


async def test_a_restart_keeps_holds_and_their_deadlines(bench: Bench):
    await bench.hold(10, D1)
    (hold,) = bench.drivers.holds()
    bench.drivers.postpone("m1", hold.resolve_time + 5)
    bench.clock.now += 3
    bench.restart()
    await settle()
    assert [h.resolve_time for h in bench.drivers.holds()] == [hold.resolve_time + 5]
    waiting = await read(bench)
    await settle()
    assert not waiting.access.answer.done()
    bench.lift(10, D1)
    assert (await waiting.result(1))[0][0] == ACCESS_STATUS_OK


@pytest.mark.parametrize("is_hold_known", [False, True])
async def test_a_kill_between_a_hold_and_its_entry_leaves_them_of_one_mind(bench: Bench, is_hold_known: bool):
    entry = replace(bench.entry(), held=not is_hold_known)
    bench.ledger.put("entry", "d1/vf1", entry.to_proto())
    if is_hold_known:
        hold = Hold(attempt=attempt(10), migration="m1", driver="d1", function="vf1", generation=1, resolve_time=5)
        bench.ledger.put("hold", "d1/vf1", hold)
    bench.restart()
    assert seen(bench) == (1, is_hold_known)
    assert bool(holds(bench)) == is_hold_known


# Groups


async def test_a_group_is_seen_moved_as_a_whole(bench: Bench):
    """Whoever looks, at whichever moment: no table has one function moved, held or lifted without the other."""
    first, second = new(bench), new(bench, function="vf2", virtual_address=2 << 40)
    bench.drivers.attach(bench.message(OLD, function="vf2", revision=2, virtual_address=2 << 40))
    driver = bench.drivers.require("d1")
    tables: list[TranslationTable] = []

    def look(notification: WatchNotificationsResponse) -> None:
        tables.append(driver.table)

    driver.listeners.append(look)
    sent = bench.fabric.to(2)
    carry, sent.send = sent.send, lambda request, sender: tables.append(driver.table) or carry(request, sender)
    await settle()
    await bench.hold(10, D1, ("d1", "vf2", 1))
    for address in (VIRTUAL_ADDRESS, 2 << 40):
        await driver.submit(ACCESS_KIND_READ, address, 8, b"", sequence=0)
    await settle()
    bench.update(10, first, second, lift=True)
    distinct = {id(table): table for table in tables}.values()
    looks = [{(e.generation, e.held) for e in table.entries} for table in distinct]
    assert looks == [{(1, True)}, {(2, False)}]
    assert len(tables) >= 5, "two notifications of each kind, and an access"


async def test_a_group_is_lifted_as_a_whole(bench: Bench):
    bench.drivers.attach(bench.message(OLD, function="vf2", revision=2, virtual_address=2 << 40))
    driver = bench.drivers.require("d1")
    await bench.hold(10, D1, ("d1", "vf2", 1))
    tables: list[TranslationTable] = []
    driver.listeners.append(lambda _: tables.append(driver.table))
    bench.lift(10, D1, ("d1", "vf2", 1))
    assert len(tables) == 2
    assert {(e.generation, e.held) for e in tables[0].entries} == {(1, False)}
    assert tables[0] is tables[1]


# Acknowledgements


async def test_a_hold_awaits_those_that_listen_for_so_long_and_names_those_that_did_not_answer(bench: Bench):
    for name in ("d2", "d3"):
        bench.drivers.recorded(name, 0)
        bench.drivers.attach(old(bench, driver=name))
    names = [D1, ("d2", "vf1", 1), ("d3", "vf1", 1)]
    listened = told(bench, "d2")

    def answer(notification: WatchNotificationsResponse) -> None:
        bench.drivers.acknowledge("d1", notification.function, notification.attempt)

    bench.drivers.require("d1").listeners.append(answer)
    assert await bench.hold(10, *names, timeout_ms=20) == ["d2"]
    assert listened == [(NOTIFICATION_KIND_HELD, "vf1")]
    assert all(bench.entry(name).held for name, *_ in names)


async def test_a_hold_is_answered_once_all_have_acknowledged(bench: Bench):
    told(bench)
    holding = asyncio.create_task(bench.hold(10, D1, timeout_ms=60_000))
    await settle()
    bench.drivers.acknowledge("d1", "vf1", attempt(9))
    bench.drivers.acknowledge("d1", "vf2", attempt(10))
    assert reason_of(bench.drivers.acknowledge, "d9", "vf1", attempt(10)) is Reason.NOT_FOUND
    await settle()
    assert not holding.done()
    bench.drivers.acknowledge("d1", "vf1", attempt(10))
    assert await holding == []


async def test_a_hold_that_is_asked_for_twice_is_acknowledged_once_for_both(bench: Bench):
    told(bench)
    first = asyncio.create_task(bench.hold(10, D1, timeout_ms=60_000))
    await settle()
    second = asyncio.create_task(bench.hold(10, D1, timeout_ms=60_000))
    await settle()
    bench.drivers.acknowledge("d1", "vf1", attempt(10))
    assert [await first, await second, await bench.hold(10, D1, timeout_ms=60_000)] == [[], [], []]


async def test_an_acknowledgement_of_an_earlier_hold_says_nothing_of_this_one(bench: Bench):
    told(bench)
    assert await bench.hold(10, D1, timeout_ms=1) == ["d1"]
    holding = asyncio.create_task(bench.hold(11, D1, timeout_ms=20))
    await settle()
    bench.drivers.acknowledge("d1", "vf1", attempt(10))
    assert await holding == ["d1"]


async def test_no_wait_at_all(bench: Bench):
    told(bench)
    assert await bench.hold(10, D1, timeout_ms=0) == ["d1"]


async def test_who_listens_is_told_of_every_hold_and_lift(bench: Bench):
    listened = told(bench)
    await bench.hold(10, D1)
    bench.lift(10, D1)
    await bench.hold(11, D1)
    bench.update(11, new(bench), lift=True)
    bench.update(11, new(bench), lift=True)
    assert listened == [(NOTIFICATION_KIND_HELD, "vf1"), (NOTIFICATION_KIND_LIFTED, "vf1")] * 2
