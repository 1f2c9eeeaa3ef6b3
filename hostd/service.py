"""The gRPC edge of a host: one servicer a service, each method a call of the room that does the work."""

# ruff: noqa: N802, ARG002, D102  # methods are named, called and described as the protos say

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TypeAlias

import grpc
from google.protobuf.message import Message

from hostd import home, rest, transfer
from hostd.client_access import ClientAccess
from hostd.dma_exchange import exchange_all
from hostd.host import Host
from vfleet.errors import invalid_field
from vfleet.v1 import driver_service_pb2 as driver_pb2
from vfleet.v1 import fabric_service_pb2 as fabric_pb2
from vfleet.v1 import function_service_pb2 as function_pb2
from vfleet.v1 import hold_service_pb2 as hold_pb2
from vfleet.v1 import transfer_service_pb2 as transfer_pb2
from vfleet.v1 import translation_service_pb2 as translation_pb2
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE
from vfleet.v1.driver_service_pb2_grpc import DriverServiceServicer, add_DriverServiceServicer_to_server
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceServicer, add_FabricServiceServicer_to_server
from vfleet.v1.function_service_pb2_grpc import FunctionServiceServicer, add_FunctionServiceServicer_to_server
from vfleet.v1.hold_service_pb2_grpc import HoldServiceServicer, add_HoldServiceServicer_to_server
from vfleet.v1.transfer_service_pb2_grpc import TransferServiceServicer, add_TransferServiceServicer_to_server
from vfleet.v1.translation_service_pb2_grpc import TranslationServiceServicer, add_TranslationServiceServicer_to_server
from vfleet.v1.types_pb2 import DEVICE_STATE_RUNNING, DEVICE_STATE_STOP_COPY

SERVICE_NAMES = tuple(
    f"vfleet.v1.{name}Service" for name in ("Function", "Hold", "Translation", "Transfer", "Driver", "Fabric")
)

_Context: TypeAlias = "grpc.aio.ServicerContext[Message, Message]"


