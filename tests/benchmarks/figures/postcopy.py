"""Blackout of a function with much state, by post-copy, over that of small state: it should not depend on the size.

Large: 16 MiB, 256 MiB and 1 GiB of local memory, all of it written before, by post-copy. Small: a function whose 1 MiB
of local memory is zero but for a page, as it moves by default. Both move between h2 and h3, in turns, under a workload
on h1 that has one access on its way at a time, up to 5,000 a second, in a page of local memory that comes after the
lift; a sample is its longest wait in one migration. A migration ends when all has arrived.
"""

from benchmarks.figures.blackout import Watched
from benchmarks.figures.transfer_rate import fill
from benchmarks.measure import Figure, Rounds, Samples, Size, alternate_async, at_most
from benchmarks.rig import bench

from vfleet.v1.types_pb2 import TransferMode

OPTIONS = {"mode": TransferMode.TRANSFER_MODE_POST_COPY, "prepare_timeout_ms": 120_000}


async def run(size: Size) -> list[Figure]:
    sizes = size.of((16, 256, 1024), (1, 4))
    measured = [await blackouts(mebibytes, size.of(12, 1)) for mebibytes in sizes]
    figures = [
        rounds.quantile(f"blackout with {mebibytes} MiB, post-copy / small state", "ms", at_most(1.3), 0.5)
        for mebibytes, rounds in zip(sizes, measured, strict=True)
    ]
    least, most = (Samples(rounds.ours, "ms") for rounds in (measured[0], measured[-1]))
    ratio = most.quantile(0.5) / least.quantile(0.5)
    return [*figures, Figure(f"blackout with {sizes[-1]} MiB / {sizes[0]} MiB, post-copy", ratio, None, most, least)]


async def blackouts(mebibytes: int, rounds: int) -> Rounds:
    async with bench(bare=0, bars={0: "4KiB", 2: f"{mebibytes}MiB"}) as rig:
        large = await Watched.start(rig, "vf1", "nic0", "d1")
        small = await Watched.start(rig, "vf2", "nic1", "d2")
        await fill(rig, "vf1", "d3", mebibytes)
        measured = await alternate_async(rounds, lambda: large.blackout(**OPTIONS), small.blackout)
        await rig.cluster.stop_workloads()
    return measured
