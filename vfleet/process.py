"""What is common to the child processes of a machine: they end with their parent, and they need ports.

They run in sessions of their own, so that Ctrl-C reaches the parent alone, which then ends its children in order.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Self

from vfleet.errors import Reason, VfleetError

LOOPBACK = "127.0.0.1"
# Below the range from which Linux takes ports for outgoing connections (32768): such a port could be taken at any
# moment, even by a client that tries to reach the very server that is to listen there.
PORTS = range(20_000, 32_768)
PORT_ATTEMPTS = 100
# What every program of vfleet exits with when what it was given can't be right.
BAD_INPUT_EXIT = 2
GRACE_S = 5.0
LOG_TAIL_BYTES = 4096

# Run between fork and exec of the child, but as a program of its own: a preexec_fn could deadlock in a process that has
# gRPC's threads. The signal is kept over exec. It is sent when the thread that started the child ends: start it from
# the main thread. The parent may have ended before the request was made, hence the look at getppid.
_TIED = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGKILL = 1, 9
if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, SIGKILL) or os.getppid() != int(sys.argv[1]):
    sys.exit("could not be tied to the parent process")
os.setsid()
os.execvp(sys.argv[2], sys.argv[2:])
"""


def tied_to_parent(command: Sequence[str]) -> list[str]:
    """Return the command that runs `command`, with the same process ID, so that the kernel kills it with this process.

    Also when this process is killed by SIGKILL. Linux only: elsewhere the command is returned as it is, and ends only
    when it is stopped.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *command]


def free_port(random: Random) -> int:
    """Return a TCP port of the loopback interface on which nobody listens. Raise LIMIT_EXCEEDED if none is found."""
    for port in random.sample(PORTS, PORT_ATTEMPTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    message = f"no free port among {PORT_ATTEMPTS} tried from {PORTS.start} to {PORTS.stop - 1}"
    raise VfleetError(Reason.LIMIT_EXCEEDED, message)


class ChildProcess:
    """A child process that says on its standard output when it is ready, and adds its standard error to a log."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @classmethod
    async def start(
        cls, name: str, command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None
    ) -> Self:
        """Start `command`; `name` is what errors call it."""
        with log.open("ab") as log_file:
            process = await asyncio.create_subprocess_exec(
                *tied_to_parent(command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log_file,
                env=None if environment is None else {**os.environ, **environment},
            )
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """What it ended with, None while it runs; -N if signal N ended it."""
        return self._process.returncode

    async def first_line(self, timeout_s: float) -> str:
        """Return the first line of its standard output.

        If it ends before, or says nothing for `timeout_s` seconds, raise VfleetError with the last line of its log:
        INVALID_FIELD if it ended for bad input, else UNREACHABLE.
        """
        assert self._process.stdout is not None  # noqa: S101  # `start` asked for a pipe
        try:
            async with asyncio.timeout(timeout_s):
                line = await self._process.stdout.readline()
        except TimeoutError:
            raise VfleetError(
                Reason.UNREACHABLE, f"{self.name} was not ready in {timeout_s:g} s: {self.last_words()}"
            ) from None
        if not line:
            code = await self.wait()
            reason = Reason.INVALID_FIELD if code == BAD_INPUT_EXIT else Reason.UNREACHABLE
            raise VfleetError(reason, f"{self.name} ended ({describe_exit(code)}): {self.last_words()}")
        return line.decode(errors="replace").strip()

    def last_words(self) -> str:
        """Return the last line of its log, or where the log is if that is empty."""
        with self.log.open("rb") as log_file:
            log_file.seek(max(0, self.log.stat().st_size - LOG_TAIL_BYTES))
            lines = log_file.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"its log {self.log} is empty"

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; to a process that has ended, do nothing."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def wait(self) -> int:
        """Wait until it ends and return its exit code."""
        return await self._process.wait()

    async def stop(self, grace_s: float = GRACE_S) -> None:
        """End it in order, by SIGTERM; after `grace_s` seconds, or when this is cancelled, by SIGKILL."""
        self.send_signal(signal.SIGTERM)
        self.send_signal(signal.SIGCONT)
        try:
            async with asyncio.timeout(grace_s):
                await self.wait()
        except TimeoutError:
            pass
        finally:
            await self.kill()

    async def kill(self) -> None:
        """End it by SIGKILL."""
        self.send_signal(signal.SIGKILL)
        await self.wait()


def describe_exit(code: int) -> str:
    """Return an exit code in words, for example "exit code 1" or "SIGKILL"."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
