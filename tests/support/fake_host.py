"""A host for the coordinator's tests: real gRPC on loopback, a real registration in etcd, and little else.

It records every call, can fail or block any method, and keeps what invariants are about: instances, holds, entries.
"""

# ruff: noqa: N802  # methods are named as the protos say

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc

from vfleet.address import table_offset
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import host_key, registration_key
from vfleet.etcd.records import encode
from vfleet.etcd.store import Delete, Put, Store, Transaction
from vfleet.rpc import Server
from vfleet.v1 import (
    driver_service_pb2_grpc,
    function_service_pb2_grpc,
    hold_service_pb2_grpc,
    transfer_service_pb2_grpc,
    translation_service_pb2_grpc,
)
from vfleet.v1.driver_service_pb2 import (
    AttachFunctionResponse,
    CreateDriverResponse,
    DeleteDriverResponse,
    DetachFunctionResponse,
)
from vfleet.v1.function_service_pb2 import (
    ChangeStateResponse,
    CreateFunctionResponse,
    DestroyFunctionResponse,
    FunctionInstance,
)
from vfleet.v1.hold_service_pb2 import LiftHoldResponse, PlaceHoldResponse
from vfleet.v1.records_pb2 import Device, Host
from vfleet.v1.transfer_service_pb2 import (
    ExportStateRequest,
    ExportStateResponse,
    ImportStateResponse,
    RoundEnd,
    StateEnd,
)
from vfleet.v1.translation_service_pb2 import UpdateTableResponse
from vfleet.v1.types_pb2 import Bar, DeviceState, Manufacturer, TableEntry

RUNNING = DeviceState.DEVICE_STATE_RUNNING
STOP_COPY = DeviceState.DEVICE_STATE_STOP_COPY
RESUMING = DeviceState.DEVICE_STATE_RESUMING


def device(
    name: str, *, bus: int = 1, total_vfs: int = 4, model: str = "checker", vendor_id: int = 0x1AF4, bar0: int = 4096
) -> Device:
    """Return a device that is like any other in what decides whether a function can move there."""
    return Device(
        name=name,
        host=name.partition("/")[0],
        routing_id=bus << 8,
        model=model,
        manufacturer=Manufacturer(vendor_id=vendor_id, device_id=0x1041),
        io_type="network",
        total_vfs=total_vfs,
        first_vf_offset=1,
        vf_stride=1,
        bars=[Bar(index=0, size_bytes=bar0), Bar(index=2, size_bytes=1 << 20)],
    )


@dataclass
class FakeHost:
    """One host. `fail` and `block` are by method's name: an error to answer with, an event to wait for first."""

    name: str
    store: Store
    segment: int
    devices: tuple[Device, ...]
    incarnation: str = "boot-1"
    calls: list[str] = field(default_factory=list)
    requests: list[object] = field(default_factory=list)
    fail: dict[str, VfleetError] = field(default_factory=dict)
    fail_after: dict[str, VfleetError] = field(default_factory=dict)
    block: dict[str, asyncio.Event] = field(default_factory=dict)
    instances: dict[tuple[str, int], int] = field(default_factory=dict)
    holds: dict[tuple[str, str], int] = field(default_factory=dict)
    table: dict[tuple[str, str], TableEntry] = field(default_factory=dict)
    drivers: set[str] = field(default_factory=set)
    address: str = ""
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    server: Server | None = None

    async def start(self) -> None:
        """Listen and register."""
        self.server = Server([], self.incarnation)
        for add in (
            function_service_pb2_grpc.add_FunctionServiceServicer_to_server,
            hold_service_pb2_grpc.add_HoldServiceServicer_to_server,
            translation_service_pb2_grpc.add_TranslationServiceServicer_to_server,
            transfer_service_pb2_grpc.add_TransferServiceServicer_to_server,
            driver_service_pb2_grpc.add_DriverServiceServicer_to_server,
        ):
            add(_Servicer(self), self.server.grpc)
        self.address = f"127.0.0.1:{self.server.listen(self.address or '127.0.0.1:0')}"
        await self.server.start()
        await self.register()

    async def register(self) -> None:
        """Put the host's record and registration."""
        record = Host(
            name=self.name,
            segment=self.segment,
            address=self.address,
            incarnation=self.incarnation,
            devices=self.devices,
        )
        writes = (
            Put(host_key(self.name), encode(record)),
            Put(registration_key(self.name), self.incarnation.encode()),
        )
        await self.store.commit(Transaction((), writes))

    async def unregister(self) -> None:
        """Take the registration away, as when the daemon is dead."""
        await self.store.commit(Transaction((), (Delete(registration_key(self.name)),)))

    async def reboot(self) -> None:
        """Start the machine anew: all is gone."""
        self.incarnation += "-again"
        self.instances.clear()
        self.holds.clear()
        self.table.clear()
        self.drivers.clear()
        await self.stop()
        await self.start()

    async def stop(self) -> None:
        """Stop listening, at once."""
        if self.server:
            await self.server.stop(0)
            self.server = None

    async def enter(self, method: str, request: object) -> None:
        """Note a call, wait if it is to be blocked, raise if it is to fail."""
        self.calls.append(method)
        self.requests.append(request)
        if method in self.block:
            await self.block[method].wait()
        if method in self.fail:
            raise self.fail[method]

    def leave(self, method: str) -> None:
        """Raise if the call is to fail although it was carried out."""
        if method in self.fail_after:
            raise self.fail_after.pop(method)

    async def notify(self) -> None:
        """Let exports look again."""
        async with self.changed:
            self.changed.notify_all()

    def count(self) -> Counter[str]:
        """Return how often each method was called."""
        return Counter(self.calls)


