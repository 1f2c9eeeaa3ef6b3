"""What is preferred among devices, what rules between functions mean, and what a request that can't be met says."""

import pytest
from support.fake_host import device
from support.fleet_values import LIMITS, FleetValues, move, three_hosts

from coordinator import assignment
from coordinator.explanation import explain
from coordinator.placement_filters import free_slots
from coordinator.planner import ask, plan
from coordinator.requests import checked_constraints, checked_moves
from coordinator.snapshot import Stored
from coordinator.term import _the_same
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.v1.migration_service_pb2 import MoveRequest
from vfleet.v1.placement_pb2 import (
    Boundary,
    BoundaryRule,
    Constraints,
    GroupRule,
    PlacementFilter,
    Preference,
    Relation,
)
from vfleet.v1.records_pb2 import Cordon, Migration, Slot

HOST, POWER_DOMAIN = Boundary.BOUNDARY_HOST, Boundary.BOUNDARY_POWER_DOMAIN
SAME, DIFFERENT = Relation.RELATION_SAME, Relation.RELATION_DIFFERENT


def chosen(fleet: FleetValues, *functions: str, **constraints: object) -> dict[str, str]:
    answer = ask(fleet.snapshot(), [move(name, "") for name in functions], Constraints(**constraints)).answer()
    assert answer is not None
    return answer


def refusal(fleet: FleetValues, *moves: MoveRequest, **constraints: object) -> VfleetError:
    with pytest.raises(VfleetError) as caught:
        plan(fleet.snapshot(), moves, name="m", coordinator="c", limits=LIMITS, constraints=Constraints(**constraints))
    return caught.value


def group(*functions: str, relation: Relation.ValueType, boundary: Boundary.ValueType = HOST) -> GroupRule:
    return GroupRule(functions=functions, boundary=boundary, relation=relation)


def use(fleet: FleetValues, name: str, *indices: int) -> None:
    for index in indices:
        fleet.put(keys.slot_key(name, index), Slot(function="other"))


def test_the_hosts_of_drivers_come_first_then_the_least_loaded():
    fleet = three_hosts()
    fleet.host("h4", 4, device("h4/nic0", total_vfs=8))
    use(fleet, "h3/nic0", 1, 2, 3)
    use(fleet, "h2/nic0", 1)
    assert chosen(fleet, "vf1") == {"vf1": "h3/nic0"}  # where its driver d2 is
    assert chosen(fleet, "vf2") == {"vf2": "h4/nic0"}
    least_loaded = [Preference.PREFERENCE_LEAST_LOADED]
    assert chosen(fleet, "vf1", preferences=least_loaded) == {"vf1": "h4/nic0"}


def test_functions_are_spread_over_hosts_or_packed_on_few():
    fleet = FleetValues()
    fleet.host("h1", 1, device("h1/nic0"))
    for number in (2, 3):
        fleet.host(f"h{number}", number, *(device(f"h{number}/nic{each}", bus=each + 1) for each in range(2)))
    for index in range(1, 4):
        fleet.function(f"vf{index}", device("h1/nic0"), 1, index)
    use(fleet, "h3/nic1", 1)
    functions = ("vf1", "vf2", "vf3")
    spread = chosen(fleet, *functions, preferences=[Preference.PREFERENCE_SPREAD])
    assert sorted(spread.values()) == ["h2/nic0", "h2/nic1", "h3/nic0"]
    packed = chosen(fleet, *functions, preferences=[Preference.PREFERENCE_PACK])
    assert set(packed.values()) == {"h3/nic1"}


def test_the_last_slot_goes_to_whom_it_is_the_only_one():
    fleet = three_hosts()
    use(fleet, "h2/nic0", 1, 2, 3)
    fleet.host("h3", 3, device("h3/nic0", bar0=2048))  # too small for either
    fleet.host("h4", 4, device("h4/nic0", total_vfs=1))
    fleet.function("vf3", device("h4/nic0"), 4, 1)
    # vf3 can go to h1 and h2, vf1 to h2 alone: h4 is full.
    assert chosen(fleet, "vf3", "vf1") == {"vf3": "h1/nic0", "vf1": "h2/nic0"}


