"""A peer that vanishes without a word, as its machine does: the other end of a stream does not wait for it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random

import grpc
import pytest
from support.chaos.proxy import Disturbance, Proxy

from vfleet import rpc
from vfleet.process import LOOPBACK
from vfleet.v1.fabric_service_pb2 import ExchangeDmaRequest, ExchangeDmaResponse
from vfleet.v1.fabric_service_pb2_grpc import (
    FabricServiceServicer,
    FabricServiceStub,
    add_FabricServiceServicer_to_server,
)

PATIENCE_S = 30.0
SOONER_MS = 1000


class Servicer(FabricServiceServicer):
    """One stream that echoes; `ended` once it is over."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def ExchangeDma(self, request_iterator, context) -> AsyncIterator[ExchangeDmaResponse]:  # noqa: N802
        try:
            async for _ in request_iterator:
                yield ExchangeDmaResponse()
        finally:
            self.ended.set()


@dataclass
class Wire:
    """A stream to a servicer, through a proxy."""

    servicer: Servicer
    proxy: Proxy
    stream: grpc.aio.StreamStreamCall[ExchangeDmaRequest, ExchangeDmaResponse]


@asynccontextmanager
async def wire() -> AsyncIterator[Wire]:
    """Begin a stream, which has carried something."""
    servicer, server = Servicer(), rpc.Server(())
    add_FabricServiceServicer_to_server(servicer, server.grpc)
    port = server.listen(f"{LOOPBACK}:0")
    await server.start()
    try:
        async with Proxy(lambda: f"{LOOPBACK}:{port}", Random()) as proxy, rpc.connect(proxy.address) as channel:
            stream = FabricServiceStub(channel).ExchangeDma()
            await stream.write(ExchangeDmaRequest())
            await stream.read()
            yield Wire(servicer, proxy, stream)
            stream.cancel()
    finally:
        await server.stop(0)


def look_sooner(patch: pytest.MonkeyPatch, options: str) -> None:
    """Make what is said to be the time between two looks, and for an answer, short."""
    times = (rpc.KEEPALIVE_TIME_MS, rpc.KEEPALIVE_TIMEOUT_MS)
    sooner = [(name, SOONER_MS if value in times else value) for name, value in getattr(rpc, options)]
    patch.setattr(rpc, options, sooner)


async def test_a_stream_ends_whose_server_has_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    look_sooner(monkeypatch, "_CHANNEL_OPTIONS")
    async with asyncio.timeout(PATIENCE_S), wire() as begun:
        begun.proxy.disturb(Disturbance("freeze"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await begun.stream.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stream_ends_whose_client_has_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    look_sooner(monkeypatch, "_SERVER_OPTIONS")
    async with asyncio.timeout(PATIENCE_S), wire() as begun:
        begun.proxy.disturb(Disturbance("freeze"))
        await begun.servicer.ended.wait()
