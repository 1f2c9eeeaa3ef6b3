"""The guard of a server with TLS: who may call what, and how much at once. It decides before a request is read.

A caller is who its certificate names, and a certificate that has expired since its connection was made names nobody.
Viewers and operators are bounded each, and all together, so that there is always room for what the fleet itself has to
say; coordinators and hosts have bounds of their own, far above what they do.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import grpc
from cryptography import x509
from google.protobuf.message import Message

from vfleet import log
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.principal import CALLER, Principal
from vfleet.roles import FIELD_RULES, ROLES, Role
from vfleet.tls import principal_in

TLS_VERSION = b"TLSv1.3"
REQUEST_TIMEOUT_S = 10.0  # from the beginning of a call until its request, if it has one only, is there
MAX_CALLS_PER_CLIENT = 128  # of one viewer or operator, under way at once
MAX_CALLS_OF_CLIENTS = 1024  # of all viewers and operators
MAX_CALLS_PER_DAEMON = 4096  # of one coordinator or host
CALLS_PER_S = 1000.0  # of one viewer or operator, in the long run
BURST_CALLS = 2000.0  # and at once, after a pause
MAX_REMEMBERED = 4096  # certificates, and callers

_DAEMONS = frozenset({Role.COORDINATOR, Role.HOST})

_Context: TypeAlias = "grpc.aio.ServicerContext[Message, Message]"
_Unary: TypeAlias = "Callable[[Message, _Context], Awaitable[Message]]"
_Stream: TypeAlias = "Callable[[Message, _Context], AsyncIterator[Message]]"
_Bidirectional: TypeAlias = "Callable[[AsyncIterator[Message], _Context], AsyncIterator[Message]]"


@dataclass(frozen=True, slots=True)
class _Certificate:
    principal: Principal | None
    expires_s: float


@dataclass(slots=True)
class _Caller:
    """Its calls under way, and how many it may begin at once by now."""

    calls: int
    allowance: float
    counted_s: float


class Guard:
    """The guard of one server. `unary`, `stream` and `bidirectional` put it before a method's handler."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._certificates: dict[bytes, _Certificate] = {}
        self._callers: dict[Principal, _Caller] = {}
        self._client_calls = 0

    def unary(self, path: str, handler: _Unary) -> "Callable[[AsyncIterator[Message], _Context], Awaitable[Message]]":
        """Return the guarded handler of a method, which reads its one request itself."""

        async def guarded(requests: AsyncIterator[Message], context: _Context) -> Message:
            with self._let_in(path, context) as principal:
                return await handler(await self._request(path, requests, principal), context)

        return guarded

    def stream(self, path: str, handler: _Stream) -> _Bidirectional:
        """Return the same of a method that streams its responses."""

        async def guarded(requests: AsyncIterator[Message], context: _Context) -> AsyncIterator[Message]:
            with self._let_in(path, context) as principal:
                async for response in handler(await self._request(path, requests, principal), context):
                    yield response

        return guarded

    def bidirectional(self, path: str, handler: _Bidirectional) -> _Bidirectional:
        """Return the guarded handler of a method that takes a stream."""

        async def guarded(requests: AsyncIterator[Message], context: _Context) -> AsyncIterator[Message]:
            with self._let_in(path, context):
                async for response in handler(requests, context):
                    yield response

        return guarded

    @contextmanager
    def _let_in(self, path: str, context: _Context) -> Iterator[Principal]:
        """Let a caller have the method, for as long as it is inside. Raise PERMISSION_DENIED or LIMIT_EXCEEDED."""
        principal = self._principal(context)
        # What is refused counts as well: it costs almost as much.
        caller = self._counted(principal)
        _check_role(path, principal, ROLES.get(path, frozenset()))
        is_client = principal.role not in _DAEMONS
        caller.calls += 1
        self._client_calls += is_client
        # Each call is served in a task of its own, so that this is forgotten with it.
        CALLER.set(principal)
        try:
            yield principal
        finally:
            caller.calls -= 1
            self._client_calls -= is_client

    def _principal(self, context: _Context) -> Principal:
        about = context.auth_context()
        (pem,) = about.get("x509_pem_cert", (b"",))
        certificate = self._certificates.get(pem)
        if certificate is None:
            certificate = self._read(pem)
        # By the way, nothing older is spoken: see `vfleet/__init__.py` for what sees to it.
        is_current = certificate.expires_s > self._clock.time() and about.get("ssl_tls_version") == [TLS_VERSION]
        if certificate.principal is None or not is_current:
            what = "a certificate with a role of vfleet's" if is_current else "a certificate that is valid now"
            raise VfleetError(Reason.PERMISSION_DENIED, f"calls take {what}, as the URI spiffe://vfleet/ROLE/NAME")
        return certificate.principal

    def _read(self, pem: bytes) -> _Certificate:
        if not pem:
            return _Certificate(None, 0)
        found = x509.load_pem_x509_certificate(pem)
        certificate = _Certificate(principal_in(found), found.not_valid_after_utc.timestamp())
        if len(self._certificates) >= MAX_REMEMBERED:
            self._certificates.clear()
        self._certificates[pem] = certificate
        return certificate

    def _counted(self, principal: Principal) -> _Caller:
        """Count a call that begins. Raise LIMIT_EXCEEDED if it is one too many."""
        now = self._clock.monotonic()
        caller = self._callers.get(principal)
        if caller is None:
            self._forget_idle()
            caller = self._callers[principal] = _Caller(0, BURST_CALLS, now)
        if principal.role in _DAEMONS:
            if caller.calls >= MAX_CALLS_PER_DAEMON:
                raise _too_much(f"{principal} has {caller.calls} calls under way; at most {MAX_CALLS_PER_DAEMON}", 1.0)
            return caller
        if caller.calls >= MAX_CALLS_PER_CLIENT:
            raise _too_much(f"{principal} has {caller.calls} calls under way; at most {MAX_CALLS_PER_CLIENT}", 1.0)
        if self._client_calls >= MAX_CALLS_OF_CLIENTS:
            raise _too_much(
                f"viewers and operators have {self._client_calls} calls under way, as many as they may", 1.0
            )
        caller.allowance = min(BURST_CALLS, caller.allowance + (now - caller.counted_s) * CALLS_PER_S)
        caller.counted_s = now
        if caller.allowance < 1:
            message = f"{principal} begins more than {CALLS_PER_S:g} calls a second"
            raise _too_much(message, (1 - caller.allowance) / CALLS_PER_S)
        caller.allowance -= 1
        return caller

    def _forget_idle(self) -> None:
        if len(self._callers) < MAX_REMEMBERED:
            return
        # Who has no call under way begins with a full allowance: what it had used is a few seconds old by then.
        self._callers = {principal: caller for principal, caller in self._callers.items() if caller.calls}

    async def _request(self, path: str, requests: AsyncIterator[Message], principal: Principal) -> Message:
        """Return the one request of a call. Raise INVALID_FIELD if there is none, LIMIT_EXCEEDED if it is late."""
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                request = await anext(aiter(requests), None)
        except TimeoutError:
            raise _too_much(f"the request did not come in {REQUEST_TIMEOUT_S:g} s", None) from None
        if request is None:
            raise invalid_field("request", "nothing", "one message")
        log.bind_request(request)
        rule = FIELD_RULES.get(path)
        if rule is not None and getattr(request, rule.field):
            _check_role(f"{path} with {rule.field}", principal, rule.roles)
        return request


def _check_role(what: str, principal: Principal, roles: frozenset[Role]) -> None:
    if principal.role not in roles:
        needed = " or ".join(sorted(roles)) or "a role that nobody has"
        raise VfleetError(
            Reason.PERMISSION_DENIED,
            f"{what.lstrip('/')} is for {needed}; the certificate is that of {principal}",
            metadata={"role": principal.role, "name": principal.name},
        )


def _too_much(message: str, retry_after_s: float | None) -> VfleetError:
    return VfleetError(Reason.LIMIT_EXCEEDED, message, retry_after_s=retry_after_s)
