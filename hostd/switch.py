"""The switch: it carries frames from this host's functions to those on the same networks, wherever they live.

    sender's outbox --> who is to get it, by the stations --> offer to its home --> taken: acknowledge to the outbox
                                    ^                              |
                                    +------ not there: look again -+

A frame lies in its sender's image until all whom it is for have taken it, and a receiver notes a frame's sequence with
the frame itself. So it arrives once, and in order, though either end moves or a daemon is killed meanwhile: what was
not acknowledged is offered again, by the sender's home of that time to the receiver's. What can't be delivered for too
long is dropped for that receiver, and counted; a hold is shorter.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from hostd.directory import Directory, Peer
from hostd.engine import Delivery, Engine, Engines
from hostd.functions import Functions
from hostd.models import NETWORK_MODELS
from hostd.models.base import MAX_FRAME_BYTES
from hostd.models.ethernet import HEADER_BYTES, MAC_BYTES, is_group
from hostd.stations import Station, Stations
from vfleet.address import location_of
from vfleet.background import in_background
from vfleet.clock import Clock, backoff_delays
from vfleet.errors import VfleetError, invalid_field
from vfleet.names import check_name
from vfleet.rpc import Channels, call
from vfleet.v1.fabric_service_pb2 import (
    FRAME_REFUSAL_NO_ROOM,
    FRAME_REFUSAL_NOT_SERVING,
    FRAME_REFUSAL_UNSPECIFIED,
    DeliverFramesRequest,
    DeliverFramesResponse,
    NetworkFrame,
)
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceStub

CALL_TIMEOUT_S = 2.0
RETRY_FIRST_S = 0.002
RETRY_LONGEST_S = 0.1
GIVE_UP_S = 30.0
"""How long a receiver may take no frame before frames for it are dropped: longer than any hold should last."""
LEARN_S = 1.0
"""How long a frame waits for somebody who has its address: a function's record may come later than a frame from it."""
MAX_UNKNOWN = 256

Frames = Sequence[tuple[int, bytes]]
Deliver = Callable[[Peer, DeliverFramesRequest], Awaitable[DeliverFramesResponse]]
"""Call DeliverFrames at a peer. Raise the VfleetError that comes of it."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SwitchReach:
    """How the switch reaches stations: this host's own functions, and the fabric."""

    segment: int
    functions: Functions
    engines: Engines
    stations: Stations
    directory: Directory
    deliver: Deliver
    clock: Clock
    random: Random


class Courier:
    """Carries the frames of one instance."""

    def __init__(self, engine: Engine, switch: "Switch", reach: SwitchReach) -> None:
        self._engine = engine
        self._instance = engine.instance
        self._switch = switch
        self._reach = reach
        self._wanted = asyncio.Event()
        # Since when a receiver has taken nothing that was offered, by its identity.
        self._stuck_since: dict[int, float] = {}
        # Since when nobody is known to have an address.
        self._unknown_since: dict[bytes, float] = {}
        engine.frames.on_frames = self._wanted.set

    async def run(self) -> None:
        """Carry frames until the instance goes."""
        await self._reach.stations.known.wait()
        await self._reach.directory.known.wait()
        while not self._instance.is_closed:
            self._wanted.clear()
            frames = self._engine.frames.peek()
            if not frames:
                await self._wanted.wait()
            elif await self._carry(frames):
                self._engine.frames.acknowledge(frames[-1][0])
            else:
                # What isn't offered can't be taken: when the function runs again, all have their time again.
                self._stuck_since.clear()
                self._unknown_since.clear()

    async def _carry(self, frames: Frames) -> bool:
        """Bring frames to all whom they are for. Return False if the function stopped running meanwhile."""
        batches: dict[int, list[tuple[int, bytes]]] = {}
        for sequence, frame in frames:
            # A frame without data was cancelled.
            receivers = await self._receivers(frame) if frame else []
            if receivers is None:
                return False
            for station in receivers:
                batches.setdefault(station.identity, []).append((sequence, frame))
        carried = await asyncio.gather(*(self._deliver(identity, batch) for identity, batch in batches.items()))
        return all(carried)

    async def _receivers(self, frame: bytes) -> list[Station] | None:
        """Return who is to get a frame; None if the function stopped running while that was to be learned."""
        about, stations, clock = self._instance.about, self._reach.stations, self._reach.clock
        if len(frame) < HEADER_BYTES:
            # A device may send it, and no station takes it.
            self._drop(1)
            return []
        destination = frame[:MAC_BYTES]
        while True:
            changed = stations.changed
            found = stations.receivers(about.identity, about.device, frame)
            if found or is_group(destination):
                self._unknown_since.pop(destination, None)
                return found
            if not self._is_running:
                return None
            left_s = self._begun_unknown(destination) + LEARN_S - clock.monotonic()
            if left_s <= 0:
                self._drop(1)
                return []
            # The network may have changed too: that is not told.
            await _first(changed, min(left_s, RETRY_LONGEST_S))

    def _begun_unknown(self, mac: bytes) -> float:
        """Return since when nobody is known to have an address."""
        if mac not in self._unknown_since and len(self._unknown_since) >= MAX_UNKNOWN:
            self._unknown_since.clear()
        return self._unknown_since.setdefault(mac, self._reach.clock.monotonic())

    async def _deliver(self, identity: int, frames: Frames) -> bool:
        """Bring frames to one receiver, in order. Return False if the sender stopped running meanwhile."""
        delays = self._delays()
        while frames and self._is_running:
            changed = self._reach.stations.changed
            station = self._reach.stations.find(identity)
            if station is None:
                self._drop(len(frames))
                return True
            response = await self._switch.offer(self._instance.about.identity, station, frames)
            frames = frames[response.taken :]
            if response.taken or not frames:
                self._stuck_since.pop(identity, None)
                delays = self._delays()
            now = self._reach.clock.monotonic()
            if frames and now >= self._stuck_since.setdefault(identity, now) + GIVE_UP_S:
                about = {"function": station.function}
                _log.warning("function %s takes no frames: %d are dropped", station.function, len(frames), extra=about)
                self._drop(len(frames))
                return True
            if frames:
                await _first(changed, next(delays))
        return not frames

    @property
    def _is_running(self) -> bool:
        return self._instance.is_serving and not self._instance.is_closed

    def _drop(self, count: int) -> None:
        self._instance.frames_dropped += count

    def _delays(self) -> Iterator[float]:
        return backoff_delays(self._reach.random, RETRY_FIRST_S, RETRY_LONGEST_S)


