"""The command `get`: lists of what there is, filtered, in the form that is asked for."""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import typer
from google.protobuf.message import Message

from vfleet.cli import complete, describe
from vfleet.cli.output import Output, coloured, hex64, moment, print_message, print_table, size
from vfleet.cli.session import CoordinatorOption, EtcdOption, fleet_client, run
from vfleet.cli.timeline import begun_word, blackout_word, moves_word
from vfleet.client import PHASES_OVER
from vfleet.errors import invalid_field
from vfleet.names import check_name
from vfleet.v1.fleet_service_pb2 import (
    DeviceUse,
    FleetServiceListDriversResponse,
    FleetServiceListFunctionsResponse,
    ListDevicesResponse,
    ListHostsResponse,
)
from vfleet.v1.migration_service_pb2 import ListMigrationsResponse
from vfleet.v1.records_pb2 import Driver, Function, Host, Migration

Row = Sequence[object]
ItemT = TypeVar("ItemT")


class Kinds(enum.StrEnum):
    """What there is, in the plural."""

    HOSTS = "hosts"
    DEVICES = "devices"
    FUNCTIONS = "functions"
    DRIVERS = "drivers"
    MIGRATIONS = "migrations"


class ListOutput(enum.StrEnum):
    """The form of a list."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"
    NAME = "name"


# What a thing of a kind can be; nothing is said of drivers.
_STATES = {
    Kinds.HOSTS: ("registered", "unregistered", "cordoned"),
    Kinds.DEVICES: ("free", "full"),
    Kinds.FUNCTIONS: ("creating", "active", "deleting", "lost", "migrating"),
    Kinds.DRIVERS: (),
    Kinds.MIGRATIONS: ("active", "queued", "preparing", "committed", "aborting", "done", "aborted"),
}


def _any_state(incomplete: str) -> list[str]:
    """Complete a state, of whatever kind: where an option is completed, the shell's line is not parsed to its end."""
    states = dict.fromkeys(state for known in _STATES.values() for state in known)
    return [state for state in states if state.startswith(incomplete)]


@dataclass(frozen=True)
class _Listing(Generic[ItemT]):
    """How things of one kind are listed: `columns` in each table, `more` in a wide one only."""

    columns: tuple[str, ...]
    row: Callable[[ItemT], Row]
    more: tuple[str, ...]
    more_cells: Callable[[ItemT], Row]
    name: Callable[[ItemT], str]
    states: Callable[[ItemT], set[str]]
    hosts: Callable[[ItemT], set[str]]
    message: Callable[[list[ItemT]], Message]

    def show(self, items: list[ItemT], output: ListOutput, host: str | None, state: str | None) -> None:
        """Print those on a host and in a state."""
        found = [
            item
            for item in items
            if (host is None or host in self.hosts(item)) and (state is None or state in self.states(item))
        ]
        match output:
            case ListOutput.NAME:
                for item in found:
                    typer.echo(self.name(item))
            case ListOutput.JSON | ListOutput.YAML:
                print_message(self.message(found), Output(output.value))
            case ListOutput.WIDE:
                print_table((*self.columns, *self.more), ((*self.row(each), *self.more_cells(each)) for each in found))
            case ListOutput.TABLE:
                print_table(self.columns, map(self.row, found))


