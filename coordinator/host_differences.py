"""Differences between etcd and what the hosts have: instances, drivers, tables, holds. Pure.

A host that can't be asked is said to be silent; nothing is concluded from what it doesn't say. Whatever a function's
lock says is under way is passed. Where etcd was restored from a backup, a host may know better: see `_ahead`.
"""

from collections.abc import Iterable, Iterator

from coordinator.findings import (
    HOME_STATES,
    SERVING_STATES,
    Call,
    Finding,
    View,
    describe_entry,
    describe_home,
    describe_instance,
    finding,
    forgetting,
    is_home,
    key_of,
    led_to,
)
from coordinator.snapshot import Stored
from vfleet.decision import lose_function, outcome
from vfleet.etcd.keys import driver_key, function_key, registration_key, slot_key
from vfleet.etcd.records import encode
from vfleet.etcd.store import Delete, KeyValue, Put, Transaction, absent, unchanged, value_is
from vfleet.names import host_of
from vfleet.v1.driver_service_pb2 import CreateDriverRequest, DeleteDriverRequest, DetachFunctionRequest, DriverState
from vfleet.v1.fleet_service_pb2 import DifferenceKind
from vfleet.v1.function_service_pb2 import ChangeStateRequest, DestroyFunctionRequest, FunctionInstance
from vfleet.v1.hold_service_pb2 import EntryName, Hold, LiftHoldRequest
from vfleet.v1.records_pb2 import Driver, Function, FunctionStatus, Slot
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.types_pb2 import Decision, DeviceState, TableEntry

ASK_AGAIN = "none while a host can't be asked: it may have the function"


def host_findings(view: View) -> Iterator[Finding]:
    """Yield what hosts have and etcd doesn't, or the other way round."""
    for host, why in sorted(view.silent.items()):
        registered = "registered" if host in view.snapshot.registrations else "not registered"
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_HOST_UNREACHABLE,
            host=host,
            etcd=registered,
            says=why,
            remedy=f"none: start its hostd, or, if it never comes back: vfleet fleet forget-host {host}",
        )
    for host, state in sorted(view.hosts.items()):
        for instance in state.instances:
            if not view.is_busy(instance.function) and instance.migration not in view.snapshot.active_migrations:
                yield from _instance(view, host, instance)
        for hold in state.holds:
            if view.is_over(hold.migration) and not view.is_busy(hold.function):
                yield _hold(view, host, hold)
        yield from _drivers(view, host)
    for name, stored in sorted(view.snapshot.functions.items()):
        yield from _missing(view, name, stored)


def _instance(view: View, host: str, instance: FunctionInstance) -> Iterator[Finding]:
    stored = view.snapshot.functions.get(instance.function)
    if stored is not None and is_home(stored.record, host, instance):
        # What was lost is said to be so; deleting it takes away what is left of it.
        is_lost = stored.record.status == FunctionStatus.FUNCTION_STATUS_LOST
        if instance.state not in SERVING_STATES and not _awaits_proof(instance) and not is_lost:
            yield _stopped(view, host, instance, stored)
        yield from _detached(view, host, instance, stored.record)
        return
    is_earlier = instance.attempt.fleet_generation < view.snapshot.fleet_generation and instance.complete
    if stored is None:
        is_ahead = is_earlier
    else:
        is_ahead = instance.generation > stored.record.generation and instance.complete
        at_home = any(is_home(stored.record, place, other) for place, other in view.instances_of(instance.function))
        if stored.record.identity != instance.identity:
            # The function was deleted and another was made under its name, which a backup may have forgotten.
            is_ahead = is_earlier and not at_home
        is_unknown = bool(view.silent) and is_earlier
        if (
            is_ahead
            and instance.state not in HOME_STATES
            and not is_unknown
            and (at_home or _has_rival(view, instance))
        ):
            # If no table leads to it, and the home has all that it has, its attempt was not committed.
            is_ahead = _is_led_to(view, instance)
    function = stored.record if stored is not None else None
    if is_ahead:
        yield _ahead(view, host, instance, function)
        return
    if any(
        other.arriving and other.generation > instance.generation for _, other in view.instances_of(instance.function)
    ):
        # The later instance fetches from this one; when it has everything, this one is left over.
        return
    request = DestroyFunctionRequest(
        attempt=view.attempt,
        function=instance.function,
        generation=instance.generation,
        decision=Decision.DECISION_COMMITTED,
    )
    remedy = "destroy the instance"
    repair: Call | None = Call(host, request)
    if view.silent and instance.HasField("stopped_by"):
        remedy, repair = ASK_AGAIN, None
    elif function is not None and function.identity != instance.identity and is_earlier:
        # Both are homes: a backup had forgotten the one, and the other was made before the raise.
        remedy, repair = "none: delete the function that has its name now, and it comes back", None
    yield finding(
        DifferenceKind.DIFFERENCE_KIND_ORPHAN_INSTANCE,
        host=host,
        function=instance.function,
        etcd=describe_home(function),
        says=describe_instance(instance),
        remedy=remedy,
        repair=repair,
    )


