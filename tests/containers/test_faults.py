"""Machines die, freeze, start anew and are cut off at every step of a migration, each a container of its own."""

import asyncio
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fault.kill_matrix import Matrix
from support.containers.fleet import contained, failpoints_of
from support.containers.scene import ContainerScene, cells
from support.kill_matrix.cells import LEASE_TTL_S
from support.kill_matrix.stage import Stage, set_stage

FLEETS = 3  # at once


@pytest.mark.timeout(900)
async def test_whatever_happens_to_whichever_machine_the_migration_ends_and_nothing_is_lost(
    tmp_path: Path, images: dict[str, str]
) -> None:
    @asynccontextmanager
    async def staged(directory: Path, *, has_second: bool) -> AsyncIterator[Stage]:
        assert has_second
        async with contained(directory, images, lease_ttl_s=LEASE_TTL_S) as cluster:
            yield await set_stage(cluster, failpoints_of(cluster.local), ContainerScene)

    matrix = Matrix(cells(), tmp_path, staged)
    ends = await asyncio.gather(*(matrix.work() for _ in range(FLEETS)), return_exceptions=True)
    failures = [f"{outcome.cell}\n{outcome.failure}" for outcome in matrix.outcomes if outcome.failure]
    failures += ["".join(traceback.format_exception(end)) for end in ends if end is not None]
    assert not failures, "\n".join(failures)
    assert len(matrix.outcomes) == len(cells())
