"""What a host does of itself with whatever waited past its deadline: each row of the diagram in hostd/resolution.py."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.bench import ABORTED, COMMITTED, IDENTITY, attempt, reason_of
from support.interposed_store import InterposedStore
from support.waiting_host import (
    BACK,
    DEADLINE_S,
    GONE,
    PREPARED,
    RUNNING,
    SOURCE,
    STOP_COPY,
    TARGET,
    THERE,
    UNDONE,
    WAITING,
    Rig,
)

from hostd.resolution import LOOK_AGAIN_S
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.keys import entries_prefix, entry_key, function_key, migration_key, owner_key
from vfleet.etcd.records import decode, encode
from vfleet.etcd.store import Listing, Transaction
from vfleet.v1.records_pb2 import (
    PHASE_ABORTED,
    PHASE_ABORTING,
    PHASE_DONE,
    PHASE_PREPARING,
    Function,
    Migration,
)
from vfleet.v1.types_pb2 import (
    DEVICE_STATE_RESUMING,
)


@pytest.fixture
async def rig(tmp_path: Path, store: EtcdStore) -> AsyncIterator[Rig]:
    found = Rig(tmp_path / "host", store)
    await found.begin()
    yield found
    await found.close()


async def test_before_the_deadline_nothing_is_asked_and_nothing_changes(rig: Rig):
    await rig.commit()
    reads = rig.store.reads
    await rig.pass_deadlines(DEADLINE_S - 0.1)
    assert rig.store.reads == reads
    assert rig.seen() == WAITING


async def test_undecided_and_somebodys_waits_on(rig: Rig):
    await rig.own()
    for _ in range(3):
        await rig.pass_deadlines()
        assert rig.seen() == WAITING
    assert await rig.phase() == PHASE_PREPARING
    now = rig.bench.clock.now
    assert {i.record.resolve_time for i in rig.bench.functions.with_deadline()} == {now + LOOK_AGAIN_S}
    assert {hold.resolve_time for hold in rig.bench.drivers.holds()} == {now + LOOK_AGAIN_S}


async def test_undecided_and_nobodys_is_aborted_and_put_back(rig: Rig):
    await rig.pass_deadlines()
    assert await rig.phase() == PHASE_ABORTING
    stored = await rig.store.get(migration_key("m1"))
    assert stored is not None
    assert "host h1" in decode(Migration, stored).abort_reason
    assert rig.seen() == UNDONE


async def test_an_owner_that_comes_while_the_host_aborts_prevents_it(rig: Rig):
    commit = rig.store.commit

    async def late_owner(transaction: Transaction):
        rig.store.commit = commit
        await rig.own()
        return await commit(transaction)

    rig.store.commit = late_owner
    await rig.pass_deadlines()
    assert await rig.phase() == PHASE_PREPARING
    assert rig.seen() == WAITING


async def test_committed_while_the_host_aborts_is_committed(rig: Rig):
    commit = rig.store.commit

    async def committed_first(transaction: Transaction):
        rig.store.commit = commit
        await rig.commit(PHASE_DONE)
        return await commit(transaction)

    rig.store.commit = committed_first
    await rig.pass_deadlines()
    await rig.pass_deadlines(LOOK_AGAIN_S)
    assert await rig.phase() == PHASE_DONE
    assert rig.seen() == THERE


async def test_committed_the_target_runs_the_driver_goes_there_and_the_source_stays_until_the_record_is_final(rig: Rig):
    await rig.commit()
    for _ in range(2):
        await rig.pass_deadlines()
        assert rig.seen() == (STOP_COPY, RUNNING, (2, False))
    await rig.commit(PHASE_DONE)
    await rig.pass_deadlines(LOOK_AGAIN_S)
    assert rig.seen() == THERE
    assert list(rig.bench.functions.with_deadline()) == []
    assert rig.bench.drivers.holds() == []


@pytest.mark.parametrize("phase", [PHASE_ABORTING, PHASE_ABORTED])
async def test_aborted_the_source_runs_again_and_the_target_waits_for_who_has_seen_that(rig: Rig, phase):
    """etcd may have forgotten a COMMIT, and the scrub that followed: then the target is all that is left."""
    await rig.put_migration(phase)
    for _ in range(2):
        await rig.pass_deadlines()
        assert rig.seen() == UNDONE
    rig.bench.destroy(2, rig.attempt, ABORTED)
    assert rig.seen() == BACK
    assert list(rig.bench.functions.with_deadline()) == []


@pytest.mark.parametrize("is_moved", [False, True])
async def test_a_migration_whose_record_is_gone_lets_run_only_what_it_did_not_stop(rig: Rig, is_moved: bool):
    """A record is kept as long as somebody is stopped by it: etcd has forgotten it, and perhaps a COMMIT."""
    if is_moved:
        await rig.commit()
    await rig.delete(migration_key("m1"))
    for _ in range(2):
        await rig.pass_deadlines()
        assert rig.seen() == (THERE if is_moved else (STOP_COPY, PREPARED, (1, False)))


async def test_a_source_that_keeps_the_rest_of_a_function_stays_until_a_record_says_that_all_is_over(rig: Rig):
    """Its target may still fetch from it, also where a restored etcd has no record of the migration."""
    rig.source.record.keeps_rest = True
    await rig.commit()
    await rig.delete(migration_key("m1"))
    await rig.pass_deadlines()
    assert rig.state(SOURCE) == STOP_COPY
    await rig.put_migration(PHASE_DONE)
    await rig.pass_deadlines(2 * LOOK_AGAIN_S)
    assert rig.seen() == THERE


async def test_a_source_that_keeps_the_rest_stays_where_a_restored_etcd_had_its_migration_aborted(rig: Rig):
    """`doctor` has written what the target's host has: the function is there, and still fetches from here."""
    rig.source.record.keeps_rest = True
    await rig.commit(PHASE_ABORTED)
    for _ in range(2):
        await rig.pass_deadlines()
        assert rig.state(SOURCE) == STOP_COPY


