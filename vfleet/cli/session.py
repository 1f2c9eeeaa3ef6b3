"""How a command meets a cluster: where the coordinators are, and what a failure means to the shell.

The coordinators are those of --coordinator or VFLEET_COORDINATOR, or those that --etcd knows; else those of the context
that --context or VFLEET_CONTEXT names; else those of the current context, which is that of the cluster that `vfleet up`
runs on this machine, unless the settings say otherwise.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from pathlib import Path
from random import Random
from typing import Annotated, TypeVar

import typer

from vfleet.caller import PATIENCE_S, parse_addresses
from vfleet.cli.settings import load_settings
from vfleet.client import FleetClient, HostClient
from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError, invalid_field

DONE, FAILED, BAD_INPUT = 0, 1, 2
INTERRUPTED = 130  # 128 + SIGINT, as shells count

# What can never succeed as it was asked; everything else may, later or elsewhere.
_BAD_INPUT_REASONS = frozenset(
    {
        Reason.INVALID_FIELD,
        Reason.NOT_FOUND,
        Reason.ALREADY_EXISTS,
        Reason.TARGET_IS_SOURCE,
        Reason.INCOMPATIBLE_DEVICE,
        Reason.GROUP_TOO_LARGE,
        Reason.SEGMENT_TAKEN,
    }
)

T = TypeVar("T")

CoordinatorOption = Annotated[
    str | None,
    typer.Option("--coordinator", metavar="HOST:PORT[,…]", envvar="VFLEET_COORDINATOR", help="The coordinators."),
]
EtcdOption = Annotated[
    str | None, typer.Option("--etcd", metavar="HOST:PORT[,…]", help="The etcd that knows the coordinators.")
]
OwnEtcdOption = Annotated[
    str | None, typer.Option("--etcd", metavar="HOST:PORT[,…]", help="Use this etcd instead of one of its own.")
]


TimeoutOption = Annotated[
    float | None,
    typer.Option("--timeout", metavar="SECONDS", help="Wait no longer than this; exit 1 if it is not over by then."),
]
MAX_TIMEOUT_S = 86_400.0


def checked_timeout(seconds: float | None) -> float | None:
    """Return how long to wait, in seconds, None for ever. Raise INVALID_FIELD for what no clock can wait for."""
    if seconds is not None and not 0 < seconds <= MAX_TIMEOUT_S:
        raise invalid_field("--timeout", seconds, f"more than 0 and at most {MAX_TIMEOUT_S:g} seconds")
    return seconds


def exit_code(error: VfleetError) -> int:
    """Return what a command that fails with this error exits with: 2 for what can never succeed as asked, else 1."""
    return BAD_INPUT if error.reason in _BAD_INPUT_REASONS else FAILED


def run(command: Coroutine[None, None, T]) -> T:
    """Carry out a command's asynchronous part. A signal that cancels it ends the command as Ctrl-C does."""
    try:
        return asyncio.run(command)
    except asyncio.CancelledError:
        raise typer.Exit(INTERRUPTED) from None


def state_file() -> Path:
    """Return where `vfleet up` leaves the addresses of its cluster for other commands."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "vfleet" / "local.json"


# The context that the command line names.
chosen_context: ContextVar[str | None] = ContextVar("chosen_context", default=None)


@asynccontextmanager
async def fleet_client(
    coordinator: str | None, etcd: str | None, *, patience_s: float = PATIENCE_S
) -> AsyncIterator[FleetClient]:
    """Give a client of the cluster that the options mean. Raise VfleetError if they mean none."""
    context = chosen_context.get()
    given = {"--context": context, "--coordinator": coordinator, "--etcd": etcd}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise VfleetError(Reason.INVALID_FIELD, f"both {' and '.join(names)} are given; expected one of them")
    if coordinator is None and etcd is None:
        named = context or os.environ.get("VFLEET_CONTEXT")
        settings = load_settings()
        found = settings.context(named or settings.current, "--context" if context else "VFLEET_CONTEXT")
        coordinator, etcd = found.coordinator, found.etcd
    if coordinator is not None:
        addresses = parse_addresses("--coordinator", coordinator)
    elif etcd is not None:
        addresses = await _registered_coordinators(parse_addresses("--etcd", etcd))
    else:
        addresses = _local_coordinators()
    async with FleetClient(addresses, patience_s=patience_s) as fleet:
        yield fleet


@asynccontextmanager
async def driver_host(coordinator: str | None, etcd: str | None, driver: str) -> AsyncIterator[HostClient]:
    """Give a client of the host on which a driver runs. Raise NOT_FOUND if there is no such driver."""
    async with fleet_client(coordinator, etcd) as fleet:
        host = await fleet.get_host((await fleet.get_driver(driver)).host)
    async with HostClient(host.address) as client:
        yield client


async def _registered_coordinators(endpoints: tuple[str, ...]) -> tuple[str, ...]:
    # Imported when needed: it costs every other command a tenth of a second.
    from vfleet.etcd.client import EtcdStore
    from vfleet.etcd.keys import COORDINATORS
    from vfleet.v1.records_pb2 import Coordinator

    async with await EtcdStore.connect(endpoints, SystemClock(), Random()) as store:  # noqa: S311  # spreads retries
        listing = await store.list(COORDINATORS)
    addresses = tuple(Coordinator.FromString(item.value).address for item in listing.items)
    if not addresses:
        raise VfleetError(Reason.UNREACHABLE, f"no coordinator is registered in etcd at {','.join(endpoints)}")
    return addresses


def _local_coordinators() -> tuple[str, ...]:
    path = state_file()
    try:
        return parse_addresses(str(path), str(json.loads(path.read_text(encoding="utf-8"))["coordinator"]))
    except FileNotFoundError:
        message = (
            "no cluster: give --coordinator, --etcd or --context, set VFLEET_COORDINATOR, or run `vfleet up TOPOLOGY`"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}, left by `vfleet up`, can't be read: {error}"
    raise VfleetError(Reason.INVALID_FIELD, message)
