"""Migrations a second, 64 at once, each of one function with small state, over the same calls and transactions alone.

Ours: 64 functions with a driver each go to and fro between h2 and h3, all begun at once by one client of one
coordinator. A sample is from the first request to the last DONE, over 64.

Floor: one process makes the same calls and transactions, 64 sequences at once, on bare stubs: a client's request;
BEGIN; create; import, for which one bare host pulls a part of the state from the other; hold and stop at once; COMMIT;
update; destroy; FINISH. The transactions have the sizes of ours and go to the same etcd. Nothing is planned, decided,
recorded by a host or watched.
"""

import asyncio
import time

from benchmarks.figures.blackout import transaction
from benchmarks.measure import Figure, Size, alternate_async, at_least
from benchmarks.rig import Bench, bench
from etcd3 import etcdrpc

from vfleet.v1.function_service_pb2 import ChangeStateRequest, CreateFunctionRequest, DestroyFunctionRequest
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.hold_service_pb2 import PlaceHoldRequest
from vfleet.v1.hold_service_pb2_grpc import HoldServiceStub
from vfleet.v1.records_pb2 import Phase
from vfleet.v1.transfer_service_pb2 import CopyOptions, ImportStateRequest
from vfleet.v1.transfer_service_pb2_grpc import TransferServiceStub
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.translation_service_pb2_grpc import TranslationServiceStub

MIGRATIONS = 64
STATE_BYTES = 4096
ATTACH_AT_ONCE = 8


async def run(size: Size) -> list[Figure]:
    count = size.of(MIGRATIONS, 4)
    async with bench(bare=3) as rig:
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
    """Host 0 has the driver, 1 and 2 the function, by turns."""

    def __init__(self, rig: Bench) -> None:
        self._channels = [rig.channel(number) for number in range(3)]
        self._addresses = rig.bare
        self._etcd = rig.etcd()

    async def run(self, count: int) -> float:
        began = time.perf_counter()
        await asyncio.gather(*(self._migrate(f"vf{number}") for number in range(count)))
        return (time.perf_counter() - began) / count * 1e3

    async def _migrate(self, function: str) -> None:
        driver, source, target = self._channels
        functions = FunctionServiceStub(target)
        # The request of a client.
        await FunctionServiceStub(driver).DestroyFunction(DestroyFunctionRequest(function=function))
        await self._commit(function)
        await functions.CreateFunction(CreateFunctionRequest(function=function))
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        importing = asyncio.create_task(self._import(function, ready))
        await ready
        await asyncio.gather(
            HoldServiceStub(driver).PlaceHold(PlaceHoldRequest(migration=function)),
            FunctionServiceStub(source).ChangeState(ChangeStateRequest(function=function)),
            importing,
        )
        await self._commit(function)
        await TranslationServiceStub(driver).UpdateTable(UpdateTableRequest(lift=True))
        await FunctionServiceStub(source).DestroyFunction(DestroyFunctionRequest(function=function))
        await self._commit(function)

    async def _import(self, function: str, ready: "asyncio.Future[None]") -> None:
        request = ImportStateRequest(
            function=function,
            source_address=self._addresses[1],
            source_generation=STATE_BYTES,
            options=CopyOptions(max_rounds=1),
        )
        async for response in TransferServiceStub(self._channels[2]).ImportState(request):
            if response.ready_to_stop:
                ready.set_result(None)

    async def _commit(self, function: str) -> None:
        response: etcdrpc.TxnResponse = await self._etcd.Txn(transaction(function))
        assert response.succeeded