def _has_rival(view: View, instance: FunctionInstance) -> bool:
    """Return whether another instance of the function is, or was, its home for certain."""
    return any(
        other is not instance
        and other.identity == instance.identity
        and other.complete
        and (other.state in HOME_STATES or _is_led_to(view, other))
        for _, other in view.instances_of(instance.function)
    )


def _is_led_to(view: View, instance: FunctionInstance) -> bool:
    """Return whether a driver's table has the function at the instance's generation."""
    entries = (entry for state in view.hosts.values() for driver in state.drivers for entry in driver.entries)
    named = {(entry.function, entry.generation) for entry in entries}
    return (instance.function, instance.generation) in named


def _awaits_proof(instance: FunctionInstance) -> bool:
    return instance.state == DeviceState.DEVICE_STATE_STOP and instance.complete


def _detached(view: View, host: str, instance: FunctionInstance, function: Function) -> Iterator[Finding]:
    """Yield the drivers that the home knows, and neither etcd nor any table has attached."""
    tables = [driver for state in view.hosts.values() for driver in state.drivers]
    attached = {driver.driver for driver in tables for entry in driver.entries if entry.function == function.name}
    for driver in sorted(set(instance.last_sequences) - attached - set(function.drivers)):
        request = forgetting(driver, function.name, instance.generation, view.attempt)
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_DETACHED_DRIVER,
            host=host,
            function=function.name,
            driver=driver,
            etcd="not attached to the function",
            says="the function knows the driver",
            remedy=ASK_AGAIN if view.silent else "let the function forget it",
            repair=None if view.silent else Call(host, request),
        )


def _stopped(view: View, host: str, instance: FunctionInstance, stored: Stored[Function]) -> Finding:
    is_of_before = instance.stopped_by.fleet_generation < view.snapshot.fleet_generation
    is_left = any(
        other.complete and other.generation > instance.generation for _, other in view.instances_of(instance.function)
    )
    request = ChangeStateRequest(
        attempt=view.attempt if is_of_before else instance.stopped_by,
        migration="" if is_of_before else instance.migration,
        function=instance.function,
        generation=instance.generation,
        state=DeviceState.DEVICE_STATE_RUNNING,
    )
    repair: Call | Transaction | None = None
    if not instance.HasField("stopped_by"):
        remedy = "none: delete the function"
    elif (is_of_before or instance.fetched) and view.silent:
        remedy = ASK_AGAIN
    elif (is_of_before or instance.fetched) and is_left:
        remedy = "none: an instance of a later generation comes first"
    elif instance.fetched:
        remedy, repair = "mark the function LOST: its home has gone with what it did since", _lose(view, stored)
    else:
        remedy, repair = "let it run", Call(host, request)
    return finding(
        DifferenceKind.DIFFERENCE_KIND_STOPPED_INSTANCE,
        host=host,
        function=instance.function,
        etcd="the function's home, and no migration has it",
        says=describe_instance(instance),
        remedy=remedy,
        repair=repair,
    )


