"""Rearrangements: what is planned for, what is left alone, and what is not begun any more."""

from collections.abc import Mapping

import pytest
from support.fake_host import device
from support.fleet_values import LIMITS, FleetValues, move, three_hosts
from support.rearrangements import DIFFERENT

from coordinator import transaction
from coordinator.planner import parts_of_targets, plan
from coordinator.rearrangement import plan_rearrangement
from vfleet.etcd import keys
from vfleet.etcd.store import Event
from vfleet.v1.migration_service_pb2 import (
    REARRANGEMENT_GOAL_EVEN,
    REARRANGEMENT_GOAL_FREE_DEVICES,
    REARRANGEMENT_GOAL_FREE_HOSTS,
    PlanRearrangementResponse,
    RearrangementGoal,
)
from vfleet.v1.placement_pb2 import Boundary, Constraints, GroupRule
from vfleet.v1.records_pb2 import Cordon

EVEN = REARRANGEMENT_GOAL_EVEN
FREE_DEVICES, FREE_HOSTS = REARRANGEMENT_GOAL_FREE_DEVICES, REARRANGEMENT_GOAL_FREE_HOSTS


def fleet_with(functions: Mapping[str, int], total_vfs: int = 8) -> FleetValues:
    """Return a fleet of devices with so many functions each."""
    fleet, hosts = FleetValues(), dict[str, list[str]]()
    for name in functions:
        hosts.setdefault(name.partition("/")[0], []).append(name)
    made = {
        name: device(name, bus=bus, total_vfs=total_vfs)
        for names in hosts.values()
        for bus, name in enumerate(names, start=1)
    }
    for segment, (host, names) in enumerate(hosts.items(), start=1):
        fleet.host(host, segment, *(made[name] for name in names))
    number = 0
    for segment, names in enumerate(hosts.values(), start=1):
        for name in names:
            for index in range(1, functions[name] + 1):
                number += 1
                fleet.function(f"vf{number}", made[name], segment, index)
    return fleet


def planned(fleet: FleetValues, goal: RearrangementGoal.ValueType, **more: object) -> PlanRearrangementResponse:
    constraints = Constraints(**more)
    return plan_rearrangement(fleet.snapshot(), goal, 10 if goal == EVEN else 0, constraints)


def used_after(response: PlanRearrangementResponse) -> dict[str, int]:
    return {change.device: change.used_after for change in response.plan.changes}


def targets(response: PlanRearrangementResponse) -> dict[str, str]:
    return {each.function: each.target_device for each in response.plan.moves}


def test_loads_are_made_even_and_each_move_says_why():
    response = planned(fleet_with({"h1/nic0": 7, "h2/nic0": 1, "h3/nic0": 4}), EVEN)
    assert used_after(response) == {"h1/nic0": 4, "h2/nic0": 4}
    assert len(response.plan.moves) == 3
    assert response.plan.moves[0].why == "h1/nic0 has 7 of 8 slots in use, h2/nic0 1 of 8"
    assert (response.before.highest_load, response.after.highest_load) == (7 / 8, 4 / 8)


def test_within_the_tolerance_nothing_moves():
    fleet = fleet_with({"h1/nic0": 4, "h2/nic0": 2})  # a move would make it 3 and 3, from 4: 1/8 less
    assert planned(fleet, EVEN).plan.moves
    assert not plan_rearrangement(fleet.snapshot(), EVEN, 13, Constraints()).plan.moves


def test_those_with_drivers_elsewhere_go_first():
    fleet = fleet_with({"h1/nic0": 0, "h2/nic0": 0}, total_vfs=4)
    home = device("h1/nic0", bus=1, total_vfs=4)
    for index, host in enumerate(("h1", "h1", "h2", "h1"), start=1):
        fleet.function(f"vf{index}", home, 1, index, f"d{index}@{host}")
    response = planned(fleet, EVEN)
    assert list(targets(response)) == ["vf3", "vf1"]
    assert (response.before.local_attachments, response.after.local_attachments) == (3, 3)


@pytest.mark.parametrize("goal", [EVEN, FREE_DEVICES, FREE_HOSTS])
@pytest.mark.parametrize("key", ["h3", "h3/device/nic0"])
def test_what_is_cordoned_is_left_alone(goal: RearrangementGoal.ValueType, key: str):
    fleet = fleet_with({"h1/nic0": 3, "h2/nic0": 1, "h3/nic0": 6})
    fleet.put(keys.cordon_key(key), Cordon())
    moves = planned(fleet, goal).plan.moves
    assert {"h3/nic0"}.isdisjoint({place for each in moves for place in (each.source_device, each.target_device)})
    assert moves


