"""Child processes: they say when they are ready, tell why they ended, and never outlive their parent."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random

import pytest

from vfleet.errors import Reason, VfleetError
from vfleet.process import PORTS, ChildProcess, free_port

READY = "print('ready', flush=True)"
SLEEP = "import time; time.sleep(600)"
IGNORE_SIGTERM = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"

Start = Callable[..., Awaitable[ChildProcess]]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start a Python program as a child."""
    children = []

    async def start(*lines: str) -> ChildProcess:
        command = [sys.executable, "-c", "\n".join(lines)]
        children.append(await ChildProcess.start("child", command, log=tmp_path / "child.log"))
        return children[-1]

    yield start
    for child in children:
        await child.kill()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


async def test_it_says_when_it_is_ready(start: Start) -> None:
    child = await start(READY, SLEEP)
    assert await child.first_line(20) == "ready"
    assert child.exit_code is None


@pytest.mark.parametrize(("code", "reason"), [(2, Reason.INVALID_FIELD), (1, Reason.UNREACHABLE)])
async def test_its_last_words_are_passed_on_when_it_ends(start: Start, code: int, reason: Reason) -> None:
    child = await start(f"import sys; print('first\\nwhy it ended', file=sys.stderr); sys.exit({code})")
    with pytest.raises(VfleetError, match=rf"^child ended \(exit code {code}\): why it ended$") as caught:
        await child.first_line(20)
    assert caught.value.reason is reason


async def test_a_silent_end_names_the_log_and_the_signal(start: Start, tmp_path: Path) -> None:
    child = await start("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(VfleetError, match=rf"SIGKILL\): its log {tmp_path}/child.log is empty"):
        await child.first_line(20)


async def test_one_that_is_never_ready_is_not_awaited_for_ever(start: Start) -> None:
    child = await start(SLEEP)
    with pytest.raises(VfleetError, match=r"child was not ready in 0\.05 s"):
        await child.first_line(0.05)


async def test_it_ends_in_order(start: Start) -> None:
    # It waits for the signal: a handler's would be missed if it came just before a sleep.
    child = await start(
        "import signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})",
        READY,
        "signal.sigwait({signal.SIGTERM}); sys.exit(7)",
    )
    await child.first_line(20)
    await child.stop()
    assert child.exit_code == 7


@pytest.mark.parametrize("obstacle", [IGNORE_SIGTERM, "pass"])
async def test_one_that_does_not_end_is_killed(start: Start, obstacle: str) -> None:
    child = await start(obstacle, READY, SLEEP)
    await child.first_line(20)
    if obstacle == "pass":
        child.send_signal(signal.SIGSTOP)
    await child.stop(grace_s=0.05)
    assert child.exit_code in (-signal.SIGKILL, -signal.SIGTERM)
    await child.stop()


async def test_a_stop_that_is_cancelled_leaves_no_process(start: Start) -> None:
    child = await start(IGNORE_SIGTERM, READY, SLEEP)
    await child.first_line(20)
    stopping = asyncio.create_task(child.stop(grace_s=60))
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert child.exit_code == -signal.SIGKILL


async def test_ctrl_c_reaches_the_parent_alone(start: Start) -> None:
    child = await start(READY, SLEEP)
    await child.first_line(20)
    assert os.getsid(child.pid) == child.pid != os.getsid(0)


async def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = f"""
import asyncio, pathlib, sys, time
from vfleet.process import ChildProcess
async def main():
    command = [sys.executable, "-c", {READY!r} + chr(10) + {SLEEP!r}]
    child = await ChildProcess.start("child", command, log=pathlib.Path({str(tmp_path / "log")!r}))
    await child.first_line(20)
    print(child.pid, flush=True)
    time.sleep(600)
asyncio.run(main())
"""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", parent, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    child = int(await process.stdout.readline())
    assert is_running(child)
    process.kill()
    await process.wait()
    async with asyncio.timeout(20):
        while is_running(child):
            await asyncio.sleep(0.01)


def test_free_ports_are_none_that_outgoing_connections_take() -> None:
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert PORTS.stop <= low
    assert free_port(Random(1)) in PORTS
