"""What each transaction compares and writes: it goes through if nothing has changed, and never if something has."""

import pytest
from support.fleet_values import LIMITS, FleetValues, move, three_hosts

from coordinator import forget, transaction
from coordinator.findings import View
from coordinator.planner import plan
from coordinator.record_differences import record_findings
from vfleet.decision import abort_transaction, lose_function, outcome
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.records import decode
from vfleet.etcd.store import Compare, Delete, Put, Transaction, absent, unchanged
from vfleet.v1.records_pb2 import Cordon, Driver, Function, FunctionStatus, Migration, Phase, Slot, Step
from vfleet.v1.types_pb2 import Decision, TableEntry

commit = FleetValues.commit


def begun(fleet: FleetValues, *moves) -> tuple[Migration, int]:
    """Begin migration m1 and return its record and revision."""
    snapshot = fleet.snapshot()
    migration = plan(snapshot, moves or [move("vf1", "h2/nic0")], name="m1", coordinator="c1", limits=LIMITS)
    assert commit(fleet, transaction.begin(migration, 5, snapshot.fleet_generation_is_this))
    return read(fleet), fleet.revision


def read(fleet: FleetValues) -> Migration:
    return decode(Migration, fleet.items[keys.migration_key("m1")])


def record(fleet: FleetValues, kind, key: str):
    return decode(kind, fleet.items[key])


def test_begin_takes_lock_slot_and_owner_key_under_the_lease():
    fleet = three_hosts()
    migration, _ = begun(fleet)
    assert migration.phase == Phase.PHASE_PREPARING
    assert fleet.items[keys.lock_key("vf1")].value == b"m1"
    assert record(fleet, Slot, keys.slot_key("h2/nic0", 1)) == Slot(function="vf1", migration="m1")
    assert (fleet.items[keys.owner_key("m1")].value, fleet.items[keys.owner_key("m1")].lease) == (b"c1", 5)


def other_function(fleet: FleetValues) -> None:
    fleet.put(keys.function_key("vf1"), Function(name="vf1"))


@pytest.mark.parametrize(
    "change",
    [
        other_function,
        lambda fleet: fleet.put(keys.lock_key("vf1"), "m0"),
        lambda fleet: fleet.put(keys.slot_key("h2/nic0", 1), Slot(function="vf7")),
        lambda fleet: fleet.put(keys.migration_key("m1"), Migration(name="m1")),
        lambda fleet: fleet.put(keys.FLEET_GENERATION, "2"),
        lambda fleet: fleet.put(keys.cordon_key("h2"), Cordon()),
        *(lambda fleet, host=host: fleet.put(keys.registration_key(host), "anew") for host in ("h1", "h2", "h3")),
        *(lambda fleet, host=host: fleet.items.pop(keys.registration_key(host)) for host in ("h1", "h2", "h3")),
    ],
)
def test_begin_does_nothing_if_what_the_plan_saw_has_changed(change):
    fleet = three_hosts()
    snapshot = fleet.snapshot()
    migration = plan(snapshot, [move("vf1", "h2/nic0")], name="m1", coordinator="c1", limits=LIMITS)
    change(fleet)
    assert not commit(fleet, transaction.begin(migration, 5, snapshot.fleet_generation_is_this))


def test_what_leaves_a_cordoned_host_begins():
    fleet = three_hosts()
    for host in ("h1", "h3"):
        fleet.put(keys.cordon_key(host), Cordon())
    begun(fleet)


def test_a_host_is_forgotten_with_its_cordon():
    fleet = three_hosts()
    fleet.put(keys.cordon_key("h2"), Cordon())
    fleet.put(keys.segment_key(2), "h2")
    del fleet.items[keys.registration_key("h2")]
    assert commit(fleet, forget._delete_records(fleet.snapshot(), "h2"))
    assert not any("h2" in key for key in fleet.items)


def test_commit_moves_home_generation_and_entries_at_once():
    fleet = three_hosts()
    migration, revision = begun(fleet)
    assert commit(fleet, transaction.commit(migration, revision, 12.5))
    target = migration.moves[0].target
    function = record(fleet, Function, keys.function_key("vf1"))
    assert (function.device, function.vf_index, function.base) == ("h2/nic0", 1, target.base)
    assert (function.generation, function.identity, list(function.drivers)) == (4, 7, ["d1", "d2"])
    assert (function.status, function.incarnation) == (FunctionStatus.FUNCTION_STATUS_ACTIVE, "h2-boot")
    assert (function.attempt.fleet_generation, function.attempt.revision) == (1, revision)
    for host, driver in (("h1", "d1"), ("h3", "d2")):
        entry = record(fleet, TableEntry, keys.entry_key(host, driver, "vf1"))
        assert (entry.virtual_address + entry.offset) % 2**64 == target.base
        assert (entry.generation, entry.host, entry.length_bytes) == (4, host, 2 << 20)
    assert read(fleet).phase == Phase.PHASE_COMMITTED
    assert read(fleet).decide_time.ToJsonString() == "1970-01-01T00:00:12.500Z"


