"""The etcd transactions of migrations and of the fleet, as pure values: what is compared and what is written.

Nothing here reads, waits or decides; each function turns records and the revisions at which they were read into one
Transaction. ABORT is in `vfleet.decision`, because hosts write it too.
"""

from collections.abc import Iterable, Mapping, Sequence

from coordinator.snapshot import Stored
from coordinator.states import is_over
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import (
    cordon_key,
    driver_key,
    entry_key,
    function_key,
    lock_key,
    migration_key,
    owner_key,
    queue_key,
    registration_key,
    slot_key,
)
from vfleet.etcd.records import encode
from vfleet.etcd.store import Compare, Delete, Put, Transaction, absent, unchanged, value_is
from vfleet.v1.records_pb2 import (
    Driver,
    Function,
    FunctionStatus,
    Migration,
    Move,
    Phase,
    Slot,
    StepDuration,
)
from vfleet.v1.types_pb2 import Attempt, TableEntry


def begin(
    migration: Migration,
    lease: int,
    fleet_generation: Compare,
    parts: Iterable[str] | None = None,
    queue_revision: int = 0,
    bystanders: Mapping[str, int] | None = None,
) -> Transaction:
    """Return BEGIN for a plan: nothing that it saw has changed, and none of its functions is in a migration.

    That none of `parts`, those that the targets are in (by default, their hosts), is cordoned is compared, so that what
    begins after a cordon goes elsewhere. `fleet_generation` holds while the fleet generation is the plan's. That the
    lease is alive needs no comparison: etcd refuses a put with a lease that is gone. A migration that was queued leaves
    the queue, where it was last written at `queue_revision`. `bystanders` are functions that don't move but that the
    plan counts on to be where they are, with the revisions that last wrote their records.
    """
    _expect(migration, Phase.PHASE_UNSPECIFIED)
    name = migration.name
    queue = queue_key(name)
    compares = [
        absent(migration_key(name)),
        absent(owner_key(name)),
        unchanged(queue, queue_revision),
        fleet_generation,
    ]
    writes: list[Put | Delete] = [
        Put(migration_key(name), encode(_in_phase(migration, Phase.PHASE_PREPARING))),
        Put(owner_key(name), migration.coordinator.encode(), lease),
        *([Delete(queue)] if queue_revision else []),
    ]
    for move in migration.moves:
        target = slot_key(move.target.device, move.target.vf_index)
        compares += [
            unchanged(function_key(move.function), move.function_revision),
            absent(lock_key(move.function)),
            absent(target),
        ]
        writes += [
            Put(lock_key(move.function), name.encode()),
            Put(target, encode(Slot(function=move.function, migration=name))),
        ]
    compares += _registered(hosts_of(migration.moves))
    if parts is None:
        parts = dict.fromkeys(move.target.host for move in migration.moves)
    compares += [absent(cordon_key(part)) for part in parts]
    for name, revision in (bystanders or {}).items():
        compares += [unchanged(function_key(name), revision), absent(lock_key(name))]
    return Transaction(tuple(compares), tuple(writes))


def commit(migration: Migration, begin_revision: int, now: float) -> Transaction:
    """Return COMMIT, the point of no return: homes, generations and entries change, all in one.

    `begin_revision` is BEGIN's, which last wrote the record; `now` is in seconds since 1970. That entries are as
    planned needs no comparison: whatever else writes an entry of a function compares its lock or writes its record.
    """
    _expect(migration, Phase.PHASE_PREPARING)
    committed = _in_phase(migration, Phase.PHASE_COMMITTED)
    committed.decide_time.FromNanoseconds(round(now * 1e9))
    compares = [unchanged(migration_key(migration.name), begin_revision)]
    writes: list[Put | Delete] = [Put(migration_key(migration.name), encode(committed))]
    attempt = Attempt(fleet_generation=migration.attempt.fleet_generation, revision=begin_revision)
    for move in migration.moves:
        compares.append(unchanged(function_key(move.function), move.function_revision))
        writes.append(Put(function_key(move.function), encode(_moved(move, attempt))))
        writes += [Put(entry_key(e.host, e.driver, e.function), encode(e)) for e in entries_after(move)]
    compares += _registered({move.target.host: move.target.incarnation for move in migration.moves})
    return Transaction(tuple(compares), tuple(writes))


