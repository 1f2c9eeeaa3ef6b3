"""Why a migration was aborted, and what can be done about it: for people, and for whoever may try again. Pure."""

from collections.abc import Mapping

from vfleet.errors import Reason
from vfleet.v1.records_pb2 import Migration, Phase, Step
from vfleet.v1.types_pb2 import ErrorReason

# What may be otherwise the next time. Everything else fails again until somebody does something about it.
PASSING = frozenset(
    {
        Reason.CONFLICT,
        Reason.HOST_CORDONED,
        Reason.HOST_UNAVAILABLE,
        Reason.INCARNATION_CHANGED,
        Reason.IN_MIGRATION,
        Reason.LIMIT_EXCEEDED,
        Reason.NO_FREE_SLOT,
        Reason.OUTCOME_UNKNOWN,
        Reason.SLOT_TAKEN,
        Reason.STORE_UNAVAILABLE,
        Reason.UNREACHABLE,
    }
)

_ADVICE: Mapping[Reason, str] = {
    Reason.BAD_STATE: "see the logs of both hosts; another target may do",
    Reason.CANCELLED: "begin it again if it is wanted still",
    Reason.CONFLICT: "try again",
    Reason.HOST_UNAVAILABLE: "look after the host, or name another target",
    Reason.INCARNATION_CHANGED: "try again: the host was started anew",
    Reason.LIMIT_EXCEEDED: "try again when there is less load, with a larger limit, or with --mode post-copy",
    Reason.STORE_UNAVAILABLE: "look after etcd, then try again",
    Reason.UNREACHABLE: "try again; if it fails again, look after the host, or name another target",
}
_UNDONE: Mapping[Step.ValueType, str] = {
    Step.STEP_CREATE: "the instances at the targets are destroyed",
    Step.STEP_COPY: "the copies at the targets are destroyed",
    Step.STEP_HOLD: "the sources run again, the holds are lifted, the copies at the targets are destroyed",
    Step.STEP_COMMIT: "the sources run again, the holds are lifted, the copies at the targets are destroyed",
}


def abort_cause(migration: Migration) -> Reason | None:
    """Return why a migration was aborted, or None if nothing of its own failed, or a newer vfleet knows why."""
    if not migration.abort_cause or migration.abort_cause not in ErrorReason.values():
        return None
    return Reason(ErrorReason.Name(migration.abort_cause).removeprefix("ERROR_REASON_"))


def is_passing(cause: Reason | None) -> bool:
    """Return whether another try is worth it after a failure of this cause; None is that nothing of its own failed."""
    return cause is None or cause in PASSING


def undone(migration: Migration) -> str:
    """Return what is undone of a migration that is aborted."""
    if not migration.attempt.fleet_generation:
        return "it had not begun"
    what = _UNDONE.get(migration.abort_step, "whatever it had begun is undone")
    where = "the functions are where they were"
    return f"{what}; {where}" if migration.phase == Phase.PHASE_ABORTED else f"{what} just now; {where}"


def advice(migration: Migration) -> str:
    """Return what a person may do about a migration that is aborted."""
    cause = abort_cause(migration)
    if cause is Reason.LIMIT_EXCEEDED and not migration.attempt.fleet_generation:
        return "try again when fewer migrations are under way, or let it wait longer (--deadline)"
    return "try again" if cause is None else _ADVICE.get(cause, "change what is in the way, then begin it again")
