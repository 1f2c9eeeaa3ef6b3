"""A rolling upgrade: machine by machine from the previous release to this one, while functions move and drivers work.

The previous release is that of the newest tag. As long as there is none, it is this tree under an older number, so that
what is done here is known to work when there is one.
"""

import asyncio
import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.containers.engine import docker
from support.containers.fleet import COORDINATORS, HOSTS, contained
from support.containers.images import REPOSITORY, build_images
from support.local_cluster import Cluster, assert_nothing_left, eventually, when_possible

from vfleet.client import move_request
from vfleet.v1.records_pb2 import Phase

PARTS = ("pyproject.toml", "README.md", "vfleet", "coordinator", "hostd")
OLDER = "0.0.1"
ROUTE = ("h2/nic0", "h3/nic0", "h1/nic0")


def git(*arguments: str) -> str:
    """Return what git prints; nothing if it fails."""
    done = subprocess.run(["git", "-C", REPOSITORY, *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def previous_release(directory: Path) -> None:
    """Put the sources of the previous release into a directory."""
    tag = git("describe", "--tags", "--match", "v*", "--abbrev=0")
    if tag:
        archive = subprocess.run(["git", "-C", REPOSITORY, "archive", tag, *PARTS], capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", directory], input=archive.stdout, check=True)
        return
    for name in PARTS:
        source, copy = REPOSITORY / name, directory / name
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, copy, ignore=ignore) if source.is_dir() else shutil.copy2(source, copy)
    about = directory / "pyproject.toml"
    about.write_text(re.sub(r'^version = ".*"$', f'version = "{OLDER}"', about.read_text(), flags=re.MULTILINE))


class Mover:
    """Moves functions on and on, one migration after the other; `done` counts those that were committed."""

    def __init__(self, cluster: Cluster) -> None:
        self.done = 0
        self._cluster = cluster

    async def run(self, function: str) -> None:
        for number, device in enumerate(itertools.cycle(ROUTE)):
            name = f"{function}-{number}"
            moves = [move_request(function, device)]
            await when_possible(lambda moves=moves, name=name: self._cluster.fleet.create_migration(moves, name=name))
            over = await self._cluster.over(name)
            self.done += over.phase == Phase.PHASE_DONE
            await asyncio.sleep(0.05)

    async def until_more(self, count: int = 3) -> None:
        """Wait until as many more were committed."""
        before = self.done

        async def more() -> bool:
            return self.done >= before + count

        await eventually(more)


async def running_images(cluster: Cluster) -> set[str]:
    """Return of which images the daemons are."""
    containers = [cluster.local.containers[name].container for name in (*COORDINATORS, *HOSTS)]
    return set((await docker("inspect", "--format", "{{.Image}}", *containers)).split())


@pytest.mark.timeout(900)
async def test_a_fleet_is_upgraded_machine_by_machine_under_load(
    tmp_path: Path, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = tmp_path_factory.mktemp("previous")
    previous_release(source)
    previous = build_images(tmp_path, "previous", source)
    async with contained(tmp_path, previous) as cluster:
        assert await running_images(cluster) == {previous["VFLEET_IMAGE"]}
        for function, driver, host in (("vf1", "d1", "h3"), ("vf2", "d2", "h1")):
            await cluster.fleet.create_function(function, "h1/nic0")
            await cluster.work(driver, function, host)
        mover = Mover(cluster)
        async with asyncio.TaskGroup() as group:
            moving = [group.create_task(mover.run(function)) for function in ("vf1", "vf2")]
            await mover.until_more()
            # Hosts first: a coordinator may ask for what only a new host knows.
            for name in (*HOSTS, *COORDINATORS):
                await cluster.local.replace(name, images)
                await mover.until_more()
                await cluster.until_working()
            for task in moving:
                task.cancel()
        assert await running_images(cluster) == {images["VFLEET_IMAGE"]} != {previous["VFLEET_IMAGE"]}
        await eventually(lambda: _all_over(cluster))
        await cluster.stop_workloads()
        await assert_nothing_left(cluster)


async def _all_over(cluster: Cluster) -> bool:
    return not [f for f in await cluster.fleet.list_functions() if f.migration]