def finish(
    migration: Migration,
    mod_revision: int,
    *,
    finished_by: str,
    now: float,
    steps: Sequence[StepDuration] = (),
) -> Transaction:
    """Return FINISH: locks, the slots left behind and the owner key go; the record stays as history.

    `mod_revision` is the decision's, which last wrote the record.
    """
    committed = migration.phase == Phase.PHASE_COMMITTED
    if not committed:
        _expect(migration, Phase.PHASE_ABORTING)
    over = _in_phase(migration, Phase.PHASE_DONE if committed else Phase.PHASE_ABORTED)
    over.finish_time.FromNanoseconds(round(now * 1e9))
    over.finished_by = finished_by
    over.steps.extend(steps)
    writes: list[Put | Delete] = [Put(migration_key(migration.name), encode(over)), Delete(owner_key(migration.name))]
    for move in migration.moves:
        source = slot_key(move.source.device, move.source.vf_index)
        target = slot_key(move.target.device, move.target.vf_index)
        writes.append(Delete(lock_key(move.function)))
        if committed:
            writes += [Delete(source), Put(target, encode(Slot(function=move.function)))]
        else:
            writes.append(Delete(target))
    return Transaction((unchanged(migration_key(migration.name), mod_revision),), tuple(writes))


def adopt(migration: Migration, mod_revision: int, coordinator: str, lease: int) -> Transaction:
    """Return the adoption of a migration that nobody owns and that is as it was read."""
    key = owner_key(migration.name)
    compares = (absent(key), unchanged(migration_key(migration.name), mod_revision))
    return Transaction(compares, (Put(key, coordinator.encode(), lease),))


def forget_migrations(found: Iterable[Stored[Migration]]) -> Transaction:
    """Return the deletion of records of migrations that are over, as they were read."""
    compares, writes = [], []
    for stored in found:
        if not is_over(stored.record.phase):
            _expect(stored.record, Phase.PHASE_DONE)
        key = migration_key(stored.record.name)
        compares.append(unchanged(key, stored.mod_revision))
        writes.append(Delete(key))
    return Transaction(tuple(compares), tuple(writes))


def entries_after(move: Move) -> list[TableEntry]:
    """Return the move's table entries as COMMIT writes them, sorted by driver."""
    return [
        TableEntry(
            driver=change.driver,
            function=move.function,
            virtual_address=change.virtual_address,
            length_bytes=change.length_bytes,
            offset=change.offset_after,
            generation=move.target.generation,
            host=change.host,
        )
        for change in move.entries
    ]


def hosts_of(moves: Iterable[Move]) -> dict[str, str]:
    """Return the incarnation that the plan saw of every host that takes part, in the order of the moves."""
    hosts: dict[str, str] = {}
    for move in moves:
        for place in (move.source, move.target):
            hosts[place.host] = place.incarnation
        for entry in move.entries:
            hosts[entry.host] = entry.incarnation
    return hosts


def create_function(function: Function, fleet_generation: Compare, parts: Iterable[str] | None = None) -> Transaction:
    """Return the record of a function to be made, and its slot. Its attempt's revision will be that of this write.

    None of `parts`, those that its device is in (by default, its host), is cordoned.
    """
    slot = slot_key(function.device, function.vf_index)
    host = function.device.partition("/")[0]
    return Transaction(
        (
            absent(function_key(function.name)),
            absent(slot),
            fleet_generation,
            value_is(registration_key(host), function.incarnation.encode()),
            *(absent(cordon_key(part)) for part in parts or (host,)),
        ),
        (Put(function_key(function.name), encode(function)), Put(slot, encode(Slot(function=function.name)))),
    )


def activate_function(function: Function, create_revision: int, mod_revision: int, incarnation: str) -> Transaction:
    """Return the end of a function's creation: the instance is there, on a host still of this incarnation."""
    active = _copy(function)
    active.status = FunctionStatus.FUNCTION_STATUS_ACTIVE
    active.attempt.revision = create_revision
    active.incarnation = incarnation
    host = function.device.partition("/")[0]
    return Transaction(
        (
            unchanged(function_key(function.name), mod_revision),
            value_is(registration_key(host), incarnation.encode()),
        ),
        (Put(function_key(function.name), encode(active)),),
    )


