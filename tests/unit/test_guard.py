"""The guard: how much each caller may do, and for how long a certificate counts. Who has what role is in test_roles."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from google.protobuf.message import Message
from support.manual_clock import ManualClock

from vfleet import guard
from vfleet.certificates import issue, make_ca
from vfleet.errors import Reason, VfleetError, to_status
from vfleet.guard import (
    BURST_CALLS,
    CALLS_PER_S,
    MAX_CALLS_OF_CLIENTS,
    MAX_CALLS_PER_CLIENT,
    MAX_CALLS_PER_DAEMON,
    Guard,
)
from vfleet.principal import CALLER, Principal
from vfleet.roles import Role
from vfleet.v1.fleet_service_pb2 import CheckFleetRequest, ListHostsRequest

LIST, CHECK, EXCHANGE = (
    f"/vfleet.v1.{name}" for name in ("FleetService/ListHosts", "FleetService/CheckFleet", "FabricService/Exchange")
)
WATCH = "/vfleet.v1.FleetService/WatchEvents"


class Context:
    """Stands for a call's context: the certificate of its connection."""

    def __init__(self, pem: bytes, version: bytes = b"TLSv1.3") -> None:
        self.about = {"x509_pem_cert": [pem], "ssl_tls_version": [version]}

    def auth_context(self) -> dict[str, list[bytes]]:
        return self.about


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs")
    make_ca(folder)
    return folder


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(time.time())


def caller(ca: Path, role: str, name: str, **more: bytes) -> Context:
    folder = ca / f"{role}-{name}"
    if not folder.exists():
        issue(ca, folder, role, name)
    return Context((folder / "tls.crt").read_bytes(), **more)


async def requests(*messages: Message) -> AsyncIterator[Message]:
    for message in messages:
        yield message


class Calls:
    """Calls under way, each of which ends when it is told to."""

    def __init__(self, guarded: Guard) -> None:
        self._guard = guarded
        self._end = asyncio.Event()
        self.under_way: list[asyncio.Task[None]] = []

    async def begin(self, context: Context, path: str = WATCH) -> None:
        """Begin a call. Raise what it is refused with."""
        begun = asyncio.Event()

        async def handler(request: Message, _: Context) -> AsyncIterator[Message]:
            begun.set()
            await self._end.wait()
            yield request

        async def call() -> None:
            async with aclosing(self._guard.stream(path, handler)(requests(ListHostsRequest()), context)) as answers:
                async for _ in answers:
                    pass

        task = asyncio.create_task(call())
        waiting = asyncio.create_task(begun.wait())
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            await task
        self.under_way.append(task)

    async def end(self) -> None:
        self._end.set()
        await asyncio.gather(*self.under_way)
        self._end.clear()
        self.under_way.clear()


async def answer(request: Message, context: Context) -> Message:
    return request


async def once(guarded: Guard, context: Context, path: str = LIST, *messages: Message) -> Message:
    return await guarded.unary(path, answer)(requests(*messages or (ListHostsRequest(),)), context)


async def refusal(guarded: Guard, context: Context, path: str = LIST, *messages: Message) -> VfleetError:
    with pytest.raises(VfleetError) as refused:
        await once(guarded, context, path, *messages)
    return refused.value


async def test_the_handler_knows_who_calls(ca: Path, clock: ManualClock) -> None:
    seen = []

    async def handler(request: Message, context: Context) -> Message:
        seen.append(CALLER.get())
        return request

    await asyncio.create_task(
        Guard(clock).unary(LIST, handler)(requests(ListHostsRequest()), caller(ca, "viewer", "a"))
    )
    assert seen == [Principal(Role.VIEWER, "a")]
    assert CALLER.get() is None


async def test_a_certificate_counts_until_it_expires_though_its_connection_stands(ca: Path, clock: ManualClock) -> None:
    guarded, viewer = Guard(clock), caller(ca, "viewer", "a")
    await once(guarded, viewer)
    clock.now += 91 * 86_400
    refused = await refusal(guarded, viewer)
    assert refused.reason is Reason.PERMISSION_DENIED
    assert "valid now" in refused.message


@pytest.mark.parametrize("version", [b"TLSv1.2", b""])
async def test_nothing_but_tls_1_3_counts(ca: Path, clock: ManualClock, version: bytes) -> None:
    assert (await refusal(Guard(clock), caller(ca, "viewer", "a", version=version))).reason is Reason.PERMISSION_DENIED


async def test_without_a_certificate_nothing_is_allowed(clock: ManualClock) -> None:
    context = Context(b"")
    context.about = {}
    assert (await refusal(Guard(clock), context)).reason is Reason.PERMISSION_DENIED


async def test_a_path_that_nobody_knows_is_nobodys(ca: Path, clock: ManualClock) -> None:
    refused = await refusal(Guard(clock), caller(ca, "operator", "a"), "/vfleet.v1.FleetService/New")
    assert refused.reason is Reason.PERMISSION_DENIED