class FunctionServicer(FunctionServiceServicer):
    """FunctionService of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._functions = host.functions

    async def CreateFunction(
        self, request: function_pb2.CreateFunctionRequest, context: _Context
    ) -> function_pb2.CreateFunctionResponse:
        return function_pb2.CreateFunctionResponse(instance=self._functions.create(request).shown())

    async def DestroyFunction(
        self, request: function_pb2.DestroyFunctionRequest, context: _Context
    ) -> function_pb2.DestroyFunctionResponse:
        if self._functions.may_end_home(request):
            # Whoever says so may have read an etcd that was restored from a backup. A scrub, which every migration
            # ends with, does not come here.
            await self._host.registration.check()
        self._functions.destroy(request, self._host.history.generation)
        return function_pb2.DestroyFunctionResponse()

    async def GetFunction(
        self, request: function_pb2.GetFunctionRequest, context: _Context
    ) -> function_pb2.GetFunctionResponse:
        instance = self._functions.require(request.function, request.generation)
        return function_pb2.GetFunctionResponse(instance=instance.shown())

    async def ListFunctions(
        self, request: function_pb2.ListFunctionsRequest, context: _Context
    ) -> function_pb2.ListFunctionsResponse:
        return function_pb2.ListFunctionsResponse(instances=[i.shown() for i in self._functions.instances()])

    async def ChangeState(
        self, request: function_pb2.ChangeStateRequest, context: _Context
    ) -> function_pb2.ChangeStateResponse:
        if request.state == DEVICE_STATE_STOP_COPY:
            return function_pb2.ChangeStateResponse(instance=self._functions.stop(request).shown())
        if request.state != DEVICE_STATE_RUNNING:
            raise invalid_field("state", request.state, f"{DEVICE_STATE_STOP_COPY} (STOP_COPY) or 2 (RUNNING)")
        # Whoever says so may have read an etcd that was restored from a backup.
        await self._host.registration.check()
        instance = self._functions.resume(request, self._host.history.generation)
        return function_pb2.ChangeStateResponse(instance=instance.shown() if instance is not None else None)

    async def ResetFunction(
        self, request: function_pb2.ResetFunctionRequest, context: _Context
    ) -> function_pb2.ResetFunctionResponse:
        self._functions.reset(request)
        return function_pb2.ResetFunctionResponse()

    async def InjectFault(
        self, request: function_pb2.InjectFaultRequest, context: _Context
    ) -> function_pb2.InjectFaultResponse:
        self._host.engines.inject(request)
        return function_pb2.InjectFaultResponse()


class HoldServicer(HoldServiceServicer):
    """HoldService of one host."""

    def __init__(self, host: Host) -> None:
        self._drivers = host.drivers

    async def PlaceHold(self, request: hold_pb2.PlaceHoldRequest, context: _Context) -> hold_pb2.PlaceHoldResponse:
        return hold_pb2.PlaceHoldResponse(unacknowledged_drivers=await self._drivers.place_hold(request))

    async def LiftHold(self, request: hold_pb2.LiftHoldRequest, context: _Context) -> hold_pb2.LiftHoldResponse:
        self._drivers.lift(request)
        return hold_pb2.LiftHoldResponse()

    async def ListHolds(self, request: hold_pb2.ListHoldsRequest, context: _Context) -> hold_pb2.ListHoldsResponse:
        return hold_pb2.ListHoldsResponse(holds=self._drivers.holds())


class TranslationServicer(TranslationServiceServicer):
    """TranslationService of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._drivers = host.drivers
        self._client = ClientAccess(host.drivers, host.workloads)

    async def GetTable(
        self, request: translation_pb2.GetTableRequest, context: _Context
    ) -> translation_pb2.GetTableResponse:
        table = self._drivers.require(request.driver).table
        return translation_pb2.GetTableResponse(entries=[entry.to_proto() for entry in table.entries])

    async def UpdateTable(
        self, request: translation_pb2.UpdateTableRequest, context: _Context
    ) -> translation_pb2.UpdateTableResponse:
        if request.goes_back:
            # Whoever says so may have read an etcd that was restored from a backup.
            await self._host.registration.check()
        self._drivers.update(request, self._host.history.generation)
        return translation_pb2.UpdateTableResponse()

    async def WatchTable(
        self, request: translation_pb2.WatchTableRequest, context: _Context
    ) -> AsyncIterator[translation_pb2.WatchTableResponse]:
        async with aclosing(self._client.tables(request.driver)) as tables:
            async for entries in tables:
                yield translation_pb2.WatchTableResponse(entries=entries)


