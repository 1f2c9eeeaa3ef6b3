"""The README's "On three machines", line by line, as a person would type it."""

import asyncio
import os
import re
import uuid
from pathlib import Path
from random import Random

import pytest
from support.containers.engine import DockerError, what_is_left
from support.readme import blocks, checkout

FEWER_LINES_THAN = 10
NETWORK_TRIES = 5


async def shell(script: list[str], directory: Path, environment: dict[str, str]) -> str:
    """Let a shell do what a person would type, until something fails, and return what they would see."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VFLEET_")}
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-e",
        cwd=directory,
        env={**inherited, **environment},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate("\n".join(script).encode())
    if process.returncode:
        raise DockerError(output.decode())
    return output.decode()


@pytest.mark.timeout(900)
async def test_what_the_readme_says_works(tmp_path: Path, images: dict[str, str]) -> None:
    (script,) = blocks("On three machines")
    assert len(script) < FEWER_LINES_THAN
    assert script[-1] == "make down"
    directory, project = checkout(tmp_path, "deploy", links=("build",)), f"vfleet-test-{uuid.uuid4().hex[:8]}"
    networks = Random().sample([f"172.{a}.{b}" for a in range(28, 32) for b in range(256)], 2)
    environment = {
        "COMPOSE_PROJECT_NAME": project,
        "VFLEET_CONTROL": networks[0],
        "VFLEET_FABRIC": networks[1],
        "XDG_CONFIG_HOME": str(tmp_path),
        "TAG": "tested",
        "VFLEET_LEASE_TTL_S": "30",  # nobody loses a session because the machine is busy
    }
    try:
        seen = await shell(script, directory, environment)
        assert re.search(r"^vf1 +to +h2/nic0 ", seen, re.MULTILINE)
        # Another day: everything is where it was, and at work.
        again = ["make up", *script[1:3], "vfleet get functions", "vfleet workload report d1 vf1", "vfleet doctor"]
        seen = await shell(again, directory, environment)
        assert re.search(r"^vf1 .* h2/nic0 ", seen, re.MULTILINE)
        assert re.search(r"^Running +yes$", seen, re.MULTILINE)
        assert re.search(r"^Lost +0$", seen, re.MULTILINE)
    finally:
        await shell(["make destroy"], directory, environment)
    assert await what_is_left(project, ()) == {}
    assert not (directory / ".vfleet").exists()
