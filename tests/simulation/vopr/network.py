"""A simulated network: channels and servers as grpc.aio has them, between processes of one simulation.

Messages are serialized and parsed, so nothing is shared. A request may be late, lost, or carried out twice; its answer
may be lost; calls overtake each other, the messages of one stream don't. Errors cross by vfleet's real edge.
"""

import asyncio
import contextvars
from collections.abc import AsyncIterator, Callable, Iterable
from random import Random
from typing import Any

import grpc
from simulation.vopr.faults import Profile
from simulation.vopr.loop import Life, SimulatedLoop

from vfleet.edge import ErrorEdge
from vfleet.v1.driver_service_pb2 import ReadRequest, WriteRequest

BROKEN_S = 15.0
HELD_BACK_S = 5.0
_NO_LIFE = contextvars.Context()
_OK = grpc.StatusCode.OK

Status = tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]
_LATE: Status = (grpc.StatusCode.DEADLINE_EXCEEDED, "simulated: no answer in time", ())


class _Details:
    """What an interceptor is told of a call."""

    def __init__(self, method: str, metadata: Iterable[tuple[str, str]]) -> None:
        self.method = method
        self.invocation_metadata = tuple(metadata)


class _Context:
    """What a servicer is given."""

    def __init__(self) -> None:
        self.status: Status = (grpc.StatusCode.UNKNOWN, "a servicer failed", ())

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata=()) -> None:
        """End the call with a status."""
        self.status = (code, details, tuple(trailing_metadata))
        raise grpc.aio.AbortError


class SimulatedServer:
    """Stands for `vfleet.rpc.Server`. `observe` sees every unary request as it arrives, and how it was answered."""

    def __init__(self, network: "Network", life: Life, address: str, incarnation: str = "") -> None:
        self.life = life
        self.grpc = self
        self._network = network
        self._address = address
        self._edge = ErrorEdge(incarnation)
        self.incarnation = incarnation
        self._handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """Generated code calls this too."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Serve methods."""
        self._handlers.update({f"/{service}/{method}": handler for method, handler in handlers.items()})

    def listen(self, address: str) -> int:
        """Take the port."""
        return int(address.rpartition(":")[2])

    async def start(self) -> None:
        """Serve."""
        self._network.servers[self._address] = self

    async def set_serving(self, *, serving: bool) -> None:
        """Nobody asks."""

    async def stop(self, grace_s: float) -> None:
        """Serve no more."""
        self._network.servers.pop(self._address, None)

    def parse(self, path: str, data: bytes) -> Any:
        """Return a request."""
        return self._handlers[path].request_deserializer(data)

    async def handler(self, path: str, metadata: Iterable[tuple[str, str]]) -> Any:
        """Return a method behind vfleet's error edge."""

        async def own(_: object) -> Any:
            return self._handlers[path]

        return await self._edge.intercept_service(own, _Details(path, metadata))

    async def unary(self, path: str, data: bytes, metadata: Iterable[tuple[str, str]]) -> tuple[Status, bytes]:
        """Carry out a request."""
        handler = await self.handler(path, metadata)
        request, context = handler.request_deserializer(data), _Context()
        answered = self._network.observe(self, path, request)
        try:
            response = await handler.unary_unary(request, context)
        except Exception:  # noqa: BLE001  # as gRPC does
            answered(context.status[0])
            return context.status, b""
        answered(_OK)
        return (_OK, "", ()), handler.response_serializer(response)


