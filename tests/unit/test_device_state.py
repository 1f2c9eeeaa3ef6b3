"""VFIO's state machine: every pair of states is walked."""

from itertools import product

import pytest

from hostd.device_state import AFTER_FAULT, AFTER_RESET, next_state, path, serves, state_name
from vfleet.errors import Reason, VfleetError
from vfleet.v1.types_pb2 import DeviceState

STATES = [
    DeviceState.Value(f"DEVICE_STATE_{name}")
    for name in ("STOP", "RUNNING", "PRE_COPY", "STOP_COPY", "RESUMING", "ERROR", "UNSPECIFIED")
]
NO_STATE = 99
PAIRS = list(product([*STATES, NO_STATE], repeat=2))

# linux/vfio.h, "the driver implements the following behavior for the FSM arcs", without peer-to-peer states.
ARCS = {
    ("RUNNING", "STOP"), ("STOP", "RUNNING"),
    ("STOP", "STOP_COPY"), ("STOP_COPY", "STOP"),
    ("STOP", "RESUMING"), ("RESUMING", "STOP"),
    ("RUNNING", "PRE_COPY"), ("PRE_COPY", "RUNNING"), ("PRE_COPY", "STOP_COPY"),
}  # fmt: skip

# vfio_mig_get_next_state(), followed to its end.
COMBINED = {
    ("RUNNING", "STOP_COPY"): "STOP STOP_COPY",
    ("RUNNING", "RESUMING"): "STOP RESUMING",
    ("STOP", "PRE_COPY"): "RUNNING PRE_COPY",
    ("PRE_COPY", "STOP"): "RUNNING STOP",
    ("PRE_COPY", "RESUMING"): "RUNNING STOP RESUMING",
    ("STOP_COPY", "RUNNING"): "STOP RUNNING",
    ("STOP_COPY", "RESUMING"): "STOP RESUMING",
    ("RESUMING", "RUNNING"): "STOP RUNNING",
    ("RESUMING", "PRE_COPY"): "STOP RUNNING PRE_COPY",
    ("RESUMING", "STOP_COPY"): "STOP STOP_COPY",
}


@pytest.mark.parametrize(("current", "wanted"), PAIRS)
def test_one_arc_is_taken_or_refused(current: DeviceState.ValueType, wanted: DeviceState.ValueType) -> None:
    if (state_name(current), state_name(wanted)) in ARCS:
        assert next_state(current, wanted) == wanted
        return
    with pytest.raises(VfleetError) as refused:
        next_state(current, wanted)
    assert refused.value.reason is Reason.ILLEGAL_STATE
    assert refused.value.metadata == {"state": state_name(current), "wanted": state_name(wanted)}


@pytest.mark.parametrize(("current", "wanted"), PAIRS)
def test_a_path_is_that_of_the_kernel_or_refused(current: DeviceState.ValueType, wanted: DeviceState.ValueType) -> None:
    pair = (state_name(current), state_name(wanted))
    if current == wanted and current in STATES[:5]:
        assert path(current, wanted) == ()
    elif pair in ARCS:
        assert path(current, wanted) == (wanted,)
    elif pair in COMBINED:
        assert " ".join(map(state_name, path(current, wanted))) == COMBINED[pair]
    else:
        with pytest.raises(VfleetError) as refused:
            path(current, wanted)
        assert refused.value.reason is Reason.ILLEGAL_STATE
        assert refused.value.metadata == {"state": pair[0], "wanted": pair[1]}


def test_a_refusal_says_from_where_and_to_where() -> None:
    for refuse in (next_state, path):
        with pytest.raises(VfleetError) as refused:
            refuse(DeviceState.DEVICE_STATE_STOP_COPY, DeviceState.DEVICE_STATE_PRE_COPY)
        assert refused.value.message == "a function in state STOP_COPY can't go to PRE_COPY"


def test_a_number_that_names_no_state_is_shown_as_it_is() -> None:
    assert (state_name(DeviceState.DEVICE_STATE_STOP), state_name(NO_STATE)) == ("STOP", "99")


def test_every_step_of_a_path_is_an_arc() -> None:
    for current, wanted in COMBINED:
        at = DeviceState.Value(f"DEVICE_STATE_{current}")
        for step in path(at, DeviceState.Value(f"DEVICE_STATE_{wanted}")):
            at = next_state(at, step)
        assert state_name(at) == wanted


def test_a_fault_leads_to_error_and_a_reset_to_running() -> None:
    assert (state_name(AFTER_FAULT), state_name(AFTER_RESET)) == ("ERROR", "RUNNING")


def test_a_function_serves_in_running_and_pre_copy_alone() -> None:
    assert {state_name(state) for state in STATES if serves(state)} == {"RUNNING", "PRE_COPY"}
