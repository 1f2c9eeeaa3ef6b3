"""The edges of a gRPC process: a server that answers every failure with one clear error, and calls that raise it again.

Servicers raise `VfleetError`; the server turns it into a status with details, whatever kind the method is. A request
that isn't a protobuf message of its type (bytes that aren't UTF-8 in a string, for example) is INVALID_ARGUMENT. The
health and reflection services come with every server, so that any language's client works unaided.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vfleet import log
from vfleet.errors import Reason, VfleetError, from_rpc_error, to_status

MAX_MESSAGE_BYTES = 4 << 20
DETAILS_KEY = "grpc-status-details-bin"
INCARNATION_KEY = "vfleet-incarnation"
MIGRATION_KEY = "vfleet-migration"
KEEPALIVE_TIME_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 5_000
RECONNECT_LONGEST_MS = 1_000

# A peer that vanished without a word is not waited for: a stream may be silent for long, and then be needed at once.
_KEEPALIVE: Sequence[tuple[str, int]] = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    # The same for each ping, and it is this one that counts: it is a minute otherwise.
    ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
)
_CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    *_KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 50),
    # Also how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.max_reconnect_backoff_ms", RECONNECT_LONGEST_MS),
    # A process that restarts on its port must be found again at once, not through another channel's failed connection.
    ("grpc.use_local_subchannel_pool", 1),
    # Daemons are reached directly, whatever the environment says of the web.
    ("grpc.enable_http_proxy", 0),
)
_SERVER_OPTIONS: Sequence[tuple[str, int]] = (
    *_KEEPALIVE,
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    # Two daemons on one port would answer by turns.
    ("grpc.so_reuseport", 0),
)

_log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
StubT = TypeVar("StubT")


def connect(address: str) -> grpc.aio.Channel:
    """Return a channel to the daemon at HOST:PORT. It connects when first used, and again whenever it has to."""
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


class Channels:
    """The channels of a process, two an address, made when first needed. `connect` is the network, as an argument."""

    def __init__(self, connect: Callable[[str], grpc.aio.Channel] = connect) -> None:
        self._connect = connect
        self._channels: dict[tuple[str, bool], grpc.aio.Channel] = {}
        self._stubs: dict[tuple[object, str, bool], object] = {}

    def to(self, address: str, *, bulk: bool = False) -> grpc.aio.Channel:
        """Return the channel to HOST:PORT, or that for `bulk`: behind megabytes nobody should have to wait."""
        if (address, bulk) not in self._channels:
            self._channels[address, bulk] = self._connect(address)
        return self._channels[address, bulk]

    def stub(self, kind: Callable[[grpc.aio.Channel], StubT], address: str, *, bulk: bool = False) -> StubT:
        """Return the stub of this kind on the channel that `to` returns, made once."""
        known = self._stubs.get((kind, address, bulk))
        if known is None:
            known = self._stubs[kind, address, bulk] = kind(self.to(address, bulk=bulk))
        return cast("StubT", known)

    async def close(self) -> None:
        """Close all; calls under way fail."""
        channels, self._channels = list(self._channels.values()), {}
        self._stubs.clear()
        await asyncio.gather(*(channel.close() for channel in channels))


def meant_for(incarnation: str) -> grpc.aio.Metadata:
    """Return the metadata by which a host refuses a call that is meant for another; none if `incarnation` is empty.

    An address is no identity: another host, or another fleet's, may have the port by now. With it goes what migration
    this is for, if it is for one, for the lines that the other side logs.
    """
    metadata = grpc.aio.Metadata()
    if incarnation:
        metadata.add(INCARNATION_KEY, incarnation)
    if migration := log.bound_migration():
        metadata.add(MIGRATION_KEY, migration)
    return metadata


async def call(
    method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT],
    request: RequestT,
    *,
    address: str,
    timeout_s: float,
    incarnation: str = "",
) -> ResponseT:
    """Call a unary method of the daemon at `address` and return its response. Raise the VfleetError it answers with.

    No answer within `timeout_s` raises UNREACHABLE; then the request may or may not have been carried out. A host with
    another incarnation than the one given refuses with INCARNATION_CHANGED.
    """
    try:
        return await method(request, timeout=timeout_s, metadata=meant_for(incarnation))
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, address) from None


async def stream(
    method: grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT],
    request: RequestT,
    *,
    address: str,
    timeout_s: float | None = None,
    incarnation: str = "",
) -> AsyncGenerator[ResponseT, None]:
    """Yield the responses of a server-streaming method. Raise as `call` does. Closing the generator ends the call."""
    responses = method(request, timeout=timeout_s, metadata=meant_for(incarnation))
    try:
        async for response in responses:
            yield response
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error, address) from None
    finally:
        responses.cancel()


class _Refused:
    """Stands for a request that is refused before any handler has seen it."""

    def __init__(self, error: VfleetError) -> None:
        self.error = error


def _not_this_host(meant: object, incarnation: str) -> VfleetError:
    return VfleetError(
        Reason.INCARNATION_CHANGED,
        f"the call is meant for incarnation {meant!r}; this is {incarnation!r}",
        metadata={"incarnation": incarnation},
    )


_Context: TypeAlias = "grpc.aio.ServicerContext[Message, Message]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Message, Message]"


class _ErrorEdge(grpc.aio.ServerInterceptor):
    """Wraps every handler, so that whatever it raises leaves as one status with details."""

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        # By method: how a call that is meant for this host is handled, wrapped once and not for each call.
        self._wrapped: dict[str, _Handler] = {}

    async def intercept_service(  # type: ignore[override]  # the stubs let each call choose its own message types
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        metadata = dict(handler_call_details.invocation_metadata or ())
        log.bind_migration(metadata.get(MIGRATION_KEY, ""))
        meant = metadata.get(INCARNATION_KEY, self._incarnation)
        is_meant_for_this = meant == self._incarnation
        wrapped = self._wrapped.get(handler_call_details.method) if is_meant_for_this else None
        if wrapped is not None:
            return wrapped
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        deserializer = handler.request_deserializer
        assert deserializer is not None  # noqa: S101  # generated code always gives one

        def decode(data: bytes) -> Message:
            try:
                return deserializer(data)
            except DecodeError as error:
                refusal = VfleetError(Reason.INVALID_FIELD, f"the request can't be decoded: {error}")
                return cast("Message", _Refused(refusal))

        def refuse(_: bytes) -> Message:
            return cast("Message", _Refused(_not_this_host(meant, self._incarnation)))

        wrapped = self._wrap(handler, decode if is_meant_for_this else refuse)
        if is_meant_for_this:
            self._wrapped[handler_call_details.method] = wrapped
        return wrapped

    @staticmethod
    def _wrap(handler: _Handler, decode: Callable[[bytes], Message]) -> _Handler:
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _edge_unary(cast("_Unary", handler.unary_unary)), decode, handler.response_serializer
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                _edge_stream(cast("_Stream", handler.unary_stream)), decode, handler.response_serializer
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _edge_stream(cast("_Stream", handler.stream_stream)), decode, handler.response_serializer
            )
        return handler


_Unary: TypeAlias = "Callable[[Message, _Context], Awaitable[Message]]"
_Stream: TypeAlias = "Callable[[Message | AsyncIterator[Message], _Context], AsyncIterator[Message]]"


def _edge_unary(handler: _Unary) -> _Unary:
    async def edge(request: Message, context: _Context) -> Message:
        try:
            decoded = _decoded(request)
            log.bind_request(decoded)
            return await handler(decoded, context)
        except Exception as error:  # the one place where every failure becomes a status
            await _abort(context, error)
            raise

    return edge


def _edge_stream(handler: _Stream) -> _Stream:
    async def edge(request: Message | AsyncIterator[Message], context: _Context) -> AsyncIterator[Message]:
        try:
            arguments = _all_decoded(request) if isinstance(request, AsyncIterator) else _decoded(request)
            if not isinstance(arguments, AsyncIterator):
                log.bind_request(arguments)
            async for response in handler(arguments, context):
                yield response
        except Exception as error:  # noqa: BLE001  # the one place where every failure becomes a status
            await _abort(context, error)

    return edge


def _decoded(request: Message) -> Message:
    if isinstance(request, _Refused):
        raise request.error
    return request


async def _all_decoded(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for request in requests:
        yield _decoded(request)


async def _abort(context: _Context, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, VfleetError):
        _log.error("a request failed for a reason that nobody foresaw", exc_info=error)
        error = VfleetError(Reason.INTERNAL, f"{type(error).__name__}: {error}")
    status = to_status(error)
    await context.abort(error.code, error.message, ((DETAILS_KEY, status.SerializeToString()),))


class Server:
    """A gRPC server with the error edge, health and reflection. A host refuses what is meant for another."""

    def __init__(self, service_names: Iterable[str], incarnation: str = "") -> None:
        self.grpc = grpc.aio.server(interceptors=(_ErrorEdge(incarnation),), options=_SERVER_OPTIONS)
        self._names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(self._names, self.grpc)

    def listen(self, address: str) -> int:
        """Bind HOST:PORT (port 0: any that is free) and return the port. Raise UNREACHABLE if it can't be bound."""
        try:
            return self.grpc.add_insecure_port(address)
        except RuntimeError as error:
            raise VfleetError(Reason.UNREACHABLE, f"can't listen on {address}: {error}") from None

    async def start(self) -> None:
        """Serve, and report every service as healthy."""
        await self.grpc.start()
        await self.set_serving(serving=True)

    async def set_serving(self, *, serving: bool) -> None:
        """Report all services as serving or not."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Report not serving, let calls under way end for `grace_s` seconds, then stop."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(grace_s)
