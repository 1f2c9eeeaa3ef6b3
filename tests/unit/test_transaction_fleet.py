"""The transactions that make and end functions, drivers and attachments: what each writes, and what it rests on."""

from collections.abc import Callable

import pytest
from support.fleet_values import FleetValues, three_hosts

from coordinator import transaction
from vfleet.decision import lose_function
from vfleet.etcd import keys
from vfleet.etcd.records import decode, encode
from vfleet.etcd.store import KeyValue, Put, Transaction, absent, value_is
from vfleet.v1.records_pb2 import Driver, Function, FunctionStatus, Slot
from vfleet.v1.types_pb2 import Attempt, TableEntry

CREATING = FunctionStatus.FUNCTION_STATUS_CREATING
ACTIVE = FunctionStatus.FUNCTION_STATUS_ACTIVE
DELETING = FunctionStatus.FUNCTION_STATUS_DELETING
LOST = FunctionStatus.FUNCTION_STATUS_LOST

VF1, VF9, SLOT9 = keys.function_key("vf1"), keys.function_key("vf9"), keys.slot_key("h2/nic0", 3)
LOCK1, REGISTRATION2 = keys.lock_key("vf1"), keys.registration_key("h2")
D2, D9 = keys.driver_key("d2"), keys.driver_key("d9")
ENTRY2, ENTRY9 = keys.entry_key("h3", "d2", "vf1"), keys.entry_key("h3", "d9", "vf1")


def new_function(**more: object) -> Function:
    function = Function(
        name="vf9",
        identity=9,
        generation=1,
        device="h2/nic0",
        vf_index=3,
        status=CREATING,
        attempt=Attempt(fleet_generation=2),
        incarnation="h2-boot",
    )
    for field, value in more.items():
        setattr(function, field, value)
    return function


def fleet_of_generation_2() -> FleetValues:
    fleet = three_hosts()
    fleet.put(keys.FLEET_GENERATION, "2")
    return fleet


def fleet_creating() -> FleetValues:
    fleet = fleet_of_generation_2()
    assert fleet.commit(create(fleet))
    return fleet


def stored(fleet: FleetValues, key: str) -> KeyValue:
    return fleet.items[key]


def function_in(fleet: FleetValues, key: str) -> Function:
    return decode(Function, stored(fleet, key))


def create(fleet: FleetValues) -> Transaction:
    return transaction.create_function(new_function(), fleet.snapshot().fleet_generation_is_this)


def activate(fleet: FleetValues) -> Transaction:
    kv = stored(fleet, VF9)
    return transaction.activate_function(decode(Function, kv), kv.create_revision, kv.mod_revision, "h2-boot")


def begin_delete(fleet: FleetValues) -> Transaction:
    kv = stored(fleet, VF1)
    return transaction.begin_delete_function(
        decode(Function, kv), kv.mod_revision, 2, fleet.snapshot().fleet_generation_is_this
    )


def finish_delete(fleet: FleetValues) -> Transaction:
    kv = stored(fleet, VF9)
    return transaction.finish_delete_function(decode(Function, kv), kv.mod_revision)


def attach(fleet: FleetValues) -> Transaction:
    kv = stored(fleet, VF1)
    entry = TableEntry(driver="d9", function="vf1", host="h3", virtual_address=7 << 40)
    return transaction.attach_driver(decode(Function, kv), kv.mod_revision, Driver(name="d9", host="h3"), 0, entry)


def attach_known(fleet: FleetValues) -> Transaction:
    """Attach d2 once more, which is attached."""
    function, driver = stored(fleet, VF1), stored(fleet, D2)
    return transaction.attach_driver(
        decode(Function, function),
        function.mod_revision,
        decode(Driver, driver),
        driver.mod_revision,
        TableEntry(driver="d2", function="vf1", host="h3"),
    )


def detach(fleet: FleetValues) -> Transaction:
    function, entry = stored(fleet, VF1), stored(fleet, ENTRY2)
    return transaction.detach_driver(
        decode(Function, function), function.mod_revision, decode(TableEntry, entry), entry.mod_revision
    )


def delete_driver(fleet: FleetValues) -> Transaction:
    kv = stored(fleet, D2)
    return transaction.delete_driver(decode(Driver, kv), kv.mod_revision)


