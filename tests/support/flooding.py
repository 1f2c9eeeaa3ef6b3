"""A cluster under a flood: how its daemons' memory grows, and what its drivers and a migration feel of it."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.local_cluster import Cluster

from vfleet.local import Daemon
from vfleet.v1.records_pb2 import Migration

TESTS = Path(__file__).parents[1]
SAMPLE_S = 0.25
MIB = 1 << 20


@dataclass
class Memory:
    """Bytes of a daemon in memory: before, at most meanwhile, after; and its open files at most."""

    before: int
    most: int = 0
    after: int = 0
    files: int = 0


@dataclass
class Flooded:
    """What a flood did."""

    memory: dict[str, Memory]
    counts: dict[str, int]
    migrations: list[Migration]


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096


async def flooded(cluster: Cluster, certs: Path | None, clients: int, seconds: float, moves: Sequence[str]) -> Flooded:
    """Flood all daemons, and meanwhile move vf1 to each device of `moves`, if there are any, in turn, again and again.

    The first migration is under way before the flood begins, and copies so slowly that it is in the midst of it.
    """
    daemons = cluster.local.daemons
    memory = {daemon.name: Memory(resident_bytes(daemon.process.pid)) for daemon in daemons}
    if moves:
        await cluster.begin("m0", {"vf1": moves[0]}, bandwidth_mib_per_s=1)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "support.flood", str(certs or "-"), str(clients), str(seconds)),
        *(daemon.address for daemon in daemons),
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    watching = asyncio.create_task(_watch(daemons, memory))
    ended = asyncio.create_task(process.communicate())
    try:
        migrations = [await cluster.over("m0")] if moves else []
        while moves and not ended.done():
            name = f"m{len(migrations)}"
            migrations.append(await cluster.move(name, {"vf1": moves[len(migrations) % len(moves)]}))
            await asyncio.wait((ended,), timeout=0.5)
        output, _ = await ended
    finally:
        watching.cancel()
        if process.returncode is None:
            process.kill()
        await asyncio.gather(watching, ended, return_exceptions=True)
    assert process.returncode == 0
    for daemon in daemons:
        memory[daemon.name].after = resident_bytes(daemon.process.pid)
    return Flooded(memory, json.loads(output), migrations)


async def _watch(daemons: Sequence[Daemon], memory: dict[str, Memory]) -> None:
    while True:
        for daemon in daemons:
            with contextlib.suppress(OSError):
                own, pid = memory[daemon.name], daemon.process.pid
                own.most = max(own.most, resident_bytes(pid))
                own.files = max(own.files, len(os.listdir(f"/proc/{pid}/fd")))  # noqa: PTH208
        await asyncio.sleep(SAMPLE_S)