def test_what_can_not_move_is_named_and_counts_where_it_is():
    """One that is in a migration, one that is lost, and one whose driver is out of reach."""
    fleet = three_hosts()
    h2 = device("h2/nic0")
    fleet.function("moving", h2, 2, 1)
    fleet.function("lost", h2, 2, 2, incarnation="another")
    fleet.function("remote", h2, 2, 3, "d9@h4")
    fleet.host("h4", 4, device("h4/nic0"), registered=False)
    snapshot = fleet.snapshot()
    migration = plan(snapshot, [move("moving", "h3/nic0")], name="m1", coordinator="c1", limits=LIMITS)
    begin = transaction.begin(migration, 5, snapshot.fleet_generation_is_this, parts_of_targets(snapshot, migration))
    assert fleet.commit(begin)
    response = planned(fleet, FREE_DEVICES)
    assert {each.function: each.why for each in response.stuck} == {
        "moving": "function 'moving' is in migration 'm1'",
        "lost": "function 'lost' was lost when host 'h2' was started anew",
        "remote": "host 'h4' is not registered",
    }
    # h2 keeps those three and h3 has a slot reserved, so h1 alone can be emptied.
    assert set(targets(response)) == {"vf1", "vf2"}
    rule = GroupRule(functions=["vf1", "moving"], boundary=Boundary.BOUNDARY_HOST, relation=DIFFERENT)
    kept = planned(fleet, FREE_DEVICES, groups=[rule])
    assert not kept.plan.moves
    assert "which a rule names with it, is in migration 'm1'" in {s.function: s.why for s in kept.stuck}["vf1"]


def test_devices_become_free_and_what_is_empty_stays_so():
    response = planned(fleet_with({"h1/nic0": 2, "h1/nic1": 5, "h2/nic0": 0, "h2/nic1": 3}), FREE_DEVICES)
    assert used_after(response) == {"h1/nic0": 0, "h1/nic1": 7}
    assert {each.why for each in response.plan.moves} == {"device h1/nic0 becomes free"}
    assert (response.before.devices_in_use, response.after.devices_in_use) == (3, 2)


def test_hosts_become_free_even_if_that_takes_more_moves():
    fleet = fleet_with({"h1/nic0": 2, "h1/nic1": 2, "h2/nic0": 1, "h2/nic1": 0, "h3/nic0": 6, "h3/nic1": 6})
    response = planned(fleet, FREE_HOSTS)
    assert (response.before.hosts_in_use, response.after.hosts_in_use) == (3, 2)
    assert {each.source_device for each in response.plan.moves} == {"h2/nic0"}
    assert response.plan.moves[0].why == "host h2 becomes free"


def test_a_plan_has_so_many_moves_and_then_there_is_another():
    fleet = fleet_with({"h1/nic0": 8, "h2/nic0": 0})
    response = plan_rearrangement(fleet.snapshot(), EVEN, 10, Constraints(), max_moves=2)
    assert len(response.plan.moves) == 2
    assert response.is_partial


def test_those_that_would_have_to_change_places_stay():
    """a and b are to be on different hosts. One after the other they could, but only by a move of a that is undone."""
    fleet = FleetValues()
    small = {name: device(name, bus=1, total_vfs=4) for name in ("h1/nic0", "h2/nic0", "h3/nic0")}
    large = {name: device(name, bus=2, total_vfs=16) for name in ("h1/nic1", "h3/nic1")}
    for segment, host in enumerate(("h1", "h2", "h3"), start=1):
        fleet.host(host, segment, *(each for each in (*small.values(), *large.values()) if each.host == host))
    fleet.function("a", small["h1/nic0"], 1, 1)
    fleet.function("b", small["h3/nic0"], 3, 1)
    for home, names in {"h2/nic0": "cde", "h1/nic1": "fg", "h3/nic1": "h"}.items():
        for index, name in enumerate(names, start=1):
            fleet.function(name, {**small, **large}[home], int(home[1]), index)
    rule = GroupRule(functions=["a", "b"], boundary=Boundary.BOUNDARY_HOST, relation=DIFFERENT)
    response = planned(fleet, FREE_DEVICES, groups=[rule])
    assert {each.function for each in response.stuck} == {"a", "b"}
    assert response.plan.moves
    assert {"a", "b"}.isdisjoint(targets(response))


def test_a_still_snapshot_stands_while_the_fleet_goes_on():
    fleet = three_hosts()
    snapshot = fleet.snapshot()
    still = snapshot.still()
    fleet.function("new", device("h2/nic0"), 2, 1, "d1@h1")
    fleet.host("h4", 4, device("h4/nic0"))
    for item in fleet.items.values():
        if item.mod_revision > snapshot.revision:
            snapshot.take(Event(item.key, item.value, item.create_revision, item.mod_revision))
    assert {"new", "vf1"} <= snapshot.functions.keys()
    assert snapshot.slots_of("h2/nic0")
    assert "new" in snapshot.entries_of("d1")
    assert "h4/nic0" in snapshot.sites
    assert "new" not in still.functions
    assert not still.slots_of("h2/nic0")
    assert "new" not in still.entries_of("d1")
    assert "h4/nic0" not in still.sites
