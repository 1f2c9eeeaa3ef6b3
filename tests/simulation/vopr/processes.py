"""The processes of a simulated fleet: real hosts and coordinators on a simulated disk, network and etcd.

A process is started, killed, stopped and started again; each of its lives is put together as its `__main__` does.
"""

import asyncio
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from simulation.vopr.disk import Disk, SimulatedLedger
from simulation.vopr.loop import Killed, Life, SimulatedLoop
from simulation.vopr.network import SimulatedServer

from coordinator.config import Config
from coordinator.daemon import Daemon
from hostd.__main__ import _claim
from hostd.host import Host
from hostd.identity import open_identity
from hostd.service import add_services
from hostd.topology import HostTopology, load_all
from vfleet.errors import VfleetError
from vfleet.rpc import Channels
from vfleet.security import Security

if TYPE_CHECKING:
    from simulation.vopr.world import World

EPOCH_S = 1_700_000_000.0


@cache
def topologies() -> dict[str, HostTopology]:
    """Return the machines."""
    return load_all(Path(__file__).with_name("topology.yaml"))


class SimulatedClock:
    """One machine's clock: virtual time, and a wall clock that is wrong by `skew_s`."""

    def __init__(self, loop: SimulatedLoop, skew_s: float) -> None:
        self._loop = loop
        self._skew_s = skew_s

    def monotonic(self) -> float:
        return self._loop.time()

    def time(self) -> float:
        return EPOCH_S + self._skew_s + self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class Process:
    """A daemon that is started again whenever it has ended. `life` is its present, or last, life."""

    def __init__(self, world: "World", name: str) -> None:
        self.name = name
        self.address = f"{name}:1"
        self.life = Life(name)
        self.life.is_alive = False
        self.well_since_s = 0.0
        self._world = world
        self.clock = SimulatedClock(world.loop, world.random.uniform(-5.0, 5.0))

    @property
    def is_up(self) -> bool:
        """Whether it runs, or is stopped."""
        return self.life.is_alive

    def start(self) -> None:
        """Begin a life."""
        world = self._world
        world.trace("start", self.name)
        self.well_since_s = world.loop.time()
        self.life = Life(self.name)
        self.life.at_death[self._forget_server] = None
        world.loop.start(self.life, self._live(self.life))

    def kill(self) -> None:
        """End it, as SIGKILL does."""
        if self.is_up:
            self._world.died(self)
            self._world.loop.kill(self.life)

    async def _live(self, life: Life) -> None:
        try:
            await self._run(life)
        except Killed:
            return
        except VfleetError as error:
            # As a process that gives up.
            self._world.trace("exit", self.name, error.reason)
            self._world.gave_up(self)

    async def _run(self, life: Life) -> None:
        raise NotImplementedError

    def _forget_server(self) -> None:
        self._world.network.servers.pop(self.address, None)


class HostProcess(Process):
    """A host's daemon. `host` is the one of its present life."""

    def __init__(self, world: "World", name: str) -> None:
        super().__init__(world, name)
        self.disk = Disk()
        self.host: Host | None = None
        self.incarnation = ""
        self.must_power_cycle = False

    async def _run(self, life: Life) -> None:
        world, random = self._world, Random(self._world.random.random())
        ledger = SimulatedLedger(self.disk, life, lambda: world.may_die(life, 0.02))
        power_cycle, self.must_power_cycle = self.must_power_cycle, False
        identity = open_identity(ledger, self.name, "", random, self.clock, power_cycle=power_cycle)
        self.incarnation = identity.incarnation
        server = SimulatedServer(world.network, life, self.address, identity.incarnation)
        self.host = Host(
            topologies()[self.name],
            identity,
            self.address,
            ledger,
            world.etcd.client(life),
            Channels(world.network.connect(life)),
            self.clock,
            random,
            world.profile.lease_ttl_s,
        )
        for driver in self.host.drivers.all():
            world.history.table_swapped(driver, self.name)
        add_services(self.host, server.grpc)
        await server.start()
        await _claim(self.host, is_first_start=identity.starts == 1)
        await self.host.run(lambda: None)


class CoordinatorProcess(Process):
    """A coordinator's daemon."""

    daemon: Daemon | None = None

    async def _run(self, life: Life) -> None:
        world, random = self._world, Random(self._world.random.random())
        config = Config(
            name=self.name,
            listen=self.address,
            etcd=("etcd:1",),
            lease_ttl_s=world.profile.lease_ttl_s,
            log_level="error",
            # The simulated network has names that aren't loopback's, and nobody there opens a certificate.
            security=Security(tls=Path("/nonexistent")),
        )
        new_server: Callable = lambda names: SimulatedServer(world.network, life, self.address)  # noqa: E731
        store, channels = world.etcd.client(life), Channels(world.network.connect(life))
        self.daemon = Daemon(config, store, channels, self.clock, random, new_server)
        await self.daemon.run(lambda address: None)
