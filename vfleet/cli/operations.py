"""The commands about hosts and the whole fleet: cordon, uncordon, doctor, fleet bump-generation, fleet forget-host."""

import enum
from collections.abc import Iterable
from typing import Annotated

import typer

from vfleet.cli import complete
from vfleet.cli.output import Output, OutputOption, enum_word, print_message, print_table
from vfleet.cli.session import FAILED, CoordinatorOption, EtcdOption, fleet_client, run
from vfleet.v1.fleet_service_pb2 import (
    BumpGenerationResponse,
    CheckFleetResponse,
    Difference,
    DifferenceKind,
    ForgetHostResponse,
)
from vfleet.v1.records_pb2 import Cordon

fleet_app = typer.Typer()


class Part(enum.StrEnum):
    """What can be cordoned and drained."""

    HOST = "host"
    DEVICE = "device"
    ADAPTER = "adapter"
    BRIDGE = "bridge"
    POWER_DOMAIN = "power-domain"


PartArgument = Annotated[Part, typer.Argument(metavar="KIND", help="host, device, adapter, bridge or power-domain.")]
NameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="HOST, or HOST/NAME for what is in one.", autocompletion=complete.of_kind),
]
ReasonOption = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for who asks.")]


def cordon(
    kind: PartArgument,
    name: NameArgument,
    reason: ReasonOption = "",
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Keep functions from being made somewhere or moved there.

    What is there, or on its way, stays.

    \b
    Example: vfleet cordon host h1
    Example: vfleet cordon power-domain h1/psu-b --reason failing
    """

    async def command() -> Cordon:
        async with fleet_client(coordinator, etcd) as fleet:
            return await fleet.cordon(kind, name, reason=reason)

    made = run(command())
    if output is Output.TABLE:
        typer.echo(f"{kind} {name} is cordoned{f': {made.reason}' if made.reason else ''}")
    else:
        print_message(made, output)


def uncordon(
    kind: PartArgument,
    name: NameArgument,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
) -> None:
    """Put what is cordoned back in use.

    Example: vfleet uncordon host h1
    """

    async def command() -> None:
        async with fleet_client(coordinator, etcd) as fleet:
            await fleet.uncordon(kind, name)
        typer.echo(f"{kind} {name} is in use")

    run(command())


def doctor(
    repair: Annotated[bool, typer.Option("--repair", help="Repair what etcd proves how to repair.")] = False,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Compare etcd with every host and name each difference.

    Exits 1 if differences are left. What is under way is none.

    Example: vfleet doctor --repair
    """

    async def command() -> CheckFleetResponse:
        async with fleet_client(coordinator, etcd) as fleet:
            return await fleet.check_fleet(repair=repair)

    checked = run(command())
    if output is not Output.TABLE:
        print_message(checked, output)
    else:
        _print_differences("repaired", checked.repaired)
        _print_differences("differences", checked.differences)
        if not checked.differences:
            typer.echo("etcd and all hosts agree")
    if checked.differences:
        raise typer.Exit(FAILED)


@fleet_app.command("bump-generation")
def bump_generation(
    coordinator: CoordinatorOption = None, etcd: EtcdOption = None, output: OutputOption = Output.TABLE
) -> None:
    """Raise the fleet generation, after etcd was restored from a backup.

    Example: vfleet fleet bump-generation
    """

    async def command() -> int:
        async with fleet_client(coordinator, etcd) as fleet:
            return await fleet.bump_generation()

    generation = run(command())
    if output is Output.TABLE:
        typer.echo(f"the fleet generation is {generation}; see what the backup forgot: vfleet doctor")
    else:
        print_message(BumpGenerationResponse(generation=generation), output)


@fleet_app.command("forget-host")
def forget_host(
    host: Annotated[
        str,
        typer.Argument(metavar="HOST", help="A host that is down and never comes back.", autocompletion=complete.hosts),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Also if something is there: functions become LOST, drivers go.")
    ] = False,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Take a host that never comes back out of the fleet.

    Example: vfleet fleet forget-host h3 --force
    """

    async def command() -> ForgetHostResponse:
        async with fleet_client(coordinator, etcd) as fleet:
            return await fleet.forget_host(host, force=force)

    forgotten = run(command())
    if output is not Output.TABLE:
        print_message(forgotten, output)
        return
    typer.echo(f"{host} is forgotten")
    for what, names in (("LOST", forgotten.lost_functions), ("deleted", forgotten.deleted_drivers)):
        for name in names:
            typer.echo(f"{name} is {what}")


def _print_differences(title: str, differences: Iterable[Difference]) -> None:
    rows = [
        (
            enum_word(DifferenceKind.Name(each.kind), "DIFFERENCE_KIND_").replace("_", " "),
            each.host,
            each.function,
            each.driver,
            each.migration,
            each.etcd_says,
            each.host_says,
            each.remedy,
        )
        for each in differences
    ]
    if rows:
        typer.echo(f"{title}:")
        print_table(("KIND", "HOST", "FUNCTION", "DRIVER", "MIGRATION", "ETCD SAYS", "HOST SAYS", "REPAIR"), rows)
