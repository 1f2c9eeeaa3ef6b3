"""Differences between etcd and the drivers that a host has, with the entries of their tables. Pure."""

from collections.abc import Iterable, Iterator

from coordinator.findings import ASK_AGAIN, Call, Finding, View, describe_entry, finding, is_home, key_of, led_to
from vfleet.etcd.keys import driver_key, function_key
from vfleet.etcd.records import encode
from vfleet.etcd.store import Put, Transaction, absent, unchanged
from vfleet.v1.driver_service_pb2 import CreateDriverRequest, DeleteDriverRequest, DetachFunctionRequest, DriverState
from vfleet.v1.fleet_service_pb2 import DifferenceKind
from vfleet.v1.records_pb2 import Driver, Function, FunctionStatus
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.types_pb2 import TableEntry


def table_findings(view: View, host: str) -> Iterator[Finding]:
    """Yield what is wrong with the drivers of a host and their tables."""
    there = {driver.driver: driver for driver in view.hosts[host].drivers}
    for name, stored in sorted(view.snapshot.drivers.items()):
        if stored.record.host == host and name not in there:
            request = CreateDriverRequest(
                driver=name,
                main_memory_bytes=stored.record.main_memory_bytes,
                revision=view.snapshot.revision,
                guest=stored.record.guest if stored.record.HasField("guest") else None,
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
    record = Driver(
        name=driver.driver,
        host=entry.host,
        main_memory_bytes=driver.main_memory_bytes,
        guest=driver.guest if driver.HasField("guest") else None,
    )
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
