"""The coordinator's process: settings and the real world."""

import sys
from random import Random

from coordinator.config import Config, parse
from coordinator.daemon import Daemon
from vfleet import daemon, log, metrics
from vfleet.clock import SystemClock
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.observed import ObservedStore
from vfleet.rpc import Channels


async def _serve(config: Config, writer: log.Writer) -> None:
    clock, channels, registry = SystemClock(), Channels(), metrics.new_registry(writer)
    random = Random()  # noqa: S311  # names, identities and delays: nothing secret
    async with (
        metrics.serving(config.metrics, registry) as metrics_at,
        await EtcdStore.connect(config.etcd, clock, random) as etcd,
    ):
        store = ObservedStore(etcd, clock, metrics.etcd_histogram(registry))
        try:
            serving = Daemon(config, store, channels, clock, random, registry=registry)
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
