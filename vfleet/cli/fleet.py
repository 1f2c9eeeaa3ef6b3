"""The commands about what is in the fleet: describe, create, delete, attach, detach."""

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.message import Message

from vfleet.cli import complete, describe
from vfleet.cli.guest_states import until_told
from vfleet.cli.output import Output, OutputOption, print_message
from vfleet.cli.session import CoordinatorOption, EtcdOption, fleet_client, run
from vfleet.cli.timeline import write_svg
from vfleet.clock import SystemClock
from vfleet.errors import invalid_field
from vfleet.names import guest_driver_name
from vfleet.v1.types_pb2 import GUEST_STATE_LOST, GUEST_STATE_UNSPECIFIED, Guest

SOCKET_PATIENCE_S = 10.0  # a new holder takes a tenth of one, on a busy machine a few

create_app = typer.Typer()
delete_app = typer.Typer()


class Kind(enum.StrEnum):
    """What there is, in the singular."""

    HOST = "host"
    DEVICE = "device"
    FUNCTION = "function"
    DRIVER = "driver"
    MIGRATION = "migration"


FunctionArgument = Annotated[
    str, typer.Argument(metavar="FUNCTION", help="The function.", autocompletion=complete.functions)
]
DriverArgument = Annotated[str, typer.Argument(metavar="DRIVER", help="The driver.", autocompletion=complete.drivers)]


def describe_command(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="host, device, function, driver or migration.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name.", autocompletion=complete.of_kind)],
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw a migration's timeline into a file, too.")
    ] = None,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show one host, device, function, driver or migration.

    Of a migration that is over also a timeline of its steps.

    \b
    Example: vfleet describe device h1/nic0
    Example: vfleet describe migration m-0123456789ab
    """
    if svg is not None and kind is not Kind.MIGRATION:
        raise invalid_field("--svg", svg, "only with a migration")

    async def command() -> None:
        async with fleet_client(coordinator, etcd) as fleet:
            match kind:
                case Kind.HOST:
                    host = await fleet.get_host(name)
                    devices = [use for use in await fleet.list_devices() if use.device.host == name]
                    host.devices.extend(use.device for use in devices)
                    _show(host, output, lambda: describe.describe_host(host, devices))
                case Kind.DEVICE:
                    use = await fleet.get_device(name)
                    _show(use, output, lambda: describe.describe_device(use))
                case Kind.FUNCTION:
                    function = await fleet.get_function(name)
                    drivers = await fleet.list_drivers()
                    entries = [e for driver in drivers for e in driver.entries if e.function == name]
                    _show(function, output, lambda: describe.describe_function(function, entries))
                case Kind.DRIVER:
                    driver = await fleet.get_driver(name)
                    _show(driver, output, lambda: describe.describe_driver(driver))
                case Kind.MIGRATION:
                    migration = await fleet.get_migration(name)
                    if svg is not None:
                        write_svg(migration, svg)
                    _show(migration, output, lambda: describe.describe_migration(migration))

    run(command())


@create_app.command("function")
def create_function(
    function: Annotated[str, typer.Argument(metavar="NAME", help="The new function's name.")],
    device: Annotated[
        str,
        typer.Option(
            "--on", metavar="HOST/DEVICE", help="The device that is to be its home.", autocompletion=complete.devices
        ),
    ],
    vf_index: Annotated[int, typer.Option("--vf", metavar="N", help="The VF's index; 0 for the lowest free.")] = 0,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Make a function on a device. Asking again for the same one succeeds.

    Example: vfleet create function vf1 --on h1/nic0
    """

    async def command() -> None:
        async with fleet_client(coordinator, etcd) as fleet:
            created = await fleet.create_function(function, device, vf_index=vf_index)
        _show(created, output, lambda: describe.describe_function(created, []))

    run(command())


@delete_app.command("function")
def delete_function(function: FunctionArgument, coordinator: CoordinatorOption = None, etcd: EtcdOption = None) -> None:
    """End a function that has no drivers.

    Example: vfleet delete function vf1
    """

    async def command() -> None:
        async with fleet_client(coordinator, etcd) as fleet:
            await fleet.delete_function(function)
        typer.echo(f"{function} is deleted")

    run(command())


