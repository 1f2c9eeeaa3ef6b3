"""VFIO's migration state machine (linux/vfio.h, "The device migration Finite State Machine"), as a table of arcs.

                 +-----------+          +-----------+
                 | PRE_COPY  |--------->| STOP_COPY |
                 +-----------+          +-----------+
                   ^   |                   ^   |
                   |   v                   |   v
    reset        +-----------+          +-----------+          +-----------+
    ------------>|  RUNNING  |<-------->|   STOP    |<-------->| RESUMING  |
      (from any) +-----------+          +-----------+          +-----------+

    fault (from any) --> ERROR, which only a reset leaves

A request names a state to go to. Most pairs are one arc; the others are made of arcs, through the states that the
kernel's vfio_mig_get_next_state() goes through without peer-to-peer states. A function serves accesses in RUNNING and
PRE_COPY alone; in ERROR it answers them, as one that is broken, and takes a driver's reset.
"""

from collections.abc import Mapping

from vfleet.errors import Reason, VfleetError
from vfleet.v1.types_pb2 import (
    DEVICE_STATE_ERROR,
    DEVICE_STATE_PRE_COPY,
    DEVICE_STATE_RESUMING,
    DEVICE_STATE_RUNNING,
    DEVICE_STATE_STOP,
    DEVICE_STATE_STOP_COPY,
    DeviceState,
)

AFTER_FAULT = DEVICE_STATE_ERROR
AFTER_RESET = DEVICE_STATE_RUNNING

_STOP = DEVICE_STATE_STOP
_RUNNING = DEVICE_STATE_RUNNING
_PRE_COPY = DEVICE_STATE_PRE_COPY
_STOP_COPY = DEVICE_STATE_STOP_COPY
_RESUMING = DEVICE_STATE_RESUMING

# From a state, towards a wanted one: the state at the end of the first arc. A pair that is not here is refused, as the
# kernel refuses it. STOP_COPY to PRE_COPY is among those: vfio.h leaves it undefined.
_FIRST_ARC: Mapping[DeviceState.ValueType, Mapping[DeviceState.ValueType, DeviceState.ValueType]] = {
    _STOP: {_RUNNING: _RUNNING, _PRE_COPY: _RUNNING, _STOP_COPY: _STOP_COPY, _RESUMING: _RESUMING},
    _RUNNING: {_STOP: _STOP, _PRE_COPY: _PRE_COPY, _STOP_COPY: _STOP, _RESUMING: _STOP},
    _PRE_COPY: {_STOP: _RUNNING, _RUNNING: _RUNNING, _STOP_COPY: _STOP_COPY, _RESUMING: _RUNNING},
    _STOP_COPY: {_STOP: _STOP, _RUNNING: _STOP, _RESUMING: _STOP},
    _RESUMING: {_STOP: _STOP, _RUNNING: _STOP, _PRE_COPY: _STOP, _STOP_COPY: _STOP},
}


def next_state(current: DeviceState.ValueType, wanted: DeviceState.ValueType) -> DeviceState.ValueType:
    """Return `wanted` if one arc leads there from `current`. Raise VfleetError ILLEGAL_STATE otherwise.

    A fault and a reset are not asked for by name: they lead to AFTER_FAULT and AFTER_RESET from any state.
    """
    if _FIRST_ARC.get(current, {}).get(wanted) != wanted:
        raise _illegal(current, wanted)
    return wanted


def path(current: DeviceState.ValueType, wanted: DeviceState.ValueType) -> tuple[DeviceState.ValueType, ...]:
    """Return the states that a function goes through, one arc each, from `current` (not included) to `wanted`.

    Empty if it is there already. Raise VfleetError ILLEGAL_STATE if no request leads there: to or from ERROR, or from
    STOP_COPY to PRE_COPY.
    """
    states: list[DeviceState.ValueType] = []
    at = current
    while at != wanted or at not in _FIRST_ARC:
        step = _FIRST_ARC.get(at, {}).get(wanted)
        if step is None:
            raise _illegal(current, wanted)
        states.append(step)
        at = step
    return tuple(states)


def serves(state: DeviceState.ValueType) -> bool:
    """Whether a function in this state serves accesses."""
    return state in (DEVICE_STATE_RUNNING, DEVICE_STATE_PRE_COPY)


def state_name(state: DeviceState.ValueType) -> str:
    """Return the state's name as VFIO writes it; a number that names no state, as it is."""
    known = state in DeviceState.values()
    return DeviceState.Name(state).removeprefix("DEVICE_STATE_") if known else str(state)


def _illegal(current: DeviceState.ValueType, wanted: DeviceState.ValueType) -> VfleetError:
    names = {"state": state_name(current), "wanted": state_name(wanted)}
    return VfleetError(
        Reason.ILLEGAL_STATE,
        f"a function in state {names['state']} can't go to {names['wanted']}",
        metadata=names,
    )
