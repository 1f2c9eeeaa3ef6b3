"""How far many moves are, for people: one bar for the whole on a terminal, lines elsewhere, a table at the end."""

from collections.abc import Mapping

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vfleet.cli.output import console, enum_word, milliseconds, print_table
from vfleet.cli.session import FAILED
from vfleet.v1.migration_service_pb2 import MOVE_STATE_MOVED, MOVE_STATE_STUCK, MoveProgress, MoveState

Functions = Mapping[str, MoveProgress]


class MovesProgress:
    """One bar for the whole on a terminal; elsewhere a line for each function that moved or is stuck."""

    def __init__(self, what: str) -> None:
        self._out = console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            console=self._out,
            transient=True,
            disable=not self._out.is_terminal,
        )
        self._task = self._bar.add_task(what, total=None, text="")
        self._told: set[str] = set()

    def __enter__(self) -> "MovesProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, functions: Functions) -> None:
        """Show how far all of them are."""
        counts = dict.fromkeys(MoveState.values(), 0)
        for each in functions.values():
            counts[each.state] += 1
            if each.state in (MOVE_STATE_MOVED, MOVE_STATE_STUCK) and each.function not in self._told:
                self._told.add(each.function)
                if not self._out.is_terminal:
                    self._out.print(f"{len(self._told)}/{len(functions)} {_line(each)}")
        text = ", ".join(f"{number} {_word(state)}" for state, number in counts.items() if number)
        self._bar.update(self._task, total=len(functions), completed=counts[MOVE_STATE_MOVED], text=text)


def stuck(functions: Functions) -> list[str]:
    """Return the functions that stay."""
    return [name for name, each in functions.items() if each.state == MOVE_STATE_STUCK]


def fail_if_stuck(functions: Functions) -> None:
    """End the command with a failure that names what stays, if anything does."""
    if names := stuck(functions):
        typer.echo(f"vfleet: can't move {', '.join(names)}", err=True)
        raise typer.Exit(FAILED)


def print_moves(functions: Functions) -> None:
    """Print where each function is and how it came there, or why it stays."""
    print_table(
        ("FUNCTION", "STATE", "DEVICE", "MIGRATION", "HELD", "WHY"),
        (
            (
                f.function,
                _word(f.state),
                f.device,
                f.migration,
                milliseconds(f.held) if f.HasField("held") else "",
                f.why,
            )
            for f in functions.values()
        ),
    )


def _line(function: MoveProgress) -> str:
    if function.state == MOVE_STATE_STUCK:
        return f"{function.function} stays: {function.why}"
    held = f", drivers held for {milliseconds(function.held)}" if function.HasField("held") else ""
    return f"{function.function} moved{f' to {function.device}' if function.device else ''}{held}"


def _word(state: MoveState.ValueType) -> str:
    return enum_word(MoveState.Name(state), "MOVE_STATE_")