def _ahead(view: View, host: str, instance: FunctionInstance, function: Function | None) -> Finding:
    """Return what a backup forgot. The record follows if this is the only instance that can be the function's home."""
    rivals = [
        other
        for _, other in view.instances_of(instance.function)
        if other.complete and other.generation >= instance.generation
    ]
    slot = view.snapshot.slots.get(f"{instance.device}/{instance.vf_index}")
    holder = slot.record.function if slot is not None else instance.function
    if view.silent:
        remedy, repair = ASK_AGAIN, None
    elif len(rivals) > 1:
        remedy, repair = "none: several instances may be the function's home", None
    elif holder != instance.function and not _has_moved(view, holder):
        remedy, repair = f"none: etcd has given its slot to {holder}", None
    else:
        remedy, repair = "write the function's record by what the host has", _follow(view, host, instance, function)
    return finding(
        DifferenceKind.DIFFERENCE_KIND_FORGOTTEN_INSTANCE,
        host=host,
        function=instance.function,
        etcd=describe_home(function),
        says=describe_instance(instance),
        remedy=remedy,
        repair=repair,
    )


def _has_moved(view: View, function: str) -> bool:
    """Return whether a backup has forgotten that a function moved, and so that its slot is another's by now."""
    stored = view.snapshot.functions.get(function)
    return stored is not None and any(
        other.identity == stored.record.identity and other.complete and other.generation > stored.record.generation
        for _, other in view.instances_of(function)
    )


def _follow(view: View, host: str, instance: FunctionInstance, before: Function | None) -> Transaction:
    name, snapshot = instance.function, view.snapshot
    function = Function(
        name=name,
        identity=instance.identity,
        generation=instance.generation,
        device=instance.device,
        vf_index=instance.vf_index,
        base=instance.base,
        bars=instance.bars,
        status=FunctionStatus.FUNCTION_STATUS_ACTIVE,
        attempt=instance.attempt,
        drivers=before.drivers if before is not None else (),
        model=instance.model,
        incarnation=snapshot.registrations[host].record,
    )
    places = [(instance.device, instance.vf_index)]
    writes: list[Put | Delete] = [
        Put(function_key(name), encode(function)),
        Put(slot_key(*places[0]), encode(Slot(function=name))),
    ]
    if before is not None and (before.device, before.vf_index) != places[0]:
        left = snapshot.slots.get(f"{before.device}/{before.vf_index}")
        if left is not None and left.record.function == name:
            places.append((before.device, before.vf_index))
            writes.append(Delete(slot_key(*places[1])))
    compares = [
        *view.unchanged_function(name),
        value_is(registration_key(host), function.incarnation.encode()),
        *(
            unchanged(slot_key(*place), stored.mod_revision if stored else 0)
            for place in places
            for stored in (snapshot.slots.get(f"{place[0]}/{place[1]}"),)
        ),
    ]
    for stored in view.entries_of(name):
        compares.append(unchanged(key_of(stored.record), stored.mod_revision))
        writes.append(Put(key_of(stored.record), encode(led_to(stored.record, function))))
    return Transaction(tuple(compares), tuple(writes))


def _missing(view: View, name: str, stored: Stored[Function]) -> Iterator[Finding]:
    function = stored.record
    host = host_of(function.device)
    if view.is_busy(name) or function.status != FunctionStatus.FUNCTION_STATUS_ACTIVE or host not in view.hosts:
        return
    if any(
        is_home(function, place, instance) or (instance.complete and instance.generation > function.generation)
        for place, instance in view.instances_of(name)
    ):
        return
    yield finding(
        DifferenceKind.DIFFERENCE_KIND_MISSING_INSTANCE,
        host=host,
        function=name,
        etcd=describe_home(function),
        says="no such instance",
        remedy=ASK_AGAIN if view.silent else "mark the function LOST: no host has it",
        repair=None if view.silent else _lose(view, stored),
    )


def _lose(view: View, stored: Stored[Function]) -> Transaction:
    name = stored.record.name
    entries = [
        KeyValue(key_of(entry.record), encode(entry.record), entry.create_revision, entry.mod_revision)
        for entry in view.entries_of(name)
    ]
    _, unlocked = view.unchanged_function(name)
    return lose_function(stored.record, stored.mod_revision, entries, unlocked)


