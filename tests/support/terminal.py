"""A terminal with a shell, in which a test types as a person would, and reads what they would see."""

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

PROMPT = "typed> "
PATIENCE_S = 300.0
INTERRUPT_AGAIN_S = 2.0
SIZE = struct.pack("HHHH", 50, 200, 0, 0)


class Terminal:
    """What is seen so far is `text`; what was looked for last lies before `position`."""

    def __init__(self, master: int) -> None:
        self.text = ""
        self.position = 0
        self._master = master
        self._changed = asyncio.Event()

    def take(self) -> None:
        """Read what has come."""
        try:
            self.text += os.read(self._master, 65536).decode(errors="replace").replace("\r", "")
        except OSError:  # the shell has ended
            asyncio.get_running_loop().remove_reader(self._master)
        self._changed.set()

    async def until(self, pattern: str) -> str:
        """Wait until what comes matches a regular expression, and return what came up to there."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while (found := re.search(pattern, self.text[self.position :], re.MULTILINE)) is None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"no {pattern!r} in {self.text[self.position - 1000 :]}") from None
        before, self.position = self.position, self.position + found.end()
        return self.text[before : self.position]

    async def type(self, line: str, then: str = f"^{PROMPT}") -> str:
        """Type a line and return what is seen until `then` is."""
        os.write(self._master, line.encode() + b"\n")
        await self.until(re.escape(line[-20:]))
        return await self.until(then)

    async def interrupt(self, then: str) -> None:
        """Press Ctrl-C until `then` is seen: a loop goes on when that only ends the program that it is just at."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                os.write(self._master, b"\x03")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(INTERRUPT_AGAIN_S):
                        await self.until(then)
                        return


@asynccontextmanager
async def terminal(directory: Path, environment: Mapping[str, str]) -> AsyncIterator[Terminal]:
    """Open a terminal, and end what runs in it as if its window were closed."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, SIZE)
    shell = await asyncio.create_subprocess_exec(
        # A session with this terminal, or there were no jobs, and nobody to hang up.
        *("setsid", "--ctty", "bash", "--norc", "--noprofile", "-i"),
        cwd=directory,
        env={**environment, "PS1": PROMPT, "TERM": "dumb", "VIRTUAL_ENV_DISABLE_PROMPT": "1"},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    opened = Terminal(master)
    loop = asyncio.get_running_loop()
    loop.add_reader(master, opened.take)
    try:
        await opened.until(f"^{PROMPT}")
        yield opened
    finally:
        loop.remove_reader(master)
        os.close(master)
        async with asyncio.timeout(PATIENCE_S):
            await shell.wait()
