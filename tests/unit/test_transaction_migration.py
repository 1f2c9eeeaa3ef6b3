"""The transactions of a migration, record by record: what each leaves of what was there, and how large it is."""

import pytest
from support.fake_host import device
from support.fleet_values import LIMITS, FleetValues, move, three_hosts

from coordinator import transaction
from coordinator.planner import plan
from vfleet.decision import abort_transaction, outcome
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.records import decode, encode
from vfleet.etcd.store import Delete, Put, Transaction, absent, value_is
from vfleet.etcd.wire import txn_request
from vfleet.v1.records_pb2 import Function, Migration, Phase, Step, StepDuration
from vfleet.v1.types_pb2 import Attempt, Decision, TableEntry

RECORD = keys.migration_key("m1")
NOW_S = 12.345678901
NOW = "1970-01-01T00:00:12.345678901Z"


def planned(fleet: FleetValues) -> Migration:
    moves = [move("vf1", "h2/nic0"), move("vf2", "h3/nic0", 2)]
    return plan(fleet.snapshot(), moves, name="m1", coordinator="c1", limits=LIMITS)


def begin(fleet: FleetValues) -> Transaction:
    return transaction.begin(planned(fleet), 5, fleet.snapshot().fleet_generation_is_this)


@pytest.mark.parametrize("is_queued", [False, True])
@pytest.mark.parametrize("change", ["none", "queued anew", "gone"])
def test_a_migration_leaves_the_queue_as_it_begins_unless_the_queue_has_changed(is_queued: bool, change: str):
    fleet = three_hosts()
    queue = keys.queue_key("m1")
    revision = fleet.put(queue, "waits") if is_queued else 0
    beginning = transaction.begin(planned(fleet), 5, fleet.snapshot().fleet_generation_is_this, queue_revision=revision)
    has_changed = change == "queued anew" or (change == "gone" and is_queued)
    if change == "queued anew":
        fleet.put(queue, "waits again")
    elif change == "gone":
        fleet.items.pop(queue, None)
    before = queue in fleet.items
    assert all(isinstance(each.key, str) for each in (*beginning.compares, *beginning.writes))
    assert [write.key for write in beginning.writes if isinstance(write, Delete)] == [queue] * is_queued
    assert bool(fleet.commit(beginning)) is not has_changed
    assert (queue in fleet.items) == (before and has_changed)


@pytest.mark.parametrize("change", ["none", "moved", "begins to move"])
def test_begin_rests_on_functions_that_stay_where_they_are(change: str):
    fleet = three_hosts()
    revisions = {}
    for number, name in enumerate(("vf3", "vf4"), start=3):
        fleet.function(name, device("h2/nic0"), 2, number)
        revisions[name] = fleet.snapshot().functions[name].mod_revision
    is_this = fleet.snapshot().fleet_generation_is_this
    beginning = transaction.begin(planned(fleet), 5, is_this, bystanders=revisions)
    if change == "moved":
        fleet.put(keys.function_key("vf3"), "elsewhere")
    elif change == "begins to move":
        fleet.put(keys.lock_key("vf3"), "m2")
    assert fleet.commit(beginning) is (change == "none")


def begun() -> FleetValues:
    fleet = three_hosts()
    assert fleet.commit(begin(fleet))
    return fleet


def in_phase(phase: Phase.ValueType) -> FleetValues:
    """Return the fleet with the migration begun, or decided so."""
    fleet = begun()
    migration, revision = read(fleet), fleet.revision
    if phase == Phase.PHASE_COMMITTED:
        assert fleet.commit(transaction.commit(migration, revision, NOW_S))
    elif phase == Phase.PHASE_ABORTING:
        assert fleet.commit(abort_transaction(migration, revision, "because", Step.STEP_COPY, NOW_S, None))
    return fleet


def read(fleet: FleetValues) -> Migration:
    return decode(Migration, fleet.items[RECORD])


def test_the_record_that_begin_writes_is_the_whole_plan():
    fleet = three_hosts()
    migration = planned(fleet)
    assert fleet.commit(begin(fleet))
    migration.phase = Phase.PHASE_PREPARING
    assert fleet.items[RECORD].value == encode(migration)


def test_begin_does_nothing_where_an_owner_is_left_without_a_record():
    fleet = three_hosts()
    late = begin(fleet)
    fleet.put(keys.owner_key("m1"), "c2")
    assert not fleet.commit(late)