def _hold(view: View, host: str, hold: Hold) -> Finding:
    stored = view.snapshot.entries_of(hold.driver).get(hold.function)
    migration = view.snapshot.migrations.get(hold.migration)
    request: UpdateTableRequest | LiftHoldRequest
    if stored is not None and migration is not None and outcome(migration.record) == Decision.DECISION_COMMITTED:
        entry = TableEntry()
        entry.CopyFrom(stored.record)
        entry.revision = stored.mod_revision
        request = UpdateTableRequest(attempt=hold.attempt, entries=[entry], lift=True)
    else:
        name = EntryName(driver=hold.driver, function=hold.function, generation=hold.generation)
        request = LiftHoldRequest(attempt=hold.attempt, entries=[name])
    return finding(
        DifferenceKind.DIFFERENCE_KIND_HOLD,
        host=host,
        function=hold.function,
        driver=hold.driver,
        migration=hold.migration,
        etcd="the migration is over",
        says="its hold is there",
        remedy="lift the hold",
        repair=Call(host, request),
    )


def _drivers(view: View, host: str) -> Iterator[Finding]:
    there = {driver.driver: driver for driver in view.hosts[host].drivers}
    for name, stored in sorted(view.snapshot.drivers.items()):
        if stored.record.host == host and name not in there:
            request = CreateDriverRequest(
                driver=name, main_memory_bytes=stored.record.main_memory_bytes, revision=view.snapshot.revision
            )
            yield finding(
                DifferenceKind.DIFFERENCE_KIND_DRIVER_UNKNOWN_TO_HOST,
                host=host,
                driver=name,
                etcd=f"a driver of host {host}",
                says="no such driver",
                remedy="make the driver",
                repair=Call(host, request),
            )
    for name, driver in sorted(there.items()):
        recorded = view.snapshot.drivers.get(name)
        attached = [entry for entry in driver.entries if entry.function]
        if recorded is None or recorded.record.host != host:
            yield finding(
                DifferenceKind.DIFFERENCE_KIND_DRIVER_UNKNOWN_TO_FLEET,
                host=host,
                driver=name,
                etcd="no such driver" if recorded is None else f"a driver of host {recorded.record.host}",
                says=f"attached to {', '.join(entry.function for entry in attached) or 'nothing'}",
                remedy="none: its entries come first" if attached else "delete the driver",
                repair=None if attached else Call(host, DeleteDriverRequest(driver=name)),
            )
        for entry in attached:
            if entry.function not in view.snapshot.entries_of(name) and not view.is_busy(entry.function):
                yield _extra(view, host, driver, entry)
        yield from _entries(view, host, driver)


def _entries(view: View, host: str, driver: DriverState) -> Iterator[Finding]:
    there = {entry.function: entry for entry in driver.entries}
    for function, stored in sorted(view.snapshot.entries_of(driver.driver).items()):
        if view.is_busy(function) or stored.record.host != host:
            continue
        own = there.get(function)
        said = TableEntry()
        said.CopyFrom(own or TableEntry())
        said.ClearField("held")
        recorded = TableEntry()
        recorded.CopyFrom(stored.record)
        recorded.revision = stored.mod_revision
        if own is not None and said == recorded:
            continue
        # Written again, it has a new revision, and so comes to its host by the watch.
        again = Transaction(
            (*view.unchanged_function(function), unchanged(key_of(stored.record), stored.mod_revision)),
            (Put(key_of(stored.record), encode(stored.record)),),
        )
        is_ahead = own is not None and own.generation > stored.record.generation
        there_is = _at_the_same_place(stored.record, driver.entries)
        repair: Transaction | Call | None
        if there_is:
            remedy, repair = f"none: detach {there_is}, or this one", None
        elif own is not None and is_ahead and not own.revision and _is_undone(view, function):
            request = UpdateTableRequest(attempt=view.attempt, entries=[recorded], goes_back=True)
            remedy, repair = "take the entry back: the move was undone", Call(host, request)
        elif is_ahead:
            remedy, repair = "none: the function's record comes first", None
        else:
            remedy, repair = "send the entry again", again
        missing, stale = DifferenceKind.DIFFERENCE_KIND_MISSING_ENTRY, DifferenceKind.DIFFERENCE_KIND_STALE_ENTRY
        yield finding(
            missing if own is None else stale,
            host=host,
            function=function,
            driver=driver.driver,
            etcd=f"{describe_entry(recorded)}, revision {recorded.revision}",
            says="no such entry" if own is None else f"{describe_entry(own)}, revision {own.revision}",
            remedy=remedy,
            repair=repair,
        )


