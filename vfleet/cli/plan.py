"""The command about where functions would go: plan, with the reason for each device."""

from collections.abc import Iterator
from typing import Annotated

import typer

from vfleet.cli import constraints as asked
from vfleet.cli.constraints import Rule
from vfleet.cli.migration import FunctionsArgument, ToOption, move_requests
from vfleet.cli.output import Output, OutputOption, enum_word, print_message, print_table
from vfleet.cli.session import FAILED, CoordinatorOption, EtcdOption, fleet_client, run
from vfleet.v1.migration_service_pb2 import PlanMigrationResponse
from vfleet.v1.placement_pb2 import Explanation, Placement, PlacementFilter, Rejection, Relaxation


def plan(
    functions: FunctionsArgument,
    to: ToOption = None,
    host: asked.HostOption = Rule.ANY,
    adapter: asked.AdapterOption = Rule.ANY,
    bridge: asked.BridgeOption = Rule.ANY,
    parent_bridge: asked.ParentBridgeOption = Rule.ANY,
    power_domain: asked.PowerDomainOption = Rule.ANY,
    attachment: asked.AttachmentOption = None,
    prefer: asked.PreferOption = None,
    together: asked.TogetherOption = None,
    apart: asked.ApartOption = None,
    brief: Annotated[bool, typer.Option("--brief", help="Only what was chosen.")] = False,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show where functions would go, and why not elsewhere.

    Nothing is moved: `vfleet migrate` with the same options does that. If there is no plan, it says what would have to
    change for one, and exits 1.

    \b
    Example: vfleet plan vf1
    Example: vfleet plan vf1 vf2 --apart vf1,vf2@power-domain --prefer spread
    Example: vfleet plan vf1 --host same --adapter different -o json
    """
    moves = move_requests(functions, to)
    wanted = asked.constraints(
        host=host,
        adapter=adapter,
        bridge=bridge,
        parent_bridge=parent_bridge,
        power_domain=power_domain,
        attachments=attachment,
        prefer=prefer,
        together=together,
        apart=apart,
    )

    async def command() -> PlanMigrationResponse:
        async with fleet_client(coordinator, etcd) as fleet:
            if brief and output is Output.TABLE:
                return PlanMigrationResponse(migration=await fleet.plan_migration(moves, wanted))
            return await fleet.explain_migration(moves, wanted)

    planned = run(command())
    if output is not Output.TABLE:
        print_message(planned, output)
    else:
        _print_plan(planned)
    if not planned.HasField("migration"):
        names = ", ".join(placement.function for placement in planned.explanation.placements)
        typer.echo(f"vfleet: no choice of devices meets what is asked for {names}", err=True)
        raise typer.Exit(FAILED)


def _print_plan(planned: PlanMigrationResponse) -> None:
    explanation = planned.explanation
    if explanation.placements:
        print_table(("FUNCTION", "DEVICE", "VERDICT", "FOUND", "EXPECTED"), _verdicts(explanation))
    if planned.HasField("migration"):
        print_table(
            ("FUNCTION", "FROM", "TO", "VF"),
            ((m.function, m.source.device, m.target.device, m.target.vf_index) for m in planned.migration.moves),
        )
    elif explanation.relaxations:
        print_table(
            ("ONE OF THESE IS ENOUGH", "CONSTRAINT", "THEN"), (_way_out(each) for each in explanation.relaxations)
        )
    else:
        typer.echo("no single change is known that would make it possible")


def _verdicts(explanation: Explanation) -> Iterator[tuple[str, str, str, str, str]]:
    for placement in explanation.placements:
        for candidate in placement.candidates:
            found = "; ".join(merit.value for merit in candidate.merits)
            yield placement.function, candidate.device, _verdict(placement, candidate.device), found, ""
        for rejection in placement.rejections:
            by = f"rejected{' by the plan' if rejection.by_plan else ''}: {_constraint(rejection)}"
            yield placement.function, rejection.device, by, rejection.found, rejection.expected


def _verdict(placement: Placement, device: str) -> str:
    if device == placement.device:
        return "chosen"
    return "will do" if placement.device else "will do alone"


def _way_out(relaxation: Relaxation) -> tuple[str, str, str]:
    then = ", ".join(f"{function}={device}" for function, device in sorted(relaxation.devices.items()))
    return relaxation.remedy, _constraint(relaxation), then


def _constraint(named: Rejection | Relaxation) -> str:
    word = enum_word(PlacementFilter.Name(named.filter), "PLACEMENT_FILTER_").replace("_", " ")
    return f"{word} {named.group}" if named.group else word
