"""How the coordinator's calls to hosts end: an import that is complete by itself, all others when nobody reads on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from support.fleet_values import three_hosts
from support.manual_clock import settle

from coordinator import hosts
from coordinator.hosts import Hosts
from coordinator.inventory import Inventory
from vfleet.rpc import Channels
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
