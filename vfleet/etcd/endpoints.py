"""The way to etcd: a channel to each endpoint, failover between them, and what a failure says about what was done.

A request that can be repeated goes from endpoint to endpoint until one answers. One that must not be (a transaction) is
sent on a connection that stands, and once: if its answer is then lost, the outcome is unknown, and nobody guesses.
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, TypeVar

import grpc
from etcd3 import etcdrpc

from vfleet.clock import Clock, backoff_delays
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.limits import OLD_CHANNEL_GRACE_S

if TYPE_CHECKING:
    from vfleet.tls import Tls

RETRY_FIRST_S = 0.05
RETRY_LONGEST_S = 0.5

# A member that has no leader refuses such a request, and ends such a stream, instead of letting it wait.
REQUIRE_LEADER = (("hasleader", "true"),)

_OPTIONS: Sequence[tuple[str, int]] = (
    # As etcd's own client: a response (a page of keys, a batch of events) is not bounded by the size of a request.
    ("grpc.max_receive_message_length", (1 << 31) - 1),
    ("grpc.max_send_message_length", (1 << 31) - 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Despite its name, how long one attempt to connect may take.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    # Only this module repeats requests.
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

# What etcd answers before it proposes a request to its peers.
_NOT_PROPOSED = frozenset({"etcdserver: no leader", "etcdserver: too many requests"})
# All else that leaves open whether the request was carried out. Any other code is etcd's own refusal: nothing was done.
_UNCLEAR = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.ABORTED,
    }
)
_TOO_LARGE = ("etcdserver: too many operations", "etcdserver: request is too large")
COMPACTED = "etcdserver: mvcc: required revision has been compacted"
FUTURE = "etcdserver: mvcc: required revision is a future revision"

T = TypeVar("T")


class CompactedError(Exception):
    """The revision asked for has been compacted."""


class Endpoint:
    """One member of etcd, or what stands before several: its address, its channel, the stubs on it."""

    def __init__(self, address: str, tls: "Tls | None") -> None:
        self.address = address
        self._tls = tls
        self._closing: set[asyncio.Task[None]] = set()
        self._open()

    def renew(self) -> None:
        """Use another channel if the certificates have changed; what goes over the old one ends there in peace."""
        if self._tls is None or self._tls.credentials is self._credentials:
            return
        task = asyncio.create_task(self.channel.close(OLD_CHANNEL_GRACE_S))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
        self._open()

    async def close(self) -> None:
        """Close the channel; calls under way are cancelled."""
        for task in self._closing:
            task.cancel()
        await asyncio.gather(self.channel.close(), *self._closing, return_exceptions=True)

    def _open(self) -> None:
        self._credentials = self._tls.credentials if self._tls is not None else None
        if self._credentials is None:
            self.channel = grpc.aio.insecure_channel(self.address, options=_OPTIONS)
        else:
            self.channel = grpc.aio.secure_channel(self.address, self._credentials.for_channel(), options=_OPTIONS)
        self.kv = etcdrpc.KVStub(self.channel)
        self.lease = etcdrpc.LeaseStub(self.channel)
        self.watch = etcdrpc.WatchStub(self.channel)
        self.maintenance = etcdrpc.MaintenanceStub(self.channel)

    async def connected(self, within_s: float) -> bool:
        """Return whether there is a connection, or comes one within `within_s` seconds."""
        if self.channel.get_state() is grpc.ChannelConnectivity.READY:
            return True
        try:
            async with asyncio.timeout(within_s):
                while (state := self.channel.get_state(try_to_connect=True)) is not grpc.ChannelConnectivity.READY:
                    if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                        return False
                    await self.channel.wait_for_state_change(state)
        except (TimeoutError, grpc.aio.UsageError):  # the latter if the channel was renewed meanwhile
            return False
        return True


class Endpoints:
    """All endpoints, one of which is current. A failure makes the next one current."""

    def __init__(
        self, addresses: Sequence[str], clock: Clock, random: Random, *, timeout_s: float, tls: "Tls | None"
    ) -> None:
        if not addresses:
            raise invalid_field("endpoints", list(addresses), "at least one HOST:PORT")
        for address in addresses:
            host, colon, port = address.rpartition(":")
            if not (host and colon and port.isdecimal() and 0 < int(port) <= 65535):
                raise invalid_field("endpoints", address, "HOST:PORT, for example 127.0.0.1:2379")
        self._all = tuple(Endpoint(address, tls) for address in addresses)
        self._position = 0
        self._clock = clock
        self._random = random
        self.timeout_s = timeout_s

    @property
    def current(self) -> Endpoint:
        """The endpoint to use next."""
        endpoint = self._all[self._position]
        endpoint.renew()
        return endpoint

    def leave(self, endpoint: Endpoint) -> None:
        """Make the next endpoint current, unless another than `endpoint` already is."""
        if self._all[self._position] is endpoint:
            self._position = (self._position + 1) % len(self._all)

    def delays(self) -> "itertools.chain[float]":
        """Return how long to wait, in seconds, after each failure in a row: not at all until all have been tried."""
        backoff = backoff_delays(self._random, RETRY_FIRST_S, RETRY_LONGEST_S)
        return itertools.chain(itertools.repeat(0.0, len(self._all) - 1), backoff)

    async def close(self) -> None:
        """Close all channels; calls under way are cancelled."""
        await asyncio.gather(*(endpoint.close() for endpoint in self._all))

    async def call(self, what: str, send: Callable[[Endpoint, float], Awaitable[T]], *, repeatable: bool) -> T:
        """Return what `send(endpoint, timeout_s)` returns at the first endpoint that answers, within `timeout_s`.

        Raise what etcd refused it with; STORE_UNAVAILABLE if nothing was done (or it was `repeatable`);
        OUTCOME_UNKNOWN, without trying again, if it is not `repeatable` and may have been done. `what` names it.
        """
        began_s = self._clock.monotonic()
        share_s = self.timeout_s / len(self._all)
        last = "no connection"

        def left_s() -> float:
            return max(0.0, began_s + self.timeout_s - self._clock.monotonic())

        for delay_s in self.delays():
            if not left_s():
                break
            endpoint = self.current
            if repeatable or await endpoint.connected(min(share_s, left_s())):
                try:
                    return await send(endpoint, min(share_s, left_s()) if repeatable else left_s())
                except grpc.aio.AioRpcError as error:
                    last = f"{endpoint.address}: {error.details() or error.code().name}"
                    if error.details() in _NOT_PROPOSED:
                        pass
                    elif error.code() not in _UNCLEAR:
                        raise _refusal(what, error, endpoint.address) from None
                    elif not repeatable:
                        self.leave(endpoint)
                        raise _unknown(what, error, endpoint.address) from None
            self.leave(endpoint)
            await self._clock.sleep(min(delay_s, left_s()))
        raise self._unavailable(what, self._clock.monotonic() - began_s, last)

    def _unavailable(self, what: str, tried_s: float, last: str) -> VfleetError:
        addresses = ",".join(endpoint.address for endpoint in self._all)
        return VfleetError(
            Reason.STORE_UNAVAILABLE,
            f"etcd did not answer: {what} at {addresses}, tried for {tried_s:.1f} s; last failure: {last}",
            metadata={"endpoints": addresses, "tried_s": f"{tried_s:.1f}"},
        )


def _unknown(what: str, error: grpc.aio.AioRpcError, address: str) -> VfleetError:
    return VfleetError(
        Reason.OUTCOME_UNKNOWN,
        f"etcd at {address} did not say whether it was done: {what}: {error.details() or error.code().name}",
        metadata={"endpoints": address},
    )


def _refusal(what: str, error: grpc.aio.AioRpcError, address: str) -> Exception:
    details = error.details() or error.code().name
    if details == COMPACTED:
        return CompactedError(details)
    message = f"etcd at {address} refused: {what}: {details}"
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED or details.startswith(_TOO_LARGE):
        return VfleetError(Reason.LIMIT_EXCEEDED, message, metadata={"endpoints": address})
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return VfleetError(Reason.NOT_FOUND, message, metadata={"endpoints": address})
    return VfleetError(Reason.INTERNAL, message, metadata={"endpoints": address})
