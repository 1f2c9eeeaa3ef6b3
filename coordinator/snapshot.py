"""The fleet as etcd had it at one revision: every record, decoded, with the revisions that made it and last wrote it.

A snapshot is built from a listing and moved forward by changes; between two `await`s it stands still, so that whoever
reads it without waiting sees one consistent fleet. Only the inventory moves it.
"""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from google.protobuf.message import Message

from coordinator.site import Site
from coordinator.states import ENTRIES, is_over
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.records import NewerSchemaError, decode
from vfleet.etcd.store import Changes, Compare, Event, KeyValue, Listing, absent, unchanged
from vfleet.names import host_of
from vfleet.v1.migration_service_pb2 import QueuedMigration
from vfleet.v1.records_pb2 import Coordinator, Cordon, Device, Driver, Function, FunctionStatus, Host, Migration, Slot
from vfleet.v1.types_pb2 import GuestState, TableEntry

# Statuses of a function that is being made or deleted.
UNFINISHED = frozenset({FunctionStatus.FUNCTION_STATUS_CREATING, FunctionStatus.FUNCTION_STATUS_DELETING})

_log = logging.getLogger(__name__)

KeyT = TypeVar("KeyT")
RecordT = TypeVar("RecordT")
MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True, slots=True)
class Stored(Generic[RecordT]):
    """A record as it stands, with the revision that made its key and the one that last wrote it."""

    record: RecordT
    create_revision: int
    mod_revision: int


