"""The coordinator's process: settings and the real world."""

import os
import sys
from functools import partial
from random import Random

from coordinator.config import Config, parse
from coordinator.daemon import Daemon
from vfleet import daemon, log, metrics, tracing
from vfleet.clock import SystemClock
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.observed import ObservedStore
from vfleet.roles import Role
from vfleet.rpc import Channels, Server


async def _serve(config: Config, writer: log.Writer) -> None:
    tracing.enable(os.environ, "vfleet-coordinator", config.name)
    keys = config.security.open(Role.COORDINATOR)
    clock, channels, registry = SystemClock(), Channels(tls=keys.tls), metrics.new_registry(writer, keys)
    random = Random()  # noqa: S311  # names, identities and delays: nothing secret
    async with (
        metrics.serving(config.metrics, registry) as metrics_at,
        await EtcdStore.connect(config.etcd, clock, random, tls=keys.etcd) as etcd,
    ):
        store = ObservedStore(etcd, clock, metrics.etcd_histogram(registry))
        try:
            new_server = partial(Server, tls=keys.tls)
            serving = Daemon(config, store, channels, clock, random, new_server, registry=registry)
            await serving.run(lambda address: daemon.announce(address, metrics_at))
        finally:
            await channels.close()


def main() -> None:
    """Run the coordinator that the command line describes until SIGTERM or SIGINT."""
    config = parse(sys.argv[1:])
    log.name_process(coordinator=config.name)
    daemon.run("vfleet-coordinator", config.log_level, config.log_format, lambda writer: _serve(config, writer))


if __name__ == "__main__":
    main()