class _Servicer:
    def __init__(self, host: FakeHost) -> None:
        self.host = host

    def __getattr__(self, name: str):
        """Refuse the methods that no coordinator calls."""
        if not name[0].isupper():
            raise AttributeError(name)

        async def refuse(request, context):
            raise VfleetError(Reason.INTERNAL, f"a coordinator has no business with {name}")

        return refuse

    async def CreateFunction(self, request, context):
        host = self.host
        await host.enter("CreateFunction", request)
        host.instances.setdefault((request.function, request.generation), RUNNING if request.fresh else RESUMING)
        host.leave("CreateFunction")
        return CreateFunctionResponse()

    async def DestroyFunction(self, request, context):
        await self.host.enter("DestroyFunction", request)
        self.host.instances.pop((request.function, request.generation), None)
        self.host.leave("DestroyFunction")
        return DestroyFunctionResponse()

    async def ChangeState(self, request, context):
        host, key = self.host, (request.function, request.generation)
        await host.enter("ChangeState", request)
        if key not in host.instances:
            if request.state == RUNNING:
                return ChangeStateResponse()
            raise VfleetError(Reason.NOT_FOUND, f"no instance {key}")
        host.instances[key] = request.state
        await host.notify()
        host.leave("ChangeState")
        return ChangeStateResponse(instance=FunctionInstance(function=request.function, generation=request.generation))

    async def PlaceHold(self, request, context):
        host = self.host
        await host.enter("PlaceHold", request)
        for entry in request.entries:
            if (entry.driver, entry.function) not in host.table:
                raise VfleetError(Reason.NOT_FOUND, f"no entry of {entry.driver} for {entry.function}")
        for entry in request.entries:
            host.holds[entry.driver, entry.function] = request.attempt.revision
        host.leave("PlaceHold")
        return PlaceHoldResponse()

    async def LiftHold(self, request, context):
        await self.host.enter("LiftHold", request)
        self._lift(request)
        return LiftHoldResponse()

    async def UpdateTable(self, request, context):
        await self.host.enter("UpdateTable", request)
        for entry in request.entries:
            key = (entry.driver, entry.function)
            if key in self.host.table and self.host.table[key].generation <= entry.generation:
                self.host.table[key] = entry
        if request.lift:
            self._lift(request)
        return UpdateTableResponse()

    def _lift(self, request) -> None:
        for entry in request.entries:
            key = (entry.driver, entry.function)
            if self.host.holds.get(key) == request.attempt.revision:
                del self.host.holds[key]

    async def ExportState(self, request, context) -> AsyncIterator[ExportStateResponse]:
        host, key = self.host, (request.function, request.generation)
        await host.enter("ExportState", request)
        yield ExportStateResponse(round_end=RoundEnd(round=1, sent_bytes=4096, last_before_stop=True))
        async with host.changed:
            await host.changed.wait_for(lambda: host.instances.get(key) == STOP_COPY)
        yield ExportStateResponse(end=StateEnd())

    async def ImportState(self, request, context) -> AsyncIterator[ImportStateResponse]:
        await self.host.enter("ImportState", request)
        export = ExportStateRequest(
            attempt=request.attempt,
            function=request.function,
            generation=request.source_generation,
            options=request.options,
        )
        async with grpc.aio.insecure_channel(request.source_address) as channel:
            async for part in transfer_service_pb2_grpc.TransferServiceStub(channel).ExportState(export):
                if part.WhichOneof("part") == "round_end":
                    yield ImportStateResponse(rounds=1, received_bytes=4096, ready_to_stop=True)
        await self.host.enter("ImportState end", request)
        yield ImportStateResponse(rounds=2, received_bytes=8192, complete=True)

    async def CreateDriver(self, request, context):
        await self.host.enter("CreateDriver", request)
        self.host.drivers.add(request.driver)
        return CreateDriverResponse()

    async def DeleteDriver(self, request, context):
        await self.host.enter("DeleteDriver", request)
        self.host.drivers.discard(request.driver)
        return DeleteDriverResponse()

    async def AttachFunction(self, request, context):
        await self.host.enter("AttachFunction", request)
        self.host.table[request.entry.driver, request.entry.function] = request.entry
        return AttachFunctionResponse()

    async def DetachFunction(self, request, context):
        await self.host.enter("DetachFunction", request)
        self.host.table.pop((request.driver, request.function), None)
        return DetachFunctionResponse()


def leads_to(entry: TableEntry) -> int:
    """Return the fabric address that the first virtual address of an entry leads to."""
    return (entry.virtual_address + entry.offset) % (1 << 64)


def offset_is_right(entry: TableEntry, base: int) -> bool:
    """Return whether the entry's offset is what the address arithmetic says for a function at `base`."""
    return entry.offset == table_offset(base, entry.virtual_address)