class TransferServicer(TransferServiceServicer):
    """TransferService of one host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def ExportState(
        self, request: transfer_pb2.ExportStateRequest, context: _Context
    ) -> AsyncIterator[transfer_pb2.ExportStateResponse]:
        await self._host.neighbours.check_pulls(request.function, request.attempt)
        async with aclosing(transfer.export_state(self._host.functions, self._host.clock, request)) as parts:
            async for part in parts:
                yield part

    async def ImportState(
        self, request: transfer_pb2.ImportStateRequest, context: _Context
    ) -> AsyncIterator[transfer_pb2.ImportStateResponse]:
        async with aclosing(transfer.import_state(self._host.functions, self._host.channels, request)) as progress:
            received = 0
            async for step in progress:
                self._host.traffic.state_bytes += step.received_bytes - received
                received = step.received_bytes
                yield step

    async def FetchState(
        self, request: transfer_pb2.FetchStateRequest, context: _Context
    ) -> AsyncIterator[transfer_pb2.FetchStateResponse]:
        await self._host.neighbours.check_pulls(request.function, request.attempt)
        async with aclosing(transfer.fetch_state(self._host.functions, self._host.clock, request)) as pages:
            async for response in pages:
                yield response

    async def WatchArrival(
        self, request: transfer_pb2.WatchArrivalRequest, context: _Context
    ) -> AsyncIterator[transfer_pb2.WatchArrivalResponse]:
        async with aclosing(rest.watch_arrival(self._host.functions, self._host.clock, request)) as progress:
            async for step in progress:
                yield step


class FabricServicer(FabricServiceServicer):
    """FabricService of one host."""

    def __init__(self, host: Host) -> None:
        self._functions = host.functions
        self._drivers = host.drivers
        self._switch = host.switch
        self._traffic = host.traffic
        self._neighbours = host.neighbours

    async def Exchange(
        self, request_iterator: AsyncIterator[fabric_pb2.ExchangeRequest], context: _Context
    ) -> AsyncIterator[fabric_pb2.ExchangeResponse]:
        async for request in request_iterator:
            if not self._neighbours.may_access(request.driver, request.function):
                yield home.refused(request, fabric_pb2.REFUSAL_NOT_SERVING)
                continue
            await home.let_arrive(self._functions, request)
            response = home.exchange(self._functions, request)
            self._traffic.exchanged(response)
            yield response

    async def GetSequence(
        self, request: fabric_pb2.GetSequenceRequest, context: _Context
    ) -> fabric_pb2.GetSequenceResponse:
        if not self._neighbours.may_access(request.driver, request.function):
            raise home.not_served(request, "the driver is not known to be attached")
        return fabric_pb2.GetSequenceResponse(last_sequence=home.last_sequence(self._functions, request))

    async def ForgetDriver(
        self, request: fabric_pb2.ForgetDriverRequest, context: _Context
    ) -> fabric_pb2.ForgetDriverResponse:
        self._neighbours.check_forgets(request.driver, request.function)
        home.forget_driver(self._functions, request)
        return fabric_pb2.ForgetDriverResponse()

    async def ExchangeDma(
        self, request_iterator: AsyncIterator[fabric_pb2.ExchangeDmaRequest], context: _Context
    ) -> AsyncIterator[fabric_pb2.ExchangeDmaResponse]:
        async for response in exchange_all(self._drivers, request_iterator, self._neighbours.check_masters):
            yield response

    async def DeliverFrames(
        self, request: fabric_pb2.DeliverFramesRequest, context: _Context
    ) -> fabric_pb2.DeliverFramesResponse:
        if not self._neighbours.may_deliver(request.sender):
            return fabric_pb2.DeliverFramesResponse(refusal=fabric_pb2.FRAME_REFUSAL_NOT_SERVING)
        return self._switch.take(request)


class DriverServicer(DriverServiceServicer):
    """DriverService of one host."""

    def __init__(self, host: Host) -> None:
        self._drivers = host.drivers
        self._workloads = host.workloads
        self._client = ClientAccess(host.drivers, host.workloads)

    async def CreateDriver(
        self, request: driver_pb2.CreateDriverRequest, context: _Context
    ) -> driver_pb2.CreateDriverResponse:
        guest = request.guest if request.HasField("guest") else None
        driver = self._drivers.create(request.driver, request.main_memory_bytes, request.revision, guest)
        return driver_pb2.CreateDriverResponse(state=self._drivers.state(driver))

    async def DeleteDriver(
        self, request: driver_pb2.DeleteDriverRequest, context: _Context
    ) -> driver_pb2.DeleteDriverResponse:
        self._drivers.delete(request.driver)
        return driver_pb2.DeleteDriverResponse()

    async def GetDriver(self, request: driver_pb2.GetDriverRequest, context: _Context) -> driver_pb2.GetDriverResponse:
        return driver_pb2.GetDriverResponse(state=self._drivers.state(self._drivers.require(request.driver)))

    async def ListDrivers(
        self, request: driver_pb2.ListDriversRequest, context: _Context
    ) -> driver_pb2.ListDriversResponse:
        return driver_pb2.ListDriversResponse(drivers=[self._drivers.state(d) for d in self._drivers.all()])

    async def AttachFunction(
        self, request: driver_pb2.AttachFunctionRequest, context: _Context
    ) -> driver_pb2.AttachFunctionResponse:
        self._drivers.attach(request.entry)
        return driver_pb2.AttachFunctionResponse()

    async def DetachFunction(
        self, request: driver_pb2.DetachFunctionRequest, context: _Context
    ) -> driver_pb2.DetachFunctionResponse:
        self._drivers.detach(request.driver, request.function, request.revision)
        return driver_pb2.DetachFunctionResponse()

    async def Read(self, request: driver_pb2.ReadRequest, context: _Context) -> driver_pb2.ReadResponse:
        (status, data), sequence = await self._client.access(
            request.driver, ACCESS_KIND_READ, request.virtual_address, request.length_bytes, b"", request.sequence
        )
        return driver_pb2.ReadResponse(data=data, status=status, sequence=sequence)

    async def Write(self, request: driver_pb2.WriteRequest, context: _Context) -> driver_pb2.WriteResponse:
        (status, _), sequence = await self._client.access(
            request.driver,
            ACCESS_KIND_WRITE,
            request.virtual_address,
            len(request.data),
            request.data,
            request.sequence,
        )
        return driver_pb2.WriteResponse(status=status, sequence=sequence)

    async def AccessMany(
        self, request: driver_pb2.AccessManyRequest, context: _Context
    ) -> driver_pb2.AccessManyResponse:
        return driver_pb2.AccessManyResponse(answers=await self._client.access_many(request.driver, request.accesses))

    async def StreamAccesses(
        self, request_iterator: AsyncIterator[driver_pb2.StreamAccessesRequest], context: _Context
    ) -> AsyncIterator[driver_pb2.StreamAccessesResponse]:
        async with aclosing(self._client.stream(request_iterator)) as answers:
            async for answer in answers:
                yield answer

    async def WatchNotifications(
        self, request: driver_pb2.WatchNotificationsRequest, context: _Context
    ) -> AsyncIterator[driver_pb2.WatchNotificationsResponse]:
        async with aclosing(self._client.notifications(request.driver)) as notifications:
            async for notification in notifications:
                yield notification

    async def AcknowledgeHold(
        self, request: driver_pb2.AcknowledgeHoldRequest, context: _Context
    ) -> driver_pb2.AcknowledgeHoldResponse:
        self._drivers.acknowledge(request.driver, request.function, request.attempt)
        return driver_pb2.AcknowledgeHoldResponse()

    async def StartWorkload(
        self, request: driver_pb2.StartWorkloadRequest, context: _Context
    ) -> driver_pb2.StartWorkloadResponse:
        await self._workloads.start(request)
        return driver_pb2.StartWorkloadResponse()

    async def StopWorkload(
        self, request: driver_pb2.StopWorkloadRequest, context: _Context
    ) -> driver_pb2.StopWorkloadResponse:
        return driver_pb2.StopWorkloadResponse(report=await self._workloads.stop(request.driver, request.function))

    async def GetWorkloadReport(
        self, request: driver_pb2.GetWorkloadReportRequest, context: _Context
    ) -> driver_pb2.GetWorkloadReportResponse:
        report = self._workloads.report(
            request.driver, request.function, restart_measurement=request.restart_measurement
        )
        return driver_pb2.GetWorkloadReportResponse(report=report)


def add_services(host: Host, server: grpc.aio.Server) -> None:
    """Let a server serve a host."""
    add_FunctionServiceServicer_to_server(FunctionServicer(host), server)
    add_HoldServiceServicer_to_server(HoldServicer(host), server)
    add_TranslationServiceServicer_to_server(TranslationServicer(host), server)
    add_TransferServiceServicer_to_server(TransferServicer(host), server)
    add_DriverServiceServicer_to_server(DriverServicer(host), server)
    add_FabricServiceServicer_to_server(FabricServicer(host), server)
