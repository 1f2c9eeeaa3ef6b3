"""One stream to a segment's host, opened again whenever it breaks. It promises nothing but order while it lasts."""

import asyncio
import logging
from collections.abc import Callable
from random import Random
from typing import Generic, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from hostd.directory import Directory, Peer
from vfleet.clock import Clock, backoff_delays
from vfleet.errors import from_rpc_error

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
    """The stream. `open_stream` begins the call at a peer."""

    def __init__(
        self,
        segment: int,
        directory: Directory,
        clock: Clock,
        random: Random,
        open_stream: "Callable[[Peer], grpc.aio.StreamStreamCall[RequestT, ResponseT]]",
        user: User[ResponseT],
    ) -> None:
        self._segment = segment
        self._directory = directory
        self._clock = clock
        self._random = random
        self._open_stream = open_stream
        self._user = user
        # Bounded by its users: each has no more on the way than its window.
        self._outbox: asyncio.Queue[RequestT] = asyncio.Queue()
        self._is_connected = False
        self._task = asyncio.create_task(self._run(), name=f"stream to segment {segment}")

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
        while True:
            await stream.write(await outbox.get())
