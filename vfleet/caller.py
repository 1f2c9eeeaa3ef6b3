"""Calls that outlive a daemon's restart: to the first that answers of several daemons that can do the same.

A call is sent again only when nothing can come of sending it twice. A daemon's own refusal is final, but that it can't
reach etcd: another may, and is asked once. Only silence is tried again, elsewhere first, for as long as the caller's
patience lasts. A daemon that is slow answers health checks
meanwhile; one that is frozen doesn't, and is turned from after PROBE_AFTER_S + PROBE_TIMEOUT_S.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from random import Random
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import grpc
from google.protobuf.message import Message

from vfleet import rpc
from vfleet.clock import Clock, SystemClock, backoff_delays
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.health import check_health
from vfleet.principal import server_name
from vfleet.roles import Role

if TYPE_CHECKING:
    from vfleet.tls import Tls

PATIENCE_S = 5.0
CALL_TIMEOUT_S = 30.0
PROBE_AFTER_S = 1.0  # of waiting for an answer, then each time after as long again
PROBE_TIMEOUT_S = 4.0
_FIRST_DELAY_S = 0.05
_LONGEST_DELAY_S = 1.0

RequestT = TypeVar("RequestT", bound=Message)
ResponseT = TypeVar("ResponseT", bound=Message)
ResultT = TypeVar("ResultT")


def parse_addresses(field: str, text: str) -> tuple[str, ...]:
    """Return the addresses in HOST:PORT[,HOST:PORT…]. Raise INVALID_FIELD, naming `field`, for anything else."""
    addresses = tuple(text.split(","))
    for address in addresses:
        host, _, port = address.rpartition(":")
        if not (host and host.isascii() and host.isprintable() and " " not in host):
            raise invalid_field(field, text, "HOST:PORT, or several with commas between")
        if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) <= 65535):
            raise invalid_field(field, text, "HOST:PORT with a port from 1 to 65535, or several with commas between")
    return addresses


def is_silence(error: VfleetError, address: str) -> bool:
    """Return whether the error means that the daemon at `address` itself did not answer.

    A daemon may also pass on that another one did not answer it: that is an answer.
    """
    return error.reason is Reason.UNREACHABLE and error.metadata.get("address") == address


class Patience:
    """How long to go on with what is not answered: `limit_s` seconds from the start or the last sign of life."""

    def __init__(self, limit_s: float, clock: Clock, random: Random) -> None:
        self._limit_s = limit_s
        self._clock = clock
        self._random = random
        self.renew()

    def renew(self) -> None:
        """Start anew: there was a sign of life."""
        self._start = self._clock.monotonic()
        self._delays = backoff_delays(self._random, _FIRST_DELAY_S, _LONGEST_DELAY_S)

    async def pause(self, who: str, error: VfleetError) -> None:
        """Wait before the next try. Once that is too late raise UNREACHABLE: who was tried, and for how long.

        Or raise the error itself, if it was an answer.
        """
        delay_s = max(next(self._delays), error.retry_after_s or 0)
        tried_s = self._clock.monotonic() - self._start
        if tried_s + delay_s > self._limit_s:
            if error.retry_after_s is not None:
                raise error
            message = f"no answer from {who}, tried for {tried_s:.1f} s; last: {error.message}"
            raise VfleetError(Reason.UNREACHABLE, message, metadata=error.metadata) from None
        await self._clock.sleep(delay_s)


class Caller:
    """Makes calls to one of several daemons of a `kind`, at one or more addresses, HOST:PORT each.

    `server` is the name that their certificates must have, and `tls` what the caller shows them, if connections are
    secured; it goes into channels of the caller's own, where none are given.
    """

    def __init__(
        self,
        kind: str,
        addresses: Sequence[str],
        *,
        server: str = "",
        channels: rpc.Channels | None = None,
        tls: "Tls | None" = None,
        clock: Clock | None = None,
        random: Random | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.who = f"the {kind} at {', '.join(addresses)}"
        # The one that is asked first: the last that answered.
        self._addresses = deque(parse_addresses("address", ",".join(addresses)))
        self._server = server
        self._channels = channels or rpc.Channels(tls=tls)
        self._owns_channels = channels is None
        self._clock = clock or SystemClock()
        self._random = random or Random()  # noqa: S311  # spreads retries, keeps no secret
        self._patience_s = patience_s

    @property
    def address(self) -> str:
        """The address to ask first."""
        return self._addresses[0]

    def channel(self) -> grpc.aio.Channel:
        """Return the channel to that address."""
        return self._channel(self.address)

    def patience(self) -> Patience:
        """Return what a call that goes on by itself waits with."""
        return Patience(self._patience_s, self._clock, self._random)

    async def close(self) -> None:
        """Close the channels, unless they were given."""
        if self._owns_channels:
            await self._channels.close()

    async def call(
        self,
        method: Callable[[grpc.aio.Channel], grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT]],
        request: RequestT,
        *,
        timeout_s: float = CALL_TIMEOUT_S,
        repeatable: bool = True,
    ) -> ResponseT:
        """Call a unary method and return the response. Raise the VfleetError that it was refused with.

        If it isn't `repeatable` it is sent once, over a connection that is there; then UNREACHABLE says that it may or
        may not have been carried out.
        """
        patience = self.patience()
        while True:
            refused: VfleetError | None = None
            for _ in range(len(self._addresses)):
                address, sent = self.address, False
                try:
                    if not repeatable:
                        await self._connect(address)
                    sent = True
                    called = rpc.call(method(self._channel(address)), request, address=address, timeout_s=timeout_s)
                    return await (self._unless_frozen(address, called) if repeatable else called)
                except VfleetError as error:
                    if error.retry_after_s is not None:
                        # Nothing was done: it was one call too many.
                        last = error
                        break
                    if repeatable and error.reason is Reason.STORE_UNAVAILABLE:
                        refused = error
                        self._turn_from(address)
                        continue
                    if not is_silence(error, address):
                        raise
                    if sent and not repeatable:
                        message = f"{error.message}; what was asked may or may not have been done"
                        raise VfleetError(Reason.UNREACHABLE, message, metadata=error.metadata) from None
                    last = error
                    self._turn_from(address)
            if refused is not None:
                raise refused
            await patience.pause(self.who, last)

    async def stream(
        self,
        method: Callable[[grpc.aio.Channel], grpc.aio.UnaryStreamMultiCallable[RequestT, ResponseT]],
        request: RequestT,
    ) -> AsyncGenerator[ResponseT, None]:
        """Yield the responses of a streaming method; when the stream breaks, go on with those of a second call."""
        patience = self.patience()
        while True:
            address = self.address
            try:
                async with aclosing(rpc.stream(method(self._channel(address)), request, address=address)) as responses:
                    while (response := await self._unless_frozen(address, anext(responses, None))) is not None:
                        patience.renew()
                        yield response
            except VfleetError as error:
                if not is_silence(error, address):
                    raise
                self._turn_from(address)
                await patience.pause(self.who, error)
            else:
                return

    async def _unless_frozen(self, address: str, answer: Awaitable[ResultT]) -> ResultT:
        """Wait for an answer. Raise UNREACHABLE once its daemon answers no health check either and others can be asked.

        The connections of a frozen process stand, so without this a call waits for all of its timeout.
        """
        if len(self._addresses) == 1:
            return await answer
        waiting = asyncio.ensure_future(answer)
        try:
            while not (await asyncio.wait([waiting], timeout=PROBE_AFTER_S))[0]:
                try:
                    await check_health(self._channel(address), address, PROBE_TIMEOUT_S)
                except VfleetError as error:
                    if is_silence(error, address) and not waiting.done():
                        raise
            return waiting.result()
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    def _channel(self, address: str) -> grpc.aio.Channel:
        return self._channels.to(address, self._server)

    def _turn_from(self, address: str) -> None:
        if self.address == address:  # else another call has done it
            self._addresses.rotate(-1)

    async def _connect(self, address: str) -> None:
        try:
            async with asyncio.timeout(self._patience_s):
                await self._channel(address).channel_ready()
        except (TimeoutError, grpc.aio.UsageError):  # the latter if the channel was renewed meanwhile
            raise VfleetError(
                Reason.UNREACHABLE,
                f"can't connect to {address} in {self._patience_s:g} s",
                metadata={"address": address},
            ) from None


class Client:
    """What the clients of both daemons share: made from addresses, closed after use."""

    _kind: str
    _role: Role

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        name: str = "",
        channels: rpc.Channels | None = None,
        tls: "Tls | None" = None,
        clock: Clock | None = None,
        random: Random | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.caller = Caller(
            self._kind,
            addresses,
            server=server_name(self._role, name),
            channels=channels,
            tls=tls,
            clock=clock,
            random=random,
            patience_s=patience_s,
        )

    async def close(self) -> None:
        """Close the connections that the client made."""
        await self.caller.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()