@pytest.mark.parametrize("is_fetched", [False, True])
async def test_a_source_that_was_fetched_from_runs_by_nobodys_word(rig: Rig, is_fetched: bool):
    """Only a target that runs fetches, so etcd has forgotten a COMMIT; here nothing else tells."""
    bench, source = rig.bench, rig.source
    source.record.keeps_rest = True
    if is_fetched:
        bench.functions.hand_out_rest(source)
    for _ in range(2):
        await rig.pass_deadlines()
    assert await rig.phase() == PHASE_ABORTING
    bench.resume(1, rig.attempt, migration="m1")
    assert rig.state(SOURCE) == (STOP_COPY if is_fetched else RUNNING)
    for begun_in in (1, 2):
        bench.resume(1, rig.attempt + 9, begun_in=begun_in, fleet_generation=begun_in)
        assert rig.state(SOURCE) == (STOP_COPY if is_fetched else RUNNING)


@pytest.mark.parametrize("phase", [PHASE_DONE, PHASE_ABORTED])
async def test_of_a_function_without_a_record_only_what_the_decision_left_behind_goes(rig: Rig, phase):
    if phase == PHASE_DONE:
        await rig.commit(phase)
    await rig.put_migration(phase)
    await rig.delete(function_key("vf1"))
    await rig.pass_deadlines()
    left = (GONE, PREPARED) if phase == PHASE_DONE else (STOP_COPY, PREPARED)
    assert (rig.state(SOURCE), rig.state(TARGET)) == left


async def test_of_a_migration_and_a_function_without_records_all_stays_that_can_be_a_home(rig: Rig):
    half = rig.bench.create(generation=3, revision=rig.attempt + 1, fresh=False, device="nic1", vf_index=2)
    await rig.delete(migration_key("m1"))
    await rig.delete(function_key("vf1"))
    await rig.pass_deadlines()
    assert (rig.state(SOURCE), rig.state(TARGET)) == (STOP_COPY, PREPARED)
    assert half.is_closed


async def test_a_home_that_moved_on_since_is_not_here(rig: Rig):
    await rig.commit(PHASE_DONE)
    later = Function(name="vf1", identity=IDENTITY, generation=3, device="h2/nic0", vf_index=1)
    await rig.put(function_key("vf1"), encode(later))
    await rig.pass_deadlines()
    assert (rig.state(SOURCE), rig.state(TARGET)) == (GONE, GONE)


@pytest.mark.parametrize("phase", [None, PHASE_ABORTED, PHASE_DONE])
async def test_another_function_that_has_had_the_name_is_not_this_one(rig: Rig, phase: int | None):
    other = Function(name="vf1", identity=IDENTITY + 1, generation=9, device="h2/nic0", vf_index=1)
    await rig.put(function_key("vf1"), encode(other))
    if phase is None:
        await rig.delete(migration_key("m1"))
    else:
        await rig.put_migration(phase)
    await rig.pass_deadlines()
    assert (rig.state(SOURCE), rig.state(TARGET)) == {
        None: (STOP_COPY, PREPARED),
        PHASE_ABORTED: (STOP_COPY, PREPARED),
        PHASE_DONE: (GONE, PREPARED),
    }[phase]