async def test_a_field_may_take_another_role(ca: Path, clock: ManualClock) -> None:
    guarded = Guard(clock)
    for role, repair, allowed in (("viewer", False, True), ("viewer", True, False), ("operator", True, True)):
        request, context = CheckFleetRequest(repair=repair), caller(ca, role, "a")
        if allowed:
            assert await once(guarded, context, CHECK, request) is request
        else:
            assert (await refusal(guarded, context, CHECK, request)).reason is Reason.PERMISSION_DENIED


async def test_a_client_has_so_many_calls_under_way_and_another_has_its_own(ca: Path, clock: ManualClock) -> None:
    guarded, viewer = Guard(clock), caller(ca, "viewer", "a")
    calls = Calls(guarded)
    for _ in range(MAX_CALLS_PER_CLIENT):
        await calls.begin(viewer)
    refused = await refusal(guarded, viewer)
    assert refused.reason is Reason.LIMIT_EXCEEDED
    assert "viewer 'a' has 128 calls under way" in refused.message
    await once(guarded, caller(ca, "viewer", "b"))
    await once(guarded, caller(ca, "operator", "a"))
    await calls.end()
    await once(guarded, viewer)


async def test_clients_together_leave_room_for_the_fleet(ca: Path, clock: ManualClock) -> None:
    guarded = Guard(clock)
    calls = Calls(guarded)
    for number in range(MAX_CALLS_OF_CLIENTS):
        await calls.begin(caller(ca, "viewer", f"v{number % 10}"))
    refused = await refusal(guarded, caller(ca, "operator", "late"))
    assert refused.reason is Reason.LIMIT_EXCEEDED
    assert refused.retry_after_s
    other = Calls(guarded)
    await other.begin(caller(ca, "host", "h1"), "/vfleet.v1.TransferService/ExportState")
    await other.end()
    await calls.end()
    await once(guarded, caller(ca, "operator", "late"))


async def test_a_daemon_has_a_bound_of_its_own_and_no_rate(
    ca: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_CALLS_PER_DAEMON", 3)
    assert MAX_CALLS_PER_DAEMON > MAX_CALLS_PER_CLIENT
    guarded, host, path = Guard(clock), caller(ca, "host", "h1"), "/vfleet.v1.TransferService/ExportState"
    calls = Calls(guarded)
    for _ in range(3):
        await calls.begin(host, path)
    assert (await refusal(guarded, host, path)).reason is Reason.LIMIT_EXCEEDED
    await calls.end()
    for _ in range(int(BURST_CALLS) + 10):
        await once(guarded, host, path)


async def test_who_calls_too_often_is_told_when_to_come_again(ca: Path, clock: ManualClock) -> None:
    guarded, viewer = Guard(clock), caller(ca, "viewer", "a")
    for _ in range(int(BURST_CALLS)):
        await once(guarded, viewer)
    refused = await refusal(guarded, viewer)
    assert refused.reason is Reason.LIMIT_EXCEEDED
    assert refused.retry_after_s == pytest.approx(1 / CALLS_PER_S)
    assert "google.rpc.RetryInfo" in [detail.type_url.rpartition("/")[2] for detail in to_status(refused).details]
    await once(guarded, caller(ca, "viewer", "b"))
    clock.now += refused.retry_after_s + 1e-6
    await once(guarded, viewer)
    assert (await refusal(guarded, viewer)).reason is Reason.LIMIT_EXCEEDED


async def test_calls_that_are_refused_count_as_others_do(ca: Path, clock: ManualClock) -> None:
    guarded, viewer = Guard(clock), caller(ca, "viewer", "a")
    for _ in range(int(BURST_CALLS)):
        assert (await refusal(guarded, viewer, EXCHANGE)).reason is Reason.PERMISSION_DENIED
    assert (await refusal(guarded, viewer, EXCHANGE)).reason is Reason.LIMIT_EXCEEDED


async def test_a_request_that_does_not_come_is_not_waited_for(
    ca: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "REQUEST_TIMEOUT_S", 0.01)

    async def never() -> AsyncIterator[Message]:
        await asyncio.Event().wait()
        yield ListHostsRequest()

    with pytest.raises(VfleetError, match="the request did not come") as refused:
        await Guard(clock).unary(LIST, answer)(never(), caller(ca, "viewer", "a"))
    assert refused.value.reason is Reason.LIMIT_EXCEEDED


async def test_a_call_without_a_request_is_refused(ca: Path, clock: ManualClock) -> None:
    with pytest.raises(VfleetError, match="request is 'nothing'"):
        await Guard(clock).unary(LIST, answer)(requests(), caller(ca, "viewer", "a"))


async def test_what_is_remembered_of_callers_is_bounded(
    ca: Path, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MAX_REMEMBERED", 4)
    guarded = Guard(clock)
    for number in range(9):
        await once(guarded, caller(ca, "viewer", f"v{number}"))
    assert len(guarded._callers) <= 4
    assert len(guarded._certificates) <= 4
