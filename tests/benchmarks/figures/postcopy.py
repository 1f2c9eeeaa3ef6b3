"""Blackout of a function with much state, by post-copy, over that of small state: it should not depend on the size.

Large: 16 MiB, 256 MiB and 1 GiB of local memory, all of it written before, by post-copy. Small: a function whose 1 MiB
of local memory is zero but for a page, as it moves by default. Both move between h2 and h3, in turns, under a workload
on h1 that has one access on its way at a time, up to 5,000 a second, in a page of local memory. A sample is what the
driver measured in one migration, which ends when all has arrived: the blackout, from the hold to the first answer after
the lift; and, without a goal, the longest wait of the whole migration, which for 1 GiB is many times as long.
"""

from benchmarks.figures.blackout import Watched, milliseconds
from benchmarks.figures.transfer_rate import fill
from benchmarks.measure import Figure, Rounds, Size, alternate_async, at_most
from benchmarks.rig import bench

from vfleet.v1.types_pb2 import TransferMode

OPTIONS = {"mode": TransferMode.TRANSFER_MODE_POST_COPY, "prepare_timeout_ms": 120_000}


async def run(size: Size) -> list[Figure]:
    sizes = size.of((16, 256, 1024), (1, 4))
    measured = [await in_turns(mebibytes, size.of(12, 1)) for mebibytes in sizes]
    blackouts = [
        rounds.quantile(f"blackout with {mebibytes} MiB, post-copy / small state", "ms", at_most(1.3), 0.5)
        for mebibytes, (rounds, _) in zip(sizes, measured, strict=True)
    ]
    waits = [
        rounds.quantile(f"longest wait until {mebibytes} MiB have arrived / small state", "ms", None, 0.5)
        for mebibytes, (_, rounds) in zip(sizes, measured, strict=True)
    ]
    least, most = blackouts[0], blackouts[-1]
    name = f"blackout with {sizes[-1]} MiB / {sizes[0]} MiB, post-copy, each over small state"
    return [*blackouts, Figure(name, most.ratio / least.ratio, None, most.ours, least.ours), *waits]


async def in_turns(mebibytes: int, rounds: int) -> tuple[Rounds, Rounds]:
    """Return the blackouts and the longest waits, of the large function and of the small one."""
    waits: Rounds = Rounds([], [])
    async with bench(bare=0, bars={0: "4KiB", 2: f"{mebibytes}MiB"}) as rig:
        large = await Watched.start(rig, "vf1", "nic0", "d1")
        small = await Watched.start(rig, "vf2", "nic1", "d2")
        await fill(rig, "vf1", "d3", mebibytes)

        async def ours() -> float:
            report = await large.watch(**OPTIONS)
            waits.ours.append(milliseconds(report.longest_gap))
            return milliseconds(report.blackout)

        async def floor() -> float:
            report = await small.watch()
            waits.floor.append(milliseconds(report.longest_gap))
            return milliseconds(report.blackout)

        blackouts = await alternate_async(rounds, ours, floor, warm_up=1)
        await rig.cluster.stop_workloads()
    return blackouts, Rounds(waits.ours[1:], waits.floor[1:])
