"""A fleet in containers, as deploy/compose has it, with clients and failpoints for a test; nothing of it stays.

It stands in for a `vfleet.local.LocalCluster`: the suites that were written for one run on it.
"""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from support.containers.container import Container
from support.containers.engine import PROJECT, SERVICE, DockerError, compose_command, docker, run, what_is_left
from support.containers.images import REPOSITORY
from support.failpoints import Failpoints
from support.local_cluster import Cluster, connected, eventually

from vfleet.clock import SystemClock
from vfleet.errors import VfleetError
from vfleet.etcd.client import EtcdStore
from vfleet.health import check_health
from vfleet.principal import server_name
from vfleet.roles import Role
from vfleet.rpc import Channels
from vfleet.security import Keys, Security

COMPOSE = REPOSITORY / "deploy" / "compose" / "compose.yaml"
MEMBERS, COORDINATORS, HOSTS = ("etcd1", "etcd2", "etcd3"), ("c1", "c2"), ("h1", "h2", "h3")
CERTS = "certs"
ETCD_PORT, PORT = 2379, 7000
NETWORK_TRIES = 20
ASK_TIMEOUT_S = 2.0


@dataclass
class ContainerFleet:
    """The containers of one project of Compose. `environment` is what its files are told."""

    project: str
    directory: Path
    environment: dict[str, str]
    containers: dict[str, Container] = field(default_factory=dict)
    channels: Channels | None = None
    certs: str = ""

    @property
    def control(self) -> str:
        """The name of the network of control."""
        return f"{self.project}_control"

    @property
    def fabric(self) -> str:
        """The name of the fabric's network."""
        return f"{self.project}_fabric"

    @property
    def etcd(self) -> list[str]:
        """HOST:PORT of etcd's members."""
        return [member.address for member in self.members.values()]

    @property
    def hosts(self) -> dict[str, Container]:
        return {name: self.containers[name] for name in HOSTS}

    @property
    def coordinators(self) -> dict[str, Container]:
        return {name: self.containers[name] for name in COORDINATORS}

    @property
    def members(self) -> dict[str, Container]:
        return {name: self.containers[name] for name in MEMBERS}

    @property
    def daemons(self) -> list[Container]:
        return [*self.hosts.values(), *self.coordinators.values()]

    @property
    def coordinator_addresses(self) -> list[str]:
        return [coordinator.address for coordinator in self.coordinators.values()]

    def keys(self) -> Keys:
        """Return what an operator meets the daemons with, and a daemon etcd."""
        return Security(self.directory / "operator", self.directory / "c1").open()

    async def compose(self, *arguments: str) -> str:
        """Run a command of Compose on the project."""
        files = ("-f", str(COMPOSE), "-f", str(self.directory / "override.json"))
        return await run((*compose_command(), "-p", self.project, *files, *arguments), environment=self.environment)

    async def replace(self, name: str, images: Mapping[str, str]) -> None:
        """Let a daemon be run by another image, on the data that it has, as a person upgrades it."""
        self.environment.update(images)
        await self._compose_up(name)
        await self.containers[name].until_ready()

    async def _compose_up(self, *names: str) -> None:
        await self.compose("up", "--detach", "--no-deps", *names)
        await self._find_containers()

    async def _find_containers(self) -> None:
        ids = (await docker("ps", "--all", "--quiet", "--filter", f"label={PROJECT}={self.project}")).split()
        for about in json.loads(await docker("inspect", *ids)):
            name = about["Config"]["Labels"][SERVICE]
            networks = about["NetworkSettings"]["Networks"]
            if name == CERTS:
                self.certs = about["Id"]
                continue
            if name in self.containers and self.containers[name].container == about["Id"]:
                continue
            addresses = {network: own["IPAMConfig"]["IPv4Address"] for network, own in networks.items()}
            address = f"{addresses[self.control]}:{ETCD_PORT if name in MEMBERS else PORT}"
            self.containers[name] = Container(name, about["Id"], address, addresses, self._check_of(name, address))

    async def start(self) -> None:
        """Start one after the other, and return when all serve: certificates, etcd, and then the daemons."""
        await self._compose_up(CERTS)
        if (await docker("wait", self.certs)).strip() != "0":
            raise DockerError(f"no certificates: {await docker('logs', self.certs)}")
        for folder in ("operator", "c1"):
            await docker("cp", f"{self.certs}:/certs/{folder}", str(self.directory))
        for names in (MEMBERS, (*COORDINATORS, *HOSTS)):
            await self._compose_up(*names)
            # Nobody goes on asking once one has failed: a network that is gone leads out of this machine.
            async with asyncio.TaskGroup() as group:
                for name in names:
                    group.create_task(self.containers[name].until_ready())

    def _check_of(self, name: str, address: str) -> Callable[[], Awaitable[bool]]:
        async def member_serves() -> bool:
            tls = self.keys().etcd
            try:
                async with EtcdStore.open(
                    (address,), SystemClock(), Random(), timeout_s=ASK_TIMEOUT_S, tls=tls
                ) as store:
                    await store.get("/")
            except VfleetError:
                return False
            return True

        async def daemon_serves() -> bool:
            self.channels = self.channels or Channels(tls=self.keys().tls)
            server = server_name(Role.COORDINATOR if name in COORDINATORS else Role.HOST, name)
            try:
                response = await check_health(self.channels.to(address, server), address, ASK_TIMEOUT_S)
            except VfleetError:
                return False
            return response.status == response.SERVING

        return member_serves if name in MEMBERS else daemon_serves


