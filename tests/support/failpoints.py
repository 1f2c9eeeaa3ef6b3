"""Failpoints of a cluster's daemons, armed while they run; see vfleet.failpoint."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vfleet.failpoint import REACHED, check
from vfleet.local import Daemon

PATIENCE_S = 30.0


@dataclass(frozen=True)
class Failpoints:
    """What the daemons of a cluster meet. `directory` has a directory for each, by its name."""

    directory: Path

    def arm(self, daemon: str, name: str, action: str) -> None:
        """Let a daemon do `action` when it next reaches the failpoint."""
        check(name, action)
        self.marker(daemon, name).unlink(missing_ok=True)
        new = self.directory / "new"
        new.write_text(action)
        new.rename(self.directory / daemon / name)

    def disarm(self, daemon: str, name: str) -> bool:
        """Return whether the failpoint was still to be reached; it no longer is."""
        path = self.directory / daemon / name
        is_armed = path.exists()
        path.unlink(missing_ok=True)
        return is_armed

    def marker(self, daemon: str, name: str) -> Path:
        """Return the file that is there once the failpoint was reached."""
        return self.directory / daemon / (name + REACHED)

    async def reached(self, daemon: str, name: str) -> None:
        """Wait until a daemon has reached a failpoint."""
        await self.reached_by_any((daemon,), name)

    async def reached_by_any(self, daemons: Iterable[str], name: str) -> None:
        """Wait until one of the daemons has reached a failpoint."""
        markers = [self.marker(daemon, name) for daemon in daemons]
        async with asyncio.timeout(PATIENCE_S):
            while not any(marker.exists() for marker in markers):
                await asyncio.sleep(0.01)


async def until_stopped(daemon: Daemon) -> None:
    """Wait until a daemon stands still that is about to stop at a failpoint."""
    stat = Path(f"/proc/{daemon.process.pid}/stat")
    async with asyncio.timeout(PATIENCE_S):
        while stat.read_text().rpartition(")")[2].split()[0] != "T":  # noqa: ASYNC240  # never waits
            await asyncio.sleep(0.005)


async def go_on(daemon: Daemon) -> None:
    """Let a daemon go on that has stopped, or is just about to stop, at a failpoint."""
    await until_stopped(daemon)
    daemon.resume()