class Snapshot:
    """Every record of the fleet at `revision`. Tables are keyed by name. Only the inventory changes it."""

    def __init__(self, listing: Listing) -> None:
        self.revision = 0
        self.hosts: dict[str, Stored[Host]] = {}
        self.cordons: dict[str, Stored[Cordon]] = {}
        self.registrations: dict[str, Stored[str]] = {}
        self.coordinators: dict[str, Stored[Coordinator]] = {}
        self.functions: dict[str, Stored[Function]] = {}
        self.unfinished_functions: set[str] = set()
        self.lost_functions: set[str] = set()
        self.locks: dict[str, Stored[str]] = {}
        self.slots: dict[str, Stored[Slot]] = {}
        self.drivers: dict[str, Stored[Driver]] = {}
        self.entries: dict[str, Stored[TableEntry]] = {}
        self.migrations: dict[str, Stored[Migration]] = {}
        self.active_migrations: dict[str, Stored[Migration]] = {}
        # How many of these take functions from or to each device, and each host.
        self.active_at: Counter[str] = Counter()
        self.queue: dict[str, Stored[QueuedMigration]] = {}
        self.owners: dict[str, Stored[str]] = {}
        self.guests: dict[str, Stored[str]] = {}
        self.devices: dict[str, Device] = {}
        self.sites: dict[str, Site] = {}
        self.fleet_generations: dict[str, Stored[str]] = {}
        self._slots_by_device: dict[str, dict[int, Stored[Slot]]] = {}
        self._entries_by_driver: dict[str, dict[str, Stored[TableEntry]]] = {}
        for item in listing.items:
            self.take(Event(item.key, item.value, item.create_revision, item.mod_revision))
        self.revision = listing.revision

    def apply(self, changes: Changes) -> None:
        """Move to the revision of `changes`."""
        for event in changes.events:
            self.take(event)
        self.revision = changes.revision

    @property
    def fleet_generation(self) -> int:
        """The fleet generation, 1 if it was never raised."""
        stored = self.fleet_generations.get("")
        return int(stored.record) if stored else 1

    @property
    def fleet_generation_is_this(self) -> Compare:
        """What holds while the fleet generation is the snapshot's."""
        stored = self.fleet_generations.get("")
        return unchanged(keys.FLEET_GENERATION, stored.mod_revision) if stored else absent(keys.FLEET_GENERATION)

    def incarnation(self, host: str) -> str | None:
        """Return the incarnation under which the host is registered, or None if it isn't."""
        registration = self.registrations.get(host)
        return registration.record if registration else None

    def is_gone(self, host: str, incarnation: str) -> bool:
        """Return whether the host was started anew since `incarnation`, or forgotten: what it held is no more."""
        registration = self.registrations.get(host)
        if registration:
            return registration.record != incarnation
        record = self.hosts.get(host)
        return record is None or record.record.incarnation != incarnation

    def cordoned(self, device: str) -> str | None:
        """Return the key of a part that a device is in and that is cordoned, or None if there is none."""
        if not self.cordons:
            return None
        return next((part for part in self.sites[device].parts if part in self.cordons), None)

    def cordons_of(self, host: str) -> list[str]:
        """Return the keys of the parts of a host that are cordoned, sorted."""
        return sorted(part for part in self.cordons if host_of(part) == host)

    def slots_of(self, device: str) -> Mapping[int, Stored[Slot]]:
        """Return the slots of a device that are taken, by VF index."""
        return self._slots_by_device.get(device, {})

    def still(self) -> "Snapshot":
        """Return the fleet as it is now, to be read in another thread while this one moves on. Records are shared."""
        kept = copy.copy(self)
        for name, table in vars(self).items():
            if isinstance(table, dict | set):
                setattr(kept, name, table.copy())
        kept._slots_by_device = {name: dict(table) for name, table in self._slots_by_device.items()}  # noqa: SLF001
        kept._entries_by_driver = {name: dict(table) for name, table in self._entries_by_driver.items()}  # noqa: SLF001
        return kept

    def once_begun(self, plans: Collection[Migration]) -> "Snapshot":
        """Return what the fleet will be once `plans` have begun: these active, functions locked, slots taken.

        For reading only.
        """
        if not plans:
            return self
        later = copy.copy(self)
        later.locks, later.active_migrations = dict(self.locks), dict(self.active_migrations)
        later._slots_by_device = dict(self._slots_by_device)  # noqa: SLF001
        later.active_at = self.active_at.copy()
        for migration in plans:
            later.active_migrations[migration.name] = Stored(migration, 0, 0)
            later.active_at.update(places_of(migration))
            for move in migration.moves:
                slot = Stored(Slot(function=move.function, migration=migration.name), 0, 0)
                later.locks[move.function] = Stored(migration.name, 0, 0)
                later._slots_by_device[move.target.device] = {  # noqa: SLF001
                    **later.slots_of(move.target.device),
                    move.target.vf_index: slot,
                }
        return later

    def entries_of(self, driver: str) -> Mapping[str, Stored[TableEntry]]:
        """Return a driver's entries, by function."""
        return self._entries_by_driver.get(driver, {})

    def guest_state(self, driver: Driver) -> GuestState.ValueType:
        """Return what has become of a driver's guest, as its host says; unspecified if it has none, or doesn't say."""
        stored = self.guests.get(f"{driver.host}/{driver.name}")
        names = dict(GuestState.items())
        return names.get(stored.record if stored is not None else "", GuestState.GUEST_STATE_UNSPECIFIED)

    def take(self, event: Event) -> None:
        """Take one change over. The revision follows, with `apply`, once its other changes are taken over as well.

        What is no record at all is passed over, and the log says so. Raise NewerSchemaError.
        """
        for prefix, put in _TABLES:
            if event.key.startswith(prefix):
                try:
                    put(self, event.key.removeprefix(prefix), event)
                except NewerSchemaError:
                    raise
                except (VfleetError, ValueError) as error:
                    _log.error("%s at revision %d can't be read: %s", event.key, event.mod_revision, error)
                return

    def _set_host(self, name: str, event: Event) -> None:
        before = self.hosts.get(name)
        for device in before.record.devices if before else ():
            del self.devices[device.name], self.sites[device.name]
        _put(self.hosts, name, event, _decoder(Host))
        if event.value is not None:
            for device in self.hosts[name].record.devices:
                self.devices[device.name], self.sites[device.name] = device, Site.of(device)

    def _set_function(self, name: str, event: Event) -> None:
        self.unfinished_functions.discard(name)
        self.lost_functions.discard(name)
        _put(self.functions, name, event, _decoder(Function))
        stored = self.functions.get(name)
        if stored is not None and stored.record.status in UNFINISHED:
            self.unfinished_functions.add(name)
        elif stored is not None and stored.record.status == FunctionStatus.FUNCTION_STATUS_LOST:
            self.lost_functions.add(name)

    def _set_slot(self, name: str, event: Event) -> None:
        device, _, index = name.rpartition("/")
        _put(self.slots, name, event, _decoder(Slot))
        _put_nested(self._slots_by_device, device, int(index), self.slots.get(name))

    def _set_migration(self, name: str, event: Event) -> None:
        before = self.active_migrations.pop(name, None)
        if before is not None:
            for place in places_of(before.record):
                self.active_at[place] -= 1
                if not self.active_at[place]:
                    del self.active_at[place]
        _put(self.migrations, name, event, _migration)
        stored = self.migrations.get(name)
        if stored is not None and not is_over(stored.record.phase):
            self.active_migrations[name] = stored
            self.active_at.update(places_of(stored.record))

    def _set_entry(self, name: str, event: Event) -> None:
        _, driver, function = name.split("/")
        _put(self.entries, name, event, _decoder(TableEntry))
        _put_nested(self._entries_by_driver, driver, function, self.entries.get(name))