def _override(directory: Path) -> dict[str, object]:
    """Return what tests change: whoever dies stays dead until it is started again, and daemons have failpoints.

    The kernel spares the first process of a container what a failpoint does to it: an init comes before. And nobody
    asks for the health of dozens of containers all the time: that takes a core. The test itself starts them in order.
    """
    changed = {"restart": "no", "init": True, "healthcheck": {"interval": "1h"}}
    services: dict[str, object] = dict.fromkeys(MEMBERS, changed)
    for name in (*COORDINATORS, *HOSTS):
        services[name] = {
            **changed,
            "environment": {"VFLEET_FAILPOINTS": "/failpoints"},
            "volumes": [f"{directory}/failpoints/{name}:/failpoints"],
        }
    return {"services": services}


async def _up(directory: Path, images: Mapping[str, str], lease_ttl_s: int) -> ContainerFleet:
    """Bring the containers up, on networks that nobody else has."""
    project = f"vfleet-test-{uuid.uuid4().hex[:8]}"
    failpoints = directory / "failpoints"
    for name in (*COORDINATORS, *HOSTS):
        (failpoints / name).mkdir(parents=True)
        (failpoints / name).chmod(0o777)  # its daemon is another user
    (directory / "override.json").write_text(json.dumps(_override(directory)))
    for tries_left in reversed(range(NETWORK_TRIES)):
        first, second = Random().sample([f"172.{a}.{b}" for a in range(28, 32) for b in range(256)], 2)
        environment = {
            **images,
            "VFLEET_CONTROL": first,
            "VFLEET_FABRIC": second,
            "VFLEET_LEASE_TTL_S": str(lease_ttl_s),
        }
        fleet = ContainerFleet(project, directory, environment)
        try:
            await fleet.start()
        except BaseException as error:
            await _down(fleet)
            if not (isinstance(error, DockerError) and tries_left and "overlaps" in str(error)):
                raise
        else:
            return fleet
    raise AssertionError("unreachable")


async def _down(fleet: ContainerFleet) -> None:
    """End all, and check that nothing of it is left; to the end, even if it is cancelled meanwhile."""
    ending = asyncio.ensure_future(_end(fleet))
    try:
        await asyncio.shield(ending)
    except asyncio.CancelledError:
        await ending
        raise


async def _end(fleet: ContainerFleet) -> None:
    if fleet.channels is not None:
        await fleet.channels.close()
    containers = [container.container for container in fleet.containers.values()]
    await fleet.compose("down", "--volumes", "--timeout", "0")
    left = await what_is_left(fleet.project, containers)
    assert not left, left


@asynccontextmanager
async def contained(directory: Path, images: Mapping[str, str], *, lease_ttl_s: int = 5) -> AsyncIterator[Cluster]:
    """Bring a fleet up for a test, and end it. If the test fails, the containers' logs stay in `directory`."""
    fleet = await _up(directory, images, lease_ttl_s)
    try:
        async with connected(fleet) as cluster:
            await eventually(lambda: _knows_hosts(cluster))
            yield cluster
    except BaseException:
        await _keep_logs(fleet)
        raise
    finally:
        await _down(fleet)


async def _knows_hosts(cluster: Cluster) -> bool:
    return sum(host.registered for host in await cluster.fleet.list_hosts()) == len(HOSTS)


async def _keep_logs(fleet: ContainerFleet) -> None:
    for container in fleet.containers.values():
        (fleet.directory / f"{container.name}.log").write_text(await container.log("all"))


def failpoints_of(fleet: ContainerFleet) -> Failpoints:
    """Return the failpoints of the fleet's daemons."""
    return Failpoints(fleet.directory / "failpoints")
