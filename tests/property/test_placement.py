"""Placement: a plan is right, found if there is one, and the same each time; and what is said of it is true."""

import copy
from itertools import product
from random import Random

from hypothesis import event, given, settings
from hypothesis import strategies as st
from support.fleet_values import FleetValues
from support.placements import Case, case_of, cases, change_device, device_of, is_right, plan_exists

from coordinator.assignment import Assignment, Group
from coordinator.explanation import explain
from coordinator.preferences import Preferences
from coordinator.snapshot import Snapshot
from vfleet.etcd import keys
from vfleet.v1.placement_pb2 import Boundary, Constraints, PlacementFilter, Rejection

FILTERS = [number for _, number in PlacementFilter.items() if number]


@given(cases)
@settings(max_examples=400)
def test_a_plan_is_right_and_found_whenever_there_is_one(case: Case):
    answer = case.question().answer()
    event("plan" if answer else "none")
    if answer is None:
        assert not plan_exists(case)
    else:
        assert is_right(case, answer)


@given(cases, st.randoms(use_true_random=False))
@settings(max_examples=80)
def test_the_same_fleet_gives_the_same_plan(case: Case, random):
    """Whatever the order in which a coordinator has heard of it."""
    first = case.question()
    second = case.question()
    sites = list(second.snapshot.sites.items())
    random.shuffle(sites)
    second.snapshot.sites = dict(sites)
    answers = first.answer(), second.answer()
    assert answers[0] == answers[1]
    assert explain(first, answers[0]) == explain(second, answers[1])


@given(cases)
@settings(max_examples=40)
def test_every_device_is_chosen_will_do_or_is_rejected(case: Case):
    question = case.question()
    answer = question.answer()
    for placement in explain(question, answer).placements:
        candidates = [candidate.device for candidate in placement.candidates]
        rejected = [rejection.device for rejection in placement.rejections]
        assert sorted(candidates + rejected) == sorted(case.devices())
        assert placement.device == (candidates[0] if answer else "")
        for device in candidates if answer else ():
            assert is_right(case, {**answer, placement.function: device})


@given(cases)
@settings(max_examples=80)
def test_without_the_reason_a_device_is_not_rejected_for_it(case: Case):
    question = case.question()
    for placement in explain(question, question.answer()).placements:
        for rejection in placement.rejections:
            changed = without_reason(case, placement.function, rejection)
            again = {r.device: r for r in changed_rejections(changed, placement.function)}.get(rejection.device)
            if again is not None and not again.by_plan:
                assert (again.filter, again.group) > (rejection.filter, rejection.group)
            elif again is not None:
                assert (again.filter, again.group) != (rejection.filter, rejection.group) or not rejection.by_plan


@given(cases)
@settings(max_examples=80)
def test_the_ways_out_are_all_single_constraints_without_which_there_is_a_plan(case: Case):
    question = case.question()
    answer = question.answer()
    relaxations = {(each.filter, each.group): each for each in explain(question, answer).relaxations}
    if answer is not None:
        assert not relaxations
        return
    event("ways out" if relaxations else "no way out")
    for without, relaxation in relaxations.items():
        assert is_right(case, relaxation.devices, without)
        assert relaxation.remedy
    groups = [(PlacementFilter.PLACEMENT_FILTER_GROUP, n + 1) for n in range(len(case.constraints.groups))]
    for without in [*((each, 0) for each in FILTERS), *groups]:
        if without not in relaxations:
            assert not plan_exists(case, without)