def _is_undone(view: View, name: str) -> bool:
    """Return whether no commit stands that a backup has forgotten: every host was asked, and none has what it made.

    An abort ended that before it had run, so that the function is where its record says; or it was lost, as that says.
    """
    stored = view.snapshot.functions.get(name)
    if view.silent or stored is None:
        return False
    function, instances = stored.record, list(view.instances_of(name))
    is_known = function.status == FunctionStatus.FUNCTION_STATUS_LOST or any(
        is_home(function, host, instance) for host, instance in instances
    )
    return is_known and all(instance.generation <= function.generation for _, instance in instances)


def _extra(view: View, host: str, driver: DriverState, entry: TableEntry) -> Finding:
    """Return an entry that etcd hasn't: one that a backup forgot, and that is right, is written to etcd."""
    stored = view.snapshot.functions.get(entry.function)
    recorded = view.snapshot.drivers.get(driver.driver)
    is_known = recorded is None or recorded.record.host == host
    request = DetachFunctionRequest(
        driver=driver.driver, function=entry.function, revision=max(view.snapshot.revision, 1)
    )
    repair: Transaction | Call | None = Call(host, request)
    remedy = "take the entry out"
    if not entry.revision and stored is not None and is_known:
        right = led_to(entry, stored.record)
        same = (right.generation, right.offset) == (entry.generation, entry.offset)
        recorded_entries = (each.record for each in view.snapshot.entries_of(driver.driver).values())
        there_is = _at_the_same_place(entry, recorded_entries)
        remedy = "write the entry to etcd" if same else "none: the function's record comes first"
        if there_is:
            remedy = f"none: detach {there_is}, or this one"
        repair = _attach(view, driver, right, stored.record) if same and not there_is else None
    elif not entry.revision and (view.silent or any(view.instances_of(entry.function))):
        remedy, repair = ASK_AGAIN if view.silent else "none: the function's record comes first", None
    return finding(
        DifferenceKind.DIFFERENCE_KIND_EXTRA_ENTRY,
        host=host,
        function=entry.function,
        driver=driver.driver,
        etcd="no such entry",
        says=f"{describe_entry(entry)}, revision {entry.revision}",
        remedy=remedy,
        repair=repair,
    )


def _at_the_same_place(entry: TableEntry, others: Iterable[TableEntry]) -> str:
    """Return another function that has some of the entry's virtual addresses; empty for none."""
    end = entry.virtual_address + entry.length_bytes
    for other in others:
        is_before = other.virtual_address + other.length_bytes <= entry.virtual_address
        if other.function != entry.function and other.virtual_address < end and not is_before:
            return other.function
    return ""


def _attach(view: View, driver: DriverState, entry: TableEntry, before: Function) -> Transaction:
    function = Function()
    function.CopyFrom(before)
    function.drivers[:] = sorted({*before.drivers, driver.driver})
    recorded = view.snapshot.drivers.get(driver.driver)
    record = Driver(name=driver.driver, host=entry.host, main_memory_bytes=driver.main_memory_bytes)
    return Transaction(
        (
            *view.unchanged_function(function.name),
            unchanged(driver_key(driver.driver), recorded.mod_revision if recorded else 0),
            absent(key_of(entry)),
        ),
        (
            Put(function_key(function.name), encode(function)),
            Put(driver_key(driver.driver), encode(recorded.record if recorded else record)),
            Put(key_of(entry), encode(entry)),
        ),
    )