@delete_app.command("driver")
def delete_driver(driver: DriverArgument, coordinator: CoordinatorOption = None, etcd: EtcdOption = None) -> None:
    """End a driver that has no functions.

    Example: vfleet delete driver d1
    """

    async def command() -> None:
        async with fleet_client(coordinator, etcd) as fleet:
            await fleet.delete_driver(driver)
        typer.echo(f"{driver} is deleted")

    run(command())


def attach(
    function: FunctionArgument,
    driver: Annotated[
        str | None,
        typer.Option(
            "--driver",
            metavar="DRIVER",
            help="The driver; made if it isn't there. Of a guest, by default guest-FUNCTION.",
            autocompletion=complete.drivers,
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="HOST", help="Its host, if it is new.", autocompletion=complete.hosts)
    ] = "",
    virtual_address: Annotated[
        str,
        typer.Option("--virtual-address", metavar="0x…", help="Where it sees the function; by default, a free place."),
    ] = "0",
    main_memory: Annotated[
        int,
        typer.Option(
            "--main-memory-bytes",
            metavar="BYTES",
            help="Its main memory, if it is new; how far a guest's may reach, by default 512 MiB.",
        ),
    ] = 0,
    guest: Annotated[
        str,
        typer.Option(
            "--guest",
            metavar="SOCKET",
            help="Offer the function to a virtual machine at this path on the driver's host.",
        ),
    ] = "",
    longest_hold: Annotated[
        int,
        typer.Option(
            "--longest-hold-ms", metavar="MS", help="For how long a migration may hold the guest; by default 2000."
        ),
    ] = 0,
    message_timeout: Annotated[
        int,
        typer.Option("--message-timeout-ms", metavar="MS", help="QEMU's x-msg-timeout; by default 5000, as QEMU's."),
    ] = 0,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Attach a driver to a function. Asking again succeeds. A guest's socket is there when it has.

    \b
    Example: vfleet attach vf1 --driver d1 --host h1
    Example: vfleet attach vf1 --guest /run/vfleet/vf1.sock --host h1
    """
    if driver is None and not guest:
        raise invalid_field("--driver", "", "a driver, unless there is --guest")
    if not guest and (longest_hold or message_timeout):
        raise invalid_field("--guest", "", "a socket, for --longest-hold-ms and --message-timeout-ms")
    name = driver or guest_driver_name(function)
    asked = Guest(socket=guest, longest_hold_ms=longest_hold, message_timeout_ms=message_timeout) if guest else None
    try:
        address = int(virtual_address, 0)
    except ValueError:
        raise invalid_field("--virtual-address", virtual_address, "a number, for example 0x10000000") from None

    async def command() -> None:
        async with fleet_client(coordinator, etcd) as fleet:
            entry = await fleet.attach_driver(
                function, name, host=host, virtual_address=address, main_memory_bytes=main_memory, guest=asked
            )
            if asked is not None:
                # What was lost may be of an attachment before this one, whose end is under way.
                passing = (GUEST_STATE_UNSPECIFIED, GUEST_STATE_LOST)
                await until_told(lambda: fleet.get_driver(name), SystemClock(), passing, SOCKET_PATIENCE_S)
        _show(entry, output, lambda: describe.print_entries([entry]))

    run(command())


def detach(
    function: FunctionArgument,
    driver: Annotated[
        str, typer.Option("--driver", metavar="DRIVER", help="The driver.", autocompletion=complete.drivers)
    ],
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
) -> None:
    """Detach a driver from a function.

    Example: vfleet detach vf1 --driver d1
    """

    async def command() -> None:
        async with fleet_client(coordinator, etcd) as fleet:
            await fleet.detach_driver(function, driver)
        typer.echo(f"{driver} is detached from {function}")

    run(command())


def _show(message: Message, output: Output, for_people: Callable[[], None]) -> None:
    if output is Output.TABLE:
        for_people()
    else:
        print_message(message, output)
