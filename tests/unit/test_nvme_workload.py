"""The NVMe workload in a host: every command completes once, with the function here or on another host."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.bench import Bench
from support.fake_dma import FakeDmaLinks
from support.fake_fabric import FakeFabric
from support.manual_clock import ManualClock

from hostd.workload import Workloads
from hostd.workloads.kinds import new_workload
from vfleet.address import bar_span
from vfleet.v1.driver_service_pb2 import StartWorkloadRequest, WorkloadOptions, WorkloadReport

BARS = {0: 16 << 10, 2: 1 << 20}
MEMORY = 2 << 20
FIGURES = ("lost", "repeated", "reordered", "misrouted", "mismatches", "errors")


class Rig:
    """Driver d1 on h1, its controller vf1 on `home`."""

    def __init__(self, path: Path, home: str) -> None:
        clock, fabric, links = ManualClock(), FakeFabric(is_automatic=True), FakeDmaLinks(is_automatic=True)
        self.hosts = {name: Bench(path / name, name, clock, fabric, links, model="nvme") for name in ("h1", "h2")}
        for name, segment in (("h1", 1), ("h2", 2)):
            fabric.peers[segment] = self.hosts[name].functions
            links.peers[segment] = self.hosts[name].drivers
        h1 = self.hosts["h1"]
        base = self.hosts[home].create(bars=BARS).about.base
        h1.drivers.recorded("d1", MEMORY)
        h1.drivers.attach(h1.message(base, length=bar_span(BARS)))
        self.workloads = Workloads(h1.drivers, h1.ledger, h1.clock, new_workload)

    async def start(self, **options) -> None:
        request = StartWorkloadRequest(driver="d1", function="vf1", options=WorkloadOptions(kind="nvme", **options))
        await self.workloads.start(request)

    def report(self) -> WorkloadReport:
        return self.workloads.report("d1", "vf1", restart_measurement=False)

    async def reach(self, operations: int) -> None:
        async with asyncio.timeout(20):
            while self.report().operations < operations:
                assert not self.report().failure, self.report().failure
                await asyncio.sleep(0)

    async def close(self) -> None:
        await self.workloads.close()
        for host in self.hosts.values():
            host.close()


@pytest.fixture(params=["h1", "h2"])
async def rig(tmp_path: Path, request) -> AsyncIterator[Rig]:
    found = Rig(tmp_path, request.param)
    yield found
    await found.close()


def figures(report: WorkloadReport) -> dict[str, int]:
    return {name: getattr(report, name) for name in FIGURES if getattr(report, name)}


async def test_every_command_completes_once_until_the_workload_is_stopped(rig: Rig) -> None:
    await rig.start(window=24)
    await rig.reach(2000)
    report = await rig.workloads.stop("d1", "vf1")
    assert (report.running, report.failure, figures(report)) == (False, "", {})
    assert report.operations >= 2000
