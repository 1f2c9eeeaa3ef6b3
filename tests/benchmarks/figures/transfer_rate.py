"""How fast state goes from host to host, over a bare gRPC stream of chunks of the same size.

Ours: 256 MiB of local memory, all of it written, from h2 to h3 and back. A sample is the migration's COPY step: the
first round, which sends everything, and those that follow it, since no driver writes meanwhile.

Floor: one bare host pulls as many chunks from another, on the same library and with the same message around them, and
takes the length of each. No chunk is read from memory, checked or stored.
"""

import time

from benchmarks.measure import Figure, Size, alternate_async, at_least
from benchmarks.rig import Bench, bench

from hostd.transfer import CHUNK_PAGES
from vfleet.address import PAGE_BYTES
from vfleet.driver import DriverClient, Write
from vfleet.v1.records_pb2 import Phase, Step
from vfleet.v1.transfer_service_pb2 import CopyOptions, ImportStateRequest
from vfleet.v1.transfer_service_pb2_grpc import TransferServiceStub

CHUNK_BYTES = CHUNK_PAGES * PAGE_BYTES
MEBIBYTE = 1 << 20
OPTIONS = {"prepare_timeout_ms": 120_000}


async def run(size: Size) -> list[Figure]:
    mebibytes = size.of(256, 2)
    async with bench(bare=2, bars={0: "4KiB", 2: f"{mebibytes}MiB"}) as rig:
        await rig.cluster.fleet.create_function("vf1", "h2/nic0")
        await fill(rig, "vf1", "d1", mebibytes)
        turns = iter(range(1 << 30))

        async def ours() -> float:
            turn = next(turns)
            migration = await rig.cluster.move(f"m{turn}", {"vf1": ("h3/nic0", "h2/nic0")[turn % 2]}, **OPTIONS)
            assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
            return copy_seconds(migration) / mebibytes * 1e3

        async def floor() -> float:
            request = ImportStateRequest(
                source_address=rig.bare[0],
                source_generation=CHUNK_BYTES,
                options=CopyOptions(max_rounds=mebibytes * MEBIBYTE // CHUNK_BYTES),
            )
            began = time.perf_counter()
            async for response in TransferServiceStub(rig.channel(1)).ImportState(request):
                assert response.received_bytes == mebibytes * MEBIBYTE
            return (time.perf_counter() - began) / mebibytes * 1e3

        measured = await alternate_async(size.of(5, 1), ours, floor)
    return [measured.speed("state transfer rate / bare stream", "ms a MiB", at_least(0.8))]


async def fill(rig: Bench, function: str, driver: str, mebibytes: int) -> int:
    """Write all of a function's local memory but its first page, by a driver on h1; return where that memory starts."""
    entry = await rig.cluster.fleet.attach_driver(function, driver, host="h1")
    start = entry.virtual_address + mebibytes * MEBIBYTE  # its natural alignment
    client = DriverClient(rig.cluster.hosts["h1"], driver)
    page = bytes(range(256)) * (PAGE_BYTES // 256)
    writes = [Write(start + offset, page) for offset in range(PAGE_BYTES, mebibytes * MEBIBYTE, PAGE_BYTES)]
    await client.access_many(writes)
    return start


def copy_seconds(migration) -> float:
    """Return how long a migration's COPY step took."""
    (copy,) = (step for step in migration.steps if step.step == Step.STEP_COPY)
    return copy.duration.ToNanoseconds() / 1e9
