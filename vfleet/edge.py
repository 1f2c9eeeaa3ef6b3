"""The edge of a server: whatever a handler raises leaves as one status with details, whatever kind its method is.

With a guard, a method is asked for before its request is read.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

import grpc
from google.protobuf.message import DecodeError, Message

from vfleet import log, tracing
from vfleet.errors import Reason, VfleetError, to_status

if TYPE_CHECKING:
    from vfleet.guard import Guard

DETAILS_KEY = "grpc-status-details-bin"
INCARNATION_KEY = "vfleet-incarnation"
MIGRATION_KEY = "vfleet-migration"
MAX_ERROR_CHARS = 2_000  # of an error's text, which travels twice in headers, of which clients take 8 KiB

_log = logging.getLogger(__name__)

# What a handler is given: a request, or a stream of them.
ArgumentT = TypeVar("ArgumentT")


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


class ErrorEdge(grpc.aio.ServerInterceptor):
    """Wraps every handler, so that whatever it raises leaves as one status with details."""

    def __init__(self, incarnation: str, guard: Guard | None = None) -> None:
        self._incarnation = incarnation
        self._guard = guard
        # By method: how a call that is meant for this host is handled, wrapped once and not for each call.
        self._wrapped: dict[str, _Handler] = {}

    async def intercept_service(  # type: ignore[override]  # the stubs let each call choose its own message types
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Return the handler of a method, wrapped."""
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

        wrapped = self._wrap(handler_call_details.method, handler, decode if is_meant_for_this else refuse)
        if is_meant_for_this:
            self._wrapped[handler_call_details.method] = wrapped
        return wrapped

    def _wrap(self, path: str, handler: _Handler, decode: Callable[[bytes], Message]) -> _Handler:
        unary = cast("_Unary[Message] | None", handler.unary_unary)
        stream = cast("_Stream[Message] | None", handler.unary_stream)
        both = cast("_Stream[_Requests] | None", handler.stream_stream)
        encode, guard = handler.response_serializer, self._guard
        if inspect.iscoroutinefunction(stream):
            stream = _generator(stream)
        if tracing.is_on():
            unary = _traced_unary(unary) if unary is not None else None
            stream = _traced_stream(stream) if stream is not None else None
        if guard is not None:
            # A guarded method takes a stream, whatever it is, so that it is asked for before its request is read.
            if unary is not None:
                edge = _edge_unary(guard.unary(path, unary), _all_decoded)
                return grpc.stream_unary_rpc_method_handler(edge, decode, encode)
            if stream is not None:
                both = guard.stream(path, stream)
            elif both is not None:
                both = guard.bidirectional(path, both)
        elif unary is not None:
            return grpc.unary_unary_rpc_method_handler(_edge_unary(unary, _taken), decode, encode)
        elif stream is not None:
            return grpc.unary_stream_rpc_method_handler(_edge_stream(stream, _taken), decode, encode)
        assert both is not None, f"{path} takes a stream and answers once, which nobody has needed so far"  # noqa: S101
        return grpc.stream_stream_rpc_method_handler(_edge_stream(both, _all_decoded), decode, encode)


_Unary: TypeAlias = Callable[[ArgumentT, "_Context"], Awaitable[Message]]
_Stream: TypeAlias = Callable[[ArgumentT, "_Context"], AsyncIterator[Message]]
_Requests: TypeAlias = AsyncIterator[Message]


def _traced_unary(handler: _Unary[Message]) -> _Unary[Message]:
    async def traced(request: Message, context: _Context) -> Message:
        with tracing.serving_method(request, context):
            return await handler(request, context)

    return traced


def _traced_stream(handler: _Stream[Message]) -> _Stream[Message]:
    async def traced(request: Message, context: _Context) -> AsyncIterator[Message]:
        with tracing.serving_method(request, context):
            async for response in handler(request, context):
                yield response

    return traced


def _edge_unary(handler: _Unary[ArgumentT], decoded: Callable[[ArgumentT], ArgumentT]) -> _Unary[ArgumentT]:
    async def edge(request: ArgumentT, context: _Context) -> Message:
        try:
            return await handler(decoded(request), context)
        except Exception as error:  # the one place where every failure becomes a status
            await _abort(context, error)
            raise

    return edge


def _edge_stream(handler: _Stream[ArgumentT], decoded: Callable[[ArgumentT], ArgumentT]) -> _Stream[ArgumentT]:
    async def edge(request: ArgumentT, context: _Context) -> AsyncIterator[Message]:
        try:
            async for response in handler(decoded(request), context):
                yield response
        except Exception as error:  # noqa: BLE001  # the one place where every failure becomes a status
            await _abort(context, error)

    return edge


def _generator(handler: Callable[[Message, _Context], Awaitable[None]]) -> _Stream[Message]:
    """Return a generator for what writes its responses itself, as the health service does."""

    async def generator(request: Message, context: _Context) -> AsyncIterator[Message]:
        await handler(request, context)
        more: tuple[Message, ...] = ()
        for response in more:
            yield response

    return generator


def _decoded(request: Message) -> Message:
    if isinstance(request, _Refused):
        raise request.error
    return request


def _taken(request: Message) -> Message:
    request = _decoded(request)
    log.bind_request(request)
    return request


async def _all_decoded(requests: AsyncIterator[Message]) -> AsyncIterator[Message]:
    async for request in requests:
        yield _decoded(request)


async def _abort(context: _Context, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, NotImplementedError):  # what generated code raises for a method that nobody has written
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, str(error))
    if not isinstance(error, VfleetError):
        _log.error("a request failed for a reason that nobody foresaw", exc_info=error)
        error = VfleetError(Reason.INTERNAL, f"{type(error).__name__}: {error}")
    status = to_status(error)
    if len(status.message) > MAX_ERROR_CHARS:
        status.message = f"{status.message[: MAX_ERROR_CHARS - 3]}..."
    await context.abort(error.code, status.message, ((DETAILS_KEY, status.SerializeToString()),))
