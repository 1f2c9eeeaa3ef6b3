"""What the tests ask of Docker, by its own command: containers to be killed, frozen and cut off, and what is left.

The tests are root's: a daemon in a container is found, stopped and continued as any process of the machine.
"""

import asyncio
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

SERVICE = "com.docker.compose.service"
PROJECT = "com.docker.compose.project"
COMMAND_TIMEOUT_S = 300.0


class DockerError(Exception):
    """A command of Docker failed."""


def require_engine() -> None:
    """Skip the test if there is no Docker engine here, and say so loudly; in CI let it fail."""
    missing = _what_is_missing()
    if not missing:
        return
    message = f"CONTAINER TESTS NOT RUN: {missing}"
    if os.environ.get("CI") == "true":
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def _what_is_missing() -> str:
    if os.geteuid() != 0:
        return "they need root, for the networks and processes of containers"
    for program in ("docker", "iptables", "nsenter"):
        if shutil.which(program) is None:
            return f"there is no {program} on PATH"
    if not compose_command():
        return "there is neither docker compose nor docker-compose"
    version = subprocess.run(["docker", "version"], capture_output=True, text=True, check=False)
    return f"no Docker engine answers ({version.stderr.strip()})" if version.returncode else ""


def compose_command() -> list[str]:
    """Return the command of Compose that there is: nothing if there is none."""
    if shutil.which("docker") and not subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else []


async def run(command: Sequence[str], *, environment: dict[str, str] | None = None, cwd: Path | None = None) -> str:
    """Run a command and return what it printed. Raise DockerError with what it said if it fails."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=None if environment is None else {**os.environ, **environment},
        cwd=cwd,
    )
    try:
        async with asyncio.timeout(COMMAND_TIMEOUT_S):
            output, errors = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise DockerError(f"{' '.join(command)}: {errors.decode(errors='replace')}{output.decode(errors='replace')}")
    return output.decode()


async def docker(*arguments: str) -> str:
    """Run a command of Docker."""
    return await run(("docker", *arguments))


def processes_of(containers: Sequence[str]) -> list[str]:
    """Return the IDs of the processes in and around containers."""
    return [p.name for p in Path("/proc").iterdir() if p.name.isdigit() and _is_of(p, containers)]


async def what_is_left(project: str, containers: Sequence[str]) -> dict[str, list[str]]:
    """Return what there still is of a project: containers, networks, volumes, and processes of its containers (IDs)."""
    of_project = ("--quiet", "--filter", f"label={PROJECT}={project}")
    left = {
        "containers": (await docker("ps", "--all", *of_project)).split(),
        "networks": (await docker("network", "ls", *of_project)).split(),
        "volumes": (await docker("volume", "ls", *of_project)).split(),
        "processes": processes_of(containers),
    }
    return {kind: found for kind, found in left.items() if found}


def _is_of(process: Path, containers: Sequence[str]) -> bool:
    try:
        groups = (process / "cgroup").read_text()
        command = (process / "cmdline").read_text()  # of a shim
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(container in groups or container in command for container in containers)
