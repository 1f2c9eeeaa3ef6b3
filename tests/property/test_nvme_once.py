"""Every NVMe command completes exactly once, whatever happens between the controller and its driver.

The world of test_commands_once.py, in which everything fails, with another device and its workload.
"""

import asyncio
import tempfile
from pathlib import Path
from random import Random

import pytest
from property.test_commands_once import DMA_EVENTS, DMA_OFTEN, DmaWorld
from support.manual_clock import settle

from vfleet.v1.driver_service_pb2 import StartWorkloadRequest, WorkloadOptions

BARS = {0: 16 << 10, 2: 1 << 19}
OPTIONS = WorkloadOptions(kind="nvme", window=20, seed=3)


class NvmeWorld(DmaWorld):
    """The world, with an NVMe controller and the workload that drives it."""

    model = "nvme"
    bars = BARS

    async def start(self) -> None:
        self.workloads = self.new_workloads()
        request = StartWorkloadRequest(driver="d1", function="vf1", options=OPTIONS)
        start = asyncio.create_task(self.workloads.start(request))
        while not start.done():
            for link in (*self.fabric.links.values(), self.link_of_dma):
                link.carry_all()
            await settle(2)
        await start


async def live(events: list[str], seed: int) -> int:
    """Live through the events, and return how many commands were verified."""
    with tempfile.TemporaryDirectory() as path:
        world = NvmeWorld(Path(path), Random(seed))
        await settle()
        await world.start()
        try:
            for event in events:
                happened = DMA_EVENTS[event](world)
                if happened is not None:
                    await happened
                await settle(8)
                world.check()
            await world.finish()
            return world.report().operations
        finally:
            if world.importing is not None:
                world.importing.cancel()
                await asyncio.gather(world.importing, return_exceptions=True)
            await world.end()


@pytest.mark.parametrize("seed", range(4))
def test_every_command_completes_once_in_a_long_life(seed: int) -> None:
    random = Random(seed)
    assert asyncio.run(live(random.choices([*DMA_EVENTS, *DMA_OFTEN], k=600), seed)) > 300
