"""The accelerator's workload: every command completes once, with the function here or on another host."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.bench import Bench
from support.fake_dma import FakeDmaLinks
from support.fake_fabric import FakeFabric
from support.manual_clock import ManualClock, settle

from hostd.dma_receiver import DmaReceiver
from hostd.models.accelerator import COMPLETION
from hostd.workload import Workloads
from hostd.workloads.kinds import new_workload
from vfleet.address import bar_span
from vfleet.errors import Reason, VfleetError
from vfleet.v1.driver_service_pb2 import StartWorkloadRequest, WorkloadOptions, WorkloadReport

BARS = {0: 8192, 2: 1 << 20}
MEMORY = 1 << 20
FIGURES = ("lost", "repeated", "reordered", "misrouted", "mismatches", "errors")


class Rig:
    """Driver d1 on h1, its accelerator vf1 on `home`, and workloads that survive `kill`."""

    def __init__(self, path: Path, home: str) -> None:
        clock, fabric, links = ManualClock(), FakeFabric(is_automatic=True), FakeDmaLinks(is_automatic=True)
        self.hosts = {
            name: Bench(path / name, name, clock, fabric, links, model="accelerator") for name in ("h1", "h2")
        }
        self.home = home
        self.fabric, self.links = fabric, links
        self.connect()
        h1 = self.hosts["h1"]
        base = self.hosts[home].create(bars=BARS).about.base
        h1.drivers.recorded("d1", MEMORY)
        h1.drivers.attach(h1.message(base, length=bar_span(BARS)))
        self.workloads = self.new_workloads()

    def connect(self) -> None:
        for name, segment in (("h1", 1), ("h2", 2)):
            self.fabric.peers[segment] = self.hosts[name].functions
            self.links.peers[segment] = self.hosts[name].drivers

    def new_workloads(self) -> Workloads:
        h1 = self.hosts["h1"]
        return Workloads(h1.drivers, h1.ledger, h1.clock, new_workload)

    async def start(self, **options) -> None:
        request = StartWorkloadRequest(
            driver="d1", function="vf1", options=WorkloadOptions(kind="accelerator", **options)
        )
        await self.workloads.start(request)

    def report(self) -> WorkloadReport:
        return self.workloads.report("d1", "vf1", restart_measurement=False)

    async def reach(self, operations: int) -> None:
        async with asyncio.timeout(20):
            while self.report().operations < operations:
                assert not self.report().failure, self.report().failure
                await settle()

    async def kill(self, host: str) -> None:
        """Let a host's daemon die and come back; the driver's workloads are its own."""
        if host == "h1":
            await self.workloads.close()
        for link in (*self.fabric.links.values(), *self.links.links.values()):
            link.break_off()
        self.hosts[host].restart()
        self.connect()
        if host == "h1":
            self.workloads = self.new_workloads()
            self.workloads.resume()
        for link in (*self.fabric.links.values(), *self.links.links.values()):
            link.come_back()
        await self.hosts[host].clock.advance(1.0)

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
    """Return what is wrong."""
    return {name: getattr(report, name) for name in FIGURES if getattr(report, name)}


async def test_every_command_completes_once_until_the_workload_is_stopped(rig: Rig):
    await rig.start(window=24)
    await rig.reach(600)
    report = await rig.workloads.stop("d1", "vf1")
    assert (report.running, report.failure, figures(report)) == (False, "", {})
    assert report.operations >= 600


@pytest.mark.parametrize("killed", ["h1", "h2"])
async def test_a_daemon_that_is_killed_goes_on_where_it_was(rig: Rig, killed: str):
    await rig.start(window=24, memory_bytes=1 << 18)
    for round_number in range(1, 4):
        await rig.reach(100 * round_number)
        await rig.kill(killed)
    await rig.reach(400)
    report = await rig.workloads.stop("d1", "vf1")
    assert (report.running, report.failure, figures(report)) == (False, "", {})


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"memory_bytes": 4096}, "options.memory_bytes"),
        ({"memory_offset_bytes": 4}, "options.memory_bytes"),
        ({"memory_bytes": 1 << 21}, "options.memory_bytes"),
    ],
)
async def test_options_that_do_not_fit_the_device_are_refused(rig: Rig, options: dict[str, int], field: str):
    with pytest.raises(VfleetError) as caught:
        await rig.start(**options)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_FIELD, field)
    assert not rig.workloads.is_running("d1", "vf1")


async def test_a_kind_that_there_is_not_is_refused(rig: Rig):
    request = StartWorkloadRequest(driver="d1", function="vf1", options=WorkloadOptions(kind="toaster"))
    with pytest.raises(VfleetError) as caught:
        await rig.workloads.start(request)
    assert caught.value.metadata["field"] == "options.kind"


async def test_the_rate_is_kept(rig: Rig):
    await rig.start(window=8, accesses_per_second=10)
    clock = rig.hosts["h1"].clock
    before = rig.report().operations
    for _ in range(30):
        await clock.advance(0.1)
    assert 25 <= rig.report().operations - before <= 35


# What is wrong is seen


async def seen_after(rig: Rig, monkeypatch, spoil) -> dict[str, int]:
    """Let the workload run, spoil what its host receives, and return what the report says in the end."""
    await rig.start(window=12)
    await rig.reach(60)
    write = DmaReceiver.write
    monkeypatch.setattr(DmaReceiver, "write", lambda self, *sent: spoil(self, lambda *more: write(self, *more), *sent))
    await rig.reach(rig.report().operations + 200)
    return figures(await rig.workloads.stop("d1", "vf1"))


async def test_content_that_changes_on_its_way_is_a_mismatch(rig: Rig, monkeypatch):
    def spoil(receiver, write, sequence, address, data):
        write(sequence, address, data[:-1] + bytes([data[-1] ^ 1]) if len(data) > 100 else data)

    assert (await seen_after(rig, monkeypatch, spoil)).keys() == {"mismatches"}


async def test_an_interrupt_too_many_is_repeated(rig: Rig, monkeypatch):
    def spoil(receiver, write, sequence, address, data):
        write(sequence, address, data)
        if len(data) == 4 and sequence % 7 == 0:
            receiver._words[256 + 3] += 1

    assert await seen_after(rig, monkeypatch, spoil) == {"repeated": 1}


async def test_completions_that_change_places_are_not_taken_for_good(rig: Rig, monkeypatch):
    last: list[bytes] = []

    def spoil(receiver, write, sequence, address, data):
        if len(data) == COMPLETION.size:
            fields = list(COMPLETION.unpack(data))
            if fields[0] % 50 == 49:
                # The identifier of the one before: that has completed twice, and this one never.
                fields[0] -= 1
                last.append(data)
            data = COMPLETION.pack(*fields)
        write(sequence, address, data)

    found = await seen_after(rig, monkeypatch, spoil)
    assert found == {"repeated": len(last)}
