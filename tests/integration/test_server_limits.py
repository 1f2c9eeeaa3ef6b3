"""What one server takes at most: connections, requests, metadata. Past that it refuses, and serves the others on."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from support.flood import PREFACE, SETTINGS, frame

from vfleet import rpc
from vfleet.caller import Caller
from vfleet.edge import MAX_ERROR_CHARS
from vfleet.errors import BUSY_RETRY_S, Reason, VfleetError
from vfleet.rpc import MAX_CONNECTIONS, MAX_METADATA_BYTES, MAX_REQUEST_BYTES, Channels, Server, call
from vfleet.v1.fleet_service_pb2 import ForgetHostRequest, ForgetHostResponse
from vfleet.v1.fleet_service_pb2_grpc import (
    FleetServiceServicer,
    FleetServiceStub,
    add_FleetServiceServicer_to_server,
)

FEW = 20


@pytest.fixture
def few_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand take longer, on a busy machine, than a silent one is left open."""
    options = dict(rpc._SERVER_OPTIONS)
    assert options["grpc.max_allowed_incoming_connections"] == MAX_CONNECTIONS
    options["grpc.max_allowed_incoming_connections"] = FEW
    monkeypatch.setattr(rpc, "_SERVER_OPTIONS", tuple(options.items()))


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server = Server(["served"])
    port = server.listen("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def check(channels: Channels, address: str, service: str = "served") -> object:
    method = health_pb2_grpc.HealthStub(channels.to(address)).Check
    request = health_pb2.HealthCheckRequest(service=service)
    return await call(method, request, address=address, timeout_s=20)


async def connect(address: str) -> tuple[asyncio.StreamWriter, bool]:
    """Connect, and return whether the server says a word."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(PREFACE + frame(SETTINGS, 0, 0))
        return writer, bool(await reader.read(9))
    except OSError:
        return writer, False


async def test_connections_past_the_bound_are_closed_and_those_before_it_go_on(
    few_connections: None, address: str
) -> None:
    channels = Channels()
    await check(channels, address)
    made = [await connect(address) for _ in range(FEW + 8)]
    assert sum(taken for _, taken in made) == FEW - 1
    assert not any(taken for _, taken in made[-8:])
    await check(channels, address)
    for writer, _ in made:
        writer.transport.abort()
    stranger = Channels()
    async with asyncio.timeout(30):
        while not await is_let_in(stranger, address):
            await asyncio.sleep(0.05)
    await stranger.close()
    await channels.close()


async def is_let_in(channels: Channels, address: str) -> bool:
    try:
        await check(channels, address)
    except VfleetError:
        return False
    return True


async def test_a_request_or_metadata_past_the_bound_is_refused_and_the_next_is_served(address: str) -> None:
    channels = Channels()
    with pytest.raises(VfleetError) as refused:
        await check(channels, address, "x" * (MAX_REQUEST_BYTES + 1))
    assert refused.value.reason is Reason.LIMIT_EXCEEDED
    method = health_pb2_grpc.HealthStub(channels.to(address)).Check
    metadata = grpc.aio.Metadata(("x-much", "y" * (MAX_METADATA_BYTES + 1)))
    with pytest.raises(grpc.aio.AioRpcError) as too_much:
        await method(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=20)
    assert too_much.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await check(channels, address)
    await channels.close()


async def test_one_call_too_many_is_made_again_by_whoever_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "MAX_CALLS", 1)
    server = Server(["served"])
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    channels, request = Channels(), health_pb2.HealthCheckRequest(service="served")
    watch = health_pb2_grpc.HealthStub(channels.to(address)).Watch(request)
    await watch.read()
    with pytest.raises(VfleetError) as refused:
        await check(channels, address)
    assert (refused.value.reason, refused.value.retry_after_s) == (Reason.LIMIT_EXCEEDED, BUSY_RETRY_S)
    caller = Caller("server", [address], channels=channels, patience_s=60)
    waiting = asyncio.create_task(caller.call(lambda channel: health_pb2_grpc.HealthStub(channel).Check, request))
    watch.cancel()
    assert (await waiting).status == health_pb2.HealthCheckResponse.SERVING
    await channels.close()
    await server.stop(0)


async def test_an_error_that_is_longer_than_headers_may_be_arrives_shortened() -> None:
    there = ", ".join(f"function vf{number}" for number in range(2_000))

    class Refusing(FleetServiceServicer):
        async def ForgetHost(self, request: ForgetHostRequest, context: object) -> ForgetHostResponse:  # noqa: N802
            raise VfleetError(Reason.IN_USE, f"host 'h1' has {there}", metadata={"host": "h1"})

    server, channels = Server([]), Channels()
    add_FleetServiceServicer_to_server(Refusing(), server.grpc)
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    with pytest.raises(VfleetError) as refused:
        await call(
            channels.stub(FleetServiceStub, address).ForgetHost, ForgetHostRequest(), address=address, timeout_s=20
        )
    assert (refused.value.reason, refused.value.metadata) == (Reason.IN_USE, {"host": "h1"})
    assert len(refused.value.message) == MAX_ERROR_CHARS
    assert refused.value.message.startswith("host 'h1' has function vf0, function vf1, ")
    assert refused.value.message.endswith("...")
    await channels.close()
    await server.stop(0)
