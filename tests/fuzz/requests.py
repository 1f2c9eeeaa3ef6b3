"""Every request message of every service, sent to a running fleet: each is answered or refused, and all go on."""

import asyncio
from collections.abc import AsyncIterator

import grpc
from atheris import FuzzedDataProvider
from fuzz.fleet import FoundError, in_a_fleet
from fuzz.messages import fill
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from simulation.vopr.world import World

from vfleet.errors import Reason, from_rpc_error
from vfleet.v1 import (
    driver_service_pb2,
    fabric_service_pb2,
    fleet_service_pb2,
    function_service_pb2,
    hold_service_pb2,
    migration_service_pb2,
    transfer_service_pb2,
    translation_service_pb2,
)

COORDINATOR_MODULES = (fleet_service_pb2, migration_service_pb2)
HOST_MODULES = (
    driver_service_pb2,
    fabric_service_pb2,
    function_service_pb2,
    hold_service_pb2,
    transfer_service_pb2,
    translation_service_pb2,
)
MAX_REQUESTS = 12
ANSWER_S = 5.0
STREAMED = 3


def methods(modules: tuple[object, ...]) -> list[MethodDescriptor]:
    """Return the methods of all services of modules."""
    services = [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    return [method for service in services for method in service.methods]


COORDINATORS, HOSTS = methods(COORDINATOR_MODULES), methods(HOST_MODULES)


def requests(data: FuzzedDataProvider) -> list[tuple[str, MethodDescriptor, list[Message]]]:
    """Return what is sent: to whom, by which method, and the messages."""
    sent = []
    while data.remaining_bytes() and len(sent) < MAX_REQUESTS:
        to_host = data.ConsumeBool()
        address = data.PickValueInList(["h1:1", "h2:1", "h3:1"] if to_host else ["c1:1", "c2:1"])
        method = data.PickValueInList(HOSTS if to_host else COORDINATORS)
        count = data.ConsumeIntInRange(1, STREAMED) if method.client_streaming else 1
        messages = [GetMessageClass(method.input_type)() for _ in range(count)]
        for message in messages:
            fill(message, data)
        sent.append((address, method, messages))
    return sent


def target(given: bytes) -> None:
    """Send a few requests, one after the other, and let what they began go on for a while."""
    sent = requests(FuzzedDataProvider(given))

    async def play(world: World) -> None:
        for address, method, messages in sent:
            await _send(world, address, method, messages)
        await asyncio.sleep(1.0)
        await _check_all_answer(world)

    if sent:
        in_a_fleet(play)


async def _send(world: World, address: str, method: MethodDescriptor, messages: list[Message]) -> None:
    channel = world.network.connect(world.client)(address)
    path = f"/{method.containing_service.full_name}/{method.name}"
    codec = (lambda message: message.SerializeToString(), GetMessageClass(method.output_type).FromString)
    try:
        async with asyncio.timeout(ANSWER_S):
            if method.client_streaming:
                call = channel.stream_stream(path, *codec)()
                await call.wait_for_connection()
                for message in messages:
                    await call.write(message)
                await _take(call)
            elif method.server_streaming:
                await _take(channel.unary_stream(path, *codec)(messages[0]))
            else:
                await channel.unary_unary(path, *codec)(messages[0], timeout=ANSWER_S)
    except TimeoutError:
        return
    except grpc.aio.AioRpcError as error:
        refusal = from_rpc_error(error, address)
        if refusal.reason is Reason.INTERNAL or error.code() in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL):
            raise FoundError(path, messages, refusal.message) from None


async def _take(call: AsyncIterator[Message]) -> None:
    """Take a few responses, and leave."""
    try:
        taken = 0
        async for _ in call:
            taken += 1
            if taken == STREAMED:
                return
    finally:
        call.cancel()


async def _check_all_answer(world: World) -> None:
    for address, path, kind in (
        *((f"c{n}:1", "/vfleet.v1.FleetService/ListHosts", fleet_service_pb2.ListHostsRequest) for n in (1, 2)),
        *((f"h{n}:1", "/vfleet.v1.HoldService/ListHolds", hold_service_pb2.ListHoldsRequest) for n in (1, 2, 3)),
    ):
        call = world.network.connect(world.client)(address).unary_unary(path, kind.SerializeToString, bytes)
        try:
            await call(kind(), timeout=ANSWER_S)
        except grpc.aio.AioRpcError as error:
            raise FoundError(address, path, error.details()) from None
