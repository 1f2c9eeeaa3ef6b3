"""DMA over the fabric: what this host's functions send to drivers on other hosts."""

from random import Random
from typing import Protocol, TypeAlias

import grpc

from hostd.directory import Directory, Peer
from hostd.fabric_stream import FabricStream, Links
from vfleet.clock import Clock
from vfleet.rpc import Channels, meant_for
from vfleet.v1.fabric_service_pb2 import ExchangeDmaRequest, ExchangeDmaResponse
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceStub

SenderId = tuple[str, int]
_Stream: TypeAlias = "grpc.aio.StreamStreamCall[ExchangeDmaRequest, ExchangeDmaResponse]"


class Sender(Protocol):
    """Who sends through a link: one instance of a function."""

    def answered(self, response: ExchangeDmaResponse) -> None:
        """Take the answer to a batch."""

    def connected(self) -> None:
        """Learn that the link is open, for the first time or again: what has no answer must be sent, again."""


class DmaLink:
    """The stream to the host of one segment. Batches of one sender, by function and generation, keep their order."""

    def __init__(self, segment: int, directory: Directory, channels: Channels, clock: Clock, random: Random) -> None:
        self._senders: dict[SenderId, Sender] = {}

        def open_stream(peer: Peer) -> _Stream:
            stub = FabricServiceStub(channels.to(peer.address, peer.server))
            return stub.ExchangeDma(metadata=meant_for(peer.incarnation))

        self._stream = FabricStream(segment, directory, clock, random, open_stream, self)

    def send(self, request: ExchangeDmaRequest, sender: Sender) -> bool:
        """Send a batch. Return False if the link is down; `sender.connected` is called when it is open again."""
        self._senders[request.function, request.generation] = sender
        return self._stream.send(request)

    def leave(self, function: str, generation: int) -> None:
        """Forget a sender that sends no more."""
        self._senders.pop((function, generation), None)

    def arrived(self, response: ExchangeDmaResponse) -> None:
        """Give a response to whom it is for (as the stream's user)."""
        sender = self._senders.get((response.function, response.generation))
        if sender is not None:
            sender.answered(response)

    def connected(self) -> None:
        """Tell all senders (as the stream's user)."""
        for sender in list(self._senders.values()):
            sender.connected()

    async def close(self) -> None:
        """End the stream."""
        await self._stream.close()


DmaLinks = Links[DmaLink]
