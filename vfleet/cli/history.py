"""The commands about what has been: history of a function, events of the fleet."""

from collections.abc import Iterable
from contextlib import aclosing
from typing import Annotated

import typer

from vfleet.cli.fleet import FunctionArgument
from vfleet.cli.output import Output, OutputOption, enum_word, moment, print_message, print_table
from vfleet.cli.session import CoordinatorOption, EtcdOption, fleet_client, run
from vfleet.cli.timeline import aborted_word, blackout_word, phase_word
from vfleet.errors import Reason, VfleetError
from vfleet.history import Home, homes
from vfleet.v1.fleet_service_pb2 import EventKind, FleetEvent
from vfleet.v1.migration_service_pb2 import ListMigrationsResponse
from vfleet.v1.records_pb2 import Function, Migration


def history(
    function: FunctionArgument,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show where a function has been: its homes, and its migrations with what came of them.

    As far back as coordinators keep records. Blackouts are as the coordinator saw them: no driver was on hold longer.

    \b
    Example: vfleet history vf1
    Example: vfleet history vf1 -o json
    """

    async def command() -> tuple[Function | None, list[Migration]]:
        async with fleet_client(coordinator, etcd) as fleet:
            migrations = await fleet.list_migrations(function=function)
            try:
                return await fleet.get_function(function), migrations
            except VfleetError as error:
                if error.reason is not Reason.NOT_FOUND or not migrations:
                    raise
                return None, migrations

    record, migrations = run(command())
    if output is Output.TABLE:
        _print_homes(homes(function, record, migrations))
        if record is None:
            typer.echo(f"{function} is no more")
    else:
        print_message(ListMigrationsResponse(migrations=migrations), output)


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what changes from now on.")] = False,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what has changed: functions, migrations, hosts, cordons, coordinators; a line each.

    As far back as the coordinator that answers remembers: the latest 1,000 since it was started. JSON is one line an
    event.

    \b
    Example: vfleet events
    Example: vfleet events -o json
    """

    async def command() -> None:
        async with fleet_client(coordinator, etcd) as fleet, aclosing(fleet.watch_events(follow=follow)) as told:
            async for event in told:
                if output is Output.TABLE:
                    typer.echo(event_line(event))
                else:
                    print_message(event, output, compact=True)

    run(command())


def event_line(event: FleetEvent) -> str:
    """Return an event in one line: when, of what kind, of what, and what changed."""
    kind = enum_word(EventKind.Name(event.kind), "EVENT_KIND_")
    return f"{moment(event.time)}  {kind:<11}  {event.name or '-':<18}  {event.what}"


def _print_homes(found: Iterable[Home]) -> None:
    print_table(
        ("GENERATION", "HOME", "VF", "MIGRATION", "BEGUN", "OUTCOME", "BLACKOUT"),
        ((home.generation, home.device, home.vf_index, *_how(home)) for home in found),
    )


def _how(home: Home) -> tuple[str, ...]:
    migration = home.migration
    if migration is None:
        return ("", "", "", "")
    outcome = phase_word(migration)
    if home.target:
        outcome += f", to {home.target}"
    if migration.abort_reason:
        outcome += f", {aborted_word(migration)}"
    return migration.name, moment(migration.begin_time), outcome, blackout_word(migration) if migration.steps else ""
