"""A link over real gRPC: it comes back by itself, and has drivers forgotten that were detached."""

# ruff: noqa: N802  # methods are named as the protos say

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from random import Random

import pytest
from support.cluster import eventually

from hostd.directory import Directory, Peer
from hostd.fabric import Link
from vfleet.clock import SystemClock
from vfleet.limits import WINDOW
from vfleet.rpc import Channels, Server
from vfleet.v1.access_pb2 import Access, Answer, Session
from vfleet.v1.fabric_service_pb2 import (
    ExchangeRequest,
    ExchangeResponse,
    ForgetDriverRequest,
    ForgetDriverResponse,
    GetSequenceRequest,
    GetSequenceResponse,
)
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceServicer, add_FabricServiceServicer_to_server


class Peers(Directory):
    """A directory that says what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.address = ""

    def peer(self, segment: int) -> Peer | None:
        return Peer(self.address, "", "") if self.address else None

    def move(self, address: str) -> None:
        self.address = address
        self.changed.set()
        self.changed = asyncio.Event()


class FarHost(FabricServiceServicer):
    """A host that answers every access, and forgets drivers once it may."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.batches: list[list[int]] = []
        self.acknowledged: list[int] = []
        self.may_forget = asyncio.Event()
        self.server = Server([])
        add_FabricServiceServicer_to_server(self, self.server.grpc)
        self.address = f"127.0.0.1:{self.server.listen('127.0.0.1:0')}"

    async def Exchange(self, request_iterator, context) -> AsyncIterator[ExchangeResponse]:
        async for request in request_iterator:
            self.batches.append([access.sequence for access in request.accesses])
            self.acknowledged.append(request.acknowledged_sequence)
            answers = [Answer(sequence=access.sequence) for access in request.accesses]
            yield ExchangeResponse(driver=request.driver, function=request.function, answers=answers)

    async def GetSequence(self, request, context) -> GetSequenceResponse:
        self.calls.append("get")
        return GetSequenceResponse(last_sequence=5)

    async def ForgetDriver(self, request, context) -> ForgetDriverResponse:
        await self.may_forget.wait()
        self.calls.append("forget")
        return ForgetDriverResponse()


@dataclass
class Sender:
    """Sends one access again and again until it is answered, as a queue does."""

    link: Link
    answered_by: list[ExchangeResponse] = field(default_factory=list)

    def send(self) -> None:
        request = ExchangeRequest(driver="d1", function="vf1", accesses=[Access(sequence=1)])
        self.link.send(request, self)

    def answered(self, response: ExchangeResponse) -> None:
        self.answered_by.append(response)

    def connected(self) -> None:
        self.send()


@dataclass
class Rig:
    peers: Peers
    link: Link
    hosts: list[FarHost] = field(default_factory=list)

    async def start_host(self) -> FarHost:
        host = FarHost()
        await host.server.start()
        self.hosts.append(host)
        self.peers.move(host.address)
        return host


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    peers, channels = Peers(), Channels()
    link = Link(2, peers, channels, SystemClock(), Random(1))
    found = Rig(peers, link)
    yield found
    await link.close()
    await channels.close()
    for host in found.hosts:
        await host.server.stop(0)


async def test_a_link_opens_when_its_host_is_known_and_again_when_it_breaks(rig: Rig):
    sender = Sender(rig.link)
    sender.send()
    assert sender.answered_by == []
    first = await rig.start_host()
    await eventually(lambda: len(sender.answered_by) == 1)
    await first.server.stop(0)
    second = await rig.start_host()
    assert second.address != first.address
    await eventually(lambda: len(sender.answered_by) == 2)


async def test_who_has_left_hears_no_answers(rig: Rig):
    gone, stays = Sender(rig.link), Sender(rig.link)
    await rig.start_host()
    gone.send()
    await eventually(lambda: bool(gone.answered_by))
    gone.send()
    rig.link.leave("d1", "vf1")
    heard = len(gone.answered_by)
    stays.send()
    await eventually(lambda: len(stays.answered_by) >= 1)
    assert len(gone.answered_by) == heard


async def test_a_driver_is_forgotten_though_its_home_can_not_be_told_at_first_and_nobody_waits_for_that(rig: Rig):
    session = Session(fleet_generation=1, revision=1, start=1)
    rig.link.forget_driver(ForgetDriverRequest(driver="d1", function="vf1", generation=1, session=session))
    host = await rig.start_host()
    request = GetSequenceRequest(driver="d1", function="vf1", generation=1, session=session)
    assert await rig.link.get_sequence(request) == 5
    host.may_forget.set()
    await eventually(lambda: host.calls == ["get", "forget"])


def batch(first: int, count: int = 1, *, driver: str = "d1", generation: int = 1) -> ExchangeRequest:
    accesses = [Access(sequence=first + number) for number in range(count)]
    return ExchangeRequest(
        driver=driver, function="vf1", generation=generation, acknowledged_sequence=first - 1, accesses=accesses
    )


async def test_batches_that_wait_are_joined_up_to_half_a_window(rig: Rig):
    sender = Sender(rig.link)
    sender.send()
    host = await rig.start_host()
    await eventually(lambda: bool(sender.answered_by))
    host.batches.clear()
    for sequence in range(2, 102):
        assert rig.link.send(batch(sequence), sender)
    await eventually(lambda: sum(map(len, host.batches)) == 100)
    assert [sequence for own in host.batches for sequence in own] == list(range(2, 102))
    assert [len(own) for own in host.batches] == [WINDOW // 2] * 3 + [4]
    # What is acknowledged is what the driver knew when it sent the last of them.
    assert host.acknowledged[-4:] == [own[-1] - 1 for own in host.batches]


@pytest.mark.parametrize(
    "following",
    [
        batch(5, driver="d2"),  # of another sender
        batch(5, generation=2),  # for another home
        batch(4),  # sent again
        batch(3, 2),
        batch(5, WINDOW // 2),  # too much
    ],
)
async def test_batches_that_do_not_belong_together_stay_apart(rig: Rig, following: ExchangeRequest):
    sequences = [access.sequence for access in following.accesses]
    sender = Sender(rig.link)
    sender.send()
    host = await rig.start_host()
    await eventually(lambda: bool(sender.answered_by))
    host.batches.clear()
    rig.link.send(batch(1, 4), sender)
    rig.link.send(following, sender)
    rig.link.send(batch(100), sender)
    await eventually(lambda: sum(map(len, host.batches)) == 5 + len(sequences))
    assert host.batches[0] == [1, 2, 3, 4]
    assert [sequence for own in host.batches[1:] for sequence in own] == [*sequences, 100]