def test_slots_beyond_the_vfs_of_a_device_are_none():
    fleet = three_hosts()
    use(fleet, "h2/nic0", 3, 5, 6)
    snapshot = fleet.snapshot()
    assert free_slots(snapshot, snapshot.sites["h2/nic0"]) == 3


def test_functions_are_kept_together_and_apart():
    fleet = three_hosts()
    fleet.function("vf3", device("h2/nic0"), 2, 1)
    together, apart = (group("vf1", "vf2", relation=relation) for relation in (SAME, DIFFERENT))
    assert len(set(chosen(fleet, "vf1", "vf2", groups=[together]).values())) == 1
    assert sorted(chosen(fleet, "vf1", "vf2", groups=[apart]).values()) == ["h2/nic0", "h3/nic0"]
    # One that doesn't move counts where it is.
    assert chosen(fleet, "vf1", groups=[group("vf1", "vf3", relation=SAME)]) == {"vf1": "h2/nic0"}
    assert chosen(fleet, "vf2", groups=[group("vf2", "vf3", relation=DIFFERENT)]) == {"vf2": "h3/nic0"}


def test_more_functions_apart_than_there_are_hosts_is_told_at_once():
    fleet = FleetValues()
    for number in range(1, 13):
        fleet.host(f"h{number}", number, device(f"h{number}/nic0", total_vfs=32))
    names = [f"vf{number}" for number in range(1, 13)]
    for index, name in enumerate(names, start=1):
        fleet.function(name, device("h1/nic0", total_vfs=32), 1, index)
    error = refusal(fleet, *(move(name, "") for name in names), groups=[group(*names, relation=DIFFERENT)])
    assert error.reason is Reason.UNSATISFIABLE
    assert "don't ask for vf1, vf2, vf3, vf4, vf5 and 7 more to be apart (host)" in error.message


def test_what_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(assignment, "MAX_STEPS", 1)
    assert refusal(three_hosts(), move("vf1", ""), move("vf2", "")).reason is Reason.LIMIT_EXCEEDED


def test_a_request_that_can_not_be_met_says_what_would_do():
    fleet = three_hosts()
    for host in ("h2", "h3"):
        fleet.put(keys.cordon_key(host), Cordon(reason="firmware"))
    error = refusal(fleet, move("vf1", ""))
    assert (error.reason, error.obstacles[0].kind) == (Reason.UNSATISFIABLE, "PLACEMENT_FILTER_SOURCE")
    assert "uncordon host h3" in error.message  # where its driver d2 is
    use(fleet, "h2/nic0", 1, 2, 3, 4)
    use(fleet, "h3/nic0", 1, 2, 3, 4)
    rule = BoundaryRule(boundary=HOST, relation=DIFFERENT)
    alone = refusal(fleet, move("vf1", ""), boundaries=[rule])
    assert (alone.reason, alone.obstacles) == (Reason.UNSATISFIABLE, ())
    assert "no single change is known that would make it possible" in alone.message


def test_the_home_that_is_named_needs_another_vf():
    for index, will_do in ((0, False), (1, False), (4, True)):
        question = ask(three_hosts().snapshot(), [move("vf1", "h1/nic0", index)])
        assert (question.answer() == {"vf1": "h1/nic0"}) is will_do


def test_a_device_that_is_named_is_refused_for_what_is_asked_only():
    fleet = three_hosts()
    lan = device("h4/nic0")
    lan.attachments.append("lan")
    fleet.host("h4", 4, lan)
    fleet.function("vf4", lan, 4, 1)
    named, free = move("vf4", "h2/nic0"), move("vf4", "")
    assert refusal(fleet, free).reason is Reason.UNSATISFIABLE  # nobody else is on its network
    plan(fleet.snapshot(), [named], name="m", coordinator="c", limits=LIMITS)
    assert refusal(fleet, named, attachments=["lan"]).reason is Reason.UNSATISFIABLE
    fleet.put(keys.cordon_key("h2"), Cordon(reason="firmware"))
    error = refusal(fleet, named)
    assert (error.reason, error.metadata["host"]) == (Reason.HOST_CORDONED, "h2")
    assert "cordoned: firmware" in error.message


