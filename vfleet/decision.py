"""How a migration is decided, for all who may decide it or must know: coordinators and hosts.

The outcome is one record in etcd, written by whoever gets there first: COMMIT (a coordinator's alone)
and the ABORT here both compare the record as it was while undecided, so they exclude each other. Pure.
"""

from collections.abc import Iterable

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import function_key, migration_key
from vfleet.etcd.records import decode_if_possible, encode
from vfleet.etcd.store import Compare, Delete, KeyValue, Put, Transaction, unchanged
from vfleet.v1.records_pb2 import Function, FunctionStatus, Migration, Phase, Step
from vfleet.v1.types_pb2 import Decision, ErrorReason, TableEntry

MAX_ABORT_REASON_CHARACTERS = 1000

_OUTCOMES = {
    Phase.PHASE_COMMITTED: Decision.DECISION_COMMITTED,
    Phase.PHASE_DONE: Decision.DECISION_COMMITTED,
    Phase.PHASE_ABORTING: Decision.DECISION_ABORTED,
    Phase.PHASE_ABORTED: Decision.DECISION_ABORTED,
}


def outcome(record: Migration) -> Decision.ValueType:
    """Return how the migration was decided; DECISION_UNSPECIFIED if it is not."""
    return _OUTCOMES.get(record.phase, Decision.DECISION_UNSPECIFIED)


def abort_transaction(
    record: Migration,
    mod_revision: int,
    reason: str,
    step: Step.ValueType,
    now: float,
    owner: Compare | None,
    cause: Reason | None = None,
    host: str = "",
) -> Transaction:
    """Return ABORT: the record, last written at `mod_revision` and undecided, becomes ABORTING.

    `reason` is for people (shortened to 1000 characters), `cause` and the `host` that failed for programs, if anything
    did; `now` is in seconds since 1970. `owner` is what the one who aborts demands of the owner key: its own if it is
    the owner, absent if it is a host, None for a cancel. Raise ILLEGAL_STATE if the record is decided.
    """
    if record.phase != Phase.PHASE_PREPARING:
        raise VfleetError(
            Reason.ILLEGAL_STATE,
            f"migration {record.name!r} is in {Phase.Name(record.phase)}; expected PHASE_PREPARING to abort it",
        )
    aborting = Migration()
    aborting.CopyFrom(record)
    aborting.phase = Phase.PHASE_ABORTING
    aborting.abort_reason = reason[:MAX_ABORT_REASON_CHARACTERS]
    aborting.abort_step = step
    aborting.abort_host = host
    if cause is not None:
        aborting.abort_cause = ErrorReason.Value(f"ERROR_REASON_{cause}")
    aborting.decide_time.FromNanoseconds(round(now * 1e9))
    key = migration_key(record.name)
    compares = (unchanged(key, mod_revision),) if owner is None else (unchanged(key, mod_revision), owner)
    return Transaction(compares, (Put(key, encode(aborting)),))


def lose_function(function: Function, mod_revision: int, entries: Iterable[KeyValue], *more: Compare) -> Transaction:
    """Return the loss of a function, last written at `mod_revision`, with the machine that was its home.

    Its drivers' entries, found among `entries`, are marked as well, since their hosts' watch on them is how they learn
    of it. It holds only if `more` does.
    """
    lost = Function()
    lost.CopyFrom(function)
    lost.status = FunctionStatus.FUNCTION_STATUS_LOST
    compares = [unchanged(function_key(function.name), mod_revision), *more]
    writes: list[Put | Delete] = [Put(function_key(function.name), encode(lost))]
    for item in entries:
        entry = decode_if_possible(TableEntry, item)
        if entry is not None and entry.function == function.name:
            entry.lost = True
            compares.append(unchanged(item.key, item.mod_revision))
            writes.append(Put(item.key, encode(entry)))
    return Transaction(tuple(compares), tuple(writes))
