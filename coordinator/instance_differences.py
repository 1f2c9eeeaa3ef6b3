"""Differences between etcd and the instances that hosts have: left over, stopped, missing, ahead of etcd. Pure.

Where etcd was restored from a backup, a host may know better: see `_is_ahead`.
"""

from collections.abc import Iterator

from coordinator.findings import (
    ASK_AGAIN,
    HOME_STATES,
    SERVING_STATES,
    Call,
    Finding,
    View,
    describe_home,
    describe_instance,
    finding,
    forgetting,
    is_home,
    key_of,
    led_to,
)
from coordinator.snapshot import Stored
from vfleet.decision import lose_function
from vfleet.etcd.keys import function_key, registration_key, slot_key
from vfleet.etcd.records import encode
from vfleet.etcd.store import Delete, KeyValue, Put, Transaction, unchanged, value_is
from vfleet.names import host_of
from vfleet.v1.fleet_service_pb2 import DifferenceKind
from vfleet.v1.function_service_pb2 import ChangeStateRequest, DestroyFunctionRequest, FunctionInstance
from vfleet.v1.records_pb2 import Function, FunctionStatus, Slot
from vfleet.v1.types_pb2 import Decision, DeviceState


def instance_findings(view: View, host: str, instance: FunctionInstance) -> Iterator[Finding]:
    """Yield what is wrong with an instance that a host has."""
    stored = view.snapshot.functions.get(instance.function)
    if stored is not None and is_home(stored.record, host, instance):
        # What was lost is said to be so; deleting it takes away what is left of it.
        is_lost = stored.record.status == FunctionStatus.FUNCTION_STATUS_LOST
        if instance.state not in SERVING_STATES and not _awaits_proof(instance) and not is_lost:
            yield _stopped(view, host, instance, stored)
        yield from _detached(view, host, instance, stored.record)
        return
    function = stored.record if stored is not None else None
    if _is_ahead(view, instance, function):
        yield _ahead(view, host, instance, function)
    elif not any(
        other.arriving and other.generation > instance.generation for _, other in view.instances_of(instance.function)
    ):
        # Else the later instance fetches from this one; when it has everything, this one is left over.
        yield _orphan(view, host, instance, function)


def _is_earlier(view: View, instance: FunctionInstance) -> bool:
    """Return whether an instance with all its state was made before the fleet generation was raised."""
    return instance.attempt.fleet_generation < view.snapshot.fleet_generation and instance.complete


def _is_ahead(view: View, instance: FunctionInstance, function: Function | None) -> bool:
    """Return whether an instance that isn't the home by etcd's word is, or may be, one that a backup has forgotten."""
    is_earlier = _is_earlier(view, instance)
    if function is None:
        return is_earlier
    is_ahead = instance.generation > function.generation and instance.complete
    at_home = any(is_home(function, place, other) for place, other in view.instances_of(instance.function))
    if function.identity != instance.identity:
        # The function was deleted and another was made under its name, which a backup may have forgotten.
        is_ahead = is_earlier and not at_home
    is_unknown = bool(view.silent) and is_earlier
    if is_ahead and instance.state not in HOME_STATES and not is_unknown and (at_home or _has_rival(view, instance)):
        # If no table leads to it, and the home has all that it has, its attempt was not committed.
        is_ahead = _is_led_to(view, instance)
    return is_ahead


def _orphan(view: View, host: str, instance: FunctionInstance, function: Function | None) -> Finding:
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
    elif function is not None and function.identity != instance.identity and _is_earlier(view, instance):
        # Both are homes: a backup had forgotten the one, and the other was made before the raise.
        remedy, repair = "none: delete the function that has its name now, and it comes back", None
    return finding(
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


def missing_instances(view: View, name: str, stored: Stored[Function]) -> Iterator[Finding]:
    """Yield it if no host has the function's home."""
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