@pytest.mark.parametrize(
    "change",
    [
        other_function,
        lambda fleet: fleet.put(keys.migration_key("m1"), read(fleet)),
        lambda fleet: fleet.items.pop(keys.migration_key("m1")),
        lambda fleet: fleet.put(keys.registration_key("h2"), "anew"),
        lambda fleet: fleet.items.pop(keys.registration_key("h2")),
    ],
)
def test_commit_does_nothing_if_what_it_rests_on_has_changed(change):
    fleet = three_hosts()
    migration, revision = begun(fleet)
    change(fleet)
    assert not commit(fleet, transaction.commit(migration, revision, 0))


def aborted(migration: Migration, revision: int, owner: Compare | None) -> Transaction:
    return abort_transaction(migration, revision, "because", Step.STEP_COPY, 3.0, owner)


def test_commit_and_abort_exclude_each_other():
    for first, second in ((0, 1), (1, 0)):
        fleet = three_hosts()
        migration, revision = begun(fleet)
        both = (transaction.commit(migration, revision, 0), aborted(migration, revision, None))
        assert commit(fleet, both[first])
        assert not commit(fleet, both[second])


def test_abort_says_why_and_is_the_outcome():
    fleet = three_hosts()
    migration, revision = begun(fleet)
    assert outcome(migration) == Decision.DECISION_UNSPECIFIED
    assert commit(fleet, aborted(migration, revision, unchanged(keys.owner_key("m1"), revision)))
    record_ = read(fleet)
    assert (record_.phase, record_.abort_reason, record_.abort_step, record_.abort_host) == (
        Phase.PHASE_ABORTING,
        "because",
        Step.STEP_COPY,
        "",
    )
    assert outcome(record_) == Decision.DECISION_ABORTED
    with pytest.raises(VfleetError) as caught:
        aborted(record_, fleet.revision, None)
    assert caught.value.reason is Reason.ILLEGAL_STATE


def test_a_host_aborts_only_what_nobody_owns():
    fleet = three_hosts()
    migration, revision = begun(fleet)
    by_host = aborted(migration, revision, absent(keys.owner_key("m1")))
    assert not commit(fleet, by_host)
    del fleet.items[keys.owner_key("m1")]
    assert commit(fleet, by_host)


def test_the_reason_of_an_abort_is_bounded():
    fleet = three_hosts()
    migration, revision = begun(fleet)
    assert commit(fleet, abort_transaction(migration, revision, "x" * 5000, Step.STEP_COPY, 0, None))
    assert len(read(fleet).abort_reason) == 1000


@pytest.mark.parametrize("committed", [True, False])
def test_finish_leaves_nothing_but_the_home_and_the_history(committed):
    fleet = three_hosts()
    migration, begin = begun(fleet)
    decide = transaction.commit(migration, begin, 0) if committed else aborted(migration, begin, None)
    assert commit(fleet, decide)
    finish = transaction.finish(read(fleet), fleet.revision, finished_by="c2", now=9)
    assert commit(fleet, finish)
    assert read(fleet).phase == (Phase.PHASE_DONE if committed else Phase.PHASE_ABORTED)
    assert read(fleet).finished_by == "c2"
    assert keys.lock_key("vf1") not in fleet.items
    assert keys.owner_key("m1") not in fleet.items
    slots = sorted(key for key in fleet.items if key.startswith(keys.SLOTS))
    home = keys.slot_key("h2/nic0", 1) if committed else keys.slot_key("h1/nic0", 1)
    assert slots == sorted([home, keys.slot_key("h1/nic0", 2)])
    assert record(fleet, Slot, home) == Slot(function="vf1")


def test_what_is_decided_is_finished_once_by_whomever():
    fleet = three_hosts()
    migration, begin = begun(fleet)
    with pytest.raises(VfleetError):
        transaction.finish(migration, begin, finished_by="c1", now=0)
    assert commit(fleet, transaction.commit(migration, begin, 0))
    decided, revision = read(fleet), fleet.revision
    fleet.put(keys.owner_key("m1"), "c2")
    assert commit(fleet, transaction.finish(decided, revision, finished_by="c1", now=0))
    assert keys.owner_key("m1") not in fleet.items
    assert not commit(fleet, transaction.finish(decided, revision, finished_by="c2", now=0))
    assert read(fleet).finished_by == "c1"


def test_adoption_takes_only_what_nobody_owns_and_what_is_as_it_was_read():
    fleet = three_hosts()
    migration, begin = begun(fleet)
    adopt = transaction.adopt(migration, begin, "c2", 6)
    assert not commit(fleet, adopt)
    del fleet.items[keys.owner_key("m1")]
    assert commit(fleet, adopt)
    assert (fleet.items[keys.owner_key("m1")].value, fleet.items[keys.owner_key("m1")].lease) == (b"c2", 6)
    del fleet.items[keys.owner_key("m1")]
    assert commit(fleet, aborted(migration, begin, None))
    assert not commit(fleet, adopt)