def test_commit_changes_where_a_function_is_and_nothing_else_of_it():
    fleet = begun()
    migration, revision = read(fleet), fleet.revision
    expected = {}
    for part in migration.moves:
        key = keys.function_key(part.function)
        function = decode(Function, fleet.items[key])
        function.generation += 1
        function.device, function.vf_index = part.target.device, part.target.vf_index
        function.base, function.incarnation = part.target.base, part.target.incarnation
        function.attempt.CopyFrom(Attempt(fleet_generation=1, revision=revision))
        expected[key] = encode(function)
        for change in part.entries:
            key = keys.entry_key(change.host, change.driver, part.function)
            entry = decode(TableEntry, fleet.items[key])
            entry.generation += 1
            entry.offset = change.offset_after
            expected[key] = encode(entry)
    migration.phase = Phase.PHASE_COMMITTED
    migration.decide_time.FromJsonString(NOW)
    expected[RECORD] = encode(migration)
    commit = transaction.commit(read(fleet), revision, NOW_S)
    assert {write.key: write.value for write in commit.writes} == expected


@pytest.mark.parametrize("phase", [Phase.PHASE_COMMITTED, Phase.PHASE_ABORTING])
def test_finish_notes_when_by_whom_and_how_long_each_step_took(phase: Phase.ValueType):
    fleet = in_phase(phase)
    decided = read(fleet)
    assert decided.decide_time.ToJsonString() == NOW
    steps = [StepDuration(step=Step.STEP_COPY), StepDuration(step=Step.STEP_HOLD)]
    finish = transaction.finish(decided, fleet.revision, finished_by="c2", now=NOW_S, steps=steps)
    assert fleet.commit(finish)
    over = read(fleet)
    assert over.finish_time.ToJsonString() == NOW
    assert (over.finished_by, list(over.steps)) == ("c2", steps)
    for field in ("finish_time", "finished_by", "steps", "schema_version"):
        over.ClearField(field)
        decided.ClearField(field)
    over.phase = decided.phase
    assert over == decided


@pytest.mark.parametrize(
    ("phase", "decision"),
    [
        (Phase.PHASE_UNSPECIFIED, Decision.DECISION_UNSPECIFIED),
        (Phase.PHASE_PREPARING, Decision.DECISION_UNSPECIFIED),
        (Phase.PHASE_COMMITTED, Decision.DECISION_COMMITTED),
        (Phase.PHASE_DONE, Decision.DECISION_COMMITTED),
        (Phase.PHASE_ABORTING, Decision.DECISION_ABORTED),
        (Phase.PHASE_ABORTED, Decision.DECISION_ABORTED),
    ],
)
def test_a_phase_says_how_a_migration_was_decided(phase: Phase.ValueType, decision: Decision.ValueType):
    assert outcome(Migration(phase=phase)) == decision


def test_a_transaction_out_of_its_phase_is_an_error_that_says_so():
    preparing, committed = read(begun()), read(in_phase(Phase.PHASE_COMMITTED))
    for make, is_in, expected in (
        (lambda: transaction.begin(preparing, 5, absent("x")), "PREPARING", "UNSPECIFIED"),
        (lambda: transaction.commit(committed, 1, 0), "COMMITTED", "PREPARING"),
        (lambda: transaction.finish(preparing, 1, finished_by="c1", now=0), "PREPARING", "ABORTING"),
    ):
        with pytest.raises(VfleetError) as refused:
            make()
        assert refused.value.reason is Reason.INTERNAL
        assert refused.value.message == f"migration 'm1' is in PHASE_{is_in}; expected PHASE_{expected}"
    with pytest.raises(VfleetError) as refused:
        abort_transaction(committed, 1, "because", Step.STEP_COPY, 0, None)
    assert refused.value.reason is Reason.ILLEGAL_STATE
    assert refused.value.message == ("migration 'm1' is in PHASE_COMMITTED; expected PHASE_PREPARING to abort it")


@pytest.mark.parametrize(
    "change",
    [
        Transaction((), ()),
        Transaction((absent("k" * 300),), (Delete("k" * 300),)),
        Transaction((value_is("k", b"v" * 70_000),), ()),
        Transaction((), (Put("k" * 300, b"v" * 70_000, lease=(1 << 63) - 1),)),
        begin(three_hosts()),
    ],
)
def test_the_size_of_a_request_is_bounded_closely(change: Transaction):
    size = txn_request(change).ByteSize()
    assert size <= transaction.request_bytes(change) <= size + 64 * (len(change.compares) + len(change.writes))
