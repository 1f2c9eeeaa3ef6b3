"""Plans and why there is none."""

import pytest
from support.fake_host import device
from support.fleet_values import LIMITS, FleetValues, move, three_hosts

from coordinator import transaction
from coordinator.planner import RECORD_GROWTH_BYTES, Limits, parts_of_targets, plan
from vfleet.address import Location, table_offset
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.store import absent
from vfleet.v1.placement_pb2 import BOUNDARY_HOST, RELATION_DIFFERENT, BoundaryRule, Constraints, GroupRule
from vfleet.v1.records_pb2 import FunctionStatus, Migration, Phase, Slot


def planned(fleet: FleetValues, *moves, limits: Limits = LIMITS):
    return plan(fleet.snapshot(), moves, name="m1", coordinator="c1", limits=limits)


def refusal(fleet: FleetValues, *moves, limits: Limits = LIMITS) -> VfleetError:
    with pytest.raises(VfleetError) as caught:
        planned(fleet, *moves, limits=limits)
    return caught.value


def test_a_plan_says_everything_that_the_transactions_need():
    fleet = three_hosts()
    migration = planned(fleet, move("vf1", "h2/nic0"))
    (part,) = migration.moves
    assert migration.phase == Phase.PHASE_UNSPECIFIED
    assert (part.source.device, part.source.vf_index, part.source.generation) == ("h1/nic0", 1, 3)
    assert (part.target.device, part.target.vf_index, part.target.generation) == ("h2/nic0", 1, 4)
    assert part.target.base == Location(2, 0x101).base
    assert (part.source.incarnation, part.target.incarnation) == ("h1-boot", "h2-boot")
    assert part.function_revision == fleet.items[keys.function_key("vf1")].mod_revision
    assert [(entry.driver, entry.host, entry.incarnation) for entry in part.entries] == [
        ("d1", "h1", "h1-boot"),
        ("d2", "h3", "h3-boot"),
    ]
    for entry in part.entries:
        assert entry.offset_after == table_offset(part.target.base, entry.virtual_address)


def test_free_slots_are_handed_out_lowest_first_around_those_that_moves_name():
    fleet = three_hosts()
    fleet.put(keys.slot_key("h2/nic0", 1), Slot(function="other"))
    fleet.function("vf3", device("h1/nic0"), 1, 3)
    migration = planned(fleet, move("vf1", "h2/nic0"), move("vf2", "h2/nic0", 2), move("vf3", "h2/nic0"))
    assert [part.target.vf_index for part in migration.moves] == [3, 2, 4]


@pytest.mark.parametrize("target", ["h2/nic0", ""])
def test_what_plans_that_are_about_to_begin_take_is_for_no_other_plan(target: str):
    fleet = three_hosts()
    for taken, count in (("h2/nic0", 3), ("h3/nic0", 4)):
        for index in range(1, count + 1):
            fleet.put(keys.slot_key(taken, index), Slot(function="other"))
    snapshot = fleet.snapshot()
    elsewhere = Constraints(boundaries=[BoundaryRule(boundary=BOUNDARY_HOST, relation=RELATION_DIFFERENT)])
    others = [planned(fleet, move("vf1", "h2/nic0"))]
    later = snapshot.once_begun(others)
    with pytest.raises(VfleetError) as caught:
        plan(later, [move("vf2", target)], name="m2", coordinator="c1", limits=LIMITS, constraints=elsewhere)
    assert caught.value.reason is (Reason.NO_FREE_SLOT if target else Reason.UNSATISFIABLE)
    with pytest.raises(VfleetError) as caught:
        plan(later, [move("vf1", "h1/nic0", 4)], name="m2", coordinator="c1", limits=LIMITS)
    assert caught.value.reason is Reason.IN_MIGRATION
    assert 4 not in snapshot.slots_of("h2/nic0")