class Switch:
    """The switch of a host: its own functions' couriers, and the way in for others' frames."""

    def __init__(self, reach: SwitchReach) -> None:
        self._reach = reach
        self._tasks: set[asyncio.Task[None]] = set()
        for engine in reach.engines.all():
            self._start(engine)
        reach.engines.listeners.append(self._start)

    async def offer(self, sender: int, station: Station, frames: Frames) -> DeliverFramesResponse:
        """Offer frames to a station's home. One that is out of reach is as one that isn't there."""
        request = DeliverFramesRequest(
            function=station.function,
            generation=station.generation,
            base=station.base,
            sender=sender,
            frames=[NetworkFrame(sequence=sequence, data=data) for sequence, data in frames],
        )
        segment = location_of(station.base).segment
        if segment == self._reach.segment:
            return self.take(request)
        refused = DeliverFramesResponse(refusal=FRAME_REFUSAL_NOT_SERVING)
        peer = self._reach.directory.peer(segment)
        if peer is None:
            return refused
        try:
            return await self._reach.deliver(peer, request)
        except VfleetError as error:
            _log.info("frames for function %s: %s", station.function, error, extra={"function": station.function})
            return refused

    def take(self, request: DeliverFramesRequest) -> DeliverFramesResponse:
        """Let a function take frames (DeliverFrames in the contract). Raise INVALID_FIELD for what no hostd sends."""
        _check(request)
        response = DeliverFramesResponse(refusal=FRAME_REFUSAL_NOT_SERVING)
        instance = self._reach.functions.answering(request.function, request.generation, request.base)
        engine = self._reach.engines.of(instance) if instance is not None else None
        if engine is None or engine.instance.about.model not in NETWORK_MODELS:
            return response
        self._make_room(engine, request.sender)
        for frame in request.frames:
            delivery = engine.deliver(frame.data, request.sender, frame.sequence)
            if delivery is Delivery.NO_ROOM:
                response.refusal = FRAME_REFUSAL_NO_ROOM
            if delivery in (Delivery.NO_ROOM, Delivery.NOT_RUNNING):
                return response
            response.taken += 1
        response.refusal = FRAME_REFUSAL_UNSPECIFIED
        return response

    async def close(self) -> None:
        """End the tasks, as a kill would."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _make_room(self, engine: Engine, sender: int) -> None:
        """Forget senders that are no more if there is no place for another one."""
        part = engine.instance.master
        if part is None or part.last_from(sender) or not part.is_full:
            return
        for known in part.senders():
            if self._reach.stations.known.is_set() and self._reach.stations.find(known) is None:
                engine.forget_sender(known)

    def _start(self, engine: Engine) -> None:
        if engine.instance.about.model not in NETWORK_MODELS:
            return
        self._reach.stations.wanted.set()
        courier = Courier(engine, self, self._reach)
        task = in_background(courier.run(), name=f"frames of {engine.instance.about.function}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _first(changed: asyncio.Event, delay_s: float) -> None:
    """Wait until something has changed, or for so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(delay_s):
            await changed.wait()


def deliver_through(channels: Channels) -> Deliver:
    """Return how frames are delivered over the network."""

    async def deliver(peer: Peer, request: DeliverFramesRequest) -> DeliverFramesResponse:
        method = FabricServiceStub(channels.to(peer.address, peer.server)).DeliverFrames
        return await call(method, request, address=peer.address, timeout_s=CALL_TIMEOUT_S, incarnation=peer.incarnation)

    return deliver


def _check(request: DeliverFramesRequest) -> None:
    check_name("function", request.function)
    if not request.sender:
        raise invalid_field("sender", 0, "an identity other than 0")
    _check_frames(request.frames)


def _check_frames(frames: Iterable[NetworkFrame]) -> None:
    last = 0
    for index, frame in enumerate(frames):
        if frame.sequence <= last:
            raise invalid_field(f"frames[{index}].sequence", frame.sequence, f"more than {last}: they ascend")
        if not HEADER_BYTES <= len(frame.data) <= MAX_FRAME_BYTES:
            expected = f"{HEADER_BYTES} to {MAX_FRAME_BYTES}"
            raise invalid_field(f"frames[{index}].data", f"{len(frame.data)} bytes", expected)
        last = frame.sequence