async def test_the_same_generation_in_another_slot_is_not_this_instance(rig: Rig):
    """What an aborted attempt left must not run in the place of the one that a later attempt made elsewhere."""
    await rig.commit(PHASE_DONE)
    elsewhere = Function(name="vf1", identity=IDENTITY, generation=2, device="h1/nic1", vf_index=5)
    await rig.put(function_key("vf1"), encode(elsewhere))
    await rig.pass_deadlines()
    assert rig.state(TARGET) is GONE


async def test_a_target_whose_import_is_not_complete_goes_with_the_abort(tmp_path: Path, store: EtcdStore):
    rig = Rig(tmp_path / "host", store)
    await rig.put_function(rig.source)
    revision = await rig.put_migration(PHASE_ABORTING)
    target = rig.bench.create(generation=2, revision=revision, fresh=False, device="nic1")
    assert target.state == DEVICE_STATE_RESUMING
    await rig.pass_deadlines()
    assert rig.state(TARGET) is GONE
    await rig.close()


@pytest.mark.parametrize("phase", [None, PHASE_PREPARING, PHASE_ABORTED])
async def test_after_a_raise_both_sides_of_what_may_have_been_committed_stay_as_they_are(rig: Rig, phase: int | None):
    """The backup is of before COMMIT, so by etcd the source is the home; the target may have been used since."""
    await rig.raise_generation()
    if phase is None:
        await rig.delete(migration_key("m1"))
    else:
        await rig.put_migration(phase)
    for _ in range(2):
        await rig.pass_deadlines()
        assert rig.seen() == (STOP_COPY, PREPARED, (1, False))


async def test_after_a_raise_what_etcd_knows_of_a_commit_is_done(rig: Rig):
    await rig.commit(PHASE_DONE)
    await rig.raise_generation()
    await rig.pass_deadlines()
    assert rig.seen() == THERE


async def test_an_entry_that_is_detached_meanwhile_is_lifted_and_left_to_the_watch(rig: Rig):
    await rig.put_migration(PHASE_ABORTING)
    await rig.delete(entry_key("h1", "d1", "vf1"))
    await rig.pass_deadlines()
    assert rig.entry() == (1, False)
    assert rig.bench.drivers.holds() == []


async def test_out_of_reach_of_etcd_everything_waits_and_goes_on_when_it_is_back(rig: Rig):
    await rig.commit(PHASE_DONE)
    rig.store.is_down = True
    for _ in range(3):
        await rig.pass_deadlines()
        assert rig.seen() == WAITING
    rig.store.is_down = False
    await rig.pass_deadlines(0)
    assert rig.seen() == THERE


async def test_a_write_whose_outcome_is_unknown_is_read_back(rig: Rig):
    commit = rig.store.commit

    async def unknown(transaction: Transaction):
        rig.store.commit = commit
        await commit(transaction)
        raise VfleetError(Reason.OUTCOME_UNKNOWN, "no answer")

    rig.store.commit = unknown
    await rig.pass_deadlines()
    await rig.pass_deadlines(0)
    assert await rig.phase() == PHASE_ABORTING
    assert rig.seen() == UNDONE


async def test_a_group_is_resolved_as_a_whole(rig: Rig):
    """Whoever looks at the table, at whichever moment, sees both functions held, or both moved and lifted."""
    bench, source, target = rig.bench, rig.source.about.base, rig.target.about.base
    bench.drivers.attach(bench.message(source, function="vf2", virtual_address=2 << 40, revision=1))
    await bench.hold(rig.attempt, ("d1", "vf2", 1))
    moved = bench.message(target, generation=2, function="vf2", virtual_address=2 << 40)
    moved.ClearField("revision")
    await rig.put(entry_key("h1", "d1", "vf2"), encode(moved))
    await rig.commit()
    driver, tables = bench.drivers.require("d1"), []
    driver.listeners.append(lambda _: tables.append(driver.table))
    await rig.pass_deadlines()
    assert [{(entry.generation, entry.held) for entry in table.entries} for table in tables] == [{(2, False)}] * 2
    assert tables[0] is tables[1]
    assert bench.drivers.holds() == []


# What is resolved is over here


@pytest.mark.parametrize("outcome", ["committed", "aborted"])
async def test_late_requests_of_the_attempt_are_refused_afterwards(rig: Rig, outcome: str):
    if outcome == "committed":
        await rig.commit(PHASE_DONE)
    await rig.pass_deadlines()
    assert rig.seen() == (THERE if outcome == "committed" else UNDONE)
    bench = rig.bench
    assert (
        reason_of(bench.create, generation=2, revision=rig.attempt, fresh=False, device="nic1") is Reason.STALE_ATTEMPT
    )
    assert reason_of(bench.stop, 1, rig.attempt) is Reason.STALE_ATTEMPT
    with pytest.raises(VfleetError) as caught:
        await bench.hold(rig.attempt, ("d1", "vf1", bench.entry().generation))
    assert caught.value.reason is Reason.STALE_ATTEMPT
    # Consequences are true whenever they come.
    if outcome == "committed":
        bench.destroy(1, rig.attempt, COMMITTED)
    else:
        bench.destroy(2, rig.attempt, ABORTED)
        bench.resume(1, rig.attempt)
        bench.lift(rig.attempt, ("d1", "vf1", 1))
    assert rig.seen() == (THERE if outcome == "committed" else BACK)