def lose(fleet: FleetValues) -> Transaction:
    """Lose vf1, given the entries of all drivers and what else is to hold."""
    kv = stored(fleet, VF1)
    entries = [item for key, item in sorted(fleet.items.items()) if key.startswith(keys.ENTRIES)]
    return lose_function(
        decode(Function, kv), kv.mod_revision, entries, absent(LOCK1), value_is(REGISTRATION2, b"h2-boot")
    )


def changes(before: FleetValues, make: Callable[[FleetValues], Transaction]) -> dict[str, bytes | None]:
    """Carry out a transaction and return what it changed: the keys that it wrote, with None for those that are gone."""
    old = dict(before.items)
    assert before.commit(make(before))
    return {
        key: before.items[key].value if key in before.items else None
        for key in {*old, *before.items}
        if old.get(key) != before.items.get(key)
    }


def test_a_function_to_be_made_takes_its_slot():
    assert changes(fleet_of_generation_2(), create) == {
        VF9: encode(new_function()),
        SLOT9: encode(Slot(function="vf9")),
    }


def test_a_function_is_active_under_the_attempt_of_its_creation():
    fleet = fleet_creating()
    fleet.put(VF9, function_in(fleet, VF9))
    created = stored(fleet, VF9).create_revision
    assert stored(fleet, VF9).mod_revision > created
    active = new_function(status=ACTIVE)
    active.attempt.revision = created
    assert changes(fleet, activate) == {VF9: encode(active)}


def test_a_function_is_active_on_the_machine_that_made_it():
    fleet = fleet_creating()
    fleet.put(REGISTRATION2, "h2-again")
    kv = stored(fleet, VF9)
    again = transaction.activate_function(decode(Function, kv), kv.create_revision, kv.mod_revision, "h2-again")
    assert fleet.commit(again)
    assert function_in(fleet, VF9).incarnation == "h2-again"


def test_a_deletion_is_an_attempt_of_its_own():
    fleet = fleet_of_generation_2()
    deleting = function_in(fleet, VF1)
    deleting.status = DELETING
    deleting.attempt.CopyFrom(Attempt(fleet_generation=2))
    assert deleting.incarnation == "h1-boot"
    assert changes(fleet, begin_delete) == {VF1: encode(deleting)}


def test_the_deletion_of_what_was_never_made_is_for_whatever_machine():
    fleet = fleet_creating()
    kv = stored(fleet, VF9)
    is_this = fleet.snapshot().fleet_generation_is_this
    assert fleet.commit(transaction.begin_delete_function(decode(Function, kv), kv.mod_revision, 2, is_this))
    assert function_in(fleet, VF9) == decode(
        Function, KeyValue(VF9, encode(new_function(status=DELETING, incarnation="")), 1, 1)
    )


def test_a_deleted_function_leaves_its_slot():
    assert changes(fleet_creating(), finish_delete) == {VF9: None, SLOT9: None}


def test_an_attachment_writes_function_driver_and_entry():
    fleet = fleet_of_generation_2()
    attached = function_in(fleet, VF1)
    attached.drivers.append("d9")
    assert changes(fleet, attach) == {
        VF1: encode(attached),
        D9: encode(Driver(name="d9", host="h3")),
        ENTRY9: encode(TableEntry(driver="d9", function="vf1", host="h3", virtual_address=7 << 40)),
    }


def test_drivers_are_sorted_whatever_the_order_of_their_attachments():
    fleet = fleet_of_generation_2()
    kv = stored(fleet, VF1)
    entry = TableEntry(driver="a1", function="vf1", host="h3")
    driver = Driver(name="a1", host="h3")
    assert fleet.commit(transaction.attach_driver(decode(Function, kv), kv.mod_revision, driver, 0, entry))
    assert list(function_in(fleet, VF1).drivers) == ["a1", "d1", "d2"]


def test_a_detachment_leaves_the_driver_and_what_else_is_attached():
    fleet = fleet_of_generation_2()
    detached = function_in(fleet, VF1)
    detached.drivers.remove("d2")
    assert changes(fleet, detach) == {VF1: encode(detached), ENTRY2: None}


def test_the_deletion_of_a_driver_deletes_its_record():
    assert changes(fleet_of_generation_2(), delete_driver) == {D2: None}


