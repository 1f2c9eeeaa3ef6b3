"""The fabric: accesses to functions that live on other hosts.

A `Link` is one stream to one host, opened again whenever it breaks. It promises nothing but order while it lasts: what
has no answer when it breaks is sent again by the queue that it came from, and the function's sequences see to it that
it takes effect once. Batches that wait for their turn on the stream are joined.
"""

import asyncio
import logging
from collections.abc import Callable
from random import Random
from typing import Protocol

import grpc

from hostd.directory import Directory
from vfleet.clock import Clock, backoff_delays
from vfleet.errors import Reason, VfleetError, from_rpc_error
from vfleet.limits import WINDOW
from vfleet.rpc import Channels, call, meant_for
from vfleet.v1.fabric_service_pb2 import ExchangeRequest, ExchangeResponse, ForgetDriverRequest, GetSequenceRequest
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceStub

CALL_TIMEOUT_S = 2.0
CONNECT_TIMEOUT_S = 2.0
RECONNECT_FIRST_S = 0.02
RECONNECT_LONGEST_S = 0.5
FORGET_FOR_S = 60.0
MAX_JOINED = WINDOW // 2

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
        # Bounded by the senders: none has more than its window on the way.
        self._outbox: asyncio.Queue[ExchangeRequest] = asyncio.Queue()
        self._connected = False
        self._forgetting: set[asyncio.Task[None]] = set()
        self._task = asyncio.create_task(self._run(), name=f"link to segment {segment}")

    def leave(self, driver: str, function: str) -> None:
        """Forget a sender that sends no more."""
        self._senders.pop((driver, function), None)

    def send(self, request: ExchangeRequest, sender: Sender) -> bool:
        """Send a batch. Return False if the link is down; `sender.connected` is called when it is open again."""
        self._senders[request.driver, request.function] = sender
        if self._connected:
            self._outbox.put_nowait(request)
        return self._connected

    async def get_sequence(self, request: GetSequenceRequest) -> int:
        """Ask the home how far it got with a driver. Raise UNREACHABLE, or what the home answers."""
        peer = self._directory.peer(self._segment)
        if peer is None:
            raise VfleetError(Reason.UNREACHABLE, f"no host has segment {self._segment}")
        response = await call(
            FabricServiceStub(self._channels.to(peer.address)).GetSequence,
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
        tasks = [self._task, *self._forgetting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forget_driver(self, request: ForgetDriverRequest) -> None:
        give_up_s = self._clock.monotonic() + FORGET_FOR_S
        for delay_s in backoff_delays(self._random, RECONNECT_FIRST_S, RECONNECT_LONGEST_S):
            peer, why = self._directory.peer(self._segment), "its host is not known"
            if peer is not None:
                try:
                    await call(
                        FabricServiceStub(self._channels.to(peer.address)).ForgetDriver,
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
                _log.warning("function %s still knows driver %s: %s", request.function, request.driver, why)
                return
            await self._clock.sleep(delay_s)

    async def _run(self) -> None:
        delays = backoff_delays(self._random, RECONNECT_FIRST_S, RECONNECT_LONGEST_S)
        while True:
            changed = self._directory.changed
            peer = self._directory.peer(self._segment)
            if peer is None:
                await changed.wait()
                continue
            address = peer.address
            try:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    stream = FabricServiceStub(self._channels.to(address)).Exchange(
                        metadata=meant_for(peer.incarnation)
                    )
                    await stream.wait_for_connection()
                delays = backoff_delays(self._random, RECONNECT_FIRST_S, RECONNECT_LONGEST_S)
                await self._carry(stream)
            except grpc.aio.AioRpcError as error:
                _log.info("link to segment %d: %s", self._segment, from_rpc_error(error, address))
            except TimeoutError:
                _log.info("link to segment %d: no connection to %s", self._segment, address)
            await self._clock.sleep(next(delays))

    async def _carry(self, stream: "grpc.aio.StreamStreamCall[ExchangeRequest, ExchangeResponse]") -> None:
        self._outbox = asyncio.Queue()
        self._connected = True
        sending = asyncio.create_task(self._send_all(stream))
        try:
            for sender in list(self._senders.values()):
                sender.connected()
            async for response in stream:
                self._dispatch(response)
        finally:
            self._connected = False
            sending.cancel()
            # What it failed with is what ended the reading, too.
            await asyncio.gather(sending, return_exceptions=True)
            stream.cancel()

    async def _send_all(self, stream: "grpc.aio.StreamStreamCall[ExchangeRequest, ExchangeResponse]") -> None:
        outbox = self._outbox
        request = await outbox.get()
        while True:
            following = None
            while following is None and not outbox.empty():
                following = outbox.get_nowait()
                if _can_join(request, following):
                    _join(request, following)
                    following = None
            await stream.write(request)
            request = following if following is not None else await outbox.get()

    def _dispatch(self, response: ExchangeResponse) -> None:
        sender = self._senders.get((response.driver, response.function))
        if sender is not None:
            sender.answered(response)


def _can_join(request: ExchangeRequest, following: ExchangeRequest) -> bool:
    """Return whether two batches may go as one: of one sender, in order, and not more than half of a window.

    Two halves are on their way at once, so that one end of the link works while the other does.
    """
    return (
        request.driver == following.driver
        and request.function == following.function
        and request.generation == following.generation
        and request.session == following.session
        and len(request.accesses) + len(following.accesses) <= MAX_JOINED
        and request.accesses[-1].sequence < following.accesses[0].sequence
    )


def _join(request: ExchangeRequest, following: ExchangeRequest) -> None:
    request.accesses.extend(following.accesses)
    request.acknowledged_sequence = following.acknowledged_sequence


class Fabric:
    """The links of a host, one a segment, opened when first needed."""

    def __init__(self, open_link: Callable[[int], Link]) -> None:
        self._open_link = open_link
        self._links: dict[int, Link] = {}

    def to(self, segment: int) -> Link:
        """Return the link to the host of a segment."""
        if segment not in self._links:
            self._links[segment] = self._open_link(segment)
        return self._links[segment]

    async def close(self) -> None:
        """End all streams."""
        await asyncio.gather(*(link.close() for link in self._links.values()))
