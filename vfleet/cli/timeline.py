"""The steps of a migration as a timeline: bars in a terminal, and the same as an SVG drawing."""

import io
from collections.abc import Iterable
from pathlib import Path

from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from vfleet.cli.output import enum_word, moment, table_of
from vfleet.errors import Reason, VfleetError
from vfleet.history import blackout_s, is_complete, spans
from vfleet.v1.records_pb2 import Migration, Move, Phase, Step

BAR_COLUMNS = 40
SVG_COLUMNS = 80


def phase_word(migration: Migration) -> str:
    """Return how far a migration is, in a word."""
    return enum_word(Phase.Name(migration.phase), "PHASE_")


def step_word(step: Step.ValueType) -> str:
    """Return a step's name, in small letters."""
    return enum_word(Step.Name(step), "STEP_")


def aborted_word(migration: Migration) -> str:
    """Return at which step a migration was aborted, if at one, and why."""
    at = f"at {step_word(migration.abort_step)}: " if migration.abort_step else ""
    return f"{at}{migration.abort_reason}"


def moves_word(moves: Iterable[Move], between: str = "=") -> str:
    """Return what moves, and where to as far as that is known."""
    return ", ".join(f"{m.function}{between}{m.target.device}" if m.target.device else m.function for m in moves)


def begun_word(migration: Migration) -> str:
    """Return when a migration began; nothing if it has not."""
    return moment(migration.begin_time) if migration.HasField("begin_time") else ""


def blackout_word(migration: Migration) -> str:
    """Return for how long a migration's drivers were on hold at most."""
    seconds = blackout_s(migration)
    if seconds is None:
        return "unknown"
    return f"at most {_milliseconds(seconds)}" if seconds else "none"


def timeline(migration: Migration) -> Table:
    """Return the steps of a migration that is over, each with a bar from when it began to when it ended."""
    rows: list[tuple[object, ...]] = []
    found = spans(migration)
    end_s = max((span.begin_s + span.duration_s for span in found), default=0.0)
    if not is_complete(migration):
        rows.append(("another coordinator", "", _milliseconds(0), _bar(end_s, 0, found[0].begin_s if found else 0)))
    for span in found:
        bar = _bar(end_s, span.begin_s, span.begin_s + span.duration_s)
        rows.append((step_word(span.step), _milliseconds(span.duration_s), _milliseconds(span.begin_s), bar))
    return table_of(("STEP", "TOOK", "FROM", ""), rows)


def write_svg(migration: Migration, path: Path) -> None:
    """Draw the timeline of a migration that is over into a file. Raise ILLEGAL_STATE if it is not, or never began."""
    if not migration.steps:
        never = migration.phase == Phase.PHASE_ABORTED
        why = "never began: it has no timeline" if never else "is not over: it has no timeline yet"
        raise VfleetError(Reason.ILLEGAL_STATE, f"migration {migration.name!r} {why}")
    out = Console(record=True, width=SVG_COLUMNS, file=io.StringIO(), highlight=False, emoji=False, markup=False)
    for move in migration.moves:
        out.print(f"{move.function}: {move.source.device} to {move.target.device}")
    out.print(f"begun {moment(migration.begin_time)}, blackout {blackout_word(migration)}")
    out.print(timeline(migration))
    # An identity of its own would make every drawing of the same migration another.
    drawing = out.export_svg(title=f"{migration.name}: {phase_word(migration)}", unique_id="vfleet")
    path.write_text(drawing, encoding="utf-8")


def _bar(size_s: float, begin_s: float, end_s: float) -> Bar:
    return Bar(size_s or 1.0, begin_s, end_s, width=BAR_COLUMNS)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
