"""The coordinator's process: settings and the real world."""

import sys
from random import Random

from coordinator.config import Config, parse
from coordinator.daemon import Daemon
from vfleet import daemon
from vfleet.clock import SystemClock
from vfleet.etcd.client import EtcdStore
from vfleet.rpc import Channels


async def _serve(config: Config) -> None:
    clock, channels = SystemClock(), Channels()
    random = Random()  # noqa: S311  # names, identities and delays: nothing secret
    async with await EtcdStore.connect(config.etcd, clock, random) as store:
        try:
            await Daemon(config, store, channels, clock, random).run(daemon.announce)
        finally:
            await channels.close()


def main() -> None:
    """Run the coordinator that the command line describes until SIGTERM or SIGINT."""
    config = parse(sys.argv[1:])
    daemon.run("vfleet-coordinator", config.log_level, lambda: _serve(config))


if __name__ == "__main__":
    main()
