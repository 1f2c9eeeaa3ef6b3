"""hostd's process: the settings, the real world, and one host in it."""

import asyncio
import contextlib
import fcntl
import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from hostd.config import Config, parse
from hostd.host import Host
from hostd.identity import kernel_boot_id, open_identity
from hostd.ledger import Ledger
from hostd.metrics import observe
from hostd.service import SERVICE_NAMES, add_services
from hostd.topology import load
from vfleet import daemon, log, metrics, tracing
from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.observed import ObservedStore
from vfleet.roles import Role
from vfleet.rpc import Channels, Server

STOP_GRACE_S = 0.5


async def _serve(config: Config, writer: log.Writer) -> None:
    clock, random = SystemClock(), Random()  # noqa: S311  # delays and incarnations: nothing secret
    topology = load(config.topology, config.host)
    log.name_process(host=topology.name)
    tracing.enable(os.environ, "vfleet-hostd", topology.name)
    keys = config.security.open(Role.HOST, topology.name)
    with _locked(config.data_dir):
        ledger = Ledger(config.data_dir)
        identity = open_identity(ledger, topology.name, kernel_boot_id(), random, clock, power_cycle=config.power_cycle)
        channels, server = Channels(tls=keys.tls), Server(SERVICE_NAMES, identity.incarnation, keys.tls)
        address = f"{config.listen.rpartition(':')[0]}:{server.listen(config.listen)}"
        registry = metrics.new_registry(writer, keys)
        async with (
            metrics.serving(config.metrics, registry) as metrics_at,
            EtcdStore.open(config.etcd, clock, random, tls=keys.etcd) as etcd,
        ):
            store = ObservedStore(etcd, clock, metrics.etcd_histogram(registry))
            reached_at = config.advertise or address
            host = Host(
                topology,
                identity,
                reached_at,
                ledger,
                store,
                channels,
                clock,
                random,
                config.lease_ttl_s,
                fabric_address=config.advertise_fabric or "",
                allows_faults=config.allow_faults,
                is_secured=keys.tls is not None,
            )
            add_services(host, server.grpc)
            observe(host, registry)
            registered = asyncio.Event()
            announcing = asyncio.create_task(_announce(address, metrics_at, registered))
            try:
                # What it has, it serves at once: that a function is not at home here any more would be in the ledger.
                # And it is well, also where etcd is out of reach: whoever looks after it is not to start it anew.
                await server.start()
                await _claim(host, is_first_start=identity.starts == 1)
                await host.run(registered.set)
            finally:
                announcing.cancel()
                await server.stop(STOP_GRACE_S)
                await host.close()
                await channels.close()


async def _announce(address: str, metrics_at: str | None, registered: asyncio.Event) -> None:
    await registered.wait()
    daemon.announce(address, metrics_at)


async def _claim(host: Host, *, is_first_start: bool) -> None:
    """Claim the segment. A host that may have functions outlasts an etcd out of reach; a new one says so and ends."""
    while True:
        try:
            await host.registration.claim_segment()
        except VfleetError as error:
            if is_first_start or error.reason not in (Reason.STORE_UNAVAILABLE, Reason.OUTCOME_UNKNOWN):
                raise
        else:
            return


@contextlib.contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """Keep a second daemon off the data directory. Raise INVALID_FIELD if there is one, or it can't be written."""
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        lock = (data_dir / "lock").open("w")
    except OSError as error:
        raise invalid_field("--data-dir", str(data_dir), f"a directory that can be written ({error})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise invalid_field("--data-dir", str(data_dir), "a directory that no other hostd uses") from None
        yield


def main() -> None:
    """Run the host that the command line describes until SIGTERM or SIGINT."""
    config = parse(sys.argv[1:])
    # A guest's memory may take some hundred descriptors, and the usual limit is a thousand.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    daemon.run("vfleet-hostd", config.log_level, config.log_format, lambda writer: _serve(config, writer))


if __name__ == "__main__":
    main()
