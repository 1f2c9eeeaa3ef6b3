"""A host with nothing in it: hostd's services on the same library, answering with messages alone. For floors.

`python -m benchmarks.bare` prints its address as daemons do. Where a floor needs a number (how many parts a state has,
how long each), it stands in a field of the request that has no other meaning here, as each method says.
"""

# ruff: noqa: N802  # methods are named as the protos say

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable

import grpc

from vfleet.rpc import MAX_MESSAGE_BYTES
from vfleet.v1 import fabric_service_pb2 as fabric_pb2
from vfleet.v1 import function_service_pb2 as function_pb2
from vfleet.v1 import hold_service_pb2 as hold_pb2
from vfleet.v1 import transfer_service_pb2 as transfer_pb2
from vfleet.v1 import translation_service_pb2 as translation_pb2
from vfleet.v1.access_pb2 import ACCESS_STATUS_OK
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceServicer, add_FabricServiceServicer_to_server
from vfleet.v1.function_service_pb2_grpc import FunctionServiceServicer, add_FunctionServiceServicer_to_server
from vfleet.v1.hold_service_pb2_grpc import HoldServiceServicer, add_HoldServiceServicer_to_server
from vfleet.v1.transfer_service_pb2_grpc import (
    TransferServiceServicer,
    TransferServiceStub,
    add_TransferServiceServicer_to_server,
)
from vfleet.v1.translation_service_pb2_grpc import TranslationServiceServicer, add_TranslationServiceServicer_to_server

OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
]


class Function(FunctionServiceServicer):
    """Makes nothing. A stop ends the exports that wait for it."""

    def __init__(self) -> None:
        self.stopped: dict[str, asyncio.Event] = {}

    async def CreateFunction(self, request, context):
        return function_pb2.CreateFunctionResponse()

    async def ChangeState(self, request, context):
        self.stopped.setdefault(request.function, asyncio.Event()).set()
        return function_pb2.ChangeStateResponse()

    async def DestroyFunction(self, request, context):
        return function_pb2.DestroyFunctionResponse()


class Hold(HoldServiceServicer):
    async def PlaceHold(self, request, context):
        return hold_pb2.PlaceHoldResponse()


class Translation(TranslationServiceServicer):
    async def UpdateTable(self, request, context):
        return translation_pb2.UpdateTableResponse()


class Transfer(TransferServiceServicer):
    """`options.max_rounds` parts of `generation` bytes; with a migration, the export's last part waits for the stop."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def ExportState(self, request, context) -> AsyncIterator[transfer_pb2.ExportStateResponse]:
        data = bytes(request.generation)
        for number in range(request.options.max_rounds):
            pages = transfer_pb2.StatePages(image_offset=number * len(data), data=data)
            yield transfer_pb2.ExportStateResponse(pages=pages)
        if request.function:
            yield transfer_pb2.ExportStateResponse(round_end=transfer_pb2.RoundEnd(round=1, last_before_stop=True))
            await self._function.stopped.setdefault(request.function, asyncio.Event()).wait()
            del self._function.stopped[request.function]
            yield transfer_pb2.ExportStateResponse(end=transfer_pb2.StateEnd())

    async def ImportState(self, request, context) -> AsyncIterator[transfer_pb2.ImportStateResponse]:
        source = request.source_address
        if source not in self._channels:
            self._channels[source] = grpc.aio.insecure_channel(source, options=OPTIONS)
        export = transfer_pb2.ExportStateRequest(
            function=request.function, generation=request.source_generation, options=request.options
        )
        received = 0
        async for part in TransferServiceStub(self._channels[source]).ExportState(export):
            received += len(part.pages.data)
            if part.HasField("round_end"):
                yield transfer_pb2.ImportStateResponse(ready_to_stop=True, received_bytes=received)
        yield transfer_pb2.ImportStateResponse(complete=True, received_bytes=received)


class Fabric(FabricServiceServicer):
    """Answers each access of a batch, with as many zeros as it asks for."""

    async def Exchange(self, request_iterator, context) -> AsyncIterator[fabric_pb2.ExchangeResponse]:
        async for request in request_iterator:
            response = fabric_pb2.ExchangeResponse(
                driver=request.driver,
                function=request.function,
                generation=request.generation,
                session=request.session,
            )
            for access in request.accesses:
                answer = response.answers.add()
                answer.sequence = access.sequence
                answer.status = ACCESS_STATUS_OK
                if not access.data:
                    answer.data = bytes(access.length_bytes)
            yield response


async def serve(add_services: Callable[[grpc.aio.Server], None]) -> None:
    """Serve for ever, and say where."""
    server = grpc.aio.server(options=OPTIONS)
    add_services(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(json.dumps({"address": f"127.0.0.1:{port}"}) + "\n")
    sys.stdout.flush()
    await server.wait_for_termination()


def add_host(server: grpc.aio.Server) -> None:
    function = Function()
    add_FunctionServiceServicer_to_server(function, server)
    add_HoldServiceServicer_to_server(Hold(), server)
    add_TranslationServiceServicer_to_server(Translation(), server)
    add_TransferServiceServicer_to_server(Transfer(function), server)
    add_FabricServiceServicer_to_server(Fabric(), server)


if __name__ == "__main__":
    asyncio.run(serve(add_host))
