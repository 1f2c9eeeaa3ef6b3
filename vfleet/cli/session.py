"""How a command meets a cluster: where the coordinators are, and what a failure means to the shell.

The coordinators are those of --coordinator or VFLEET_COORDINATOR, or those that --etcd knows; else those of the context
that --context or VFLEET_CONTEXT names; else those of the current context, which is that of the cluster that `vfleet up`
runs on this machine, unless the settings say otherwise.

How connections are secured is said in the same way: by --tls or --insecure, by the context, or by VFLEET_TLS or
VFLEET_INSECURE; the cluster of `vfleet up` is plaintext on this machine, and says so where it leaves its addresses.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Annotated, TypeVar

import typer

from vfleet.caller import PATIENCE_S, parse_addresses
from vfleet.cli.settings import Context, load_settings
from vfleet.client import FleetClient
from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.host_client import HostClient
from vfleet.security import Keys, Security

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
INSECURE_VARIABLE = "VFLEET_INSECURE"


def checked_timeout(seconds: float | None) -> float | None:
    """Return how long to wait, in seconds, None for ever. Raise INVALID_FIELD for what no clock can wait for."""
    if seconds is not None and not 0 < seconds <= MAX_TIMEOUT_S:
        raise invalid_field("--timeout", seconds, f"more than 0 and at most {MAX_TIMEOUT_S:g} seconds")
    return seconds


def refuse_certificates() -> None:
    """Raise INVALID_FIELD if the command line names certificates for a cluster that has none."""
    tls = chosen.get().tls
    if tls is not None:
        raise invalid_field("--tls", str(tls), "none: what `vfleet up` and `vfleet demo` run is in plaintext")


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


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the command line says before the command: the context, and how connections are secured."""

    context: str | None = None
    tls: Path | None = None
    etcd_tls: Path | None = None
    insecure: bool = False

    def security(self, context: Context) -> Security:
        """Return how connections to a context's cluster are secured. Raise INVALID_FIELD if nobody says it."""
        etcd_tls = self.etcd_tls or context.etcd_tls
        for tls, insecure in ((self.tls, self.insecure), (context.tls, context.insecure), (None, _is_insecure())):
            if tls is not None or insecure:
                return Security.given(tls, etcd_tls, insecure=insecure)
        return Security.given(None, etcd_tls, insecure=False)


NOTHING_CHOSEN = Chosen()
chosen: ContextVar[Chosen] = ContextVar("chosen", default=NOTHING_CHOSEN)


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where a cluster's coordinators are, and with what they are met."""

    coordinators: tuple[str, ...]
    keys: Keys


@asynccontextmanager
async def fleet_client(
    coordinator: str | None, etcd: str | None, *, patience_s: float = PATIENCE_S
) -> AsyncIterator[FleetClient]:
    """Give a client of the cluster that the options mean. Raise VfleetError if they mean none."""
    cluster = await _cluster(coordinator, etcd)
    async with FleetClient(cluster.coordinators, tls=cluster.keys.tls, patience_s=patience_s) as fleet:
        yield fleet


@asynccontextmanager
async def driver_host(coordinator: str | None, etcd: str | None, driver: str) -> AsyncIterator[HostClient]:
    """Give a client of the host on which a driver runs. Raise NOT_FOUND if there is no such driver."""
    cluster = await _cluster(coordinator, etcd)
    async with FleetClient(cluster.coordinators, tls=cluster.keys.tls) as fleet:
        host = await fleet.get_host((await fleet.get_driver(driver)).host)
    async with HostClient(host.address, name=host.name, tls=cluster.keys.tls) as client:
        yield client


async def _cluster(coordinator: str | None, etcd: str | None) -> Cluster:
    """Find the cluster that the options mean."""
    chosen_now = chosen.get()
    context = chosen_now.context
    given = {"--context": context, "--coordinator": coordinator, "--etcd": etcd}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise VfleetError(Reason.INVALID_FIELD, f"both {' and '.join(names)} are given; expected one of them")
    meant = Context(coordinator, etcd)
    if not (coordinator or etcd):
        named = context or os.environ.get("VFLEET_CONTEXT")
        settings = load_settings()
        meant = settings.context(named or settings.current, "--context" if context else "VFLEET_CONTEXT")
    if not (meant.coordinator or meant.etcd):
        meant = _local_context()
    security = chosen_now.security(meant)
    keys = security.open()
    if meant.coordinator is not None:
        addresses = parse_addresses("--coordinator", meant.coordinator)
    else:
        endpoints = parse_addresses("--etcd", str(meant.etcd))
        for endpoint in endpoints:
            security.check_etcd("--etcd", endpoint)
        addresses = await _registered_coordinators(endpoints, keys)
    for address in addresses:
        security.check("--coordinator", address)
    return Cluster(addresses, keys)


async def _registered_coordinators(endpoints: tuple[str, ...], keys: Keys) -> tuple[str, ...]:
    # Imported when needed: it costs every other command a tenth of a second.
    from vfleet.etcd.client import EtcdStore
    from vfleet.etcd.keys import COORDINATORS
    from vfleet.v1.records_pb2 import Coordinator

    random = Random()  # noqa: S311  # spreads retries
    async with await EtcdStore.connect(endpoints, SystemClock(), random, tls=keys.etcd) as store:
        listing = await store.list(COORDINATORS)
    addresses = tuple(Coordinator.FromString(item.value).address for item in listing.items)
    if not addresses:
        raise VfleetError(Reason.UNREACHABLE, f"no coordinator is registered in etcd at {','.join(endpoints)}")
    return addresses


def _is_insecure() -> bool:
    """Return what VFLEET_INSECURE says."""
    value = os.environ.get(INSECURE_VARIABLE, "")
    if value not in ("", "0", "1"):
        raise invalid_field(INSECURE_VARIABLE, value, "1 or 0")
    return value == "1"


def _local_context() -> Context:
    path = state_file()
    try:
        left = json.loads(path.read_text(encoding="utf-8"))
        return Context(coordinator=str(left["coordinator"]), insecure=bool(left["insecure"]))
    except FileNotFoundError:
        message = (
            "no cluster: give --coordinator, --etcd or --context, set VFLEET_COORDINATOR, or run `vfleet up TOPOLOGY`"
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"{path}, left by `vfleet up`, can't be read: {error}"
    raise VfleetError(Reason.INVALID_FIELD, message)