_HOSTS = _Listing[Host](
    columns=("HOST", "SEGMENT", "ADDRESS", "REGISTERED", "CORDONED", "INCARNATION"),
    row=lambda host: (
        host.name,
        f"{host.segment:#06x}",
        host.address,
        coloured("yes") if host.registered else coloured("no"),
        describe.cordon_word(host),
        host.incarnation,
    ),
    more=(),
    more_cells=lambda _: (),
    name=lambda host: host.name,
    states=lambda host: {
        "registered" if host.registered else "unregistered",
        *(["cordoned"] if describe.cordon_word(host) != "no" else []),
    },
    hosts=lambda host: {host.name},
    message=lambda hosts: ListHostsResponse(hosts=hosts),
)
_DEVICES = _Listing[DeviceUse](
    columns=describe.DEVICE_COLUMNS,
    row=describe.device_row,
    more=("MANUFACTURER", "ADAPTER", "BRIDGE", "PARENT BRIDGE", "POWER DOMAIN", "STATE VERSION"),
    more_cells=lambda use: (
        f"{use.device.manufacturer.vendor_id:04x}:{use.device.manufacturer.device_id:04x}",
        use.device.physical_adapter,
        use.device.bridge,
        use.device.parent_bridge,
        use.device.power_domain,
        f"{use.device.state_version.format}.{use.device.state_version.model}",
    ),
    name=lambda use: use.device.name,
    states=lambda use: {"free" if use.used_slots + use.reserved_slots < use.device.total_vfs else "full"},
    hosts=lambda use: {use.device.host},
    message=lambda uses: ListDevicesResponse(devices=uses),
)
_FUNCTIONS = _Listing[Function](
    columns=("FUNCTION", "STATUS", "GENERATION", "DEVICE", "VF", "BASE", "DRIVERS", "MIGRATION"),
    row=lambda function: (
        function.name,
        coloured(describe.status_word(function)),
        function.generation,
        function.device,
        function.vf_index,
        hex64(function.base),
        ", ".join(function.drivers),
        function.migration,
    ),
    more=("MODEL", "IDENTITY", "BARS"),
    more_cells=lambda function: (function.model, hex64(function.identity), describe.bars(function.bars)),
    name=lambda function: function.name,
    states=lambda function: {describe.status_word(function), *(["migrating"] if function.migration else [])},
    hosts=lambda function: {_host_of(function.device)},
    message=lambda functions: FleetServiceListFunctionsResponse(functions=functions),
)
_DRIVERS = _Listing[Driver](
    columns=("DRIVER", "HOST", "FUNCTIONS", "GUEST"),
    row=lambda driver: (
        driver.name,
        driver.host,
        ", ".join(entry.function for entry in driver.entries),
        coloured(describe.guest_word(driver)),
    ),
    more=("MAIN MEMORY", "VIRTUAL ADDRESSES"),
    more_cells=lambda driver: (
        size(driver.main_memory_bytes),
        ", ".join(hex64(entry.virtual_address) for entry in driver.entries),
    ),
    name=lambda driver: driver.name,
    states=lambda driver: {describe.guest_word(driver)} - {""},
    hosts=lambda driver: {driver.host},
    message=lambda drivers: FleetServiceListDriversResponse(drivers=drivers),
)
_MIGRATIONS = _Listing[Migration](
    columns=("MIGRATION", "PHASE", "MOVES", "REASON"),
    row=lambda migration: (
        migration.name,
        coloured(describe.phase_word(migration)),
        moves_word(migration.moves),
        migration.abort_reason,
    ),
    more=("MODE", "BEGUN", "OVER", "BLACKOUT", "COORDINATOR"),
    more_cells=lambda migration: (
        describe.mode_word(migration) if migration.mode else "",
        begun_word(migration),
        moment(migration.finish_time) if migration.HasField("finish_time") else "",
        blackout_word(migration) if migration.steps else "",
        describe.coordinators(migration),
    ),
    name=lambda migration: migration.name,
    states=lambda migration: {
        describe.phase_word(migration),
        *(["active"] if migration.phase not in PHASES_OVER else []),
    },
    hosts=lambda migration: (
        {_host_of(device) for move in migration.moves for device in (move.source.device, move.target.device)}
        | {entry.host for move in migration.moves for entry in move.entries}
    ),
    message=lambda migrations: ListMigrationsResponse(migrations=migrations),
)


def get(
    kind: Annotated[Kinds, typer.Argument(metavar="KIND", help="hosts, devices, functions, drivers or migrations.")],
    host: Annotated[
        str | None,
        typer.Option(
            "--host", metavar="HOST", help="Only what this host has a part in.", autocompletion=complete.hosts
        ),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option("--state", metavar="STATE", help="Only what is in this state.", autocompletion=_any_state),
    ] = None,
    active: Annotated[bool, typer.Option("--active", help="Only migrations that are not over.")] = False,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: Annotated[
        ListOutput, typer.Option("--output", "-o", help="For people, wide or not; for programs; or names alone.")
    ] = ListOutput.TABLE,
) -> None:
    """List hosts, devices, functions, drivers or migrations.

    States of hosts: registered, unregistered, cordoned. Of devices: free, full. Of functions: creating, active,
    deleting, lost, migrating. Of migrations: active, queued, preparing, committed,
    aborting, done, aborted.

    \b
    Example: vfleet get functions -o json
    Example: vfleet get functions --host h1 --state active -o name
    Example: vfleet get migrations --state aborted -o wide
    """
    known = _STATES[kind]
    if state is not None and state not in known:
        raise invalid_field("--state", state, f"one of {', '.join(known)}" if known else f"none: {kind} have no states")
    if active and kind is not Kinds.MIGRATIONS:
        raise invalid_field("--active", kind.value, "migrations")
    if host is not None:
        check_name("--host", host)

    async def command() -> None:
        async with fleet_client(coordinator, etcd) as fleet:
            match kind:
                case Kinds.HOSTS:
                    _HOSTS.show(await fleet.list_hosts(), output, host, state)
                case Kinds.DEVICES:
                    _DEVICES.show(await fleet.list_devices(), output, host, state)
                case Kinds.FUNCTIONS:
                    _FUNCTIONS.show(await fleet.list_functions(), output, host, state)
                case Kinds.DRIVERS:
                    _DRIVERS.show(await fleet.list_drivers(), output, host, state)
                case Kinds.MIGRATIONS:
                    active_only = active or state in ("active", "queued", "preparing", "committed", "aborting")
                    _MIGRATIONS.show(await fleet.list_migrations(active_only=active_only), output, host, state)

    run(command())


def _host_of(device: str) -> str:
    return device.partition("/")[0]
