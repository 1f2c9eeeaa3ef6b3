"""The command `top`: hosts, functions and migrations as they are now, drawn anew whenever something changes."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from vfleet.cli.describe import cordon_word, status_word
from vfleet.cli.output import coloured, console, print_rich, table_of
from vfleet.cli.session import CoordinatorOption, EtcdOption, fleet_client, run
from vfleet.cli.timeline import blackout_word, moves_word, phase_word
from vfleet.client import PHASES_OVER, FleetClient
from vfleet.clock import Clock, SystemClock
from vfleet.v1.fleet_service_pb2 import DeviceUse
from vfleet.v1.records_pb2 import Function, FunctionStatus, Host, Migration, Phase

REDRAW_S = 1.0  # how long a migration under way has taken is to be seen
PAUSE_S = 0.25  # between two looks at the fleet, however fast it changes
MAX_FUNCTIONS = 15
MAX_HOSTS = 20
MAX_MIGRATIONS = 10


@dataclass(frozen=True, slots=True)
class Fleet:
    """What one frame shows. `migrations` are those under way, those that are queued, then the latest that are over."""

    hosts: Sequence[Host]
    devices: Sequence[DeviceUse]
    functions: Sequence[Function]
    migrations: Sequence[Migration]


def top(
    once: Annotated[bool, typer.Option("--once", help="Show it once, and end.")] = False,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
) -> None:
    """Show hosts, functions, migrations and blackouts, and go on as they change, until Ctrl-C.

    Without a terminal it is shown once.

    Example: vfleet top --once
    """
    clock = SystemClock()

    async def command() -> None:
        out = console()
        async with fleet_client(coordinator, etcd) as fleet:
            if once or not out.is_terminal:
                print_rich(frame(await _look(fleet), clock.time()))
                return
            changed = asyncio.Event()
            with Live(console=out, screen=True, auto_refresh=False) as live:
                following = asyncio.create_task(_follow(fleet, changed))
                try:
                    await _draw(fleet, live, changed, following, clock)
                finally:
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)

    run(command())


async def _draw(
    fleet: FleetClient, live: Live, changed: asyncio.Event, following: asyncio.Task[None], clock: Clock
) -> None:
    shown = await _look(fleet)
    while True:
        live.update(frame(shown, clock.time()), refresh=True)
        if following.done():
            return following.result()
        try:
            async with asyncio.timeout(REDRAW_S):
                await changed.wait()
        except TimeoutError:
            continue
        changed.clear()
        shown = await _look(fleet)
        await clock.sleep(PAUSE_S)


async def _follow(fleet: FleetClient, changed: asyncio.Event) -> None:
    async with aclosing(fleet.watch_events()) as events:
        async for _ in events:
            changed.set()


async def _look(fleet: FleetClient) -> Fleet:
    active = await fleet.list_migrations(active_only=True)
    active.sort(key=lambda migration: migration.phase == Phase.PHASE_QUEUED)
    latest = await fleet.list_migrations(latest=MAX_MIGRATIONS)
    over = [migration for migration in latest if migration.phase in PHASES_OVER]
    return Fleet(await fleet.list_hosts(), await fleet.list_devices(), await fleet.list_functions(), [*active, *over])


def frame(fleet: Fleet, now: float) -> RenderableType:
    """Return what is shown at `now`, in seconds since 1970.

    What needs a look comes first; of what is too much for a screen the number is said.
    """
    return Group(
        _summary(fleet),
        Text(),
        _hosts(fleet),
        Text(),
        _functions(fleet),
        Text(),
        _migrations(fleet, now),
    )


def _summary(fleet: Fleet) -> Text:
    states = Counter(status_word(function) for function in fleet.functions)
    moving = sum(bool(function.migration) for function in fleet.functions)
    registered = sum(host.registered for host in fleet.hosts)
    parts = [f"{registered} of {len(fleet.hosts)} hosts registered", f"{len(fleet.functions)} functions"]
    parts += [f"{count} {state}" for state, count in sorted(states.items())]
    return Text(", ".join([*parts, f"{moving} in a migration"]), "bold")


def _hosts(fleet: Fleet) -> RenderableType:
    functions = Counter(_host_of(function.device) for function in fleet.functions)
    used, slots = Counter[str](), Counter[str]()
    for use in fleet.devices:
        used[use.device.host] += use.used_slots + use.reserved_slots
        slots[use.device.host] += use.device.total_vfs
    hosts = sorted(fleet.hosts, key=lambda host: (host.registered and cordon_word(host) == "no", host.name))
    rows = [
        (
            host.name,
            coloured("yes") if host.registered else coloured("no"),
            cordon_word(host),
            functions[host.name],
            f"{used[host.name]} of {slots[host.name]}",
        )
        for host in hosts[:MAX_HOSTS]
    ]
    return _table(("HOST", "REGISTERED", "CORDONED", "FUNCTIONS", "SLOTS"), rows, len(hosts))


def _functions(fleet: Fleet) -> RenderableType:
    active = FunctionStatus.FUNCTION_STATUS_ACTIVE
    functions = sorted(fleet.functions, key=lambda each: (each.status == active, not each.migration, each.name))
    rows = [
        (
            function.name,
            coloured(status_word(function)),
            f"{function.device}, VF {function.vf_index}",
            function.generation,
            len(function.drivers),
            function.migration,
        )
        for function in functions[:MAX_FUNCTIONS]
    ]
    columns = ("FUNCTION", "STATUS", "HOME", "GENERATION", "DRIVERS", "MIGRATION")
    return _table(columns, rows, len(functions))


def _migrations(fleet: Fleet, now: float) -> RenderableType:
    rows = [
        (
            migration.name,
            coloured(phase_word(migration)),
            moves_word(migration.moves[:3], " to ")
            + (f" and {len(migration.moves) - 3} more" if len(migration.moves) > 3 else ""),
            f"{_took_s(migration, now):.1f} s" if migration.HasField("begin_time") else "",
            blackout_word(migration) if migration.steps else "",
        )
        for migration in fleet.migrations[:MAX_MIGRATIONS]
    ]
    columns = ("MIGRATION", "PHASE", "MOVES", "TOOK", "BLACKOUT")
    return _table(columns, rows, len(fleet.migrations))


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]], count: int) -> RenderableType:
    table = table_of(columns, rows)
    return Group(table, Text(f"and {count - len(rows)} more")) if count > len(rows) else table


def _took_s(migration: Migration, now: float) -> float:
    end_s = migration.finish_time.ToNanoseconds() / 1e9 if migration.HasField("finish_time") else now
    return max(0.0, end_s - migration.begin_time.ToNanoseconds() / 1e9)


def _host_of(device: str) -> str:
    return device.partition("/")[0]
