"""Differences within etcd: records that can't all be true, whatever the hosts say. Pure.

Only what is over, or never was, is taken away; what is under way is passed.
"""

from collections.abc import Iterator

from coordinator.findings import Finding, View, describe_entry, describe_home, finding, key_of, led_to
from coordinator.snapshot import UNFINISHED, Stored
from vfleet.address import Location, vf_routing_id
from vfleet.etcd.keys import function_key, lock_key, owner_key, slot_key
from vfleet.etcd.records import encode
from vfleet.etcd.store import Delete, Put, Transaction, unchanged
from vfleet.names import host_of
from vfleet.v1.fleet_service_pb2 import DifferenceKind
from vfleet.v1.records_pb2 import Function, FunctionStatus, Slot
from vfleet.v1.types_pb2 import TableEntry


def record_findings(view: View) -> Iterator[Finding]:
    """Yield what is wrong within etcd."""
    yield from _migrations(view)
    yield from _slots(view)
    for name in sorted(view.snapshot.functions):
        yield from _function(view, name)
    for name in sorted(view.snapshot.entries):
        yield from _entry(view, view.snapshot.entries[name])


def _migrations(view: View) -> Iterator[Finding]:
    snapshot = view.snapshot
    for function, lock in sorted(snapshot.locks.items()):
        if view.is_over(lock.record):
            yield finding(
                DifferenceKind.DIFFERENCE_KIND_LOCK_WITHOUT_MIGRATION,
                function=function,
                migration=lock.record,
                etcd="a lock whose migration is over",
                remedy="delete the lock",
                repair=Transaction(
                    (unchanged(lock_key(function), lock.mod_revision), view.unchanged_migration(lock.record)),
                    (Delete(lock_key(function)),),
                ),
            )
    for migration, owner in sorted(snapshot.owners.items()):
        if view.is_over(migration):
            yield finding(
                DifferenceKind.DIFFERENCE_KIND_OWNER_WITHOUT_MIGRATION,
                migration=migration,
                etcd=f"an owner, {owner.record}, of a migration that is over",
                remedy="delete the owner key",
                repair=Transaction(
                    (unchanged(owner_key(migration), owner.mod_revision), view.unchanged_migration(migration)),
                    (Delete(owner_key(migration)),),
                ),
            )
    for migration in sorted(snapshot.active_migrations.keys() - snapshot.owners.keys()):
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_MIGRATION_WITHOUT_OWNER,
            migration=migration,
            etcd="not over, and nobody owns it",
            remedy="none is needed while a coordinator runs: it adopts the migration",
        )


def _slots(view: View) -> Iterator[Finding]:
    for name, stored in sorted(view.snapshot.slots.items()):
        slot, function = stored.record, view.snapshot.functions.get(stored.record.function)
        is_home = function is not None and f"{function.record.device}/{function.record.vf_index}" == name
        device, _, index = name.rpartition("/")
        key = slot_key(device, int(index))
        compares = (
            unchanged(key, stored.mod_revision),
            *view.unchanged_function(slot.function),
            *((view.unchanged_migration(slot.migration),) if slot.migration else ()),
        )
        if slot.migration and view.is_over(slot.migration):
            home = Put(key, encode(Slot(function=slot.function)))
            yield finding(
                DifferenceKind.DIFFERENCE_KIND_RESERVED_SLOT,
                function=slot.function,
                migration=slot.migration,
                etcd=f"slot {name} is reserved by a migration that is over",
                remedy="make it the home's" if is_home else "free the slot",
                repair=Transaction(compares, (home if is_home else Delete(key),)),
            )
        elif not slot.migration and not is_home and not view.is_busy(slot.function):
            yield finding(
                DifferenceKind.DIFFERENCE_KIND_SLOT_WITHOUT_FUNCTION,
                function=slot.function,
                etcd=f"slot {name} is taken; the function: {describe_home(function.record if function else None)}",
                remedy="free the slot",
                repair=Transaction(compares, (Delete(key),)),
            )