@pytest.mark.parametrize("when", [migration_key("m1"), function_key("vf1")])
async def test_what_is_put_back_and_stopped_by_the_next_attempt_meanwhile_stays_stopped(rig: Rig, when: str):
    """The host reads that the attempt was aborted while its resume, and the stop of the next attempt, arrive."""
    await rig.put_migration(PHASE_ABORTED)
    later = await rig.put_migration(PHASE_PREPARING, "m2")
    await rig.put(owner_key("m2"), b"c1")

    def overtaken(key: str) -> None:
        if key == when:
            rig.store.before_get = lambda key: None
            rig.bench.resume(1, rig.attempt)
            rig.bench.stop(1, later, migration="m2")

    rig.store.before_get = overtaken
    await rig.pass_deadlines()
    assert rig.state(SOURCE) == STOP_COPY
    assert rig.source.about.stopped_by == attempt(later)
    await rig.pass_deadlines()
    assert rig.state(SOURCE) == STOP_COPY


async def test_a_hold_that_the_next_attempt_places_meanwhile_stays(rig: Rig):
    later = await rig.put_migration(PHASE_ABORTED)

    async def overtaken(prefix: str) -> Listing:
        if prefix == entries_prefix("h1"):
            del rig.store.list
            rig.bench.lift(rig.attempt, ("d1", "vf1", 1))
            await rig.bench.hold(later, ("d1", "vf1", 1), migration="m2")
        return await InterposedStore.list(rig.store, prefix)

    rig.store.list = overtaken
    await rig.pass_deadlines()
    assert rig.entry() == (1, True)
    assert [hold.attempt for hold in rig.bench.drivers.holds()] == [attempt(later)]


async def test_an_instance_that_is_destroyed_meanwhile_is_left_alone(rig: Rig):
    await rig.put_migration(PHASE_ABORTED)

    def overtaken(key: str) -> None:
        if key == function_key("vf1"):
            rig.store.before_get = lambda key: None
            rig.bench.destroy(2, rig.attempt, ABORTED)

    rig.store.before_get = overtaken
    await rig.resolver.resolve_all()
    assert rig.seen() == BACK


# The task


async def run_until(rig: Rig, expected: object) -> None:
    """Let time pass for the task until the host is in an expected state."""
    async with asyncio.timeout(10):
        while rig.seen() != expected:
            await rig.bench.clock.advance(0.5)
            await asyncio.sleep(0.002)


async def test_the_task_keeps_deadlines_as_they_come_and_go(rig: Rig):
    await rig.own()
    rig.task = asyncio.create_task(rig.resolver.run())
    began = rig.bench.clock.now
    await rig.bench.clock.advance(0.1)
    rig.store.is_down = True
    while rig.bench.clock.now < began + DEADLINE_S + 5:
        await rig.bench.clock.advance(0.5)
    assert rig.seen() == WAITING
    rig.store.is_down = False
    await rig.commit(PHASE_DONE)
    await run_until(rig, THERE)
    # Something new that waits is seen without being told.
    bench = rig.bench
    bench.stop(2, await rig.put_migration(PHASE_ABORTED, "m2"), migration="m2")
    await run_until(rig, THERE)


async def test_the_task_does_not_ask_an_etcd_that_is_down_all_the_time(rig: Rig):
    rig.store.is_down = True
    rig.task = asyncio.create_task(rig.resolver.run())
    await rig.bench.clock.advance(DEADLINE_S)
    reads = rig.store.reads
    await rig.bench.clock.advance(10 * LOOK_AGAIN_S)
    assert 10 <= rig.store.reads - reads <= 40


async def test_after_a_restart_everything_is_resolved_whatever_its_deadline(rig: Rig):
    await rig.commit(PHASE_DONE)
    await rig.resolver.resolve_all()
    assert rig.seen() == THERE


async def test_after_a_restart_out_of_reach_of_etcd_says_so(rig: Rig):
    rig.store.is_down = True
    with pytest.raises(VfleetError) as caught:
        await rig.resolver.resolve_all()
    assert caught.value.reason is Reason.STORE_UNAVAILABLE
    assert rig.seen() == WAITING
