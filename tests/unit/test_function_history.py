"""Where a function has been and how long its drivers waited, from migrations' records; the timeline."""

import io
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console

from vfleet.cli.timeline import blackout_word, timeline, write_svg
from vfleet.errors import Reason, VfleetError
from vfleet.history import blackout_s, homes, spans
from vfleet.v1.records_pb2 import EntryChange, Function, Migration, Move, Phase, Place, Step, StepDuration

B, C, K, H, T, L, S, U = (
    Step.STEP_BEGIN,
    Step.STEP_CREATE,
    Step.STEP_COPY,
    Step.STEP_HOLD,
    Step.STEP_COMMIT,
    Step.STEP_LIFT,
    Step.STEP_SCRUB,
    Step.STEP_UNDO,
)
ALL = {B: 10, C: 20, K: 100, H: 5, T: 3, L: 2, S: 60}
DONE, ABORTED, ABORTING = Phase.PHASE_DONE, Phase.PHASE_ABORTED, Phase.PHASE_ABORTING


def migration(
    revision: int,
    source: str,
    target: str,
    generation: int = 1,
    *,
    phase: Phase.ValueType = DONE,
    steps: dict[Step.ValueType, int] | None = None,
    identity: int = 7,
    drivers: int = 1,
) -> Migration:
    """Return a migration of vf1 that began at 1000 s and took 200 ms, with the milliseconds of its steps."""
    move = Move(
        function="vf1",
        source=Place(device=source, vf_index=1, generation=generation),
        target=Place(device=target, vf_index=1, generation=generation + 1),
        identity=identity,
        entries=[EntryChange(driver=f"d{number}") for number in range(drivers)],
    )
    made = Migration(name=f"m-{revision}", phase=phase, moves=[move, Move(function="vf9")])
    made.attempt.revision = revision
    made.begin_time.FromMilliseconds(1_000_000)
    made.finish_time.FromMilliseconds(1_000_200)
    for step, took_ms in (steps or {}).items():
        made.steps.append(StepDuration(step=step))
        made.steps[-1].duration.FromMilliseconds(took_ms)
    return made


def function(device: str, generation: int) -> Function:
    return Function(name="vf1", identity=7, device=device, vf_index=1, generation=generation)


def path(found: Function | None, *migrations: Migration) -> list[tuple[int, str, str, str]]:
    return [
        (home.generation, home.device, home.migration.name if home.migration else "", home.target)
        for home in homes("vf1", found, migrations)
    ]


def test_a_function_that_never_moved_has_one_home() -> None:
    assert path(function("a", 1)) == [(1, "a", "", "")]


def test_each_move_is_a_home_and_each_abort_is_none() -> None:
    # Newest first, as they are listed.
    moves = (migration(30, "b", "a", 2), migration(20, "b", "c", 2, phase=ABORTED), migration(10, "a", "b"))
    assert path(function("a", 3), *moves) == [
        (1, "a", "", ""),
        (2, "b", "m-10", ""),
        (2, "b", "m-20", "c"),
        (3, "a", "m-30", ""),
    ]


def test_a_migration_under_way_says_where_it_leads() -> None:
    assert path(function("a", 1), migration(10, "a", "b", phase=Phase.PHASE_PREPARING)) == [
        (1, "a", "", ""),
        (1, "a", "m-10", "b"),
    ]


def test_homes_without_a_record_are_shown_as_far_as_others_tell() -> None:
    assert path(function("e", 9), migration(10, "a", "b", 1), migration(20, "c", "d", 5)) == [
        (1, "a", "", ""),
        (2, "b", "m-10", ""),
        (5, "c", "", ""),
        (6, "d", "m-20", ""),
        (9, "e", "", ""),
    ]


def test_another_function_that_had_the_name_counts_only_if_there_is_none_now() -> None:
    of_before = migration(10, "a", "b", identity=6)
    assert path(function("c", 1), of_before) == [(1, "c", "", "")]
    assert path(None, of_before) == [(1, "a", "", ""), (2, "b", "m-10", "")]


