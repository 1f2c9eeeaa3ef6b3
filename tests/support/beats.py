"""What comes of `tests/guests/inside/beats.py`: when a guest did something through a device, by this machine's clock.

The guest's own clock is no use for this: it stands still while QEMU migrates.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

from support.guest import VirtualMachine

STEADY = 50
REST_S = 0.5
TIMEOUT_S = 120.0


class Beats:
    """The times of one guest's beats, in seconds, from whichever QEMU it runs in."""

    def __init__(self) -> None:
        self._times: list[float] = []

    def listen(self, path: Path) -> None:
        """Take what comes from a QEMU that runs with `port(path)`, until it ends."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(str(path))
        # A thread, since what else this process has to do must not come in between.
        threading.Thread(target=self._take, args=(connection,), daemon=True).start()

    async def gaps_ms(
        self, machine: VirtualMachine, act: Callable[[], Awaitable[object]], *work: str
    ) -> tuple[float, float]:
        """Let the guest work (`beats.py WORK…`), and do something to it. Return its longest gaps before and since.

        Before: in half a second at rest. It ends when the work goes on steadily after what was done.
        """
        await machine.start("beats", "python3", "-S", "/beats.py", *work)
        await self._until_steady()
        rests = len(self._times) - 1
        await asyncio.sleep(REST_S)
        acts = len(self._times) - 1
        await act()
        await self._until_steady()
        gaps = [(later - earlier) * 1e3 for earlier, later in pairwise(self._times)]
        await machine.run("touch /tmp/stop")
        while (await machine.report("beats"))[1]:
            pass
        self._times.clear()
        return max(gaps[rests:acts]), max(gaps[acts:])

    async def _until_steady(self) -> None:
        wanted = len(self._times) + STEADY
        async with asyncio.timeout(TIMEOUT_S):
            while len(self._times) < wanted:
                await asyncio.sleep(0.01)

    def _take(self, connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(4096):
                now = time.monotonic()
                self._times += [now] * len(data)


def port(path: Path) -> list[str]:
    """Return the arguments that give a machine the port that its beats come from, at a socket."""
    chardev = f"socket,id=beats,path={path},server=on,wait=off"
    return ["-chardev", chardev, "-device", "isa-debugcon,iobase=0xe9,chardev=beats"]