@pytest.mark.parametrize("function", ["vf1", "vf2"])
def test_a_function_of_a_plan_that_is_about_to_begin_is_in_its_migration(function: str):
    """Whoever moves it, and whoever has a rule about where it is."""
    snapshot = three_hosts().snapshot()
    others = [planned(three_hosts(), move("vf1", "h2/nic0"))]
    apart = GroupRule(functions=["vf1", "vf2"], boundary=BOUNDARY_HOST, relation=RELATION_DIFFERENT)
    with pytest.raises(VfleetError) as caught:
        plan(
            snapshot.once_begun(others),
            [move(function, "h3/nic0")],
            name="m2",
            coordinator="c1",
            limits=LIMITS,
            constraints=Constraints(groups=[apart]),
        )
    assert caught.value.reason is Reason.IN_MIGRATION
    assert caught.value.metadata == {"function": "vf1", "migration": "m1"}
    assert "vf1" not in snapshot.locks


def test_a_move_within_a_device_needs_another_index():
    assert planned(three_hosts(), move("vf1", "h1/nic0", 3)).moves[0].target.vf_index == 3
    for vf_index in (0, 1):
        assert refusal(three_hosts(), move("vf1", "h1/nic0", vf_index)).reason is Reason.TARGET_IS_SOURCE


@pytest.mark.parametrize(
    ("moves", "reason", "words"),
    [
        ([move("vf9", "h2/nic0")], Reason.NOT_FOUND, "function named 'vf9'"),
        ([move("vf1", "h2/nic9")], Reason.NOT_FOUND, "device named 'h2/nic9'"),
        ([move("vf1", "h9/nic0")], Reason.NOT_FOUND, "host named 'h9'"),
        ([move("vf1", "h2/nic0", 5)], Reason.INVALID_FIELD, "moves[0].target_vf_index"),
        ([move("vf1", "h1/nic0", 2)], Reason.SLOT_TAKEN, "'vf2'"),
        ([move("vf1", "h2/nic0"), move("vf1", "h3/nic0")], Reason.INVALID_FIELD, "moves[1].function"),
        ([move("vf1", "h2/nic0", 1), move("vf2", "h2/nic0", 1)], Reason.INVALID_FIELD, "moves[1].target_vf_index"),
        ([], Reason.INVALID_FIELD, "moves"),
    ],
)
def test_what_can_not_be_planned_is_refused_by_name(moves, reason, words):
    error = refusal(three_hosts(), *moves)
    assert error.reason is reason
    assert words in error.message


def test_a_full_device_is_refused():
    fleet = three_hosts()
    for index in range(1, 4):
        fleet.put(keys.slot_key("h2/nic0", index), Slot(function="other"))
    assert planned(fleet, move("vf1", "h2/nic0")).moves[0].target.vf_index == 4
    error = refusal(fleet, move("vf1", "h2/nic0"), move("vf2", "h2/nic0"))
    assert (error.reason, error.metadata["device"]) == (Reason.NO_FREE_SLOT, "h2/nic0")


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ({"model": "other"}, "model: other; expected checker"),
        ({"vendor_id": 0x8086}, "manufacturer: 8086:1041; expected 1af4:1041"),
    ],
)
def test_a_device_of_another_kind_is_refused(difference, words):
    fleet = three_hosts()
    fleet.host("h4", 4, device("h4/nic0", **difference))
    error = refusal(fleet, move("vf1", "h4/nic0"))
    assert error.reason is Reason.INCOMPATIBLE_DEVICE
    assert words in error.message


def test_bars_may_be_larger_but_not_smaller():
    fleet = FleetValues()
    fleet.host("h1", 1, device("h1/nic0", bar0=8192))
    fleet.host("h2", 2, device("h2/nic0", bar0=16384), device("h2/nic1", bar0=4096, bus=2))
    fleet.function("vf1", device("h1/nic0", bar0=8192), 1, 1)
    assert planned(fleet, move("vf1", "h2/nic0")).moves[0].bars[0].size_bytes == 8192
    error = refusal(fleet, move("vf1", "h2/nic1"))
    assert error.reason is Reason.INCOMPATIBLE_DEVICE
    assert "BAR 0 of 4096 bytes; expected at least 8192" in error.message


