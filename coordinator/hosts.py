"""Calls to hosts: each by the host's name, with a deadline of its own, and an error that names host and method.

A host is called only while it is registered: the address of one that isn't may be another's by now.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import grpc

from coordinator.findings import HostState, Request
from coordinator.inventory import Inventory
from coordinator.planner import registered_incarnation
from coordinator.tasks import Tasks
from vfleet.errors import VfleetError, is_broken, not_found
from vfleet.principal import server_name
from vfleet.roles import Role
from vfleet.rpc import Channels, RequestT, ResponseT, StubT, call, stream
from vfleet.v1.driver_service_pb2 import (
    AttachFunctionRequest,
    CreateDriverRequest,
    DeleteDriverRequest,
    DetachFunctionRequest,
    ListDriversRequest,
)
from vfleet.v1.driver_service_pb2_grpc import DriverServiceStub
from vfleet.v1.fabric_service_pb2 import ForgetDriverRequest
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceStub
from vfleet.v1.function_service_pb2 import (
    ChangeStateRequest,
    CreateFunctionRequest,
    DestroyFunctionRequest,
    ListFunctionsRequest,
)
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.hold_service_pb2 import LiftHoldRequest, ListHoldsRequest, PlaceHoldRequest
from vfleet.v1.hold_service_pb2_grpc import HoldServiceStub
from vfleet.v1.records_pb2 import Host
from vfleet.v1.transfer_service_pb2 import (
    ImportStateRequest,
    ImportStateResponse,
    WatchArrivalRequest,
    WatchArrivalResponse,
)
from vfleet.v1.transfer_service_pb2_grpc import TransferServiceStub
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.translation_service_pb2_grpc import TranslationServiceStub

CREATE_FUNCTION_TIMEOUT_S = 30.0  # it reserves, and for a fresh function zeroes, gigabytes
DESTROY_FUNCTION_TIMEOUT_S = 30.0  # it zeroes gigabytes
CHANGE_STATE_TIMEOUT_S = 5.0
HOLD_TIMEOUT_S = 5.0  # beyond the time for acknowledgement
TABLE_TIMEOUT_S = 5.0
DRIVER_TIMEOUT_S = 10.0
LIST_TIMEOUT_S = 5.0
END_TIMEOUT_S = 5.0  # of a stream that has said all

_log = logging.getLogger(__name__)


class Hosts:
    """The fleet's hosts, as the inventory knows them, over `channels`.

    Every method raises the VfleetError that the host answers with, or HOST_UNAVAILABLE or UNREACHABLE; the message
    begins with the host's name. A request that has raised UNREACHABLE may or may not have been carried out.

    What is answered once is sent once more if its connection breaks before the answer: hosts take every request twice.
    """

    def __init__(self, inventory: Inventory, channels: Channels, check: Callable[[], None] = lambda: None) -> None:
        self._inventory = inventory
        self._channels = channels
        self._check = check
        self._ending = Tasks()

    def under(self, check: Callable[[], None]) -> "Hosts":
        """Return the same hosts for one who may call them only while `check` does not raise."""
        return Hosts(self._inventory, self._channels, check)

    def address(self, host: str) -> str:
        """Return HOST:PORT of the host's daemon. Raise NOT_FOUND or HOST_UNAVAILABLE."""
        return self._record(host).address

    def fabric_address(self, host: str) -> str:
        """Return HOST:PORT at which other hosts reach the host's daemon. Raise as `address`."""
        record = self._record(host)
        return record.fabric_address or record.address

    def incarnation(self, host: str) -> str:
        """Return the incarnation of the host. Raise HOST_UNAVAILABLE."""
        return registered_incarnation(self._inventory.snapshot, host)

    def _record(self, host: str) -> Host:
        snapshot = self._inventory.snapshot
        record = snapshot.hosts.get(host)
        if record is None:
            raise not_found("host", host)
        registered_incarnation(snapshot, host)
        return record.record

    async def create_function(self, host: str, request: CreateFunctionRequest) -> None:
        """Make an instance."""
        method = self._stub(FunctionServiceStub, host).CreateFunction
        await self._call(host, "CreateFunction", method, request, CREATE_FUNCTION_TIMEOUT_S)

    async def destroy_function(self, host: str, request: DestroyFunctionRequest) -> None:
        """Destroy an instance."""
        method = self._stub(FunctionServiceStub, host).DestroyFunction
        await self._call(host, "DestroyFunction", method, request, DESTROY_FUNCTION_TIMEOUT_S)

    async def change_state(self, host: str, request: ChangeStateRequest) -> bool:
        """Stop an instance, or let it run again. Return whether the host has it."""
        method = self._stub(FunctionServiceStub, host).ChangeState
        response = await self._call(host, "ChangeState", method, request, CHANGE_STATE_TIMEOUT_S)
        return response.HasField("instance")

    async def import_state(self, host: str, request: ImportStateRequest) -> AsyncGenerator[ImportStateResponse, None]:
        """Yield the progress of an import. The stream has no deadline of its own: the migration bounds it.

        Who has read that the import is complete need not wait for the end, which follows by itself.
        """
        self._check()
        method = self._stub(TransferServiceStub, host).ImportState
        responses = stream(method, request, address=self.address(host), incarnation=self.incarnation(host))
        is_complete = False
        try:
            async for response in responses:
                is_complete = response.complete
                yield response
        except VfleetError as error:
            raise _named(host, "ImportState", error) from None
        finally:
            if is_complete:
                # To break it off would cost target and source more than to end it as they would.
                self._ending.spawn(_let_end(responses))
            else:
                await responses.aclose()

    async def watch_arrival(
        self, host: str, request: WatchArrivalRequest
    ) -> AsyncGenerator[WatchArrivalResponse, None]:
        """Yield how much of a function's state is still at its source, until all is at its home."""
        self._check()
        method = self._stub(TransferServiceStub, host).WatchArrival
        try:
            async with aclosing(
                stream(method, request, address=self.address(host), incarnation=self.incarnation(host))
            ) as responses:
                async for response in responses:
                    yield response
        except VfleetError as error:
            raise _named(host, "WatchArrival", error) from None

    async def place_hold(self, host: str, request: PlaceHoldRequest) -> tuple[str, ...]:
        """Hold entries. Return the drivers that listen and did not acknowledge."""
        method = self._stub(HoldServiceStub, host).PlaceHold
        timeout_s = request.acknowledge_timeout_ms / 1000 + HOLD_TIMEOUT_S
        response = await self._call(host, "PlaceHold", method, request, timeout_s)
        return tuple(response.unacknowledged_drivers)

    async def lift_hold(self, host: str, request: LiftHoldRequest) -> None:
        """Lift holds and leave the offsets."""
        method = self._stub(HoldServiceStub, host).LiftHold
        await self._call(host, "LiftHold", method, request, HOLD_TIMEOUT_S)

    async def update_table(self, host: str, request: UpdateTableRequest) -> None:
        """Change drivers' tables."""
        method = self._stub(TranslationServiceStub, host).UpdateTable
        await self._call(host, "UpdateTable", method, request, TABLE_TIMEOUT_S)

    async def create_driver(self, host: str, request: CreateDriverRequest) -> None:
        """Make a driver."""
        method = self._stub(DriverServiceStub, host).CreateDriver
        await self._call(host, "CreateDriver", method, request, DRIVER_TIMEOUT_S)

    async def delete_driver(self, host: str, request: DeleteDriverRequest) -> None:
        """End a driver."""
        method = self._stub(DriverServiceStub, host).DeleteDriver
        await self._call(host, "DeleteDriver", method, request, DRIVER_TIMEOUT_S)

    async def attach_function(self, host: str, request: AttachFunctionRequest) -> None:
        """Put an entry into a driver's table."""
        method = self._stub(DriverServiceStub, host).AttachFunction
        await self._call(host, "AttachFunction", method, request, DRIVER_TIMEOUT_S)

    async def detach_function(self, host: str, request: DetachFunctionRequest) -> None:
        """Take an entry out of a driver's table."""
        method = self._stub(DriverServiceStub, host).DetachFunction
        await self._call(host, "DetachFunction", method, request, DRIVER_TIMEOUT_S)

    async def forget_driver(self, host: str, request: ForgetDriverRequest) -> None:
        """Let a function forget a driver."""
        method = self._stub(FabricServiceStub, host).ForgetDriver
        await self._call(host, "ForgetDriver", method, request, DRIVER_TIMEOUT_S)

    async def state(self, host: str) -> HostState:
        """Return what the host has: instances, holds, drivers."""
        functions, holds = self._stub(FunctionServiceStub, host), self._stub(HoldServiceStub, host)
        drivers = self._stub(DriverServiceStub, host)
        instances, held, there = await asyncio.gather(
            self._call(host, "ListFunctions", functions.ListFunctions, ListFunctionsRequest(), LIST_TIMEOUT_S),
            self._call(host, "ListHolds", holds.ListHolds, ListHoldsRequest(), LIST_TIMEOUT_S),
            self._call(host, "ListDrivers", drivers.ListDrivers, ListDriversRequest(), LIST_TIMEOUT_S),
        )
        return HostState(tuple(instances.instances), tuple(held.holds), tuple(there.drivers))

    async def send(self, host: str, request: Request) -> None:
        """Send a request of any kind that repairs something."""
        match request:
            case DestroyFunctionRequest():
                await self.destroy_function(host, request)
            case ChangeStateRequest():
                await self.change_state(host, request)
            case CreateDriverRequest():
                await self.create_driver(host, request)
            case DeleteDriverRequest():
                await self.delete_driver(host, request)
            case DetachFunctionRequest():
                await self.detach_function(host, request)
            case UpdateTableRequest():
                await self.update_table(host, request)
            case LiftHoldRequest():
                await self.lift_hold(host, request)
            case ForgetDriverRequest():
                await self.forget_driver(host, request)

    def _stub(self, kind: Callable[[grpc.aio.Channel], StubT], host: str) -> StubT:
        return self._channels.stub(kind, self.address(host), server_name(Role.HOST, host))

    async def _call(
        self,
        host: str,
        name: str,
        method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
        request: RequestT,
        timeout_s: float,
    ) -> ResponseT:
        self._check()
        try:
            address, incarnation = self.address(host), self.incarnation(host)
            try:
                return await call(method, request, address=address, timeout_s=timeout_s, incarnation=incarnation)
            except VfleetError as error:
                if not is_broken(error, address):
                    raise
                _log.info("host %s, %s: is sent once more: %s", host, name, error.message, extra={"host": host})
            # A connection of before a cut may break only when it is next used; the host is there all the same.
            self._check()
            return await call(method, request, address=address, timeout_s=timeout_s, incarnation=incarnation)
        except VfleetError as error:
            raise _named(host, name, error) from None


async def _let_end(responses: AsyncGenerator[ImportStateResponse, None]) -> None:
    with contextlib.suppress(VfleetError, TimeoutError):
        async with asyncio.timeout(END_TIMEOUT_S), aclosing(responses):
            async for _ in responses:
                pass


def _named(host: str, method: str, error: VfleetError) -> VfleetError:
    metadata = {**error.metadata, "host": host, "method": method}
    return VfleetError(error.reason, f"host {host!r}, {method}: {error.message}", metadata=metadata)
