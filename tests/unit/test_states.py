"""The transitions of a migration."""

import itertools

import pytest

from coordinator import states
from coordinator.states import Event, State, next_state
from vfleet.errors import Reason, VfleetError
from vfleet.v1.records_pb2 import Phase

ALL = sorted({state for state, _ in states.TRANSITIONS} | set(states.TRANSITIONS.values()), key=str)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(ALL, Event)))
def test_only_listed_pairs_lead_on(state, event):
    if (state, event) in states.TRANSITIONS:
        assert next_state(state, event) == states.TRANSITIONS[state, event]
    else:
        with pytest.raises(VfleetError, match=event.value) as caught:
            next_state(state, event)
        assert caught.value.reason is Reason.INTERNAL


@pytest.mark.parametrize(
    "walk",
    [
        """
        BEGUN PREPARING/CREATE, CREATED PREPARING/COPY, COPIED PREPARING/HOLD, HELD PREPARING/COMMIT,
        COMMITTED COMMITTED/LIFT, LIFTED COMMITTED/SCRUB, SCRUBBED COMMITTED/FINISH, FINISHED DONE/FINISH
        """,
        """
        BEGUN PREPARING/CREATE, CREATED PREPARING/COPY, ABORTED ABORTING/UNDO, UNDONE ABORTING/FINISH,
        FINISHED ABORTED/FINISH
        """,
    ],
)
def test_a_migration_goes_step_by_step(walk):
    state = states.PLANNED
    for event, after in (step.split() for step in walk.split(",")):
        state = next_state(state, Event[event])
        assert str(state).replace("PHASE_", "").replace("STEP_", "") == after


def reachable(start: State) -> set[State]:
    found, new = set(), {start}
    while new:
        found |= new
        new = {after for (before, _), after in states.TRANSITIONS.items() if before in new} - found
    return found


def test_the_decision_is_final():
    assert {state.phase for state in reachable(states.LIFT)} == {Phase.PHASE_COMMITTED, Phase.PHASE_DONE}
    assert {state.phase for state in reachable(states.UNDO)} == {Phase.PHASE_ABORTING, Phase.PHASE_ABORTED}


def test_every_undecided_state_can_be_aborted():
    undecided = [state for state in ALL if state.phase == Phase.PHASE_PREPARING]
    assert len(undecided) == 4
    assert {next_state(state, Event.ABORTED) for state in undecided} == {states.UNDO}


def test_every_phase_that_is_stored_has_an_entry_that_leads_to_its_end():
    stored = set(Phase.values()) - {Phase.PHASE_UNSPECIFIED, Phase.PHASE_QUEUED}
    assert set(states.ENTRIES) == stored
    assert all(states.is_over(phase) == (reachable(entry) == {entry}) for phase, entry in states.ENTRIES.items())


def test_a_migration_begins_as_planned():
    assert next_state(states.PLANNED, Event.BEGUN) == states.ENTRIES[Phase.PHASE_PREPARING]