class Network:
    """All servers by address (PROCESS:PORT), all that is on its way, and which ways are cut."""

    def __init__(self, loop: SimulatedLoop, random: Random, profile: Profile, trace: Callable[..., None]) -> None:
        self.servers: dict[str, SimulatedServer] = {}
        self.loop = loop
        self.random = random
        self.profile = profile
        self.trace = trace
        self.observe: Callable[[SimulatedServer, str, Any], Callable[[grpc.StatusCode], None]]
        self.observe = lambda *_: lambda _: None
        self.delivered_again: Callable[[SimulatedServer, str, bytes], None] = lambda *_: None
        self._cut: dict[tuple[str, str], None] = {}

    def connect(self, life: Life) -> Callable[[str], "SimulatedChannel"]:
        """Return what makes the channels of a process."""
        return lambda address: SimulatedChannel(self, life, address)

    def cut(self, source: str, target: str) -> None:
        """Let nothing through, one way."""
        self._cut[source, target] = None

    def heal(self) -> None:
        """Let everything through."""
        self._cut.clear()

    def is_cut(self, source: str, target: str) -> bool:
        """Whether nothing gets through, this way."""
        return (source, target) in self._cut

    def later(self, delay_s: float, act: Callable[..., None], *args: object) -> None:
        """Do something later, whoever dies meanwhile."""
        self.loop.call_later(delay_s, act, *args, context=_NO_LIFE)

    def delay(self) -> float:
        """Return how long a message is on its way."""
        return self.profile.delay(self.random)


class SimulatedChannel:
    """A channel from one process to an address."""

    def __init__(self, network: Network, life: Life, address: str) -> None:
        self._ends = (network, life, address)

    def unary_unary(self, path, request_serializer, response_deserializer, **_):
        def call(request, *, timeout=None, metadata=()):
            unary = _Unary(*self._ends, path, request_serializer(request), tuple(metadata or ()))
            return unary.call(timeout, response_deserializer)

        return call

    def unary_stream(self, path, request_serializer, response_deserializer, **_):
        def call(request, *, timeout=None, metadata=()):
            stream = _Stream(*self._ends, path, tuple(metadata or ()), request_serializer, response_deserializer)
            stream.open([request_serializer(request)])
            return stream

        return call

    def stream_stream(self, path, request_serializer, response_deserializer, **_):
        def call(requests=None, *, timeout=None, metadata=()):
            stream = _Stream(*self._ends, path, tuple(metadata or ()), request_serializer, response_deserializer)
            stream.open(None)
            return stream

        return call

    async def close(self) -> None:
        """Close it."""


def _error(status: Status) -> grpc.aio.AioRpcError:
    code, details, trailing = status
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details)


class _Unary:
    """One unary call."""

    def __init__(
        self, network: Network, life: Life, address: str, path: str, data: bytes, metadata: tuple[tuple[str, str], ...]
    ) -> None:
        self._network, self._life, self._address = network, life, address
        self._path, self._data, self._metadata = path, data, metadata
        self._source, self._target = life.name, address.partition(":")[0]
        self._answer: asyncio.Future[tuple[Status, bytes]] = network.loop.create_future()
        self._task: asyncio.Task[None] | None = None

    async def call(self, timeout: float | None, deserialize: Callable[[bytes], Any]) -> Any:
        await self._life.running()
        network, random, profile = self._network, self._network.random, self._network.profile
        network.trace("call", self._source, self._target, self._path)
        if random.random() >= profile.request_loss:
            network.later(network.delay(), self._arrive)
        if random.random() < profile.duplication and is_repeatable(self._path, self._data):
            network.later(random.choice((0.01, 1.0, 15.0)) * random.random(), self._arrive_again)
        timer = network.loop.call_later(timeout, self._settle, _LATE, b"") if timeout is not None else None
        status, data = _LATE, b""
        try:
            status, data = await self._answer
        finally:
            if timer is not None:
                timer.cancel()
            # gRPC tells the server that nobody waits any more, if it still can.
            if status is _LATE and self._life.is_alive and random.random() < 0.5:
                network.later(network.delay(), self._abandon)
        if status[0] is not _OK:
            raise _error(status)
        return deserialize(data)

    def _arrive(self) -> None:
        server = self._server()
        if server is not None:
            server.life.at_death[self._broken] = None
            self._task = self._network.loop.start(server.life, self._serve(server))
        elif not self._network.is_cut(self._source, self._target):
            self._reply((grpc.StatusCode.UNAVAILABLE, "simulated: connection refused", ()), b"")

    def _arrive_again(self) -> None:
        server = self._server()
        if server is not None:
            self._network.delivered_again(server, self._path, self._data)
            self._network.loop.start(server.life, server.unary(self._path, self._data, self._metadata))

    def _server(self) -> SimulatedServer | None:
        """Return who gets the request, now."""
        network = self._network
        server = network.servers.get(self._address)
        if server is None or network.is_cut(self._source, self._target):
            return None
        network.trace("arrive", self._source, self._target, self._path)
        return server

    async def _serve(self, server: SimulatedServer) -> None:
        status, data = await server.unary(self._path, self._data, self._metadata)
        if server.life.is_alive:
            server.life.at_death.pop(self._broken, None)
            if self._network.random.random() >= self._network.profile.answer_loss:
                self._reply(status, data)

    def _broken(self) -> None:
        self._reply((grpc.StatusCode.UNAVAILABLE, "simulated: connection reset", ()), b"")

    def _abandon(self) -> None:
        if self._task is not None and not self._network.is_cut(self._source, self._target):
            self._task.cancel()

    def _reply(self, status: Status, data: bytes) -> None:
        if not self._network.is_cut(self._target, self._source):
            self._network.later(self._network.delay(), self._settle, status, data)

    def _settle(self, status: Status, data: bytes) -> None:
        if not self._answer.done():
            self._answer.set_result((status, data))