@pytest.mark.parametrize(
    ("functions", "reason", "words"),
    [
        (["vf2", "vf3"], Reason.INVALID_FIELD, "constraints.groups[0].functions"),
        (["vf1", "vf9"], Reason.NOT_FOUND, "'vf9'"),
        (["vf1", "vf3"], Reason.IN_MIGRATION, "'m0'"),
    ],
)
def test_rules_are_about_functions_whose_place_is_known(functions, reason, words):
    fleet = three_hosts()
    fleet.function("vf3", device("h2/nic0"), 2, 1)
    fleet.put(keys.lock_key("vf3"), "m0")
    error = refusal(fleet, move("vf1", ""), groups=[group(*functions, relation=SAME)])
    assert (error.reason, words in error.message) == (reason, True)


def test_the_plan_says_whose_place_a_device_is():
    fleet = three_hosts()
    use(fleet, "h2/nic0", 1, 2, 3)
    use(fleet, "h3/nic0", 1, 2, 3)
    question = ask(fleet.snapshot(), [move("vf1", ""), move("vf2", "")])
    first, second = explain(question, question.answer()).placements
    assert (first.device, second.device) == ("h3/nic0", "h2/nic0")
    taken = next(rejection for rejection in second.rejections if rejection.device == "h3/nic0")
    assert (taken.by_plan, taken.filter) == (True, PlacementFilter.PLACEMENT_FILTER_FREE_SLOT)
    assert (taken.found, taken.expected) == ("the last for vf1", "1 free")


@pytest.mark.parametrize(
    ("constraints", "field"),
    [
        (Constraints(boundaries=[BoundaryRule(relation=SAME)]), "constraints.boundaries[0].boundary"),
        (Constraints(boundaries=[BoundaryRule(boundary=HOST)]), "constraints.boundaries[0].relation"),
        (
            Constraints(boundaries=[BoundaryRule(boundary=HOST, relation=SAME)] * 2),
            "constraints.boundaries[1].boundary",
        ),
        (Constraints(groups=[group("vf1", relation=SAME)]), "constraints.groups[0].functions"),
        (Constraints(groups=[group("vf1", "vf1", relation=SAME)]), "constraints.groups[0].functions"),
        (Constraints(groups=[group("vf1", "VF", relation=SAME)]), "constraints.groups[0].functions"),
        (Constraints(groups=[group("vf1", "vf2", relation=SAME)] * 65), "constraints.groups"),
        (Constraints(preferences=[99]), "constraints.preferences"),
        (Constraints(preferences=[Preference.PREFERENCE_SPREAD] * 2), "constraints.preferences"),
        (
            Constraints(preferences=[Preference.PREFERENCE_SPREAD, Preference.PREFERENCE_PACK]),
            "constraints.preferences",
        ),
        (Constraints(attachments=["a b"]), "constraints.attachments"),
    ],
)
def test_constraints_that_can_not_be_meant_name_the_field(constraints, field):
    with pytest.raises(VfleetError) as caught:
        checked_constraints(constraints)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_FIELD, field)


def test_an_index_needs_a_device():
    with pytest.raises(VfleetError, match=r"moves\[0\].target_vf_index is 4; expected 0 without a device"):
        checked_moves([MoveRequest(function="vf1", target_vf_index=4)])


def test_a_repeated_request_without_a_device_is_the_same_wherever_it_went():
    record = Migration(name="m")
    record.moves.add(function="vf1").target.device = "h2/nic0"
    stored = Stored(record, 1, 1)
    assert _the_same(stored, [move("vf1", "")]) is stored
    with pytest.raises(VfleetError):
        _the_same(stored, [move("vf1", "h3/nic0")])
