"""Migrations a second, 64 at once, each of one function with small state, over the same calls and transactions alone.

Ours: 64 functions with a driver each go to and fro between h2 and h3, all begun at once by one client of one
coordinator. A sample is from the first request to the last DONE, over 64.

Floor: the same calls and transactions between as many processes, 64 sequences at once, on bare stubs and servers. A
client asks a bare coordinator, and waits for the end by a second call; that makes BEGIN; create; import, for which one
bare host pulls a part of the state from another; hold and stop at once; COMMIT; update; destroy; FINISH. The
transactions have as many comparisons and writes as ours, of the same sizes, and go to the same etcd. Nothing is
planned, decided, recorded by a host or watched in etcd.
"""

import asyncio
import time

from benchmarks.measure import Figure, Size, alternate_async, at_least
from benchmarks.rig import Bench, bench

from vfleet.client import move_request
from vfleet.v1.migration_service_pb2 import CreateMigrationRequest, WatchMigrationRequest
from vfleet.v1.migration_service_pb2_grpc import MigrationServiceStub
from vfleet.v1.records_pb2 import Phase

MIGRATIONS = 64
ATTACH_AT_ONCE = 8


async def run(size: Size) -> list[Figure]:
    count = size.of(MIGRATIONS, 4)
    async with bench(bare=3) as rig:
        await rig.start("benchmarks.bare_coordinator", *rig.cluster.local.etcd[:1], *rig.bare)
        room = asyncio.Semaphore(ATTACH_AT_ONCE)

        async def make(number: int) -> None:
            async with room:
                await rig.cluster.fleet.create_function(f"vf{number}", "h2/nic0" if number % 2 else "h2/nic1")
                await rig.cluster.fleet.attach_driver(f"vf{number}", f"d{number}", host="h1")

        await asyncio.gather(*(make(number) for number in range(count)))
        turns = iter(range(1 << 30))

        async def ours() -> float:
            turn = next(turns)
            host = ("h3", "h2")[turn % 2]
            began = time.perf_counter()
            ended = await asyncio.gather(
                *(
                    rig.cluster.move(f"m{turn}-{number}", {f"vf{number}": f"{host}/nic{number % 2}"})
                    for number in range(count)
                )
            )
            spent = time.perf_counter() - began
            assert {migration.phase for migration in ended} == {Phase.PHASE_DONE}
            return spent / count * 1e3

        floor = Floor(rig)
        measured = await alternate_async(size.of(6, 1), ours, lambda: floor.run(count))
    return [measured.speed("migrations, 64 at once / bare calls and transactions", "ms a migration", at_least(0.6))]


class Floor:
    """Host 0 has the driver; functions go from host 1 to host 2, again and again. The fourth process coordinates."""

    def __init__(self, rig: Bench) -> None:
        self._migrations = MigrationServiceStub(rig.channel(3))
        self._turns = iter(range(1 << 30))

    async def run(self, count: int) -> float:
        turn = next(self._turns)
        began = time.perf_counter()
        await asyncio.gather(*(self._migrate(f"m{turn}-{number}", f"vf{number}") for number in range(count)))
        return (time.perf_counter() - began) / count * 1e3

    async def _migrate(self, name: str, function: str) -> None:
        request = CreateMigrationRequest(request_id=name, moves=[move_request(function, "h3/nic0")])
        await self._migrations.CreateMigration(request)
        async for response in self._migrations.WatchMigration(WatchMigrationRequest(name=name, until_over=True)):
            assert response.migration.phase == Phase.PHASE_DONE