def test_steps_follow_each_other() -> None:
    found = spans(migration(1, "a", "b", steps=ALL))
    assert [(each.step, round(each.begin_s * 1000)) for each in found] == [
        (B, 0),
        (C, 10),
        (K, 30),
        (H, 130),
        (T, 135),
        (L, 138),
        (S, 140),
    ]


def test_the_steps_of_an_adopter_end_with_the_migration() -> None:
    found = spans(migration(1, "a", "b", steps={L: 20, S: 30}))
    assert [(each.step, round(each.begin_s * 1000)) for each in found] == [(L, 150), (S, 170)]
    # Clocks of two coordinators may differ by more than the migration took.
    assert spans(migration(1, "a", "b", steps={L: 20, S: 300}))[0].begin_s == 0


@pytest.mark.parametrize(
    ("steps", "drivers", "expected_ms"),
    [
        (ALL, 1, 10),
        (ALL, 0, 0),
        ({B: 1, C: 2, U: 3}, 1, 0),
        ({B: 1, C: 2, K: 3, H: 4, U: 5}, 1, 9),
        ({L: 2, S: 3}, 1, None),
        ({}, 1, None),
    ],
)
def test_blackout_is_from_hold_to_lift(
    steps: dict[Step.ValueType, int], drivers: int, expected_ms: float | None
) -> None:
    found = blackout_s(migration(1, "a", "b", steps=steps, drivers=drivers))
    assert (None if found is None else pytest.approx(found * 1000)) == expected_ms


@pytest.mark.parametrize(
    ("steps", "words"),
    [(ALL, "at most 10.0 ms"), ({B: 1, C: 2, U: 3}, "none"), ({L: 2, S: 3}, "unknown")],
)
def test_blackout_in_words(steps: dict[Step.ValueType, int], words: str) -> None:
    assert blackout_word(migration(1, "a", "b", steps=steps)) == words


def shown(found: Migration) -> list[str]:
    out = Console(file=io.StringIO(), width=100)
    with out.capture() as captured:
        out.print(timeline(found))
    return [line.rstrip() for line in captured.get().splitlines()]


def test_the_timeline_has_a_bar_for_each_step() -> None:
    lines = shown(migration(1, "a", "b", steps={B: 100, C: 300}))
    assert lines == [
        "STEP     TOOK       FROM",
        f"begin    100.0 ms   0.0 ms     {'█' * 10}",
        f"create   300.0 ms   100.0 ms   {' ' * 10}{'█' * 30}",
    ]


def test_the_timeline_says_that_another_coordinator_did_the_first_part() -> None:
    lines = shown(migration(1, "a", "b", steps={L: 50, S: 50}))
    assert lines[1] == f"another coordinator             0.0 ms     {'█' * 20}"
    assert lines[2].split()[:5] == ["lift", "50.0", "ms", "100.0", "ms"]


def test_steps_that_took_no_time_can_be_shown() -> None:
    assert len(shown(migration(1, "a", "b", steps={B: 0, C: 0}))) == 3


def test_a_drawing_is_svg_with_the_steps_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = tmp_path / "1.svg", tmp_path / "2.svg"
    for file in (first, second):
        write_svg(migration(1, "h1/nic0", "h2/nic0", steps=ALL), file)
    assert first.read_bytes() == second.read_bytes()
    root = ET.parse(first).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = " ".join("".join(root.itertext()).replace("\xa0", " ").split())
    for words in ("m-1: done", "vf1: h1/nic0 to h2/nic0", "at most 10.0 ms", "hold 5.0 ms 130.0 ms"):
        assert words in text


def test_a_migration_that_is_not_over_has_no_drawing(tmp_path: Path) -> None:
    with pytest.raises(VfleetError) as caught:
        write_svg(migration(1, "a", "b", phase=ABORTING), tmp_path / "1.svg")
    assert caught.value.reason is Reason.ILLEGAL_STATE
    assert not (tmp_path / "1.svg").exists()