class _Stream:
    """One streaming call, as its client sees it. Messages of one way keep their order."""

    def __init__(
        self,
        network: Network,
        life: Life,
        address: str,
        path: str,
        metadata: tuple[tuple[str, str], ...],
        serialize: Callable[[Any], bytes],
        deserialize: Callable[[bytes], Any],
    ) -> None:
        self._network, self._life, self._address = network, life, address
        self._path, self._metadata = path, metadata
        self._serialize, self._deserialize = serialize, deserialize
        self._source, self._target = life.name, address.partition(":")[0]
        self._to_server: list[bytes | None] = []
        self._to_client: list[bytes | Status] = []
        self._server_news, self._client_news = asyncio.Event(), asyncio.Event()
        self._connected: asyncio.Future[None] = network.loop.create_future()
        self._server: SimulatedServer | None = None
        self._task: asyncio.Task[None] | None = None
        self._last_arrival = {True: 0.0, False: 0.0}
        self._is_over = False

    # --- the client's side ---

    def open(self, requests: list[bytes] | None) -> None:
        self._life.check()
        self._network.trace("open", self._source, self._target, self._path)
        self._life.at_death[self._client_died] = None
        if requests is not None:
            self._to_server = [*requests, None]
        if self._network.is_cut(self._source, self._target):
            self._break()
        else:
            self._network.later(self._network.delay(), self._arrive)

    async def wait_for_connection(self) -> None:
        await asyncio.shield(self._connected)
        if self._to_client and not isinstance(self._to_client[0], bytes):
            raise _error(self._to_client[0])

    async def write(self, message: Any) -> None:
        await self._life.running()
        self._send(self._serialize(message), to_server=True)

    def __aiter__(self) -> "AsyncIterator[Any]":
        return self._responses()

    async def _responses(self) -> AsyncIterator[Any]:
        while True:
            while not self._to_client:
                self._client_news.clear()
                await self._client_news.wait()
            part = self._to_client.pop(0)
            if isinstance(part, bytes):
                yield self._deserialize(part)
                continue
            if part[0] is not _OK:
                raise _error(part)
            return

    def cancel(self) -> None:
        if self._life.is_alive:
            self._life.at_death.pop(self._client_died, None)
            self._end((grpc.StatusCode.CANCELLED, "simulated: cancelled", ()))
            self._hang_up()

    # --- on the way ---

    def _send(self, part: Any, *, to_server: bool) -> None:
        if self._is_over:
            return
        network = self._network
        ends = (self._source, self._target) if to_server else (self._target, self._source)
        delay_s = network.delay()
        if network.is_cut(*ends):
            if network.random.random() < 0.5:
                self._break()
                return
            # As TCP, which sends it again until the way is open, also for a process that has died meanwhile.
            delay_s += network.random.uniform(0.0, HELD_BACK_S)
        at = max(network.loop.time() + delay_s, self._last_arrival[to_server] + 1e-6)
        self._last_arrival[to_server] = at
        network.loop.call_at(at, self._deliver, part, to_server, context=_NO_LIFE)

    def _deliver(self, part: Any, to_server: bool) -> None:
        if to_server:
            self._to_server.append(part)
            self._server_news.set()
        elif isinstance(part, bytes):
            if not self._is_over:
                self._to_client.append(part)
                self._client_news.set()
        else:
            self._end(part)

    def _break(self) -> None:
        """Let both sides learn, each at its time, that there is no connection any more."""
        random, status = self._network.random, (grpc.StatusCode.UNAVAILABLE, "simulated: connection lost", ())
        self._network.later(random.uniform(0.0, BROKEN_S), self._end, status)
        self._network.later(random.uniform(0.0, BROKEN_S), self._cancel_server)

    def _end(self, status: Status) -> None:
        if not self._is_over:
            self._is_over = True
            self._to_client.append(status)
            self._client_news.set()
            if not self._connected.done():
                self._connected.set_result(None)

    def _client_died(self) -> None:
        self._is_over = True
        self._hang_up()

    def _hang_up(self) -> None:
        """Let the server learn that its client is gone, after what the client had sent before."""
        network = self._network
        at = max(network.loop.time() + network.delay(), self._last_arrival[True] + 1e-6)
        network.loop.call_at(at, self._cancel_server, context=_NO_LIFE)

    # --- the server's side ---

    def _arrive(self) -> None:
        server = self._network.servers.get(self._address)
        if server is None:
            status = (grpc.StatusCode.UNAVAILABLE, "simulated: connection refused", ())
            self._network.later(self._network.delay(), self._end, status)
            return
        self._server = server
        server.life.at_death[self._server_died] = None
        self._task = self._network.loop.start(server.life, self._serve(server))
        self._network.later(self._network.delay(), self._say_connected)

    def _say_connected(self) -> None:
        if not self._connected.done():
            self._connected.set_result(None)

    async def _serve(self, server: SimulatedServer) -> None:
        handler, context = await server.handler(self._path, self._metadata), _Context()
        status: Status = (_OK, "", ())
        try:
            if handler.unary_stream is not None:
                responses = handler.unary_stream(handler.request_deserializer(self._to_server[0]), context)
            else:
                responses = handler.stream_stream(self._requests(handler.request_deserializer), context)
            async for response in responses:
                server.life.check()
                self._send(handler.response_serializer(response), to_server=False)
        except Exception:  # noqa: BLE001  # as gRPC does
            status = context.status
        server.life.check()
        server.life.at_death.pop(self._server_died, None)
        self._send(status, to_server=False)

    async def _requests(self, deserialize: Callable[[bytes], Any]) -> AsyncIterator[Any]:
        while True:
            while not self._to_server:
                self._server_news.clear()
                await self._server_news.wait()
            part = self._to_server.pop(0)
            if part is None:
                return
            yield deserialize(part)

    def _server_died(self) -> None:
        if self._network.is_cut(self._target, self._source):
            self._break()
        else:
            self._send((grpc.StatusCode.UNAVAILABLE, "simulated: connection reset", ()), to_server=False)

    def _cancel_server(self) -> None:
        if self._task is not None and self._server is not None:
            self._server.life.at_death.pop(self._server_died, None)
            self._task.cancel()


def is_repeatable(path: str, data: bytes) -> bool:
    """Whether a unary request may be carried out twice: all but an access that has no sequence."""
    method = path.rpartition("/")[2]
    kinds = {"Read": ReadRequest, "Write": WriteRequest}
    return method not in kinds or bool(kinds[method].FromString(data).sequence)