def devices_of(migration: Migration) -> set[str]:
    """Return the devices that a migration takes functions from or to."""
    return {place.device for move in migration.moves for place in (move.source, move.target) if place.device}


def places_of(migration: Migration) -> set[str]:
    """Return the same with the hosts that the devices are on."""
    devices = devices_of(migration)
    return devices | set(map(host_of, devices))


def _text(kv: KeyValue) -> str:
    return kv.value.decode()


def _migration(kv: KeyValue) -> Migration:
    migration = decode(Migration, kv)
    if migration.phase not in ENTRIES:
        raise VfleetError(Reason.INTERNAL, f"no migration is in phase {migration.phase} there")
    return migration


def _decoder(kind: type[MessageT]) -> Callable[[KeyValue], MessageT]:
    return lambda kv: decode(kind, kv)


def _put(table: dict[str, Stored[RecordT]], name: str, event: Event, read: Callable[[KeyValue], RecordT]) -> None:
    table.pop(name, None)
    if event.value is not None:
        kv = KeyValue(event.key, event.value, event.create_revision, event.mod_revision)
        table[name] = Stored(read(kv), event.create_revision, event.mod_revision)


def _put_nested(
    table: dict[str, dict[KeyT, Stored[RecordT]]], outer: str, inner: KeyT, stored: Stored[RecordT] | None
) -> None:
    if stored is not None:
        table.setdefault(outer, {})[inner] = stored
    elif outer in table:
        table[outer].pop(inner, None)
        if not table[outer]:
            del table[outer]


_TABLES: tuple[tuple[str, Callable[[Snapshot, str, Event], None]], ...] = (
    (keys.FLEET_GENERATION, lambda s, name, event: _put(s.fleet_generations, name, event, _text)),
    (keys.HOSTS, Snapshot._set_host),  # noqa: SLF001
    (keys.CORDONS, lambda s, name, event: _put(s.cordons, name, event, _decoder(Cordon))),
    (keys.REGISTRATIONS, lambda s, name, event: _put(s.registrations, name, event, _text)),
    (keys.COORDINATORS, lambda s, name, event: _put(s.coordinators, name, event, _decoder(Coordinator))),
    (keys.FUNCTIONS, Snapshot._set_function),  # noqa: SLF001
    (keys.LOCKS, lambda s, name, event: _put(s.locks, name, event, _text)),
    (keys.SLOTS, Snapshot._set_slot),  # noqa: SLF001
    (keys.DRIVERS, lambda s, name, event: _put(s.drivers, name, event, _decoder(Driver))),
    (keys.ENTRIES, Snapshot._set_entry),  # noqa: SLF001
    (keys.GUESTS, lambda s, name, event: _put(s.guests, name, event, _text)),
    (keys.MIGRATIONS, Snapshot._set_migration),  # noqa: SLF001
    (keys.QUEUE, lambda s, name, event: _put(s.queue, name, event, _decoder(QueuedMigration))),
    (keys.OWNERS, lambda s, name, event: _put(s.owners, name, event, _text)),
)
