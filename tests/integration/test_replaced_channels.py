"""A channel whose certificate was replaced is closed in the end; what goes over it for ever goes on over the next."""

# ruff: noqa: N802  # methods are named as the protos say

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from random import Random

import grpc
import pytest
from support.cluster import eventually

from hostd.directory import Directory, Peer
from hostd.fabric import Link
from vfleet import rpc
from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import endpoints
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.server import EtcdServer
from vfleet.etcd.store import Changes, Put, Transaction
from vfleet.process import LOOPBACK
from vfleet.v1.access_pb2 import Access, Answer
from vfleet.v1.fabric_service_pb2 import ExchangeRequest, ExchangeResponse
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceServicer, add_FabricServiceServicer_to_server
from vfleet.v1.transfer_service_pb2 import WatchArrivalRequest, WatchArrivalResponse
from vfleet.v1.transfer_service_pb2_grpc import (
    TransferServiceServicer,
    TransferServiceStub,
    add_TransferServiceServicer_to_server,
)

GRACE_S = 0.05


class Credentials:
    def for_channel(self) -> grpc.ChannelCredentials:
        return grpc.local_channel_credentials(grpc.LocalConnectionType.LOCAL_TCP)


class Tls:
    """Certificates that are those of plaintext, and can be replaced."""

    def __init__(self) -> None:
        self.credentials = Credentials()

    def replace(self) -> None:
        self.credentials = Credentials()


class FarHost(FabricServiceServicer, TransferServiceServicer):
    """A host that answers every access, and tells of an arrival that is never over."""

    async def Exchange(self, request_iterator, context) -> AsyncIterator[ExchangeResponse]:
        async for request in request_iterator:
            answers = [Answer(sequence=access.sequence) for access in request.accesses]
            yield ExchangeResponse(driver=request.driver, function=request.function, answers=answers)

    async def WatchArrival(self, request, context) -> AsyncIterator[WatchArrivalResponse]:
        yield WatchArrivalResponse(missing_bytes=1)
        await asyncio.Event().wait()


class OnePeer(Directory):
    def __init__(self, address: str) -> None:
        super().__init__()
        self._peer = Peer(address, "", "")

    def peer(self, segment: int) -> Peer:
        return self._peer


class Sender:
    """Sends an access whenever the link is open, and counts the answers."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.answers = 0

    def answered(self, response: ExchangeResponse) -> None:
        self.answers += len(response.answers)

    def connected(self) -> None:
        self.link.send(ExchangeRequest(driver="d1", function="vf1", accesses=[Access(sequence=1)]), self)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    server, host = rpc.Server(()), FarHost()
    add_FabricServiceServicer_to_server(host, server.grpc)
    add_TransferServiceServicer_to_server(host, server.grpc)
    port = server.listen(f"{LOOPBACK}:0")
    await server.start()
    yield f"{LOOPBACK}:{port}"
    await server.stop(0)


@pytest.fixture
def tls(monkeypatch: pytest.MonkeyPatch) -> Tls:
    for module in (rpc, endpoints):
        monkeypatch.setattr(module, "OLD_CHANNEL_GRACE_S", GRACE_S)
    return Tls()


async def test_a_link_to_another_host_goes_on(address: str, tls: Tls):
    channels = rpc.Channels(tls=tls)
    link = Link(2, OnePeer(address), channels, SystemClock(), Random(1))
    sender = Sender(link)
    sender.connected()
    for count in (1, 2, 3):
        await eventually(lambda count=count: sender.answers == count)
        tls.replace()
        channels.to(address)
    await link.close()
    await channels.close()


async def test_who_reads_a_stream_learns_that_it_broke(address: str, tls: Tls):
    channels = rpc.Channels(tls=tls)
    method = channels.stub(TransferServiceStub, address).WatchArrival
    async with aclosing(rpc.stream(method, WatchArrivalRequest(), address=address)) as told:
        await anext(told)
        tls.replace()
        channels.to(address)
        with pytest.raises(VfleetError) as caught:
            await anext(told)
    assert caught.value.reason is Reason.UNREACHABLE
    assert address in caught.value.message
    await channels.close()


async def test_a_watch_on_etcd_goes_on_and_leaves_nothing_out(
    etcd: EtcdServer, tls: Tls, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    async with (
        EtcdStore.open([etcd.endpoint], SystemClock(), Random(1), tls=tls) as store,
        aclosing(store.watch("/a/")) as watch,
    ):
        await anext(watch)
        for key in ("/a/1", "/a/2", "/a/3"):
            coming = asyncio.create_task(anext(watch))
            if key != "/a/1":  # since then there is a stream
                tls.replace()
                await store.get(key)
                await eventually(lambda coming=coming: coming.done() or "its channel was closed" in caplog.text)
                caplog.clear()
            await store.commit(Transaction((), (Put(key, b""),)))
            changes = await coming
            assert isinstance(changes, Changes)
            assert [event.key for event in changes.events] == [key]
