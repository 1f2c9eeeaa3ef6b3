"""Where a migration is: a phase, which etcd records, and a step, which only its owner knows. One table of transitions.

                  BEGUN         CREATED        COPIED         HELD           COMMITTED
    UNSPECIFIED --------> PREPARING ----> PREPARING ----> PREPARING ----> PREPARING ----> COMMITTED
      BEGIN                CREATE           COPY            HOLD           COMMIT           LIFT
                             |               |               |               |               | LIFTED
                             +---------------+-------+-------+---------------+           COMMITTED
                                                     | ABORTED                             SCRUB
                                                 ABORTING                                    | SCRUBBED
                                                   UNDO                                  COMMITTED
                                                     | UNDONE                             FINISH
                                                 ABORTING                                    | FINISHED
                                                  FINISH  --FINISHED-->  ABORTED           DONE

There is no way from COMMITTED but forward, and none from ABORTING but back to where the functions were.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from vfleet.errors import Reason, VfleetError
from vfleet.v1.records_pb2 import Phase, Step


class Event(enum.Enum):
    """What takes a migration further."""

    BEGUN = "begun"
    CREATED = "created"
    COPIED = "copied"
    HELD = "held"
    COMMITTED = "committed"
    ABORTED = "aborted"
    LIFTED = "lifted"
    SCRUBBED = "scrubbed"
    UNDONE = "undone"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class State:
    """A phase and a step of it."""

    phase: Phase.ValueType
    step: Step.ValueType

    def __str__(self) -> str:
        return f"{Phase.Name(self.phase)}/{Step.Name(self.step)}"


PLANNED = State(Phase.PHASE_UNSPECIFIED, Step.STEP_BEGIN)
CREATE = State(Phase.PHASE_PREPARING, Step.STEP_CREATE)
COPY = State(Phase.PHASE_PREPARING, Step.STEP_COPY)
HOLD = State(Phase.PHASE_PREPARING, Step.STEP_HOLD)
COMMIT = State(Phase.PHASE_PREPARING, Step.STEP_COMMIT)
LIFT = State(Phase.PHASE_COMMITTED, Step.STEP_LIFT)
SCRUB = State(Phase.PHASE_COMMITTED, Step.STEP_SCRUB)
FINISH_DONE = State(Phase.PHASE_COMMITTED, Step.STEP_FINISH)
DONE = State(Phase.PHASE_DONE, Step.STEP_FINISH)
UNDO = State(Phase.PHASE_ABORTING, Step.STEP_UNDO)
FINISH_ABORTED = State(Phase.PHASE_ABORTING, Step.STEP_FINISH)
ABORTED = State(Phase.PHASE_ABORTED, Step.STEP_FINISH)

TRANSITIONS: Mapping[tuple[State, Event], State] = {
    (PLANNED, Event.BEGUN): CREATE,
    (CREATE, Event.CREATED): COPY,
    (COPY, Event.COPIED): HOLD,
    (HOLD, Event.HELD): COMMIT,
    (COMMIT, Event.COMMITTED): LIFT,
    (LIFT, Event.LIFTED): SCRUB,
    (SCRUB, Event.SCRUBBED): FINISH_DONE,
    (FINISH_DONE, Event.FINISHED): DONE,
    (CREATE, Event.ABORTED): UNDO,
    (COPY, Event.ABORTED): UNDO,
    (HOLD, Event.ABORTED): UNDO,
    (COMMIT, Event.ABORTED): UNDO,
    (UNDO, Event.UNDONE): FINISH_ABORTED,
    (FINISH_ABORTED, Event.FINISHED): ABORTED,
}

# Where one who knows nothing but the record goes on. What was done before is done again: every request can be.
ENTRIES: Mapping[Phase.ValueType, State] = {
    Phase.PHASE_PREPARING: CREATE,
    Phase.PHASE_COMMITTED: LIFT,
    Phase.PHASE_ABORTING: UNDO,
    Phase.PHASE_DONE: DONE,
    Phase.PHASE_ABORTED: ABORTED,
}


def next_state(state: State, event: Event) -> State:
    """Return where `event` leads from `state`. Raise INTERNAL for a pair that isn't in the table."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise VfleetError(Reason.INTERNAL, f"a migration in {state} can't be {event.value}") from None


def is_over(phase: Phase.ValueType) -> bool:
    """Return whether nothing is left to do in `phase`."""
    return phase in (Phase.PHASE_DONE, Phase.PHASE_ABORTED)