def begin_delete_function(
    function: Function, mod_revision: int, fleet_generation: int, fleet_generation_is: Compare
) -> Transaction:
    """Return the start of a function's deletion. The revision of its attempt will be that of this write."""
    deleting = _copy(function)
    deleting.status = FunctionStatus.FUNCTION_STATUS_DELETING
    deleting.attempt.CopyFrom(Attempt(fleet_generation=fleet_generation))
    if function.status == FunctionStatus.FUNCTION_STATUS_CREATING:
        # Another machine than the one that was asked first may have made it since.
        deleting.incarnation = ""
    return Transaction(
        (
            unchanged(function_key(function.name), mod_revision),
            absent(lock_key(function.name)),
            fleet_generation_is,
        ),
        (Put(function_key(function.name), encode(deleting)),),
    )


def finish_delete_function(function: Function, mod_revision: int) -> Transaction:
    """Return the end of a function's deletion: the instance is gone."""
    return Transaction(
        (unchanged(function_key(function.name), mod_revision),),
        (Delete(function_key(function.name)), Delete(slot_key(function.device, function.vf_index))),
    )


def attach_driver(
    function: Function, function_revision: int, driver: Driver, driver_revision: int, entry: TableEntry
) -> Transaction:
    """Return an attachment. `driver_revision` is 0 for a driver to be made.

    The driver's record is written even if it stays the same, so that two attachments to one driver, which may want the
    same virtual addresses, exclude each other.
    """
    attached = _copy(function)
    attached.drivers[:] = sorted({*function.drivers, driver.name})
    key = entry_key(driver.host, driver.name, function.name)
    return Transaction(
        (
            unchanged(function_key(function.name), function_revision),
            absent(lock_key(function.name)),
            unchanged(driver_key(driver.name), driver_revision),
            absent(key),
        ),
        (
            Put(function_key(function.name), encode(attached)),
            Put(driver_key(driver.name), encode(driver)),
            Put(key, encode(entry)),
        ),
    )


def detach_driver(function: Function, function_revision: int, entry: TableEntry, entry_revision: int) -> Transaction:
    """Return the end of an attachment."""
    detached = _copy(function)
    detached.drivers[:] = [driver for driver in function.drivers if driver != entry.driver]
    key = entry_key(entry.host, entry.driver, function.name)
    return Transaction(
        (
            unchanged(function_key(function.name), function_revision),
            absent(lock_key(function.name)),
            unchanged(key, entry_revision),
        ),
        (Put(function_key(function.name), encode(detached)), Delete(key)),
    )


def delete_driver(driver: Driver, mod_revision: int) -> Transaction:
    """Return the end of a driver. It has no entries as of `mod_revision`, and an attachment would have changed it."""
    return Transaction((unchanged(driver_key(driver.name), mod_revision),), (Delete(driver_key(driver.name)),))


def request_bytes(transaction: Transaction) -> int:
    """Return an upper bound of the size of the transaction's request: keys, values, and what encloses them."""
    enclosing = 64
    compares = sum(
        enclosing + len(compare.key) + (len(compare.expected) if isinstance(compare.expected, bytes) else 0)
        for compare in transaction.compares
    )
    writes = sum(
        enclosing + len(write.key) + (len(write.value) if isinstance(write, Put) else 0) for write in transaction.writes
    )
    return compares + writes


def _moved(move: Move, attempt: Attempt) -> Function:
    target = move.target
    return Function(
        name=move.function,
        identity=move.identity,
        generation=target.generation,
        device=target.device,
        vf_index=target.vf_index,
        base=target.base,
        bars=move.bars,
        status=FunctionStatus.FUNCTION_STATUS_ACTIVE,
        attempt=attempt,
        drivers=[change.driver for change in move.entries],
        model=move.model,
        incarnation=target.incarnation,
    )


def _registered(incarnations: dict[str, str]) -> list[Compare]:
    return [value_is(registration_key(host), incarnation.encode()) for host, incarnation in incarnations.items()]


def _expect(migration: Migration, phase: Phase.ValueType) -> None:
    if migration.phase != phase:
        raise VfleetError(
            Reason.INTERNAL,
            f"migration {migration.name!r} is in {Phase.Name(migration.phase)}; expected {Phase.Name(phase)}",
        )


def _in_phase(migration: Migration, phase: Phase.ValueType) -> Migration:
    copy = Migration()
    copy.CopyFrom(migration)
    copy.phase = phase
    return copy


def _copy(function: Function) -> Function:
    copy = Function()
    copy.CopyFrom(function)
    return copy
