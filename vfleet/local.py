"""A whole cluster on this machine, each daemon its own process: etcd, coordinators, and one hostd for each host of a
topology. `vfleet up`, `vfleet demo` and the tests use it.

Entering it returns when all serve; leaving it, in whatever way, leaves no process. Daemons keep their address and data
when they are killed and started again.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Self

import yaml

from vfleet import failpoint
from vfleet.client import FleetClient
from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.etcd.server import EtcdServer
from vfleet.host_client import HostClient
from vfleet.names import check_name
from vfleet.process import LOOPBACK, ChildProcess, describe_exit, free_port
from vfleet.security import INSECURE, Keys, Security

READY_TIMEOUT_S = 30.0
START_ATTEMPTS = 3
RESTART_DELAY_S = 1.0
CANNOT_LISTEN = "can't listen"  # how vfleet.rpc says that a port is taken
MAX_COORDINATORS = 16


class Daemon:
    """One daemon of the cluster: it keeps its command line, addresses, data and log over restarts.

    `address` is HOST:PORT of its services, `metrics` the URL of its metrics.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        log: Path,
        random: Random,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self.address = ""
        self.metrics = ""
        self._metrics_address = ""
        self._command = [sys.executable, "-m", module, *arguments]
        self._random = random
        self._environment = environment
        self._process: ChildProcess | None = None

    @property
    def process(self) -> ChildProcess:
        """The running process. Raise ILLEGAL_STATE if there is none."""
        if self._process is None or self._process.exit_code is not None:
            raise VfleetError(Reason.ILLEGAL_STATE, f"{self.name} is not running")
        return self._process

    async def start(self, *extra: str) -> None:
        """Start it, with `extra` arguments, and return when it serves; the first time on a port that is free.

        Raise VfleetError with its own last words if it ends before.
        """
        if self._process is not None and self._process.exit_code is None:
            raise VfleetError(Reason.ILLEGAL_STATE, f"{self.name} is running")
        for attempts_left in reversed(range(START_ATTEMPTS)):
            try:
                address, metrics = (known or self._free_address() for known in (self.address, self._metrics_address))
                await self._start_at(address, metrics, extra)
            except VfleetError as error:
                await self.kill()
                if self.address or not attempts_left or CANNOT_LISTEN not in error.message:
                    raise
            except BaseException:
                await self.kill()
                raise
            else:
                return

    def _free_address(self) -> str:
        return f"{LOOPBACK}:{free_port(self._random)}"

    async def _start_at(self, address: str, metrics: str, extra: Sequence[str]) -> None:
        command = [*self._command, "--listen", address, "--metrics", metrics, *extra]
        self._process = await ChildProcess.start(self.name, command, log=self.log, environment=self._environment)
        line = await self._process.first_line(READY_TIMEOUT_S)
        try:
            said = json.loads(line)
            self.address, self.metrics, self._metrics_address = str(said["address"]), str(said["metrics"]), metrics
        except (ValueError, KeyError, TypeError):
            raise VfleetError(Reason.INTERNAL, f"{self.name} said {line!r} instead of its address") from None

    async def stop(self) -> None:
        """End it in order. One that is not running stays so."""
        if self._process is not None:
            await self._process.stop()

    async def kill(self) -> None:
        """End it by SIGKILL. One that is not running stays so."""
        if self._process is not None:
            await self._process.kill()

    async def restart(self, *extra: str) -> None:
        """End it by SIGKILL, if it runs, and start it again with `extra` arguments."""
        await self.kill()
        await self.start(*extra)

    def pause(self) -> None:
        """Stop it from doing anything (SIGSTOP), as if its machine had frozen."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`."""
        self.process.send_signal(signal.SIGCONT)

    async def ended(self) -> str:
        """Wait until it ends and return how, with its last words."""
        process = self.process
        code = await process.wait()
        return f"{describe_exit(code)}: {process.last_words()}"


