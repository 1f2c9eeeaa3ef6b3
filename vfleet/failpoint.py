"""Failpoints: named instants at which a test lets a daemon die, freeze, fail or wait, exactly there and exactly once.

They are compiled in and off. The environment variable VFLEET_FAILPOINTS turns them on: it names a directory in which a
file is an armed failpoint, its name the failpoint's and its content the action. Whoever reaches it renames it to
NAME.reached first, so that it is hit once, also over restarts, and so that the test sees that it was.
"""

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from vfleet.errors import Reason, VfleetError, invalid_field

VARIABLE = "VFLEET_FAILPOINTS"
REACHED = ".reached"
ACTIONS = ("kill", "stop", "error", "delay MILLISECONDS")

# What is done in one go; each has a failpoint before and one after it. A host's lie behind the fence's record.
STEPS = (
    *("begin", "create", "import", "hold", "stop", "commit", "lift", "scrub", "finish"),
    *("arrive", "abort", "discard", "resume", "restore", "adopt"),
)
HOST_STEPS = (
    *("create", "complete", "prove", "arrived", "hold", "stop", "update", "destroy", "resume", "lift"),
    *("resolve_instance", "resolve_hold", "resolve_abort", "lose"),
)
NAMES = frozenset(
    [f"coordinator.{step}.{side}" for step in STEPS for side in ("before", "after")]
    + [f"hostd.{step}.{side}" for step in HOST_STEPS for side in ("before", "after")]
    + [f"hostd.export.{part}" for part in ("header", "round", "last", "end")]
    + ["hostd.import.round", "hostd.arrive", "hostd.remove.halfway"]
)

# A process's own, and read from its environment alone: no logic depends on it.
_directory: Path | None = None


def enable(environment: Mapping[str, str]) -> None:
    """Turn failpoints on if `environment` says so. Raise INVALID_FIELD for what it can't mean."""
    global _directory
    if VARIABLE not in environment:
        return
    directory = Path(environment[VARIABLE])
    if not directory.is_dir():
        raise invalid_field(VARIABLE, str(directory), "a directory")
    for path in directory.iterdir():
        if path.suffix != REACHED:
            check(path.name, path.read_text())
    _directory = directory


def check(name: str, action: str) -> None:
    """Raise INVALID_FIELD, naming the variable, for a failpoint or an action that there is none of."""
    if name not in NAMES:
        raise invalid_field(VARIABLE, name, "the name of a failpoint, as vfleet/failpoint.py lists them")
    word, _, milliseconds = action.partition(" ")
    is_delay = word == "delay" and milliseconds.isascii() and milliseconds.isdecimal()
    if action not in ACTIONS[:3] and not is_delay:
        raise invalid_field(f"{VARIABLE}, {name}", action, " or ".join(ACTIONS))


def reach(name: str) -> None:
    """Do what the failpoint is armed with, if it is: `error` raises UNREACHABLE, `delay` blocks the process."""
    if _directory is not None:
        _reach(_directory, name)


class around:  # noqa: N801  # used like a function
    """Reaches STEP.before when the block begins, and STEP.after when it ends without an error."""

    __slots__ = ("_step",)

    def __init__(self, step: str) -> None:
        self._step = step

    def __enter__(self) -> None:
        if _directory is not None:
            _reach(_directory, f"{self._step}.before")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if _directory is not None and kind is None:
            _reach(_directory, f"{self._step}.after")


def _reach(directory: Path, name: str) -> None:
    reached = directory / (name + REACHED)
    try:
        (directory / name).rename(reached)
    except FileNotFoundError:
        return
    action = reached.read_text()
    check(name, action)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "error":
        raise VfleetError(Reason.UNREACHABLE, f"failpoint {name}", metadata={"failpoint": name})
    else:
        time.sleep(int(action.partition(" ")[2]) / 1000)
