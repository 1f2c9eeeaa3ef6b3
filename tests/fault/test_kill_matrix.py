"""A cut through the kill matrix: each participant dies or freezes at some step. `make kill-matrix` runs all cells."""

from pathlib import Path

import pytest
from support.kill_matrix.cells import NOT_HERE, Cell, Course, Fault, Participant, all_cells
from support.kill_matrix.stage import may_kill_etcd, staged

from vfleet import failpoint

COORDINATOR, SOURCE, TARGET, DRIVER_HOST, ETCD = Participant
KILL, STOP, RESTART = Fault.KILL, Fault.STOP, Fault.RESTART

WITH_SECOND = [
    Cell(Course.COMMIT, "coordinator.stop.after", COORDINATOR, KILL),
    Cell(Course.COMMIT, "coordinator.commit.before", COORDINATOR, STOP),
    Cell(Course.COMMIT, "coordinator.lift.before", DRIVER_HOST, KILL),
    Cell(Course.COMMIT, "hostd.prove.before", TARGET, KILL),
    Cell(Course.COMMIT, "hostd.remove.halfway", SOURCE, KILL),
    Cell(Course.ABORT, "hostd.resume.before", SOURCE, KILL),
    Cell(Course.ADOPT_COMMITTED, "coordinator.adopt.after", COORDINATOR, KILL),
    Cell(Course.COMMIT, "coordinator.commit.before", ETCD, KILL),
]
ALONE = [
    Cell(Course.COMMIT, "coordinator.commit.before", COORDINATOR, KILL, has_second=False),
    Cell(Course.RESOLVE, "hostd.resolve_hold.before", DRIVER_HOST, KILL, has_second=False),
    Cell(Course.COMMIT, "coordinator.commit.after", COORDINATOR, STOP, has_second=False),
]


@pytest.mark.parametrize("cells", [WITH_SECOND[:4], WITH_SECOND[4:], ALONE], ids=["first", "second", "alone"])
async def test_whoever_dies_at_whatever_step_the_migration_ends_and_nothing_is_lost(
    tmp_path: Path, cells: list[Cell]
) -> None:
    matrix = all_cells(may_kill_etcd=await may_kill_etcd())
    async with staged(tmp_path, has_second=cells[0].has_second) as stage:
        for cell in cells:
            if cell in matrix:  # an etcd that loses data when it is killed is not killed
                await stage.run(cell)


def test_the_matrix_has_every_failpoint_by_every_fault() -> None:
    for may_kill in (True, False):
        cells = all_cells(may_kill_etcd=may_kill)
        assert len(cells) == len(set(cells))
        for fault in (KILL, STOP):
            assert {cell.point for cell in cells if cell.fault is fault} == failpoint.NAMES - NOT_HERE
        coordinators = {point for point in failpoint.NAMES if point.startswith("coordinator.")}
        for participant in (SOURCE, TARGET, DRIVER_HOST, ETCD):
            points = {cell.point for cell in cells if cell.participant is participant}
            assert coordinators - points == {"coordinator.adopt.before", "coordinator.adopt.after"}
