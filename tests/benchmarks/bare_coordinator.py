"""A coordinator with nothing in it: a migration is its calls and transactions, one after the other. For a floor.

`python -m benchmarks.bare_coordinator ETCD DRIVERS_HOST SOURCE TARGET` prints its address as daemons do. Nothing is
planned, checked, watched or kept.
"""

# ruff: noqa: N802  # methods are named as the protos say

import asyncio
import sys
from collections.abc import AsyncIterator

import grpc
from benchmarks import bare_etcd
from benchmarks.bare import OPTIONS, serve
from etcd3 import etcdrpc

from vfleet.v1 import migration_service_pb2 as migration_pb2
from vfleet.v1.function_service_pb2 import ChangeStateRequest, CreateFunctionRequest, DestroyFunctionRequest
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.hold_service_pb2 import PlaceHoldRequest
from vfleet.v1.hold_service_pb2_grpc import HoldServiceStub
from vfleet.v1.migration_service_pb2_grpc import MigrationServiceServicer, add_MigrationServiceServicer_to_server
from vfleet.v1.records_pb2 import Migration, Phase
from vfleet.v1.transfer_service_pb2 import CopyOptions, ImportStateRequest
from vfleet.v1.transfer_service_pb2_grpc import TransferServiceStub
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.translation_service_pb2_grpc import TranslationServiceStub

STATE_BYTES = 4096


class Migrations(MigrationServiceServicer):
    """Moves a function of which only the name is known, always from the same host to the same other."""

    def __init__(self, etcd: str, driver: str, source: str, target: str) -> None:
        self._etcd = etcdrpc.KVStub(grpc.aio.insecure_channel(etcd))
        channels = [grpc.aio.insecure_channel(address, options=OPTIONS) for address in (driver, source, target)]
        self._holds, self._tables = HoldServiceStub(channels[0]), TranslationServiceStub(channels[0])
        self._source, self._target = FunctionServiceStub(channels[1]), FunctionServiceStub(channels[2])
        self._transfer = TransferServiceStub(channels[2])
        self._source_address = source
        self._running: dict[str, asyncio.Task[None]] = {}

    async def CreateMigration(self, request, context):
        name = request.request_id
        await self._commit(bare_etcd.begin(name))
        self._running[name] = asyncio.create_task(self._migrate(name))
        return migration_pb2.CreateMigrationResponse(migration=Migration(name=name))

    async def WatchMigration(self, request, context) -> AsyncIterator[migration_pb2.WatchMigrationResponse]:
        await self._running.pop(request.name)
        yield migration_pb2.WatchMigrationResponse(migration=Migration(name=request.name, phase=Phase.PHASE_DONE))

    async def _migrate(self, function: str) -> None:
        await self._target.CreateFunction(CreateFunctionRequest(function=function))
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        importing = asyncio.create_task(self._import(function, ready))
        await ready
        await asyncio.gather(
            self._holds.PlaceHold(PlaceHoldRequest(migration=function)),
            self._source.ChangeState(ChangeStateRequest(function=function)),
            importing,
        )
        await self._commit(bare_etcd.commit(function))
        await self._tables.UpdateTable(UpdateTableRequest(lift=True))
        await self._source.DestroyFunction(DestroyFunctionRequest(function=function))
        await self._commit(bare_etcd.finish(function))

    async def _import(self, function: str, ready: "asyncio.Future[None]") -> None:
        request = ImportStateRequest(
            function=function,
            source_address=self._source_address,
            source_generation=STATE_BYTES,
            options=CopyOptions(max_rounds=1),
        )
        async for response in self._transfer.ImportState(request):
            if response.ready_to_stop:
                ready.set_result(None)

    async def _commit(self, transaction: etcdrpc.TxnRequest) -> None:
        response: etcdrpc.TxnResponse = await self._etcd.Txn(transaction)
        assert response.succeeded


async def main() -> None:
    migrations = Migrations(*sys.argv[1:5])
    await serve(lambda server: add_MigrationServiceServicer_to_server(migrations, server))


if __name__ == "__main__":
    asyncio.run(main())
