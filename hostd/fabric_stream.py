"""Streams to other hosts, one to each segment's, opened again whenever they break.

A stream promises nothing but order while it lasts: what has no answer when it breaks is sent again by its user.
"""

import asyncio
import logging
from collections.abc import Callable
from random import Random
from typing import Generic, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from hostd.directory import Directory, Peer
from vfleet import cancellation
from vfleet.background import in_background
from vfleet.clock import Clock, backoff_delays
from vfleet.errors import VfleetError, from_rpc_error

CONNECT_TIMEOUT_S = 2.0
RECONNECT_FIRST_S = 0.02
RECONNECT_LONGEST_S = 0.5

_log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
ArrivedT = TypeVar("ArrivedT", bound=Message, contravariant=True)


class User(Protocol[ArrivedT]):
    """Who uses a stream."""

    def arrived(self, response: ArrivedT) -> None:
        """Take a response."""

    def connected(self) -> None:
        """Learn that the stream is open, for the first time or again."""


class FabricStream(Generic[RequestT, ResponseT]):
    """The stream. `open_stream` begins the call at a peer.

    `join`, if given, puts what follows a request into it while both wait for their turn, or returns False.
    """

    def __init__(
        self,
        segment: int,
        directory: Directory,
        clock: Clock,
        random: Random,
        open_stream: "Callable[[Peer], grpc.aio.StreamStreamCall[RequestT, ResponseT]]",
        user: User[ResponseT],
        join: Callable[[RequestT, RequestT], bool] | None = None,
    ) -> None:
        self._segment = segment
        self._directory = directory
        self._clock = clock
        self._random = random
        self._open_stream = open_stream
        self._user = user
        self._join = join
        # Bounded by its users: each has no more on the way than its window.
        self._outbox: asyncio.Queue[RequestT] = asyncio.Queue()
        self._is_connected = False
        self._task = in_background(self._run(), name=f"stream to segment {segment}")

    def send(self, request: RequestT) -> bool:
        """Send a request. Return False if the stream is down; `connected` is called when it is open again."""
        if self._is_connected:
            self._outbox.put_nowait(request)
        return self._is_connected

    async def close(self) -> None:
        """End the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        delays = backoff_delays(self._random, RECONNECT_FIRST_S, RECONNECT_LONGEST_S)
        while True:
            changed = self._directory.changed
            peer = self._directory.peer(self._segment)
            if peer is None:
                await changed.wait()
                continue
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    stream = self._open_stream(peer)
                    await stream.wait_for_connection()
                delays = backoff_delays(self._random, RECONNECT_FIRST_S, RECONNECT_LONGEST_S)
                await self._carry(stream)
            except grpc.aio.AioRpcError as error:
                _log.info("stream to segment %d: %s", self._segment, from_rpc_error(error, peer.address))
            except TimeoutError:
                _log.info("stream to segment %d: no connection to %s", self._segment, peer.address)
            except VfleetError as error:  # plaintext, and the host says that it is on another machine
                _log.warning("stream to segment %d: %s", self._segment, error.message)
            except asyncio.CancelledError:
                if cancellation.is_asked_for():
                    raise
                _log.info("stream to segment %d: its channel was closed", self._segment)
            await self._clock.sleep(next(delays))

    async def _carry(self, stream: "grpc.aio.StreamStreamCall[RequestT, ResponseT]") -> None:
        self._outbox = asyncio.Queue()
        self._is_connected = True
        sending = asyncio.create_task(self._send_all(stream))
        try:
            self._user.connected()
            async for response in stream:
                self._user.arrived(response)
        finally:
            self._is_connected = False
            sending.cancel()
            # What it failed with is what ended the reading, too.
            await asyncio.gather(sending, return_exceptions=True)
            stream.cancel()

    async def _send_all(self, stream: "grpc.aio.StreamStreamCall[RequestT, ResponseT]") -> None:
        outbox = self._outbox
        request = await outbox.get()
        while True:
            following = None
            while following is None and not outbox.empty():
                following = outbox.get_nowait()
                if self._join is not None and self._join(request, following):
                    following = None
            await stream.write(request)
            request = following if following is not None else await outbox.get()


class Link(Protocol):
    """What goes over one stream."""

    async def close(self) -> None:
        """End the stream."""


LinkT = TypeVar("LinkT", bound=Link)


class Links(Generic[LinkT]):
    """The links of a host, one a segment, opened when first needed."""

    def __init__(self, open_link: Callable[[int], LinkT]) -> None:
        self._open_link = open_link
        self._links: dict[int, LinkT] = {}

    def to(self, segment: int) -> LinkT:
        """Return the link to the host of a segment."""
        if segment not in self._links:
            self._links[segment] = self._open_link(segment)
        return self._links[segment]

    async def close(self) -> None:
        """End all streams."""
        await asyncio.gather(*(link.close() for link in self._links.values()))