def test_a_lost_function_marks_its_own_entries_as_well():
    fleet = fleet_of_generation_2()
    fleet.put(keys.entry_key("h3", "d2", "vf2"), TableEntry(driver="d2", function="vf2", host="h3"))
    lost = function_in(fleet, VF1)
    lost.status = LOST
    expected = {VF1: encode(lost)}
    for key in (keys.entry_key("h1", "d1", "vf1"), ENTRY2):
        entry = decode(TableEntry, stored(fleet, key))
        entry.lost = True
        expected[key] = encode(entry)
    assert changes(fleet, lose) == expected


def test_what_the_records_say_is_not_changed_where_they_came_from():
    fleet = fleet_creating()
    given = {key: function_in(fleet, key) for key in (VF1, VF9)}
    is_this = fleet.snapshot().fleet_generation_is_this
    entry = decode(TableEntry, stored(fleet, ENTRY2))
    transaction.activate_function(given[VF9], 5, 6, "h2-again")
    transaction.begin_delete_function(given[VF9], 6, 2, is_this)
    transaction.attach_driver(given[VF1], 1, Driver(name="d9", host="h3"), 0, entry)
    transaction.detach_driver(given[VF1], 1, entry, 1)
    lose_function(given[VF1], 1, [])
    assert given == {key: function_in(fleet, key) for key in (VF1, VF9)}


def written(key: str) -> Callable[[FleetValues], object]:
    """Write a key again as it is, or anew."""

    def write(fleet: FleetValues) -> None:
        value = stored(fleet, key).value if key in fleet.items else b"anew"
        assert fleet.commit(Transaction((), (Put(key, value),)))

    return write


def gone(key: str) -> Callable[[FleetValues], object]:
    return lambda fleet: fleet.items.pop(key)


def other(key: str, value: str) -> Callable[[FleetValues], object]:
    return lambda fleet: fleet.put(key, value)


@pytest.mark.parametrize(
    ("fleet_before", "make", "change"),
    [
        (fleet_of_generation_2, create, written(VF9)),
        (fleet_of_generation_2, create, written(SLOT9)),
        (fleet_of_generation_2, create, other(keys.FLEET_GENERATION, "3")),
        (fleet_of_generation_2, create, other(REGISTRATION2, "anew")),
        (fleet_of_generation_2, create, gone(REGISTRATION2)),
        (fleet_of_generation_2, create, written(keys.cordon_key("h2"))),
        (fleet_creating, activate, written(VF9)),
        (fleet_creating, activate, gone(VF9)),
        (fleet_creating, activate, other(REGISTRATION2, "anew")),
        (fleet_creating, activate, gone(REGISTRATION2)),
        (fleet_of_generation_2, begin_delete, written(VF1)),
        (fleet_of_generation_2, begin_delete, written(LOCK1)),
        (fleet_of_generation_2, begin_delete, other(keys.FLEET_GENERATION, "3")),
        (fleet_creating, finish_delete, written(VF9)),
        (fleet_of_generation_2, attach, written(VF1)),
        (fleet_of_generation_2, attach, written(LOCK1)),
        (fleet_of_generation_2, attach, written(D9)),
        (fleet_of_generation_2, attach, written(ENTRY9)),
        (fleet_of_generation_2, detach, written(VF1)),
        (fleet_of_generation_2, detach, written(LOCK1)),
        (fleet_of_generation_2, detach, written(ENTRY2)),
        (fleet_of_generation_2, detach, gone(ENTRY2)),
        (fleet_of_generation_2, delete_driver, written(D2)),
        (fleet_of_generation_2, lose, written(VF1)),
        (fleet_of_generation_2, lose, written(ENTRY2)),
        (fleet_of_generation_2, lose, written(LOCK1)),
        (fleet_of_generation_2, lose, other(REGISTRATION2, "anew")),
    ],
)
def test_nothing_is_done_if_what_it_rests_on_has_changed(
    fleet_before: Callable[[], FleetValues],
    make: Callable[[FleetValues], Transaction],
    change: Callable[[FleetValues], object],
):
    fleet = fleet_before()
    late = make(fleet)
    change(fleet)
    assert not fleet.commit(late)


def test_an_entry_that_is_there_is_never_attached_over():
    fleet = fleet_of_generation_2()
    assert not fleet.commit(attach_known(fleet))


def test_other_functions_may_change_meanwhile():
    for make in (begin_delete, attach, detach, delete_driver, lose):
        fleet = fleet_of_generation_2()
        late = make(fleet)
        for key in (keys.function_key("vf2"), keys.lock_key("vf2"), keys.driver_key("d1")):
            written(key)(fleet)
        assert fleet.commit(late)
