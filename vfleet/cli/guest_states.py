"""Waiting until a host has told what has become of a guest."""

from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

from vfleet.cli.output import enum_word
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError
from vfleet.v1.types_pb2 import GuestState

LOOK_AGAIN_S = 0.05


class Told(Protocol):
    """What a coordinator, or the driver's host, says of a driver."""

    guest_state: GuestState.ValueType


async def until_told(
    look: Callable[[], Awaitable[Told]], clock: Clock, passing: Collection[GuestState.ValueType], patience_s: float
) -> GuestState.ValueType:
    """Return a guest's state once it isn't one of `passing`. Raise UNREACHABLE if it still is after `patience_s`."""
    give_up_s = clock.monotonic() + patience_s
    while (state := (await look()).guest_state) in passing:
        if clock.monotonic() >= give_up_s:
            what = enum_word(GuestState.Name(state), "GUEST_STATE_") if state else "not there"
            raise VfleetError(Reason.UNREACHABLE, f"the guest's socket is {what} after {patience_s:g} s")
        await clock.sleep(LOOK_AGAIN_S)
    return state
