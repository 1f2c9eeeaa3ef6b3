"""The fabric: accesses to functions that live on other hosts.

A `Link` is what goes over one stream to one host. What has no answer when the stream breaks is sent again by the queue
that it came from, and the function's sequences see to it that it takes effect once. Batches that wait for their turn
are joined.
"""

import asyncio
import logging
from random import Random
from typing import Protocol, TypeAlias

import grpc

from hostd.directory import Directory, Peer
from hostd.fabric_stream import RECONNECT_FIRST_S, RECONNECT_LONGEST_S, FabricStream, Links
from vfleet.clock import Clock, backoff_delays
from vfleet.errors import Reason, VfleetError
from vfleet.limits import WINDOW
from vfleet.rpc import Channels, call, meant_for
from vfleet.v1.fabric_service_pb2 import ExchangeRequest, ExchangeResponse, ForgetDriverRequest, GetSequenceRequest
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceStub

CALL_TIMEOUT_S = 2.0
FORGET_FOR_S = 60.0
MAX_JOINED = WINDOW // 2

_Stream: TypeAlias = "grpc.aio.StreamStreamCall[ExchangeRequest, ExchangeResponse]"

_log = logging.getLogger(__name__)


class Sender(Protocol):
    """Who sends accesses through a link: one driver's queue for one function."""

    def answered(self, response: ExchangeResponse) -> None:
        """Take the answers, or the refusal, of a batch."""

    def connected(self) -> None:
        """Learn that the link is open, for the first time or again: what has no answer must be sent, again."""


class Link:
    """The stream to the host of one segment. Batches of one sender keep their order."""

    def __init__(self, segment: int, directory: Directory, channels: Channels, clock: Clock, random: Random) -> None:
        self._segment = segment
        self._directory = directory
        self._channels = channels
        self._clock = clock
        self._random = random
        self._senders: dict[tuple[str, str], Sender] = {}
        self._forgetting: set[asyncio.Task[None]] = set()

        def open_stream(peer: Peer) -> _Stream:
            stub = FabricServiceStub(channels.to(peer.address, peer.server))
            return stub.Exchange(metadata=meant_for(peer.incarnation))

        self._stream = FabricStream(segment, directory, clock, random, open_stream, self, _join)

    def leave(self, driver: str, function: str) -> None:
        """Forget a sender that sends no more."""
        self._senders.pop((driver, function), None)

    def send(self, request: ExchangeRequest, sender: Sender) -> bool:
        """Send a batch. Return False if the link is down; `sender.connected` is called when it is open again."""
        self._senders[request.driver, request.function] = sender
        return self._stream.send(request)

    def arrived(self, response: ExchangeResponse) -> None:
        """Give a response to whom it is for (as the stream's user)."""
        sender = self._senders.get((response.driver, response.function))
        if sender is not None:
            sender.answered(response)

    def connected(self) -> None:
        """Tell all senders (as the stream's user)."""
        for sender in list(self._senders.values()):
            sender.connected()

    async def get_sequence(self, request: GetSequenceRequest) -> int:
        """Ask the home how far it got with a driver. Raise UNREACHABLE, or what the home answers."""
        peer = self._directory.peer(self._segment)
        if peer is None:
            raise VfleetError(Reason.UNREACHABLE, f"no host has segment {self._segment}")
        response = await call(
            FabricServiceStub(self._channels.to(peer.address, peer.server)).GetSequence,
            request,
            address=peer.address,
            timeout_s=CALL_TIMEOUT_S,
            incarnation=peer.incarnation,
        )
        return response.last_sequence

    def forget_driver(self, request: ForgetDriverRequest) -> None:
        """Let the home forget a driver's session. What comes late, or again, changes nothing of a later one.

        If it can't be told for too long, or the function moves meanwhile, what is kept stays until `doctor` finds it.
        """
        task = asyncio.create_task(self._forget_driver(request))
        self._forgetting.add(task)
        task.add_done_callback(self._forgetting.discard)

    async def close(self) -> None:
        """End the stream."""
        for task in self._forgetting:
            task.cancel()
        await asyncio.gather(self._stream.close(), *self._forgetting, return_exceptions=True)

    async def _forget_driver(self, request: ForgetDriverRequest) -> None:
        give_up_s = self._clock.monotonic() + FORGET_FOR_S
        for delay_s in backoff_delays(self._random, RECONNECT_FIRST_S, RECONNECT_LONGEST_S):
            peer, why = self._directory.peer(self._segment), "its host is not known"
            if peer is not None:
                try:
                    await call(
                        FabricServiceStub(self._channels.to(peer.address, peer.server)).ForgetDriver,
                        request,
                        address=peer.address,
                        timeout_s=CALL_TIMEOUT_S,
                        incarnation=peer.incarnation,
                    )
                except VfleetError as error:
                    why = error.message
                else:
                    return
            if self._clock.monotonic() >= give_up_s:
                about = {"function": request.function, "driver": request.driver}
                _log.warning("function %s still knows driver %s: %s", *about.values(), why, extra=about)
                return
            await self._clock.sleep(delay_s)


def _join(request: ExchangeRequest, following: ExchangeRequest) -> bool:
    """Make two batches one: of one sender, in order, and not more than half of a window.

    Two halves are on their way at once, so that one end of the link works while the other does.
    """
    can_join = (
        request.driver == following.driver
        and request.function == following.function
        and request.generation == following.generation
        and request.session == following.session
        and len(request.accesses) + len(following.accesses) <= MAX_JOINED
        and request.accesses[-1].sequence < following.accesses[0].sequence
    )
    if can_join:
        request.accesses.extend(following.accesses)
        request.acknowledged_sequence = following.acknowledged_sequence
    return can_join


Fabric = Links[Link]
