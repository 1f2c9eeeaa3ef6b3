"""The command that empties a part of the fleet: drain."""

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vfleet.cli import constraints as asked
from vfleet.cli.constraints import Rule
from vfleet.cli.operations import NameArgument, PartArgument, ReasonOption
from vfleet.cli.output import Output, OutputOption, console, enum_word, milliseconds, print_message, print_table
from vfleet.cli.session import FAILED, CoordinatorOption, EtcdOption, fleet_client, run
from vfleet.v1.migration_service_pb2 import (
    DRAIN_STATE_MOVED,
    DRAIN_STATE_STUCK,
    DrainedFunction,
    DrainResponse,
    DrainState,
)

Functions = Mapping[str, DrainedFunction]


def drain(
    kind: PartArgument,
    name: NameArgument,
    parallel: Annotated[int, typer.Option("--parallel", metavar="N", min=0, max=64, help="At once; 0 for 4.")] = 0,
    reason: ReasonOption = "",
    attachment: asked.AttachmentOption = None,
    prefer: asked.PreferOption = None,
    together: asked.TogetherOption = None,
    apart: asked.ApartOption = None,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Cordon something and move all functions there elsewhere.

    Drivers stay where they run. What can't move is named, with the reason, and the exit code is 1. After Ctrl-C what is
    under way ends; the same command goes on. `vfleet uncordon` ends a drain, and puts what is empty back in use.

    \b
    Example: vfleet drain host h1
    Example: vfleet drain power-domain h1/psu-b --parallel 8 --reason failing
    Example: vfleet drain device h1/nic0 --together vf1,vf2 -o json
    """
    wanted = asked.constraints(
        host=Rule.ANY,
        adapter=Rule.ANY,
        bridge=Rule.ANY,
        parent_bridge=Rule.ANY,
        power_domain=Rule.ANY,
        attachments=attachment,
        prefer=prefer,
        together=together,
        apart=apart,
    )

    async def command() -> Functions:
        functions: Functions = {}
        with _Progress(f"{kind} {name}") as progress:
            async with fleet_client(coordinator, etcd) as fleet:
                found = fleet.drain(kind, name, reason=reason, parallel=parallel, constraints=wanted)
                try:
                    async with aclosing(found) as pictures:
                        async for functions in pictures:
                            progress.show(functions)
                except asyncio.CancelledError:
                    typer.echo("vfleet: interrupted; what is under way ends, the same command goes on", err=True)
                    raise
        return functions

    functions = run(command())
    stuck = [each for each in functions.values() if each.state == DRAIN_STATE_STUCK]
    if output is not Output.TABLE:
        print_message(DrainResponse(functions=functions.values(), is_over=True), output)
    else:
        _print(functions)
        typer.echo(f"{kind} {name}: {len(functions) - len(stuck)} moved, {len(stuck)} stuck; it stays cordoned")
    if stuck:
        typer.echo(f"vfleet: can't move {', '.join(each.function for each in stuck)}", err=True)
        raise typer.Exit(FAILED)


class _Progress:
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

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, functions: Functions) -> None:
        """Show how far all of them are."""
        counts = dict.fromkeys(DrainState.values(), 0)
        for each in functions.values():
            counts[each.state] += 1
            if each.state in (DRAIN_STATE_MOVED, DRAIN_STATE_STUCK) and each.function not in self._told:
                self._told.add(each.function)
                if not self._out.is_terminal:
                    self._out.print(f"{len(self._told)}/{len(functions)} {_line(each)}")
        text = ", ".join(f"{number} {_word(state)}" for state, number in counts.items() if number)
        self._bar.update(self._task, total=len(functions), completed=counts[DRAIN_STATE_MOVED], text=text)


def _print(functions: Functions) -> None:
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


def _line(function: DrainedFunction) -> str:
    if function.state == DRAIN_STATE_STUCK:
        return f"{function.function} stays: {function.why}"
    held = f", drivers held for {milliseconds(function.held)}" if function.HasField("held") else ""
    return f"{function.function} moved{f' to {function.device}' if function.device else ''}{held}"


def _word(state: DrainState.ValueType) -> str:
    return enum_word(DrainState.Name(state), "DRAIN_STATE_")
