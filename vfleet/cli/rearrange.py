"""The commands that rearrange functions, after a look at what they would do: rebalance and defragment."""

import asyncio
import enum
import sys
from collections.abc import Iterator
from contextlib import aclosing
from typing import Annotated

import typer

from vfleet.cli import constraints as asked
from vfleet.cli.constraints import Rule
from vfleet.cli.many_moves import Functions, MovesProgress, fail_if_stuck, print_moves, stuck
from vfleet.cli.output import Output, OutputOption, print_message, print_table
from vfleet.cli.session import CoordinatorOption, EtcdOption, fleet_client, run
from vfleet.errors import Reason, VfleetError
from vfleet.v1.migration_service_pb2 import (
    REARRANGEMENT_GOAL_EVEN,
    REARRANGEMENT_GOAL_FREE_DEVICES,
    REARRANGEMENT_GOAL_FREE_HOSTS,
    FleetFigures,
    PlanRearrangementResponse,
    RearrangementGoal,
    RearrangeResponse,
)
from vfleet.v1.placement_pb2 import Constraints


class Unit(enum.StrEnum):
    """What is to become free."""

    DEVICES = "devices"
    HOSTS = "hosts"


_FREE = {Unit.DEVICES: REARRANGEMENT_GOAL_FREE_DEVICES, Unit.HOSTS: REARRANGEMENT_GOAL_FREE_HOSTS}

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask before it begins.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only show the plan.")]
ParallelOption = Annotated[int, typer.Option("--parallel", metavar="N", min=0, max=64, help="At once; 0 for 4.")]
HostsOption = Annotated[bool, typer.Option("--within-hosts", help="Leave each function on its host.")]


def rebalance(
    tolerance: Annotated[
        int, typer.Option("--tolerance", metavar="PERCENT", min=0, max=100, help="How uneven it may stay; 0 for 10.")
    ] = 0,
    within_hosts: HostsOption = False,
    attachment: asked.AttachmentOption = None,
    together: asked.TogetherOption = None,
    apart: asked.ApartOption = None,
    parallel: ParallelOption = 0,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make the loads of devices even, once you have seen how.

    A device's load is the part of its slots that is in use. What is cordoned is left alone. It may be interrupted and
    begun anew at any time. What can't move is named, and the exit code is 1.

    \b
    Example: vfleet rebalance --dry-run
    Example: vfleet rebalance --tolerance 5 --yes
    Example: vfleet rebalance --within-hosts --apart vf1,vf2@power-domain --dry-run -o json
    """
    wanted = _constraints(within_hosts, attachment, together, apart)
    _rearrange(REARRANGEMENT_GOAL_EVEN, tolerance, wanted, parallel, yes, dry_run, coordinator, etcd, output)


def defragment(
    free: Annotated[Unit, typer.Option("--free", help="What is to become free.")] = Unit.DEVICES,
    within_hosts: HostsOption = False,
    attachment: asked.AttachmentOption = None,
    together: asked.TogetherOption = None,
    apart: asked.ApartOption = None,
    parallel: ParallelOption = 0,
    yes: YesOption = False,
    dry_run: DryRunOption = False,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Empty devices, or hosts, into others, once you have seen how.

    Functions go to devices that have some already. What is cordoned is left alone. It may be interrupted and begun anew
    at any time. What can't move is named, and the exit code is 1.

    \b
    Example: vfleet defragment --dry-run
    Example: vfleet defragment --free hosts --parallel 8 --yes
    """
    wanted = _constraints(within_hosts, attachment, together, apart)
    _rearrange(_FREE[free], 0, wanted, parallel, yes, dry_run, coordinator, etcd, output)


def _constraints(
    within_hosts: bool, attachment: list[str] | None, together: list[str] | None, apart: list[str] | None
) -> Constraints:
    return asked.constraints(
        host=Rule.SAME if within_hosts else Rule.ANY,
        adapter=Rule.ANY,
        bridge=Rule.ANY,
        parent_bridge=Rule.ANY,
        power_domain=Rule.ANY,
        attachments=attachment,
        prefer=None,
        together=together,
        apart=apart,
    )


def _rearrange(
    goal: RearrangementGoal.ValueType,
    tolerance: int,
    wanted: Constraints,
    parallel: int,
    yes: bool,
    dry_run: bool,
    coordinator: str | None,
    etcd: str | None,
    output: Output,
) -> None:
    if not yes and not dry_run and (output is not Output.TABLE or not sys.stdin.isatty()):
        message = "nobody can be asked here whether to begin; expected --yes, or --dry-run to see the plan alone"
        raise VfleetError(Reason.INVALID_FIELD, message)

    async def plan() -> PlanRearrangementResponse:
        async with fleet_client(coordinator, etcd) as fleet:
            return await fleet.plan_rearrangement(goal, tolerance_percent=tolerance, constraints=wanted)

    async def carry_out(planned: PlanRearrangementResponse) -> Functions:
        functions: Functions = {}
        with MovesProgress("moves") as progress:
            async with fleet_client(coordinator, etcd) as fleet:
                found = fleet.rearrange(planned.plan, parallel=parallel, constraints=wanted)
                try:
                    async with aclosing(found) as pictures:
                        async for functions in pictures:
                            progress.show(functions)
                except asyncio.CancelledError:
                    typer.echo("vfleet: interrupted; what is under way ends, the same command goes on", err=True)
                    raise
        return functions

    planned = run(plan())
    is_table = output is Output.TABLE
    if is_table:
        _print_plan(planned)
    elif dry_run:
        print_message(planned, output)
    if dry_run:
        return
    count = len(planned.plan.moves)
    if count and not yes and not typer.confirm(f"Move {count} {'function' if count == 1 else 'functions'}?", err=True):
        typer.echo("nothing is moved")
        return
    functions = run(carry_out(planned)) if count else {}
    if not is_table:
        print_message(RearrangeResponse(functions=functions.values(), is_over=True), output)
    elif count:
        print_moves(functions)
        typer.echo(f"{count - len(stuck(functions))} moved, {len(stuck(functions))} stuck")
    fail_if_stuck(functions)


def _print_plan(planned: PlanRearrangementResponse) -> None:
    plan = planned.plan
    if plan.moves:
        print_table(
            ("FUNCTION", "FROM", "TO", "AFTER", "WHY"),
            ((m.function, m.source_device, m.target_device, ", ".join(m.after), m.why) for m in plan.moves),
        )
        print_table(
            ("DEVICE", "SLOTS", "IN USE NOW", "THEN"),
            ((c.device, c.total_vfs, c.used_before, c.used_after) for c in plan.changes),
        )
        print_table(("THE FLEET", "NOW", "THEN"), _figures(planned.before, planned.after))
    if planned.stuck:
        print_table(("CAN'T MOVE", "WHY"), ((each.function, each.why) for each in planned.stuck))
    if planned.is_partial:
        typer.echo("this is not all: there is more to do when it is done")
    elif not plan.moves:
        typer.echo("nothing to do")


def _figures(now: FleetFigures, then: FleetFigures) -> Iterator[tuple[str, object, object]]:
    yield "highest load of a device", f"{now.highest_load:.0%}", f"{then.highest_load:.0%}"
    yield "lowest load of a device", f"{now.lowest_load:.0%}", f"{then.lowest_load:.0%}"
    yield "devices with functions", now.devices_in_use, then.devices_in_use
    yield "hosts with functions", now.hosts_in_use, then.hosts_in_use
    yield "functions on their drivers' hosts", now.local_attachments, then.local_attachments
