"""How the coordinator's calls to hosts end, and which are sent once more: those whose connection broke too early."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

import grpc
import pytest
from support.fleet_values import three_hosts
from support.manual_clock import settle

from coordinator import hosts
from coordinator.hosts import Hosts
from coordinator.inventory import Inventory
from vfleet.errors import Reason, VfleetError
from vfleet.rpc import Channels
from vfleet.v1.function_service_pb2 import ChangeStateRequest, ChangeStateResponse, FunctionInstance
from vfleet.v1.transfer_service_pb2 import ImportStateRequest, ImportStateResponse


class Call:
    """An import, and the channel that it goes over. After its last response it waits until it `may_end`."""

    def __init__(self, *responses: ImportStateResponse) -> None:
        self.responses = responses
        self.may_end = asyncio.Event()
        self.is_cancelled = self.has_ended = False

    def unary_stream(self, path: str, **_):
        return lambda request, **_: self

    def unary_unary(self, path: str, **_):
        return None

    async def __aiter__(self) -> AsyncIterator[ImportStateResponse]:
        for response in self.responses:
            yield response
        await self.may_end.wait()
        self.has_ended = True

    def cancel(self) -> None:
        self.is_cancelled = True


async def read(call: Call, count: int) -> None:
    """Read so many responses of an import and no more."""
    inventory = Inventory()
    inventory.snapshot = three_hosts().snapshot()
    fleet = Hosts(inventory, Channels(lambda address: call))
    async with aclosing(fleet.import_state("h2", ImportStateRequest())) as responses:
        for _ in range(count):
            await anext(responses)


PROGRESS, COMPLETE = ImportStateResponse(rounds=1), ImportStateResponse(complete=True)


async def test_a_complete_import_ends_by_itself_and_nobody_waits_for_that():
    call = Call(PROGRESS, COMPLETE)
    await read(call, 2)
    await settle()
    assert (call.is_cancelled, call.has_ended) == (False, False)
    call.may_end.set()
    await settle()
    assert call.has_ended


async def test_an_import_that_is_not_complete_is_broken_off():
    call = Call(PROGRESS, COMPLETE)
    await read(call, 1)
    assert (call.is_cancelled, call.has_ended) == (True, False)


async def test_a_complete_import_that_does_not_end_is_broken_off_after_a_while(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts, "END_TIMEOUT_S", 0.0)
    call = Call(COMPLETE)
    await read(call, 1)
    while not call.is_cancelled:
        await asyncio.sleep(0)
    assert not call.has_ended


# Calls that are answered once

BROKEN, LATE = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED


class Answering:
    """A channel whose calls end with these, one after the other: a status, or an answer."""

    def __init__(self, *ends: grpc.StatusCode | ChangeStateResponse) -> None:
        self.ends = list(ends)
        self.sent: list[ChangeStateRequest] = []
        self.timeouts_s: list[float] = []

    def unary_unary(self, path: str, **_):
        return self.call if path.endswith("/ChangeState") else None

    async def call(self, request: ChangeStateRequest, *, timeout: float, metadata: grpc.aio.Metadata):
        self.sent.append(request)
        self.timeouts_s.append(timeout)
        end = self.ends.pop(0)
        if isinstance(end, grpc.StatusCode):
            raise grpc.aio.AioRpcError(end, grpc.aio.Metadata(), grpc.aio.Metadata(), "Stream removed")
        return end


STOP, STOPPED = ChangeStateRequest(function="vf1"), ChangeStateResponse(instance=FunctionInstance(function="vf1"))


def fleet_through(channel: Answering, check: Callable[[], None] = lambda: None) -> Hosts:
    inventory = Inventory()
    inventory.snapshot = three_hosts().snapshot()
    return Hosts(inventory, Channels(lambda address: channel), check)


async def test_a_call_whose_connection_breaks_before_its_answer_is_sent_once_more():
    channel = Answering(BROKEN, STOPPED)
    assert await fleet_through(channel).change_state("h2", STOP)
    assert channel.sent == [STOP, STOP]
    assert channel.timeouts_s == [hosts.CHANGE_STATE_TIMEOUT_S] * 2


@pytest.mark.parametrize("ends", [(BROKEN, BROKEN), (LATE,), (BROKEN, LATE)])
async def test_a_host_that_is_not_there_or_is_late_is_not_asked_for_ever(ends):
    channel = Answering(*ends, STOPPED)
    with pytest.raises(VfleetError) as caught:
        await fleet_through(channel).change_state("h2", STOP)
    assert (caught.value.reason, len(channel.sent)) == (Reason.UNREACHABLE, len(ends))
    assert caught.value.message.startswith("host 'h2', ChangeState: ")


async def test_who_is_deposed_meanwhile_sends_nothing_more():
    def check() -> None:
        if channel.sent:
            raise VfleetError(Reason.CONFLICT, "the lease is lost")

    channel = Answering(BROKEN, STOPPED)
    with pytest.raises(VfleetError) as caught:
        await fleet_through(channel, check).change_state("h2", STOP)
    assert (caught.value.reason, channel.sent) == (Reason.CONFLICT, [STOP])
