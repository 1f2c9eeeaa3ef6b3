"""Where a function has been and what its migrations took, from the records that are kept. Pure.

What a driver waited at most is told by the steps: from the order to hold it until its table had the new offset.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from vfleet.v1.records_pb2 import Function, Migration, Move, Phase, Place, Step

_COMMITTED = (Phase.PHASE_COMMITTED, Phase.PHASE_DONE)
_HELD = (Step.STEP_HOLD, Step.STEP_COMMIT, Step.STEP_LIFT)


@dataclass(frozen=True, slots=True)
class Span:
    """One step of a migration: how long after its start it began, and how long it took, in seconds."""

    step: Step.ValueType
    begin_s: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class Home:
    """A function's home, and the migration that led there, or failed to lead away; None if no record tells."""

    generation: int
    device: str
    vf_index: int
    migration: Migration | None = None
    target: str = ""  # where the migration was to lead, if it has not


def spans(migration: Migration) -> tuple[Span, ...]:
    """Return the steps that a migration's last owner went through; none before it is over.

    Those of an owner that adopted it are counted back from its end, since what was before isn't recorded.
    """
    durations = [(each.step, each.duration.ToNanoseconds() / 1e9) for each in migration.steps]
    begin_s = 0.0
    if not is_complete(migration):
        all_s = (migration.finish_time.ToNanoseconds() - migration.begin_time.ToNanoseconds()) / 1e9
        begin_s = max(0.0, all_s - sum(duration_s for _, duration_s in durations))
    found = []
    for step, duration_s in durations:
        found.append(Span(step, begin_s, duration_s))
        begin_s += duration_s
    return tuple(found)


def is_complete(migration: Migration) -> bool:
    """Return whether one coordinator went through all steps, so that the record has them all."""
    return bool(migration.steps) and migration.steps[0].step == Step.STEP_BEGIN


def blackout_s(migration: Migration) -> float | None:
    """Return for how long its drivers were on hold at most, in seconds; None if the record does not tell.

    After an abort the undoing counts as a whole, though it lifts the holds before its end.
    """
    if not any(move.entries for move in migration.moves):
        return 0.0
    if not is_complete(migration):
        return None
    took = {span.step: span.duration_s for span in spans(migration)}
    if Step.STEP_HOLD not in took:
        return 0.0
    return sum(took.get(step, 0.0) for step in (*_HELD, Step.STEP_UNDO))


def homes(name: str, function: Function | None, migrations: Iterable[Migration]) -> list[Home]:
    """Return where a function has been, the oldest first, as far as records of migrations are kept.

    `function` is its record, None if it is no more; then, and only then, others that had the name count as well.
    """
    found: list[Home] = []
    for migration in sorted(migrations, key=lambda each: each.attempt.revision):
        move = _move_of(name, function, migration)
        if move is None or not move.source.device:  # one that never began led nowhere
            continue
        source = _home(move.source)
        if not found or not _is_at(found[-1], source):
            found.append(source)
        if migration.phase in _COMMITTED:
            found.append(_home(move.target, migration))
        else:
            found.append(_home(move.source, migration, move.target.device))
    if function is not None:
        now = Home(function.generation, function.device, function.vf_index)
        if not found or not _is_at(found[-1], now):
            found.append(now)
    return found


def _move_of(name: str, function: Function | None, migration: Migration) -> Move | None:
    for move in migration.moves:
        if move.function == name and (function is None or move.identity == function.identity):
            return move
    return None


def _home(place: Place, migration: Migration | None = None, target: str = "") -> Home:
    return Home(place.generation, place.device, place.vf_index, migration, target)


def _is_at(one: Home, other: Home) -> bool:
    return (one.generation, one.device, one.vf_index) == (other.generation, other.device, other.vf_index)
