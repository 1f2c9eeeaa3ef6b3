"""How long a driver waits when its function moves to another host, over the least that the protocol needs.

Ours: a function with 1 MiB of local memory, most of it zero, goes to and fro between h2 and h3 under a workload on h1
that has one access on its way at a time, up to 5,000 a second. A sample is the workload's longest wait for an answer
in one migration: from the hold, or the last access before it, to the first answer after the lift.

Floor: two unary calls to two bare hosts, one after the other, and between them one etcd transaction of COMMIT's size on
the same etcd, all on bare stubs: hold and stop, decide, lift. Nothing is looked at or kept anywhere.
"""

import asyncio
import time
from typing import Self

from benchmarks import bare_etcd
from benchmarks.measure import Figure, Size, alternate_async, at_most
from benchmarks.rig import Bench, bench
from google.protobuf.duration_pb2 import Duration

from vfleet.address import PAGE_BYTES
from vfleet.v1.driver_service_pb2 import WorkloadOptions, WorkloadReport
from vfleet.v1.hold_service_pb2 import PlaceHoldRequest
from vfleet.v1.hold_service_pb2_grpc import HoldServiceStub
from vfleet.v1.records_pb2 import Migration, Phase
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.translation_service_pb2_grpc import TranslationServiceStub

RATE = 5000
QUIET_S = 0.05


async def run(size: Size) -> list[Figure]:
    async with bench(bare=2) as rig:
        driver = await Watched.start(rig, "vf1", "nic0", "d1")
        measured = await alternate_async(size.of(40, 2), driver.longest_wait_ms, Floor(rig).once)
        await rig.cluster.stop_workloads()
    return [
        measured.quantile("blackout p50 / floor, small state", "ms", at_most(1.5), 0.5),
        measured.quantile("blackout p99 / floor's p50, small state", "ms", at_most(3), 0.99),
    ]


class Watched:
    """A function that goes to and fro between h2 and h3 under a workload on h1, which tells how long it waited."""

    def __init__(self, rig: Bench, function: str, device: str, driver: str) -> None:
        self._rig = rig
        self._function, self._device, self._driver = function, device, driver
        self._moves = 0

    @classmethod
    async def start(cls, rig: Bench, function: str, device: str, driver: str) -> Self:
        """Make the function on h2 and let its driver work, in the first page of local memory."""
        cluster = rig.cluster
        await cluster.fleet.create_function(function, f"h2/{device}")
        await cluster.fleet.attach_driver(function, driver, host="h1")
        options = WorkloadOptions(accesses_per_second=RATE, window=1, memory_bytes=PAGE_BYTES)
        await cluster.hosts["h1"].start_workload(driver, function, options)
        cluster.workloads[driver, function] = "h1"
        return cls(rig, function, device, driver)

    async def move(self, **options: int) -> Migration:
        """Move the function to the other host."""
        self._moves += 1
        target = f"{('h2', 'h3')[self._moves % 2]}/{self._device}"
        migration = await self._rig.cluster.move(f"{self._function}-{self._moves}", {self._function: target}, **options)
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
        return migration

    async def longest_wait_ms(self, **options: int) -> float:
        """Move the function and return the longest wait of its driver meanwhile, in milliseconds."""
        return milliseconds((await self.watch(**options)).longest_gap)

    async def watch(self, **options: int) -> WorkloadReport:
        """Move the function and return what its driver noticed."""
        host = self._rig.cluster.hosts["h1"]
        await host.workload_report(self._driver, self._function, restart_measurement=True)
        await asyncio.sleep(QUIET_S)
        await self.move(**options)
        await self._rig.cluster.until_working([(self._driver, self._function)], operations=100)
        return await host.workload_report(self._driver, self._function)


def milliseconds(duration: Duration) -> float:
    return duration.ToNanoseconds() / 1e6


class Floor:
    """Two calls and one transaction."""

    def __init__(self, rig: Bench) -> None:
        self._holds = HoldServiceStub(rig.channel(0))
        self._tables = TranslationServiceStub(rig.channel(1))
        self._etcd = rig.etcd()

    async def once(self) -> float:
        began = time.perf_counter()
        await self._holds.PlaceHold(PlaceHoldRequest(migration="m"))
        assert (await self._etcd.Txn(bare_etcd.commit("m"))).succeeded
        await self._tables.UpdateTable(UpdateTableRequest(lift=True))
        return (time.perf_counter() - began) * 1e3
