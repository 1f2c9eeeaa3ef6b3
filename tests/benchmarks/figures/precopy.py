"""Blackout of a function with 256 MiB of state that changes all the time, by pre-copy, over that of small state.

Large: 256 MiB of local memory, all of it written before. A second driver goes on writing pages, each another, at a
tenth of the rate at which state is copied, as a migration without it has shown in this run. Small: a function whose
1 MiB of local memory is zero but for a page. Both move between h2 and h3, in turns, under a workload on h1 that has one
access on its way at a time, up to 5,000 a second; a sample is its longest wait in one migration.
"""

import asyncio

from benchmarks.figures.blackout import Watched
from benchmarks.figures.transfer_rate import MEBIBYTE, OPTIONS, copy_seconds, fill
from benchmarks.measure import Figure, Size, alternate_async, at_most
from benchmarks.rig import bench

from vfleet.address import PAGE_BYTES
from vfleet.clock import SystemClock
from vfleet.driver import DriverClient, Write

WRITE_SHARE = 0.1
PAGES_AT_ONCE = 16


async def run(size: Size) -> list[Figure]:
    mebibytes = size.of(256, 4)
    async with bench(bare=0, bars={0: "4KiB", 2: f"{mebibytes}MiB"}) as rig:
        large = await Watched.start(rig, "vf1", "nic0", "d1")
        small = await Watched.start(rig, "vf2", "nic1", "d2")
        start = await fill(rig, "vf1", "d3", mebibytes)
        pages = mebibytes * MEBIBYTE // PAGE_BYTES
        rate = pages / copy_seconds(await large.move(**OPTIONS)) * WRITE_SHARE
        writing = asyncio.create_task(write(DriverClient(rig.cluster.hosts["h1"], "d3"), start, pages, rate))
        try:
            measured = await alternate_async(
                size.of(8, 1), lambda: large.longest_wait_ms(**OPTIONS), small.longest_wait_ms
            )
            assert not writing.done(), writing.exception()
        finally:
            writing.cancel()
            await asyncio.wait([writing])
        await rig.cluster.stop_workloads()
    name = f"blackout with {mebibytes} MiB written at {WRITE_SHARE:.0%} of the copy rate, pre-copy / small state"
    return [measured.quantile(name, "ms", at_most(3), 0.5)]


async def write(driver: DriverClient, start: int, pages: int, pages_a_second: float) -> None:
    """Write one page after the other, for ever; the first is the workload's."""
    clock = SystemClock()
    began, written = clock.monotonic(), 0
    while True:
        offsets = [(1 + (written + number) % (pages - 1)) * PAGE_BYTES for number in range(PAGES_AT_ONCE)]
        content = written.to_bytes(8, "little") * (PAGE_BYTES // 8)
        await driver.access_many([Write(start + offset, content) for offset in offsets])
        written += PAGES_AT_ONCE
        await clock.sleep(max(0.0, began + written / pages_a_second - clock.monotonic()))