@given(st.randoms(use_true_random=False))
@settings(max_examples=150)
def test_rules_that_cross_each_other_are_met_whenever_they_can_be(random):
    """Functions in several groups, in a fleet that they fill: most choices have to be taken back."""
    snapshot = CROWDED
    functions = [f"vf{number}" for number in range(random.randint(3, 5))]
    devices = sorted(snapshot.sites)
    own = {function: random.sample(devices, random.randint(2, 4)) for function in functions}
    shared = random.sample(devices, 5)
    options = {function: shared if random.random() < 0.2 else own[function] for function in functions}
    room = {device: random.choice([1, 1, 2]) for device in devices}
    groups = [
        Group(tuple(random.sample(functions, random.randint(2, 3))), random.choice(CROSSING), random.random() < 0.1)
        for _ in range(random.randint(1, 3))
    ]
    preferences = Preferences([], snapshot, {function: {} for function in functions})
    answer = Assignment(snapshot, options, room, groups, preferences).find()

    def is_met(devices: dict[str, str]) -> bool:
        for group in groups:
            boundaries = [snapshot.sites[devices[member]].within[group.boundary] for member in group.members]
            if len(set(boundaries)) != (1 if group.together else len(boundaries)):
                return False
        return all(list(devices.values()).count(device) <= room[device] for device in devices.values())

    event("met" if answer else "not met")
    if answer is None:
        every = (dict(zip(functions, chosen, strict=True)) for chosen in product(*options.values()))
        assert not any(map(is_met, every))
    else:
        assert all(answer[function] in options[function] for function in functions)
        assert is_met(answer)


def crowded() -> Snapshot:
    fleet, random = FleetValues(), Random(1)
    for segment in range(1, 4):
        fleet.host(f"h{segment}", segment, *(device_of(random, f"h{segment}", number) for number in range(2)))
    return fleet.snapshot()


CROWDED = crowded()
CROSSING = [Boundary.BOUNDARY_HOST, Boundary.BOUNDARY_HOST, Boundary.BOUNDARY_POWER_DOMAIN]


def changed_rejections(case: Case, function: str) -> list[Rejection]:
    question = case.question()
    placements = explain(question, question.answer()).placements
    return next(list(p.rejections) for p in placements if p.function == function)


def without_reason(case: Case, function: str, rejection: Rejection) -> Case:
    """Return the case with the reason for a rejection removed."""
    changed = Case(copy.copy(case.fleet), dict(case.moves), Constraints())
    changed.fleet.items = dict(case.fleet.items)
    changed.constraints.CopyFrom(case.constraints)
    source = case.devices()[case.function(function).device]
    device, host = rejection.device, rejection.device.partition("/")[0]
    fields = {
        PlacementFilter.PLACEMENT_FILTER_MANUFACTURER: {"manufacturer": source.manufacturer},
        PlacementFilter.PLACEMENT_FILTER_MODEL: {"model": source.model},
        PlacementFilter.PLACEMENT_FILTER_IO_TYPE: {"io_type": source.io_type},
        PlacementFilter.PLACEMENT_FILTER_BARS: {"bars": source.bars},
        PlacementFilter.PLACEMENT_FILTER_STATE_VERSION: {"state_version": source.state_version},
        PlacementFilter.PLACEMENT_FILTER_FREE_SLOT: {"total_vfs": 20},
        PlacementFilter.PLACEMENT_FILTER_ATTACHMENTS: {"attachments": ["lan", "san"]},
    }
    match rejection.filter:
        case filter_ if filter_ in fields:
            change_device(changed, device, **fields[filter_])
        case PlacementFilter.PLACEMENT_FILTER_TARGET:
            changed.moves[function] = ""
        case PlacementFilter.PLACEMENT_FILTER_SOURCE:
            changed.moves[function] = device
        case PlacementFilter.PLACEMENT_FILTER_HOST_REGISTERED:
            changed.fleet.put(keys.registration_key(host), f"{host}-boot")
        case PlacementFilter.PLACEMENT_FILTER_CORDON:
            del changed.fleet.items[keys.cordon_key(host)]
        case PlacementFilter.PLACEMENT_FILTER_GROUP:
            changed.constraints.groups[rejection.group - 1].relation = 0
        case _:
            number = rejection.filter - PlacementFilter.PLACEMENT_FILTER_HOST
            for rule in changed.constraints.boundaries:
                rule.relation = 0 if rule.boundary == number + 1 else rule.relation
    return changed


def test_the_cases_are_of_enough_kinds():
    """Each filter rejects a device of one of those that are drawn."""
    met: set[int] = set()
    for seed in range(200):
        question = case_of(seed).question()
        for placement in explain(question, question.answer()).placements:
            met.update(rejection.filter for rejection in placement.rejections)
    assert sorted(set(FILTERS) - met) == []
