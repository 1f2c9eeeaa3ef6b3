"""Names that a shell completes, from the live cluster.

A shell waits while this runs, so that a cluster out of reach soon completes to nothing; and it has no place for errors.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import typer

from vfleet.cli.session import Chosen, chosen, fleet_client
from vfleet.client import FleetClient
from vfleet.errors import VfleetError

PATIENCE_S = 0.5
TIMEOUT_S = 3.0
MAX_MIGRATIONS = 100  # there may be thousands that are over

Read = Callable[[FleetClient], Awaitable[Iterable[str]]]
Complete = Callable[[typer.Context, str], list[str]]


async def _hosts(fleet: FleetClient) -> Iterable[str]:
    return [host.name for host in await fleet.list_hosts()]


async def _devices(fleet: FleetClient) -> Iterable[str]:
    return [use.device.name for use in await fleet.list_devices()]


async def _functions(fleet: FleetClient) -> Iterable[str]:
    return [function.name for function in await fleet.list_functions()]


async def _drivers(fleet: FleetClient) -> Iterable[str]:
    return [driver.name for driver in await fleet.list_drivers()]


async def _migrations(fleet: FleetClient) -> Iterable[str]:
    return [migration.name for migration in await fleet.list_migrations(latest=MAX_MIGRATIONS)]


async def _active_migrations(fleet: FleetClient) -> Iterable[str]:
    return [migration.name for migration in await fleet.list_migrations(active_only=True)]


async def _adapters(fleet: FleetClient) -> Iterable[str]:
    return {f"{use.device.host}/{use.device.physical_adapter}" for use in await fleet.list_devices()}


async def _bridges(fleet: FleetClient) -> Iterable[str]:
    devices = [use.device for use in await fleet.list_devices()]
    return {f"{each.host}/{bridge}" for each in devices for bridge in (each.bridge, each.parent_bridge) if bridge}


async def _power_domains(fleet: FleetClient) -> Iterable[str]:
    return {f"{use.device.host}/{use.device.power_domain}" for use in await fleet.list_devices()}


_BY_KIND: dict[str, Read] = {
    "host": _hosts,
    "device": _devices,
    "function": _functions,
    "driver": _drivers,
    "migration": _migrations,
    "adapter": _adapters,
    "bridge": _bridges,
    "power-domain": _power_domains,
}


def _completion(read: Read) -> Complete:
    def complete(ctx: typer.Context, incomplete: str) -> list[str]:
        return _names(ctx, incomplete, read)

    return complete


hosts = _completion(_hosts)
devices = _completion(_devices)
functions = _completion(_functions)
drivers = _completion(_drivers)
migrations = _completion(_migrations)
active_migrations = _completion(_active_migrations)


def of_kind(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a thing of the kind that was named before."""
    read = _BY_KIND.get(str(ctx.params.get("kind")))
    return _names(ctx, incomplete, read) if read else []


def moves(ctx: typer.Context, incomplete: str) -> list[str]:
    """Complete FUNCTION, or after that =DEVICE."""
    function, equals, device = incomplete.partition("=")
    if not equals:
        return functions(ctx, function)
    return [f"{function}={name}" for name in devices(ctx, device)]


def _names(ctx: typer.Context, incomplete: str, read: Read) -> list[str]:
    # Commands are not carried out while they are completed: what the options say is looked up here.
    given = ctx.find_root().params
    tls, etcd_tls = (Path(str(given[key])) if given.get(key) else None for key in ("tls", "etcd_tls"))
    context = str(given["context"]) if given.get("context") else None
    chosen.set(Chosen(context, tls, etcd_tls, bool(given.get("insecure"))))

    async def names() -> Iterable[str]:
        coordinator, etcd = (ctx.params.get(name) for name in ("coordinator", "etcd"))
        async with asyncio.timeout(TIMEOUT_S), fleet_client(coordinator, etcd, patience_s=PATIENCE_S) as fleet:
            return await read(fleet)

    try:
        return [name for name in asyncio.run(names()) if name.startswith(incomplete)]
    except (VfleetError, OSError, TimeoutError):
        return []
