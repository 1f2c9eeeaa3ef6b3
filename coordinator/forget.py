"""Taking a host that never comes back out of the fleet: its functions are LOST, its drivers go, then its records.

Every step compares that the host isn't registered, so a host that comes back meanwhile stays. Whatever a migration was
to tell it counts as told from then on, so that migrations which wait for it end. Repeating goes on where it stopped.

Its witness stays. Only the host writes it, and a host that misses it takes etcd for one that has forgotten; but this
one, if it does come back, is to believe that it was forgotten on purpose. Instances and drivers that it still has then
are for `doctor` to name.
"""

import logging

from coordinator.context import Context
from coordinator.findings import forgetting
from coordinator.snapshot import Snapshot
from coordinator.transaction import hosts_of
from vfleet.decision import lose_function
from vfleet.errors import Reason, VfleetError, not_found
from vfleet.etcd.keys import (
    PREFIX,
    cordon_key,
    driver_key,
    entry_key,
    function_key,
    guest_key,
    host_key,
    registration_key,
    segment_key,
)
from vfleet.etcd.records import encode
from vfleet.etcd.store import Delete, KeyValue, Put, Transaction, absent, unchanged, value_is
from vfleet.names import host_of
from vfleet.v1.fleet_service_pb2 import ForgetHostResponse
from vfleet.v1.records_pb2 import Function, FunctionStatus
from vfleet.v1.types_pb2 import Attempt

_log = logging.getLogger(__name__)

TRIES = 16  # in a row, of a step that the fleet changes under

# What needs nothing of its home any more.
_WITHOUT_HOME = frozenset({FunctionStatus.FUNCTION_STATUS_LOST, FunctionStatus.FUNCTION_STATUS_DELETING})


async def forget_host(context: Context, host: str, *, force: bool) -> ForgetHostResponse:
    """Forget a host. Return what it took with it.

    Raise NOT_FOUND, ILLEGAL_STATE if it is registered, IN_USE unless forced if something is there, CONFLICT if the
    fleet changes faster than can be followed.
    """
    lost: list[str] = []
    deleted: list[str] = []
    tries = TRIES
    while tries:
        snapshot = Snapshot(await context.store.list(PREFIX))
        _check(snapshot, host, force=force)
        functions = [
            name
            for name, stored in sorted(snapshot.functions.items())
            if host_of(stored.record.device) == host and stored.record.status not in _WITHOUT_HOME
        ]
        drivers = [name for name, stored in sorted(snapshot.drivers.items()) if stored.record.host == host]
        if functions:
            step = _lose(snapshot, host, functions[0])
        elif drivers:
            step = _delete_driver(snapshot, host, drivers[0])
        else:
            step = _delete_records(snapshot, host)
        committed = await context.store.commit(step)
        if not committed.succeeded:
            tries -= 1
            continue
        tries = TRIES
        if drivers and not functions:
            await _let_forget(context, snapshot, drivers[0], committed.revision)
        if functions:
            lost.append(functions[0])
        elif not drivers:
            await context.inventory.wait_for(committed.revision)
            return ForgetHostResponse(lost_functions=lost, deleted_drivers=deleted)
        elif not snapshot.entries_of(drivers[0]):
            deleted.append(drivers[0])
    raise VfleetError(Reason.CONFLICT, f"the fleet changed {TRIES} times meanwhile; try again")


async def _let_forget(context: Context, snapshot: Snapshot, driver: str, revision: int) -> None:
    """Let the function forget the driver that was detached from it at a revision: the driver's host can't say so."""
    for name in sorted(snapshot.entries_of(driver))[:1]:
        stored = snapshot.functions.get(name)
        if stored is None:
            return
        as_of = Attempt(fleet_generation=snapshot.fleet_generation, revision=revision)
        try:
            request = forgetting(driver, name, stored.record.generation, as_of)
            await context.hosts.forget_driver(host_of(stored.record.device), request)
        except VfleetError as error:
            _log.warning(
                "function %s still knows driver %s, as doctor will say: %s",
                name,
                driver,
                error,
                extra={"function": name, "driver": driver},
            )


def _check(snapshot: Snapshot, host: str, *, force: bool) -> None:
    if host not in snapshot.hosts:
        raise not_found("host", host)
    if host in snapshot.registrations:
        message = f"host {host!r} is registered; expected one that is down"
        raise VfleetError(Reason.ILLEGAL_STATE, message, metadata={"host": host})
    there = [
        *(f"function {name}" for name, s in sorted(snapshot.functions.items()) if host_of(s.record.device) == host),
        *(f"driver {name}" for name, s in sorted(snapshot.drivers.items()) if s.record.host == host),
        *(
            f"migration {name}"
            for name, s in sorted(snapshot.active_migrations.items())
            if host in hosts_of(s.record.moves)
        ),
    ]
    if there and not force:
        message = f"host {host!r} has {', '.join(there)}; forcing it, functions become LOST and drivers go"
        raise VfleetError(Reason.IN_USE, message, metadata={"host": host})


def _lose(snapshot: Snapshot, host: str, name: str) -> Transaction:
    stored = snapshot.functions[name]
    entries = [
        KeyValue(
            entry_key(entry.record.host, entry.record.driver, name),
            encode(entry.record),
            entry.create_revision,
            entry.mod_revision,
        )
        for entry in snapshot.entries.values()
        if entry.record.function == name
    ]
    return lose_function(stored.record, stored.mod_revision, entries, absent(registration_key(host)))


def _delete_driver(snapshot: Snapshot, host: str, name: str) -> Transaction:
    """Return the end of one of the driver's attachments, or, without any, its own."""
    away = absent(registration_key(host))
    for function_name, entry in sorted(snapshot.entries_of(name).items()):
        stored = snapshot.functions.get(function_name)
        key = entry_key(host, name, function_name)
        compares = (
            away,
            unchanged(key, entry.mod_revision),
            unchanged(function_key(function_name), stored.mod_revision if stored else 0),
        )
        writes: tuple[Put | Delete, ...] = (Delete(key),)
        if stored is not None:
            function = Function()
            function.CopyFrom(stored.record)
            function.drivers[:] = [driver for driver in function.drivers if driver != name]
            writes = (Delete(key), Put(function_key(function_name), encode(function)))
        return Transaction(compares, writes)
    return Transaction(
        (away, unchanged(driver_key(name), snapshot.drivers[name].mod_revision)),
        (Delete(driver_key(name)), Delete(guest_key(host, name))),
    )


def _delete_records(snapshot: Snapshot, host: str) -> Transaction:
    stored = snapshot.hosts[host]
    segment = segment_key(stored.record.segment)
    compares = (
        absent(registration_key(host)),
        unchanged(host_key(host), stored.mod_revision),
        value_is(segment, host.encode()),
    )
    cordons = (Delete(cordon_key(part)) for part in snapshot.cordons_of(host))
    return Transaction(compares, (Delete(host_key(host)), Delete(segment), *cordons))
