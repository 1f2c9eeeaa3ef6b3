"""All cells of the kill matrix, on several clusters at once, and the table of how each ended: `make kill-matrix`."""

import argparse
import asyncio
import collections
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

from rich.console import Console
from rich.table import Table
from support.kill_matrix.cells import LEASE_TTL_S, RESOLUTION_MARGIN_S, Cell, Fault, all_cells
from support.kill_matrix.stage import Outcome, Stage, may_kill_etcd, staged

from vfleet.local import CANNOT_LISTEN

COLUMNS = ("coordinator and second", "coordinator alone", "source", "target", "driver host", "etcd")


class Matrix:
    """The cells still to be run, by the kind of cluster that they need, and the outcomes. `stage` makes a cluster."""

    def __init__(self, cells: list[Cell], directory: Path, stage: Callable[..., AbstractAsyncContextManager[Stage]]):
        self._stage = stage
        self._waiting = {kind: collections.deque(c for c in cells if c.has_second is kind) for kind in (True, False)}
        self._directory = directory
        self._clusters = 0
        self.outcomes: list[Outcome] = []

    async def work(self) -> None:
        """Run cells on one cluster after the other: a new one after each failure, which keeps its logs."""
        while cells := max(self._waiting.values(), key=len):
            self._clusters += 1
            directory = self._directory / str(self._clusters)
            directory.mkdir()
            async with self._stage(directory, has_second=cells[0].has_second) as stage:
                while cells:
                    cell = cells.popleft()
                    outcome = await run_cell(stage, cell)
                    if CANNOT_LISTEN in outcome.failure:
                        # While a daemon was dead, another program took its port: that says nothing of the cell.
                        cells.append(cell)
                        break
                    self.outcomes.append(outcome)
                    sys.stderr.write("F" if outcome.failure else ".")
                    sys.stderr.flush()
                    if outcome.failure:
                        outcome.failure += f"\nlogs: {directory}"
                        break


async def run_cell(stage: Stage, cell: Cell) -> Outcome:
    try:
        return await stage.run(cell)
    except Exception:  # noqa: BLE001  # whatever went wrong, the other cells are run
        return Outcome(cell, phase="FAILED", failure=traceback.format_exc())


def table(outcomes: list[Outcome]) -> Table:
    """Return the table: a row for each step and fault, a column for each participant."""
    rows: dict[tuple[str, str, str], dict[str, Outcome]] = {}
    for cell in all_cells(may_kill_etcd=not any(o.cell.fault is Fault.RESTART for o in outcomes)):
        for outcome in outcomes:
            if outcome.cell == cell:
                fault = Fault.KILL if cell.fault is Fault.RESTART else cell.fault
                rows.setdefault((cell.course, cell.point, fault), {})[cell.column] = outcome
    shown = Table("the migration", "step", "fault", *COLUMNS)
    last = ""
    for (course, point, fault), by_column in rows.items():
        if last not in ("", course):
            shown.add_section()
        cells = [_show(by_column[column]) if column in by_column else "" for column in COLUMNS]
        shown.add_row(course if course != last else "", point, fault, *cells)
        last = course
    return shown


def _show(outcome: Outcome) -> str:
    restart = " (restart)" if outcome.cell.fault is Fault.RESTART else ""
    return f"{outcome.phase} {outcome.resolution_s:.1f} s{restart}"


def summary(outcomes: list[Outcome], seconds: float) -> str:
    """Return the two figures that have a bound."""
    bounded = [outcome.resolution_s for outcome in outcomes if outcome.cell.resolution_max_s is not None]
    late = [outcome.hold_late_s for outcome in outcomes if outcome.hold_late_s is not None]
    failed = sum(bool(outcome.failure) for outcome in outcomes)
    return (
        f"{len(outcomes)} cells in {seconds:.0f} s, {failed} failed\n"
        f"a coordinator killed, another running: over after at most {max(bounded, default=0):.2f} s"
        f" (bound: lease TTL {LEASE_TTL_S} s + {RESOLUTION_MARGIN_S:g} s; {len(bounded)} cells)\n"
        f"no coordinator running: a hold outlived its deadline by at most {max(late, default=0):.2f} s"
        f" (bound: {RESOLUTION_MARGIN_S:g} s; {len(late)} cells with holds)"
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clusters", type=int, default=6, help="how many run at once (%(default)s)")
    parser.add_argument("--only", default="", help="only cells whose step contains this")
    options = parser.parse_args()
    may_kill = await may_kill_etcd()
    if not may_kill:
        sys.stdout.write(
            "this etcd can lose data when it is killed: it is stopped in order and started again instead;\n"
            "for the cells that kill it, install another (Debian: apt-get install etcd-server)\n"
        )
    cells = [cell for cell in all_cells(may_kill_etcd=may_kill) if options.only in cell.point]
    began_s = time.monotonic()
    directory = Path(tempfile.mkdtemp(prefix="vfleet-kill-matrix-"))
    matrix = Matrix(cells, directory, staged)
    async with asyncio.TaskGroup() as group:
        for _ in range(options.clusters):
            group.create_task(matrix.work())
    console = Console(width=180)
    console.print(table(matrix.outcomes))
    for outcome in matrix.outcomes:
        if outcome.failure:
            console.print(f"{outcome.cell}\n{outcome.failure}", markup=False)
    console.print(summary(matrix.outcomes, time.monotonic() - began_s))
    if any(outcome.failure for outcome in matrix.outcomes):
        sys.exit(1)
    shutil.rmtree(directory)


if __name__ == "__main__":
    asyncio.run(main())
