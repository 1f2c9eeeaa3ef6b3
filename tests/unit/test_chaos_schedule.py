"""Chaos' schedule of faults: a function of its seed, each lane one trouble at a time, all sorts of them."""

from itertools import pairwise

from support.chaos.schedule import LEADER, Targets, schedule

TARGETS = Targets(["c1", "h1", "h2"], ["m1", "m2", "m3"], ["to h1", "h1 to etcd"])
LANES = schedule(7, 3000.0, TARGETS, 2.0)


def test_a_seed_gives_the_same_schedule_and_another_seed_another():
    assert schedule(7, 3000.0, TARGETS, 2.0) == LANES
    assert schedule(8, 3000.0, TARGETS, 2.0) != LANES


def test_a_target_suffers_one_fault_at_a_time_and_in_time():
    assert len(LANES) == 6
    for lane in LANES:
        assert all(before.end_s < after.at_s for before, after in pairwise(lane))
        assert lane[-1].end_s <= 3000.0


def test_all_members_of_etcd_share_one_lane_so_that_a_quorum_remains():
    members = {"m1", "m2", "m3", LEADER}
    lanes = [{fault.target for fault in lane} for lane in LANES]
    assert [targets for targets in lanes if targets & members] == [members]


def test_every_sort_of_fault_happens():
    faults = [fault for lane in LANES for fault in lane]
    assert {fault.what for fault in faults} == {"kill", "pause", "cut", "freeze", "delay"}
    lengths = [fault.length_s for fault in faults if fault.what == "pause"]
    assert min(lengths) < 2.0 < max(lengths)
    assert all((fault.disturbance is None) == (fault.what in ("kill", "pause")) for fault in faults)
    frozen = [fault.disturbance for fault in faults if fault.what == "freeze"]
    assert len({disturbance.way for disturbance in frozen}) == 3
    assert {disturbance.half for disturbance in frozen} == {True, False}


def test_without_members_etcd_is_left_alone():
    assert len(schedule(7, 3000.0, Targets(["c1"], [], []), 2.0)) == 1
