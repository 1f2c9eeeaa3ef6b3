"""The command that empties a part of the fleet: drain."""

import asyncio
from contextlib import aclosing
from typing import Annotated

import typer

from vfleet.cli import constraints as asked
from vfleet.cli.constraints import Rule
from vfleet.cli.many_moves import Functions, MovesProgress, fail_if_stuck, print_moves, stuck
from vfleet.cli.operations import NameArgument, PartArgument, ReasonOption
from vfleet.cli.output import Output, OutputOption, print_message
from vfleet.cli.session import CoordinatorOption, EtcdOption, fleet_client, run
from vfleet.v1.migration_service_pb2 import (
    DrainResponse,
)


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
        with MovesProgress(f"{kind} {name}") as progress:
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
    if output is not Output.TABLE:
        print_message(DrainResponse(functions=functions.values(), is_over=True), output)
    else:
        print_moves(functions)
        left = len(stuck(functions))
        typer.echo(f"{kind} {name}: {len(functions) - left} moved, {left} stuck; it stays cordoned")
    fail_if_stuck(functions)
