"""The edges of a gRPC process: a server that answers every failure with one clear error, and calls that raise it again.

Servicers raise `VfleetError`; the server turns it into a status with details, whatever kind the method is. A request
that isn't a protobuf message of its type (bytes that aren't UTF-8 in a string, for example) is INVALID_ARGUMENT. The
health and reflection services come with every server, so that any language's client works unaided.

With `vfleet.tls.Tls` both ends show certificates, and the server has a guard; without it connections are plaintext, and
never leave the machine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

import grpc
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from vfleet import cancellation, log, tracing
from vfleet.clock import SystemClock
from vfleet.edge import INCARNATION_KEY, MIGRATION_KEY, ErrorEdge
from vfleet.errors import Reason, VfleetError, from_rpc_error
from vfleet.limits import OLD_CHANNEL_GRACE_S
from vfleet.loopback import check_loopback

if TYPE_CHECKING:
    # Imported where they are needed: what reads certificates takes a command on plaintext a twentieth of a second.
    from vfleet.guard import Guard
    from vfleet.tls import Credentials, Tls

MAX_MESSAGE_BYTES = 5 << 20  # the largest is the end of a function's state: 1,024 answers of 4 KiB, 256 KiB of pages
MAX_REQUEST_BYTES = 1 << 20  # what a server takes: four times the largest that it is sent, 64 accesses of 4 KiB
MAX_METADATA_BYTES = 16 << 10  # of one call
MAX_CONNECTIONS = 1024  # of one server
MAX_STREAMS = 1024  # of one connection: calls at once
MAX_CALLS = 8192  # of one server, at once
HANDSHAKE_TIMEOUT_MS = 5_000  # from a connection's beginning until it speaks HTTP/2
IDLE_TIMEOUT_MS = 600_000  # of a connection without calls
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
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIME_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.max_concurrent_streams", MAX_STREAMS),
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
    ("grpc.http2.settings_timeout", HANDSHAKE_TIMEOUT_MS),
    ("grpc.max_connection_idle_ms", IDLE_TIMEOUT_MS),
    # Two daemons on one port would answer by turns.
    ("grpc.so_reuseport", 0),
)

_log = logging.getLogger(__name__)

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
StubT = TypeVar("StubT")


def connect(address: str) -> grpc.aio.Channel:
    """Return a channel to the daemon at HOST:PORT. It connects when first used, and again whenever it has to.

    Plaintext: raise INVALID_FIELD if the address is another machine's.
    """
    check_loopback("address", address)
    return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)


def _connect_securely(address: str, server: str, credentials: Credentials) -> grpc.aio.Channel:
    options = (*_CHANNEL_OPTIONS, ("grpc.ssl_target_name_override", server)) if server else _CHANNEL_OPTIONS
    return grpc.aio.secure_channel(address, credentials.for_channel(), options=options)


class Channels:
    """The channels of a process, two a server, made when first needed. `connect` is the network, as an argument.

    With `tls` they are made anew when the certificates have changed; what goes over the old ones ends there in peace.
    """

    def __init__(self, connect: Callable[[str], grpc.aio.Channel] = connect, tls: Tls | None = None) -> None:
        self._connect = connect
        self._tls = tls
        self._credentials = tls.credentials if tls is not None else None
        self._channels: dict[tuple[str, str, bool], grpc.aio.Channel] = {}
        self._stubs: dict[tuple[object, str, str, bool], object] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def to(self, address: str, server: str = "", *, bulk: bool = False) -> grpc.aio.Channel:
        """Return the channel to HOST:PORT, or that for `bulk`: behind megabytes nobody should have to wait.

        `server` is the name that the certificate there must have (`vfleet.principal.server_name`); without it, that of
        the address.
        """
        self._renew()
        known = self._channels.get((address, server, bulk))
        if known is None:
            known = (
                self._connect(address)
                if self._credentials is None
                else _connect_securely(address, server, self._credentials)
            )
            self._channels[address, server, bulk] = known
        return known

    def stub(
        self, kind: Callable[[grpc.aio.Channel], StubT], address: str, server: str = "", *, bulk: bool = False
    ) -> StubT:
        """Return the stub of this kind on the channel that `to` returns, made once."""
        self._renew()
        known = self._stubs.get((kind, address, server, bulk))
        if known is None:
            known = self._stubs[kind, address, server, bulk] = kind(self.to(address, server, bulk=bulk))
        return cast("StubT", known)

    async def close(self) -> None:
        """Close all; calls under way fail."""
        channels, self._channels = list(self._channels.values()), {}
        self._stubs.clear()
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*self._closing, *(channel.close() for channel in channels), return_exceptions=True)

    def _renew(self) -> None:
        if self._tls is None or self._tls.credentials is self._credentials:
            return
        self._credentials = self._tls.credentials
        channels, self._channels = self._channels, {}
        self._stubs.clear()
        for channel in channels.values():
            task = asyncio.create_task(channel.close(OLD_CHANNEL_GRACE_S))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


def meant_for(incarnation: str) -> grpc.aio.Metadata:
    """Return the metadata by which a host refuses a call that is meant for another; none if `incarnation` is empty.

    An address is no identity: another host, or another fleet's, may have the port by now.
    """
    return grpc.aio.Metadata((INCARNATION_KEY, incarnation)) if incarnation else grpc.aio.Metadata()


def _metadata(incarnation: str, parent: str) -> grpc.aio.Metadata:
    """Return whom a call is meant for, and what it is for: the migration, for the other side's log, and the trace."""
    metadata = meant_for(incarnation)
    if migration := log.bound_migration():
        metadata.add(MIGRATION_KEY, migration)
    if parent:
        metadata.add(tracing.METADATA_KEY, parent)
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
    with tracing.calling_method(request, address) as parent:
        try:
            return await method(request, timeout=timeout_s, metadata=_metadata(incarnation, parent))
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
    with tracing.calling_method(request, address) as parent:
        responses = method(request, timeout=timeout_s, metadata=_metadata(incarnation, parent))
        try:
            async for response in responses:
                yield response
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, address) from None
        except asyncio.CancelledError:
            if cancellation.is_asked_for():
                raise
            message = f"no answer from {address}: its channel was closed"
            raise VfleetError(Reason.UNREACHABLE, message, metadata={"address": address}) from None
        finally:
            responses.cancel()


class Server:
    """A gRPC server with the error edge, health and reflection. A host refuses what is meant for another.

    With `tls` it has a guard; without, its connections are plaintext and come from this machine.
    """

    def __init__(self, service_names: Iterable[str], incarnation: str = "", tls: Tls | None = None) -> None:
        self._tls = tls
        edge = ErrorEdge(incarnation, _new_guard() if tls is not None else None)
        self.grpc = grpc.aio.server(interceptors=(edge,), options=_SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
        self._names = (*service_names, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(self._names, self.grpc)

    def listen(self, address: str) -> int:
        """Bind HOST:PORT (port 0: any that is free) and return the port. Raise UNREACHABLE if it can't be bound."""
        try:
            if self._tls is not None:
                return self.grpc.add_secure_port(address, self._tls.for_server())
            return self.grpc.add_insecure_port(check_loopback("--listen", address))
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


def _new_guard() -> Guard:
    from vfleet.guard import Guard

    return Guard(SystemClock())