def test_a_former_owner_and_its_adopter_exclude_each_other():
    for first, second in ((0, 1), (1, 0)):
        fleet = three_hosts()
        migration, begin = begun(fleet)
        del fleet.items[keys.owner_key("m1")]
        assert commit(fleet, transaction.adopt(migration, begin, "c2", 6))
        own = unchanged(keys.owner_key("m1"), fleet.revision)
        both = (transaction.commit(migration, begin, 0), aborted(migration, begin, own))
        assert commit(fleet, both[first])
        assert not commit(fleet, both[second])


def test_a_former_owner_leaves_the_abort_to_its_adopter():
    fleet = three_hosts()
    migration, begin = begun(fleet)
    del fleet.items[keys.owner_key("m1")]
    assert commit(fleet, transaction.adopt(migration, begin, "c2", 6))
    assert not commit(fleet, aborted(migration, begin, unchanged(keys.owner_key("m1"), begin)))


def writers_of_entries(fleet: FleetValues) -> list[Transaction]:
    """Return whatever else may write or delete entries of vf1 that are there, as made before BEGIN."""
    vf1 = record(fleet, Function, keys.function_key("vf1"))
    revision = fleet.items[keys.function_key("vf1")].mod_revision
    stored = fleet.items[keys.entry_key("h3", "d2", "vf1")]
    repairs = [found.repair for found in record_findings(View(fleet.snapshot(), {}, {}))]
    assert len(repairs) == 1
    return [
        *(repair for repair in repairs if isinstance(repair, Transaction)),
        transaction.detach_driver(vf1, revision, decode(TableEntry, stored), stored.mod_revision),
        lose_function(vf1, revision, [stored]),
        forget._delete_driver(fleet.snapshot(), "h3", "d2"),
    ]


@pytest.mark.parametrize("number", range(4))
def test_what_else_writes_an_entry_excludes_commit(number):
    fleet = three_hosts()
    wrong = record(fleet, TableEntry, keys.entry_key("h3", "d2", "vf1"))
    wrong.offset += 1
    fleet.put(keys.entry_key("h3", "d2", "vf1"), wrong)
    other = writers_of_entries(fleet)[number]
    assert keys.entry_key("h3", "d2", "vf1") in [write.key for write in other.writes]
    migration, begin = begun(fleet)
    del fleet.items[keys.registration_key("h3")]  # as it must be for a host to be forgotten
    if commit(fleet, other):
        assert not commit(fleet, transaction.commit(migration, begin, 0))


def test_phases_are_taken_in_order_only():
    fleet = three_hosts()
    migration, begin = begun(fleet)
    with pytest.raises(VfleetError):
        transaction.begin(migration, 5, absent(keys.FLEET_GENERATION))
    assert commit(fleet, transaction.commit(migration, begin, 0))
    with pytest.raises(VfleetError):
        transaction.commit(read(fleet), begin, 0)


def test_a_swap_of_attachments_excludes_a_migration_of_the_function():
    fleet = three_hosts()
    vf1, driver = record(fleet, Function, keys.function_key("vf1")), Driver(name="d3", host="h1")
    revision = fleet.items[keys.function_key("vf1")].mod_revision
    entry = TableEntry(driver="d3", function="vf1", host="h1")
    attach = transaction.attach_driver(vf1, revision, driver, 0, entry)
    snapshot = fleet.snapshot()
    migration = plan(snapshot, [move("vf1", "h2/nic0")], name="m1", coordinator="c1", limits=LIMITS)
    begin = transaction.begin(migration, 5, snapshot.fleet_generation_is_this)
    for first, second in ((attach, begin), (begin, attach)):
        fleet = three_hosts()
        assert commit(fleet, first)
        assert not commit(fleet, second)


def test_two_attachments_to_one_driver_exclude_each_other():
    fleet = three_hosts()
    driver, revision = record(fleet, Driver, keys.driver_key("d1")), fleet.items[keys.driver_key("d1")].mod_revision
    del fleet.items[keys.entry_key("h1", "d1", "vf1")]
    both = [
        transaction.attach_driver(
            record(fleet, Function, keys.function_key(name)),
            fleet.items[keys.function_key(name)].mod_revision,
            driver,
            revision,
            TableEntry(driver="d1", function=name, host="h1"),
        )
        for name in ("vf1", "vf2")
    ]
    assert commit(fleet, both[0])
    assert not commit(fleet, both[1])


def test_a_driver_that_was_attached_meanwhile_is_not_deleted():
    fleet = three_hosts()
    driver, revision = record(fleet, Driver, keys.driver_key("d1")), fleet.items[keys.driver_key("d1")].mod_revision
    fleet.put(keys.driver_key("d1"), driver)
    assert not commit(fleet, transaction.delete_driver(driver, revision))


def test_size_counts_what_etcd_counts():
    writes = (Put("a", b"1"), Delete("b"), Delete("c"))
    assert Transaction((absent("a"),), writes).size == 3
    assert transaction.request_bytes(Transaction((absent("a"),), writes)) >= 5
