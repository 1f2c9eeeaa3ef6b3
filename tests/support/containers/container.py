"""A daemon in a container, with what `vfleet.local.Daemon` has for one that is a child process, and more to suffer."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from support.containers.engine import DockerError, docker, run

from vfleet.errors import Reason, VfleetError

READY_TIMEOUT_S = 240.0
POLL_S = 0.02
LOG_LINES = "20"


@dataclass(frozen=True)
class ContainedProcess:
    """A daemon's process, as the machine sees it."""

    pid: int

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        try:
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return 0
        return None if state not in "ZX" else 0


class Container:
    """One container of a fleet. It serves at `address`; `addresses` are its own in its networks, by their names.

    `serves` says whether the daemon in it serves.
    """

    def __init__(
        self,
        name: str,
        container: str,
        address: str,
        addresses: Mapping[str, str],
        serves: Callable[[], Awaitable[bool]],
    ) -> None:
        self.name = name
        self.container = container
        self.address = address
        self.addresses = addresses
        self._serves = serves
        self._process: ContainedProcess | None = None

    @property
    def process(self) -> ContainedProcess:
        """The daemon's process. Raise ILLEGAL_STATE if there is none."""
        if self._process is None or self._process.exit_code is not None:
            raise VfleetError(Reason.ILLEGAL_STATE, f"{self.name} is not running")
        return self._process

    async def start(self) -> None:
        """Start it and return when it serves. One whose daemon has just died is waited for before."""
        await docker("wait", self.container)
        await docker("start", self.container)
        await self.until_ready()

    async def until_ready(self) -> None:
        """Wait until it serves. Raise DockerError with the end of its log if it ends before."""
        first = int(await docker("inspect", "--format", "{{.State.Pid}}", self.container))
        async with asyncio.timeout(READY_TIMEOUT_S):
            while True:
                children = _children(first)
                if children is None:
                    raise DockerError(f"{self.name} ended: {await self.log()}")
                if children and await self._serves():
                    break
                await asyncio.sleep(POLL_S)
        self._process = ContainedProcess(children[0])

    async def log(self, lines: str = LOG_LINES) -> str:
        """Return the end of what it has logged."""
        return await run(("sh", "-c", 'exec docker logs --tail "$0" "$1" 2>&1', lines, self.container))

    async def kill(self) -> None:
        """Kill all that is in it. One that is not running stays so."""
        try:
            await docker("kill", self.container)
        except DockerError as error:
            if "is not running" not in str(error):
                raise
        await docker("wait", self.container)

    async def restart(self) -> None:
        """End it in order and start it again."""
        await docker("restart", self.container)
        await self.until_ready()

    def pause(self) -> None:
        """Stop its daemon (SIGSTOP)."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let its daemon go on."""
        os.kill(self.process.pid, signal.SIGCONT)

    async def freeze(self) -> None:
        """Stop all that is in it, and it can't tell."""
        await docker("pause", self.container)

    async def thaw(self) -> None:
        """Let it go on."""
        await docker("unpause", self.container)

    async def cut(self, *networks: str) -> None:
        """Take it off networks of its own, by default all."""
        for network in networks or self.addresses:
            await docker("network", "disconnect", network, self.container)

    async def mend(self, *networks: str) -> None:
        """Put it on networks again, with the addresses and the name that it had."""
        for network in networks or self.addresses:
            own = ("--ip", self.addresses[network], "--alias", self.name)
            await docker("network", "connect", *own, network, self.container)


def _children(pid: int) -> list[int] | None:
    """Return the children of a process, None if it has ended."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return None