class LocalCluster:
    """A cluster of the hosts in a topology file, with `coordinators` coordinators.

    Data and logs are in `data_dir`, which is made if it is absent. `etcd` lists the endpoints of an existing etcd;
    without it the cluster has its own. With `failpoints`, each daemon has its own in a directory there of its name.
    With `certs`, a folder with `host-NAME` for each host, `coordinator-NAME` for each coordinator, `etcd-local` and
    `operator-local`, connections are secured; without it they are plaintext.
    """

    def __init__(
        self,
        topology: Path,
        data_dir: Path,
        *,
        etcd: Sequence[str] = (),
        coordinators: int = 1,
        lease_ttl_s: int | None = None,
        failpoints: Path | None = None,
        certs: Path | None = None,
    ) -> None:
        if not 1 <= coordinators <= MAX_COORDINATORS:
            raise invalid_field("coordinators", coordinators, f"1 to {MAX_COORDINATORS}")
        self.topology = topology
        self.data_dir = data_dir
        self.etcd = tuple(etcd)
        self.etcd_server: EtcdServer | None = None
        self.hosts: dict[str, Daemon] = {}
        self.coordinators: dict[str, Daemon] = {}
        self._host_names = read_host_names(topology)
        # An etcd that is not the cluster's own may have coordinators already.
        suffix = f"-{uuid.uuid4().hex[:8]}" if etcd else ""
        self._coordinator_names = [f"c{number}{suffix}" for number in range(1, coordinators + 1)]
        self._lease_arguments = () if lease_ttl_s is None else ("--lease-ttl-s", str(lease_ttl_s))
        self._failpoints = failpoints
        self._certs = certs
        self._random = Random()  # noqa: S311  # chooses ports

    @property
    def daemons(self) -> list[Daemon]:
        """The daemons: hosts, then coordinators."""
        return [*self.hosts.values(), *self.coordinators.values()]

    @property
    def coordinator_addresses(self) -> list[str]:
        """HOST:PORT of each coordinator."""
        return [daemon.address for daemon in self.coordinators.values()]

    def fleet(self) -> FleetClient:
        """Return a new client of the coordinators."""
        return FleetClient(self.coordinator_addresses, tls=self.keys().tls)

    def host(self, name: str) -> HostClient:
        """Return a new client of a host's hostd."""
        return HostClient(self.hosts[name].address, name=name, tls=self.keys().tls)

    def keys(self) -> Keys:
        """Return what an operator meets the daemons with, and a daemon etcd."""
        if self._certs is None:
            return INSECURE.open()
        return Security(self._certs / "operator-local", self._certs / "etcd-local").open()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseExceptionGroup as group:
            await self._stop()
            raise _first_error(group) from None
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stop()

    async def keep_running(self, report: Callable[[str], None]) -> None:
        """Start again whichever daemon ends, for ever, and report it in a line. Raise VfleetError if it can't."""
        try:
            async with asyncio.TaskGroup() as group:
                for daemon in self.daemons:
                    group.create_task(_keep_running(daemon, report))
        except BaseExceptionGroup as errors:
            raise _first_error(errors) from None

    async def _start(self) -> None:
        self.data_dir.mkdir(parents=True, exist_ok=True)
        if not self.etcd:
            certs = None if self._certs is None else self._certs / "etcd-local"
            self.etcd_server = EtcdServer(self.data_dir / "etcd", SystemClock(), self._random, certs=certs)
            await self.etcd_server.start()
            self.etcd = (self.etcd_server.endpoint,)
        for name in self._host_names:
            arguments = ["--topology", str(self.topology), "--host", name, "--data-dir", str(self.data_dir / name)]
            self.hosts[name] = self._daemon(name, "hostd", [*arguments, *self._security(f"host-{name}")])
        for name in self._coordinator_names:
            secured = self._security(f"coordinator-{name}")
            self.coordinators[name] = self._daemon(name, "coordinator", ["--name", name, *secured])
        async with asyncio.TaskGroup() as group:
            for daemon in self.daemons:
                group.create_task(daemon.start())

    async def _stop(self) -> None:
        try:
            await asyncio.gather(*(daemon.stop() for daemon in self.daemons))
        finally:
            _end_holders(self.data_dir)
            if self.etcd_server is not None:
                await self.etcd_server.stop()

    def _security(self, folder: str) -> list[str]:
        return ["--insecure"] if self._certs is None else ["--tls", str(self._certs / folder)]

    def _daemon(self, name: str, module: str, arguments: Sequence[str]) -> Daemon:
        shared = ["--etcd", ",".join(self.etcd), *self._lease_arguments]
        log = self.data_dir / f"{module}-{name}.log"
        environment = None
        if self._failpoints is not None:
            own = self._failpoints / name
            own.mkdir(parents=True, exist_ok=True)
            environment = {failpoint.VARIABLE: str(own)}
        return Daemon(name, module, [*arguments, *shared], log=log, random=self._random, environment=environment)


def _end_holders(data_dir: Path) -> None:
    """End the holders of guests' sockets: they outlive a hostd, and are not to outlive the cluster."""
    for path in data_dir.glob("*/guests/*.pid"):
        pid = path.read_text()
        with contextlib.suppress(OSError, ValueError):
            # Unless the number is another process's by now.
            if path.stem.encode() in Path(f"/proc/{int(pid)}/cmdline").read_bytes():
                os.kill(int(pid), signal.SIGTERM)


async def _keep_running(daemon: Daemon, report: Callable[[str], None]) -> None:
    while True:
        how = await daemon.ended()
        report(f"{daemon.name} ended ({how}); it is started again")
        await SystemClock().sleep(RESTART_DELAY_S)
        await daemon.start()


def read_host_names(topology: Path) -> list[str]:
    """Return the names of a topology's hosts. Only hostd checks the rest of the file.

    Raise INVALID_FIELD if it can't be read or has no list of named hosts.
    """
    try:
        content: object = yaml.safe_load(topology.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise invalid_field("topology", str(topology), f"a YAML file ({' '.join(str(error).split())})") from None
    hosts: object = content.get("hosts") if isinstance(content, dict) else None
    names = []
    for host in hosts if isinstance(hosts, list) else []:
        name: object = host.get("name") if isinstance(host, dict) else None
        names.append(check_name("name of a host in the topology", name if isinstance(name, str) else repr(name)))
    if not names:
        raise invalid_field("topology", str(topology), "a file with hosts, each with a name")
    return names


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
