"""Rearrangements: each move can be done when its turn may come, nothing gets worse, and then there is no more to do."""

from fractions import Fraction
from itertools import product

from hypothesis import event, given, settings
from hypothesis import strategies as st
from support.rearrangements import Rearranged, alike_of, counts_of, rearranged_of, seeds

from vfleet.etcd import keys
from vfleet.etcd.records import decode
from vfleet.v1.migration_service_pb2 import REARRANGEMENT_GOAL_EVEN
from vfleet.v1.records_pb2 import Host

cases = seeds.map(rearranged_of)


@given(cases, st.randoms(use_true_random=False))
@settings(max_examples=400)
def test_whatever_the_order_each_move_finds_a_slot_and_breaks_no_rule(case: Rearranged, random):
    """Up to three are under way at once, and those whose turn it may be begin and end at random."""
    moves = {move.function: move for move in case.plan().plan.moves}
    event("moves" if moves else "none")
    slots, homes = case.used(), dict(case.homes)
    waiting, under_way, done = list(moves), list[str](), set[str]()
    while waiting or under_way:
        ready = [name for name in waiting if done.issuperset(moves[name].after)]
        assert ready or under_way
        if ready and len(under_way) < 3 and (not under_way or random.random() < 0.7):
            name = random.choice(ready)
            move = moves[name]
            assert move.source_device == homes[name] == case.homes[name]
            assert case.will_do(name, move.target_device)
            assert case.keeps_rules(name, move.target_device, homes)
            slots[move.target_device] += 1
            assert slots[move.target_device] <= case.devices[move.target_device].total_vfs
            waiting.remove(name)
            under_way.append(name)
        else:
            name = under_way.pop(random.randrange(len(under_way)))
            slots[moves[name].source_device] -= 1
            homes[name] = moves[name].target_device
            done.add(name)


@given(cases)
@settings(max_examples=400)
def test_planned_again_after_all_moves_there_is_nothing_to_do(case: Rearranged):
    planned = case.plan()
    case.carry_out(planned.plan.moves)
    again = case.plan()
    assert not again.plan.moves
    assert again.before == planned.after
    assert not planned.is_partial


@given(cases)
@settings(max_examples=300)
def test_the_figures_are_right_and_nothing_is_worse(case: Rearranged):
    planned = case.plan()
    before = case.used()
    case.carry_out(planned.plan.moves)
    after = case.used()
    for change in planned.plan.changes:
        assert (change.used_before, change.used_after) == (before[change.device], after[change.device])
    changed = {change.device for change in planned.plan.changes}
    assert all(before[name] == after[name] for name in case.devices if name not in changed)
    mine = [name for name in case.devices if case.is_in_use(name)]
    for figures, used in ((planned.before, before), (planned.after, after)):
        loads = [used[name] / case.devices[name].total_vfs for name in mine]
        assert figures.highest_load == max(loads, default=0)
        assert figures.lowest_load == min(loads, default=0)
        assert figures.devices_in_use == sum(used[name] > 0 for name in mine)
        assert figures.hosts_in_use == len({case.devices[name].host for name in mine if used[name]})
    if case.goal == REARRANGEMENT_GOAL_EVEN:
        assert planned.after.highest_load <= planned.before.highest_load
        assert planned.after.lowest_load >= planned.before.lowest_load
    else:
        assert not [
            name for name in case.devices if after[name] and not units_in_use(case, before) >= {case.unit(name)}
        ]
        if planned.plan.moves:
            assert len(units_in_use(case, after)) < len(units_in_use(case, before))


@given(cases)
@settings(max_examples=300)
def test_no_single_step_is_left_that_would_help(case: Rearranged):
    """For even loads that is a move of one function; for free units, to empty one of them with all functions in it."""
    case.carry_out(case.plan().plan.moves)
    used = case.used()
    mine = [name for name in case.homes if case.is_in_use(case.homes[name])]
    if case.goal == REARRANGEMENT_GOAL_EVEN:
        for name, target in product(mine, case.devices):
            source = case.homes[name]
            if case.will_do(name, target) and case.keeps_rules(name, target, case.homes):
                assert not helps(case, used, source, target)
        return
    for unit in units_in_use(case, used):
        inside = [name for name in case.homes if case.unit(case.homes[name]) == unit]
        if case.constraints.groups or not set(inside) <= set(mine) or len(inside) > 5:
            continue
        others = [each for each in case.devices if case.unit(each) in units_in_use(case, used) - {unit}]
        for targets in product(*([each for each in others if case.will_do(name, each)] for name in inside)):
            assert any(
                used[each] + targets.count(each) > case.devices[each].total_vfs for each in dict.fromkeys(targets)
            )


@given(seeds)
@settings(max_examples=300)
def test_where_all_devices_are_alike_loads_become_even_in_as_few_moves_as_can_be(seed: int):
    case = alike_of(seed, one_size=True)
    case.goal, case.tolerance_percent = REARRANGEMENT_GOAL_EVEN, case.tolerance_percent or 10
    before = case.used()
    fewest = min(
        sum(max(before[name] - counts[name], 0) for name in counts)
        for counts in counts_of(case.devices, len(case.homes))
        if not any(helps(case, counts, source, target) for source, target in product(counts, counts))
    )
    event(f"{min(fewest, 3)} moves")
    assert len(case.plan().plan.moves) == fewest


@given(seeds, st.booleans())
@settings(max_examples=300)
def test_where_all_may_be_anywhere_as_many_devices_become_free_as_can(seed: int, one_size: bool):
    """And with devices of a size, in as few moves as that takes."""
    case = alike_of(seed, one_size=one_size)
    before = case.used()
    case.goal, case.tolerance_percent = max(case.goal, 2), 0
    in_use = {name: device for name, device in case.devices.items() if before[name]}
    ways = [
        (sum(n > 0 for n in counts.values()), sum(max(before[name] - n, 0) for name, n in counts.items()))
        for counts in counts_of(in_use, len(case.homes))
    ]
    best = min(ways)
    moves = case.plan().plan.moves
    case.carry_out(moves)
    assert sum(used > 0 for used in case.used().values()) == best[0]
    if one_size:
        assert len(moves) == best[1]


@given(cases, st.randoms(use_true_random=False))
@settings(max_examples=100)
def test_the_same_fleet_gives_the_same_plan(case: Rearranged, random):
    first = case.plan()
    items = list(case.fleet.items.items())
    random.shuffle(items)
    case.fleet.items = dict(items)
    for key, item in items:
        if key.startswith(keys.HOSTS):
            host = decode(Host, item)
            host.devices.sort(key=lambda _: random.random())
            case.fleet.put(key, host)
    assert case.plan() == first


def helps(case: Rearranged, used: dict[str, int], source: str, target: str) -> bool:
    """Return whether loads would be more even, by more than the tolerance, if one function went from here to there."""
    sizes = {name: case.devices[name].total_vfs for name in (source, target)}
    if source == target or not used[source] or used[target] >= sizes[target]:
        return False
    left, leaves = Fraction(used[source], sizes[source]), Fraction(used[source] - 1, sizes[source])
    found, comes = Fraction(used[target], sizes[target]), Fraction(used[target] + 1, sizes[target])
    return left - comes > Fraction(case.tolerance_percent, 100) and leaves >= found


def units_in_use(case: Rearranged, used: dict[str, int]) -> set[str]:
    return {case.unit(name) for name in case.devices if used[name]}