def _function(view: View, name: str) -> Iterator[Finding]:
    stored = view.snapshot.functions[name]
    function = stored.record
    if function.status == FunctionStatus.FUNCTION_STATUS_LOST:
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_LOST_FUNCTION,
            function=name,
            host=host_of(function.device),
            etcd=describe_home(function),
            remedy="none: its state is gone; detach its drivers and delete it",
        )
    if function.status in UNFINISHED:
        # One that is merely under way changes, or is done, before the last of several looks.
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_UNFINISHED_FUNCTION,
            function=name,
            host=host_of(function.device),
            etcd=f"{describe_home(function)}, since revision {stored.mod_revision}",
            remedy="none is needed while a coordinator runs: it goes on trying, and its log says what fails",
        )
    if view.is_busy(name):
        return
    key = slot_key(function.device, function.vf_index)
    slot = view.snapshot.slots.get(f"{function.device}/{function.vf_index}")
    if slot is None or slot.record.function != name:
        taker = slot.record.function if slot is not None else ""
        put = Put(key, encode(Slot(function=name)))
        repair = Transaction((*view.unchanged_function(name), unchanged(key, 0)), (put,)) if not taker else None
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_FUNCTION_WITHOUT_SLOT,
            function=name,
            etcd=f"{describe_home(function)}; its slot is {'that of ' + taker if taker else 'free'}",
            remedy="none: one of the two must be deleted" if taker else "take the slot",
            repair=repair,
        )
    yield from _base(view, function)
    for driver in function.drivers:
        if name not in view.snapshot.entries_of(driver):
            yield _attached_without_entry(view, stored, driver)


def _base(view: View, function: Function) -> Iterator[Finding]:
    device = view.snapshot.devices.get(function.device)
    if device is None:
        return
    rid = vf_routing_id(device.routing_id, device.first_vf_offset, device.vf_stride, function.vf_index)
    base = Location(view.snapshot.hosts[device.host].record.segment, rid).base
    if base != function.base:
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_WRONG_BASE,
            function=function.name,
            etcd=f"base {function.base:#018x}; its place is at {base:#018x}",
            remedy=f"none: has the topology of host {device.host} changed? Undo that",
        )


def _attached_without_entry(view: View, stored: Stored[Function], driver: str) -> Finding:
    function = Function()
    function.CopyFrom(stored.record)
    function.drivers.remove(driver)
    return finding(
        DifferenceKind.DIFFERENCE_KIND_WRONG_ATTACHMENT,
        function=function.name,
        driver=driver,
        etcd="the function lists the driver; there is no entry",
        remedy="take the driver off the function's list",
        repair=Transaction(
            view.unchanged_function(function.name), (Put(function_key(function.name), encode(function)),)
        ),
    )


def _entry(view: View, stored: Stored[TableEntry]) -> Iterator[Finding]:
    entry = stored.record
    if view.is_busy(entry.function):
        return
    function = view.snapshot.functions.get(entry.function)
    compares = (*view.unchanged_function(entry.function), unchanged(key_of(entry), stored.mod_revision))
    if function is None:
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_WRONG_ATTACHMENT,
            function=entry.function,
            driver=entry.driver,
            etcd="an entry for a function that isn't there",
            remedy="delete the entry",
            repair=Transaction(compares, (Delete(key_of(entry)),)),
        )
        return
    if entry.driver not in function.record.drivers:
        listed = Function()
        listed.CopyFrom(function.record)
        listed.drivers[:] = sorted((*function.record.drivers, entry.driver))
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_WRONG_ATTACHMENT,
            function=entry.function,
            driver=entry.driver,
            etcd="an entry of a driver that the function doesn't list",
            remedy="put the driver on the function's list",
            repair=Transaction(compares, (Put(function_key(entry.function), encode(listed)),)),
        )
    right = led_to(entry, function.record)
    if right != entry:
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_WRONG_OFFSET,
            function=entry.function,
            driver=entry.driver,
            etcd=f"{describe_entry(entry)}; by the function's record it is {describe_entry(right)}",
            remedy="write the entry as the function's record says",
            repair=Transaction(compares, (Put(key_of(entry), encode(right)),)),
        )
