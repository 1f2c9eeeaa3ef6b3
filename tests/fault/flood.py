"""`make flood`: clients that mean harm, in numbers, and a table of what the daemons and drivers felt of it."""

import argparse
import asyncio
import tempfile
from pathlib import Path

from support.certs import make_certs
from support.flooding import MIB, Flooded, flooded
from support.local_cluster import running

from vfleet.certificates import issue, make_ca
from vfleet.v1.driver_service_pb2 import WorkloadReport
from vfleet.v1.records_pb2 import Phase

SHOW = Path(__file__).parents[2] / "vfleet" / "topologies" / "show.yaml"
MOVES = ("h3/mem0", "h2/mem0")


async def run(directory: Path, clients: int, seconds: float, *, plaintext: bool) -> tuple[Flooded, WorkloadReport]:
    """Flood a cluster in which a driver on h1 works with a function that moves between h2 and h3.

    In plaintext it stays: there everybody's calls are taken alike, so that a coordinator's may have no room.
    """
    certs = None
    if not plaintext:
        certs = make_certs(directory / "certs")
        make_ca(directory / "other")
        issue(directory / "other", certs / "another", "operator", "local")
    async with running(directory, topology=SHOW, certs=certs) as cluster:
        await cluster.fleet.create_function("vf1", "h2/mem0")
        await cluster.work("d1", "vf1", "h1", memory_bytes=4 * MIB)
        found = await flooded(cluster, certs, clients, seconds, () if plaintext else MOVES)
        await cluster.until_working()
        reports = await cluster.stop_workloads()
        assert not (await cluster.fleet.check_fleet()).differences
        return found, reports["d1", "vf1"]


def show(found: Flooded, report: WorkloadReport) -> None:
    """Print the table."""
    print(f"{'daemon':8}{'before':>10}{'at most':>10}{'after':>10}{'files':>8}")
    for name, own in found.memory.items():
        sizes = "".join(f"{size / MIB:6.0f} MiB" for size in (own.before, own.most, own.after))
        print(f"{name:8}{sizes}{own.files:8}")
    done = sum(migration.phase == Phase.PHASE_DONE for migration in found.migrations)
    print(f"\nmigrations done {done} of {len(found.migrations)}")
    print(f"operations {report.operations}, each verified; longest gap {report.longest_gap.ToTimedelta()}")
    for what, count in sorted(found.counts.items()):
        print(f"  {what}: {count}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--duration", type=float, default=60)
    parser.add_argument("--plaintext", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vfleet-flood-") as directory:
        show(*asyncio.run(run(Path(directory), options.clients, options.duration, plaintext=options.plaintext)))


if __name__ == "__main__":
    main()