@pytest.mark.parametrize("host", ["h1", "h2", "h3"])
def test_source_target_and_driver_hosts_are_to_be_registered(host):
    fleet = three_hosts()
    del fleet.items[keys.registration_key(host)]
    error = refusal(fleet, move("vf1", "h2/nic0"))
    assert (error.reason, error.metadata["host"]) == (Reason.HOST_UNAVAILABLE, host)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (FunctionStatus.FUNCTION_STATUS_CREATING, Reason.ILLEGAL_STATE),
        (FunctionStatus.FUNCTION_STATUS_DELETING, Reason.ILLEGAL_STATE),
        (FunctionStatus.FUNCTION_STATUS_LOST, Reason.FUNCTION_LOST),
    ],
)
def test_a_function_that_is_not_active_does_not_move(status, reason):
    fleet = three_hosts()
    fleet.function("vf3", device("h1/nic0"), 1, 3, status=status)
    assert refusal(fleet, move("vf3", "h2/nic0")).reason is reason


def test_a_function_whose_machine_was_started_anew_is_lost():
    fleet = three_hosts()
    fleet.put(keys.registration_key("h1"), "h1-boot-again")
    assert refusal(fleet, move("vf1", "h2/nic0")).reason is Reason.FUNCTION_LOST


def test_a_function_in_a_migration_names_it():
    fleet = three_hosts()
    fleet.put(keys.lock_key("vf1"), "m0")
    error = refusal(fleet, move("vf1", "h2/nic0"))
    assert (error.reason, error.metadata["migration"]) == (Reason.IN_MIGRATION, "m0")
    assert "'m0'" in error.message


def test_an_entry_that_contradicts_the_function_is_a_conflict():
    fleet = three_hosts()
    del fleet.items[keys.entry_key("h3", "d2", "vf1")]
    assert refusal(fleet, move("vf1", "h2/nic0")).reason is Reason.CONFLICT


def many(count: int) -> tuple[FleetValues, list]:
    fleet = FleetValues()
    fleet.host("h1", 1, device("h1/nic0", total_vfs=200))
    fleet.host("h2", 2, device("h2/nic0", total_vfs=200))
    for index in range(1, count + 1):
        fleet.function(f"vf{index}", device("h1/nic0"), 1, index, f"d{index}@h1")
    return fleet, [move(f"vf{index}", "h2/nic0") for index in range(1, count + 1)]


def test_a_group_that_is_too_large_says_how_many_moves_would_fit():
    fleet, moves = many(60)
    error = refusal(fleet, *moves)
    assert error.reason is Reason.GROUP_TOO_LARGE
    fitting = int(error.metadata["fitting"])
    assert f"the first {fitting} would" in error.message
    largest = planned(fleet, *moves[:fitting])
    assert transaction.begin(largest, 1, absent(keys.FLEET_GENERATION)).size <= LIMITS.operations
    assert int(refusal(fleet, *moves[: fitting + 1]).metadata["fitting"]) == fitting


def test_the_size_of_a_request_bounds_a_group_too():
    fleet, moves = many(20)
    error = refusal(fleet, *moves, limits=Limits(operations=1000, request_bytes=16_384))
    assert error.reason is Reason.GROUP_TOO_LARGE
    assert 0 < int(error.metadata["fitting"]) < 20


@pytest.mark.parametrize("count", [1, 2, 5])
def test_what_fits_is_what_its_transactions_say(count: int):
    fleet, moves = many(count)
    the_plan = planned(fleet, *moves)
    committing, committed = Migration(), Migration()
    for phase, part in ((Phase.PHASE_PREPARING, committing), (Phase.PHASE_COMMITTED, committed)):
        part.CopyFrom(the_plan)
        part.phase = phase
    each = (
        transaction.begin(
            the_plan, 1, absent(keys.FLEET_GENERATION), parts_of_targets(fleet.snapshot(), the_plan), queue_revision=1
        ),
        transaction.commit(committing, 1, 0),
        transaction.finish(committed, 1, finished_by="c1", now=0),
    )
    operations = max(one.size for one in each)
    request_bytes = max(map(transaction.request_bytes, each)) + RECORD_GROWTH_BYTES
    exact = Limits(operations, request_bytes)
    for limits in (exact, Limits(10 * operations, request_bytes), Limits(operations, 100 * request_bytes), LIMITS):
        planned(fleet, *moves, limits=limits)
    for limits in (Limits(operations - 1, 100 * request_bytes), Limits(10 * operations, request_bytes - 1)):
        assert refusal(fleet, *moves, limits=limits).reason is Reason.GROUP_TOO_LARGE
