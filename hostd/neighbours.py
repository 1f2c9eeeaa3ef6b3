"""What other hosts may do here, where certificates say who they are: each speaks for itself alone.

| who calls | may |
| --- | --- |
| the host of a driver that is attached to the function | access it, ask for its sequence, let it forget the driver |
| the function's home, by the driver's own table | write to and read from the driver's memory |
| the sender's home, by its record | deliver frames |
| the target of the migration that has the function's lock, in that attempt | pull its state |

Where the caller is known to be another's, it is told so (PERMISSION_DENIED). Where this host may just not have heard
yet, the call is answered as one that comes too early, which an honest host repeats. In plaintext everybody is trusted.
"""

import logging

from hostd.directory import Directory
from hostd.drivers import Drivers
from hostd.reach import segment_of
from hostd.stations import Stations
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import ENTRIES, lock_key, migration_key
from vfleet.etcd.records import decode
from vfleet.etcd.store import Listing, Store
from vfleet.names import host_of
from vfleet.principal import CALLER, Principal
from vfleet.roles import Role
from vfleet.v1.fabric_service_pb2 import ExchangeDmaRequest
from vfleet.v1.records_pb2 import Migration
from vfleet.v1.types_pb2 import Attempt

MAX_TARGETS = 1024  # of migrations, remembered

_log = logging.getLogger(__name__)


class Neighbours:
    """The other hosts, as this one knows them. `follow` keeps it true; until then nobody's driver is attached."""

    def __init__(self, directory: Directory, stations: Stations, drivers: Drivers, store: Store) -> None:
        self._directory = directory
        self._stations = stations
        self._drivers = drivers
        self._store = store
        # The host of each driver that is attached to a function, by driver and function.
        self._attached: dict[tuple[str, str], str] = {}
        # The targets of migrations: by function and attempt, which never has another.
        self._targets: dict[tuple[str, int, int], str] = {}

    async def follow(self) -> None:
        """Know which drivers are attached to what, for ever."""
        async for update in self._store.watch(ENTRIES):
            if isinstance(update, Listing):
                self._attached = dict(_attachment(item.key) for item in update.items)
                continue
            for event in update.events:
                attachment, host = _attachment(event.key)
                if event.value is not None:
                    self._attached[attachment] = host
                elif self._attached.get(attachment) == host:
                    del self._attached[attachment]

    def may_access(self, driver: str, function: str) -> bool:
        """Return whether the caller is the host of a driver that is attached. Raise PERMISSION_DENIED for another's."""
        caller = CALLER.get()
        if caller is None:
            return True
        host = self._attached.get((driver, function))
        if host is not None and host != caller.name:
            raise _denied(caller, f"driver {driver!r} is on host {host!r}")
        return host is not None

    def check_forgets(self, driver: str, function: str) -> None:
        """Raise PERMISSION_DENIED if the driver is attached, and on another host than the caller."""
        caller = CALLER.get()
        if caller is not None and caller.role is Role.HOST:
            self.may_access(driver, function)

    def check_masters(self, request: ExchangeDmaRequest) -> None:
        """Raise PERMISSION_DENIED if the caller isn't the function's home at the generation that the request names."""
        caller = CALLER.get()
        driver = self._drivers.find(request.driver) if caller is not None else None
        entry = driver.table.by_function.get(request.function) if driver is not None else None
        if caller is None or entry is None or entry.generation != request.generation:
            return
        home = self._directory.peer(segment_of(entry))
        if home is None or home.host != caller.name:
            raise _denied(caller, f"it is not the home of function {request.function!r}")

    def may_deliver(self, sender: int) -> bool:
        """Return whether the caller is the home of the function that frames are from, as far as this host knows."""
        caller = CALLER.get()
        if caller is None:
            return True
        station = self._stations.find(sender)
        return station is not None and host_of(station.device) == caller.name

    async def check_pulls(self, function: str, attempt: Attempt) -> None:
        """Raise PERMISSION_DENIED if the caller isn't the target of the attempt, or what the store raises."""
        caller = CALLER.get()
        if caller is None:
            return
        key = (function, attempt.fleet_generation, attempt.revision)
        target = self._targets.get(key)
        if target is None:
            target = await self._read_target(function, attempt)
            if target is None:
                raise _denied(caller, f"no migration under way moves function {function!r} in this attempt")
            if len(self._targets) >= MAX_TARGETS:
                self._targets.clear()
            self._targets[key] = target
        if target != caller.name:
            raise _denied(caller, f"function {function!r} moves to host {target!r}")

    async def _read_target(self, function: str, attempt: Attempt) -> str | None:
        lock = await self._store.get(lock_key(function))
        stored = await self._store.get(migration_key(lock.value.decode())) if lock is not None else None
        # The attempt is named by the revision of BEGIN, which made the record.
        if stored is None or stored.create_revision != attempt.revision:
            return None
        moves = decode(Migration, stored).moves
        return next((move.target.host for move in moves if move.function == function), None)


def _attachment(key: str) -> tuple[tuple[str, str], str]:
    host, driver, function = key.removeprefix(ENTRIES).split("/")
    return (driver, function), host


def _denied(caller: Principal, why: str) -> VfleetError:
    message = f"refused to {caller}: {why}"
    _log.warning("%s", message)
    return VfleetError(Reason.PERMISSION_DENIED, message, metadata={"role": caller.role, "name": caller.name})
