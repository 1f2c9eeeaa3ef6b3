"""How far a migration is, for people: bars that grow on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from vfleet.cli.describe import phase_word, step_word
from vfleet.cli.output import milliseconds, rounded_size
from vfleet.v1.migration_service_pb2 import CopyProgress, WatchMigrationResponse
from vfleet.v1.records_pb2 import Step


class LiveProgress:
    """One line for the migration and a bar for each copy, on a terminal; nothing where there is none."""

    def __init__(self, out: Console, name: str) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.fields[head]}"), BarColumn(), TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, console=out, transient=True, disable=not out.is_terminal)
        self._first = self._progress.add_task("", total=None, head=name, text="waiting")
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def show(self, update: WatchMigrationResponse) -> None:
        """Show an update in the place of the last."""
        self._progress.update(self._first, head=update.migration.name, text=_where(update))
        for copy in update.copies:
            if copy.total_bytes:
                if copy.function not in self._bars:
                    self._bars[copy.function] = self._progress.add_task("", total=None, head=copy.function, text="")
                done = copy.total_bytes - (copy.missing_bytes or copy.dirty_bytes)
                if not copy.rounds and not copy.missing_bytes:
                    done = min(copy.received_bytes, copy.total_bytes)
                text = describe_copy(copy)
                self._progress.update(self._bars[copy.function], total=copy.total_bytes, completed=done, text=text)


def progress_line(update: WatchMigrationResponse) -> str:
    """Return an update in one line; while a round goes on it stays the same."""
    copies = (
        f"{copy.function}: {describe_copy(copy)}" for copy in update.copies if copy.rounds and _is_copying(update)
    )
    return "; ".join((f"{update.migration.name}: {_where(update)}", *copies))


def describe_copy(copy: CopyProgress) -> str:
    """Return how far a copy is."""
    if copy.missing_bytes:
        return f"{rounded_size(copy.missing_bytes)} still at the source"
    if not copy.rounds:
        return f"{rounded_size(copy.received_bytes)} of {rounded_size(copy.total_bytes)}"
    parts = [
        f"round {copy.rounds}",
        f"{rounded_size(copy.received_bytes)} received",
        f"{rounded_size(copy.dirty_bytes)} dirty at {rounded_size(copy.dirty_bytes_per_s)}/s",
        f"blackout {milliseconds(copy.estimated_blackout)}",
    ]
    if copy.throttle_percent:
        parts.append(f"slowed by {copy.throttle_percent} %")
    return ", ".join(parts)


def _is_copying(update: WatchMigrationResponse) -> bool:
    return update.step in (Step.STEP_COPY, Step.STEP_HOLD)


def _where(update: WatchMigrationResponse) -> str:
    phase = phase_word(update.migration)
    return f"{phase}, {step_word(update.step)}" if update.step != Step.STEP_UNSPECIFIED else phase
