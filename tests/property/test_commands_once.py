"""Every command of an accelerator completes exactly once, whatever happens between it and its driver.

The world of test_exactly_once.py with another device: the function reads commands from, and writes completions to, the
main memory of its driver on h1, while it moves among three hosts. In the end the driver has verified all of them, by
identifier, order and content, and has had one interrupt for each.
"""

import asyncio
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.test_exactly_once import EVENTS, OFTEN, World
from support.bench import SEGMENTS
from support.fake_dma import FakeDmaLink
from support.manual_clock import settle

from hostd.workload import Workloads
from hostd.workloads.kinds import new_workload
from vfleet.v1.driver_service_pb2 import StartWorkloadRequest, WorkloadOptions, WorkloadReport

BARS = {0: 8192, 2: 1 << 19}
MAIN_MEMORY_BYTES = 1 << 20
FIGURES = ("lost", "repeated", "reordered", "misrouted", "mismatches", "errors")
OPTIONS = WorkloadOptions(kind="accelerator", window=20, seed=3)


class DmaWorld(World):
    """The world, with a bus master and the workload that drives it."""

    model = "accelerator"
    bars = BARS
    main_memory_bytes = MAIN_MEMORY_BYTES

    async def start(self) -> None:
        self.workloads = self.new_workloads()
        start = asyncio.create_task(
            self.workloads.start(StartWorkloadRequest(driver="d1", function="vf1", options=OPTIONS))
        )
        while not start.done():
            for link in self.fabric.links.values():
                link.carry_all()
            await settle(2)
        await start

    def connect(self) -> None:
        super().connect()
        self.dma_links.peers[1] = self.driver_host.drivers

    def new_workloads(self) -> Workloads:
        host = self.driver_host
        return Workloads(host.drivers, host.ledger, host.clock, new_workload)

    @property
    def link_of_dma(self) -> FakeDmaLink:
        return self.dma_links.to(1)

    def submit(self) -> None:
        """The workload does, all the time."""

    do_at_once = submit

    def carry_dma_request(self) -> None:
        self.link_of_dma.carry_request()

    def carry_dma_response(self) -> None:
        self.link_of_dma.carry_response()

    def carry_all_dma(self) -> None:
        self.link_of_dma.carry_all()

    def carry_late_dma(self) -> None:
        self.link_of_dma.carry_late()

    def break_dma_link(self) -> None:
        self.link_of_dma.break_off()

    def mend_dma_link(self) -> None:
        self.link_of_dma.come_back()

    async def run(self) -> None:
        """Let all that is on its way arrive, for a while."""
        for _ in range(20):
            for link in (*self.fabric.links.values(), self.link_of_dma):
                link.carry_all()
            await settle(3)

    async def kill(self) -> None:
        workloads, daemon = self.workloads, self.driver_host.drivers
        await super().kill()
        if self.driver_host.drivers is not daemon:
            await workloads.close()
            self.workloads = self.new_workloads()
            self.workloads.resume()

    def report(self) -> WorkloadReport:
        return self.workloads.report("d1", "vf1", restart_measurement=False)

    def check(self) -> None:
        super().check()
        report = self.report()
        wrong = {name: getattr(report, name) for name in FIGURES if getattr(report, name)}
        assert not wrong, wrong
        assert not report.failure

    async def finish(self) -> None:
        """Let the migration end, everything arrive, and the workload verify all that it has submitted."""
        while self.move is not None:
            for _ in range(8):
                await self.prepare()
            self.decide()
            self.conclude()
        stopping = asyncio.create_task(self.workloads.stop("d1", "vf1"))
        for _ in range(400):
            for link in (*self.fabric.links.values(), self.link_of_dma):
                link.come_back()
                link.carry_late()
                link.carry_all()
            await self.clock.advance(0.3)
            self.check()
            if stopping.done():
                break
        assert stopping.done(), "some commands were never completed"
        assert not stopping.result().running
        assert self.driver_host.drivers.holds() == []
        ((name, home),) = self.instances()
        assert (name, home.about.generation) == (self.home, self.generation)
        assert home.about.dma_faults == 0

    async def end(self) -> None:
        await self.workloads.close()
        self.close()


DMA_EVENTS = EVENTS | {
    name: getattr(DmaWorld, method)
    for name, method in {
        "submit": "submit",
        "do at once": "do_at_once",
        "kill a daemon": "kill",
        "carry a DMA request": "carry_dma_request",
        "carry a DMA response": "carry_dma_response",
        "carry all DMA": "carry_all_dma",
        "carry some DMA late": "carry_late_dma",
        "break the DMA link": "break_dma_link",
        "mend the DMA link": "mend_dma_link",
        "run": "run",
    }.items()
}
DMA_OFTEN = [*OFTEN, "run", "run", "carry all DMA", "mend the DMA link"]
assert SEGMENTS["h1"] == 1


async def live(events: list[str], seed: int) -> int:
    """Live through the events, and return how many commands were verified."""
    with tempfile.TemporaryDirectory() as path:
        world = DmaWorld(Path(path), Random(seed))
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


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from([*DMA_EVENTS, *DMA_OFTEN]), max_size=120), st.integers(0, 1 << 32))
def test_every_command_completes_once(events: list[str], seed: int):
    asyncio.run(live(events, seed))


@pytest.mark.parametrize("seed", range(4))
def test_every_command_completes_once_in_a_long_life(seed: int):
    random = Random(seed)
    assert asyncio.run(live(random.choices([*DMA_EVENTS, *DMA_OFTEN], k=1000), seed)) > 500
