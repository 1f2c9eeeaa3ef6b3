"""The drivers of this host: made, attached, held and lifted; their entries follow etcd. Durable.

An entry is either held or equal to what etcd says (invariant 2). It comes by three ways, of which the first to arrive
wins: a coordinator's call, the watch on this host's entries, and the resolution of a hold past its deadline. What is
older than what is there, by the revision of the entry's key, changes nothing.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from hostd.dma_receiver import Receivers, file_of
from hostd.driver import Driver
from hostd.entry_order import taken_over
from hostd.fence import Fences
from hostd.function_checks import check_deadline
from hostd.holds import EntryId, Holds, ledger_key
from hostd.ledger import Ledger
from hostd.main_memory import MainMemory
from hostd.reach import Reach
from hostd.translation import Entry, TranslationTable
from vfleet import failpoint
from vfleet.address import Location
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError, invalid_field, not_found
from vfleet.names import check_name
from vfleet.v1.driver_service_pb2 import (
    NOTIFICATION_KIND_ATTACHED,
    NOTIFICATION_KIND_DETACHED,
    NOTIFICATION_KIND_HELD,
    NOTIFICATION_KIND_LIFTED,
    NOTIFICATION_KIND_LOST,
    DriverState,
    NotificationKind,
    WatchNotificationsResponse,
)
from vfleet.v1.hold_service_pb2 import EntryName, Hold, LiftHoldRequest, PlaceHoldRequest
from vfleet.v1.host_records_pb2 import DriverRecord
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.types_pb2 import Attempt, Guest, TableEntry

MAX_ENTRIES_A_REQUEST = 128

_DRIVER = "driver"
_ENTRY = "entry"

_log = logging.getLogger(__name__)


class Drivers:
    """All drivers of the host.

    `deadlines` are those of its holds; `attachments_changed` is set when one is attached or detached.
    """

    def __init__(
        self,
        host: str,
        memory_place: Location,
        ledger: Ledger,
        fences: Fences,
        clock: Clock,
        reach: Reach,
        receivers: Receivers,
    ) -> None:
        self._host = host
        self._main_memory = MainMemory(host, memory_place, ledger)
        self._ledger = ledger
        self._fences = fences
        self._clock = clock
        self._reach = reach
        self._receivers = receivers
        self._holds = Holds(ledger, clock)
        self.deadlines = self._holds.deadlines
        self.attachments_changed = asyncio.Event()
        self._followed_revision = 0
        self._detached: dict[EntryId, int] = {}  # by calls ahead of the watch, which may tell of the attachment still
        entries: dict[str, list[Entry]] = defaultdict(list)
        for message in ledger.all(_ENTRY, TableEntry):
            held = self._holds.find((message.driver, message.function)) is not None
            entries[message.driver].append(replace(Entry.from_proto(message), held=held))
        self._drivers = {
            record.driver: self._open(record, entries[record.driver]) for record in ledger.all(_DRIVER, DriverRecord)
        }

    def files(self) -> set[str]:
        """Return the names of the mapped files that drivers use."""
        memories = {driver.record.file for driver in self._drivers.values() if driver.record.file}
        return memories | {file_of(driver.name, function) for driver in self.all() for function in driver.receivers}

    def all(self) -> list[Driver]:
        """Return the drivers, by name."""
        return [self._drivers[name] for name in sorted(self._drivers)]

    def find(self, name: str) -> Driver | None:
        """Return a driver, or None."""
        return self._drivers.get(name)

    def require(self, name: str) -> Driver:
        """Return a driver. Raise NOT_FOUND."""
        found = self._drivers.get(name)
        if found is None:
            raise not_found("driver", check_name("driver", name))
        return found

    def state(self, driver: Driver) -> DriverState:
        """Return a driver as the contract shows it."""
        return driver.state(self._main_memory.base(driver.record))

    def create(self, name: str, main_memory_bytes: int, revision: int, guest: Guest | None = None) -> Driver:
        """Make a driver whose record was made at `revision`.

        Raise ALREADY_EXISTS if it has other main memory, LIMIT_EXCEEDED if there is none left, CONFLICT if it must have
        been deleted since: a record comes with an entry, and the watch on entries has been past the revision.
        """
        check_name("driver", name)
        if name not in self._drivers and revision <= self._followed_revision:
            raise VfleetError(Reason.CONFLICT, f"driver {name!r} was deleted since", metadata={"driver": name})
        return self.recorded(name, main_memory_bytes, guest)

    def recorded(self, name: str, main_memory_bytes: int, guest: Guest | None = None) -> Driver:
        """Make a driver that etcd has, as has just been read there. Raise as `create` does."""
        if (known := self._drivers.get(name)) is not None:
            if known.record.main_memory_bytes != main_memory_bytes:
                raise VfleetError(
                    Reason.ALREADY_EXISTS,
                    f"driver {name!r} has {known.record.main_memory_bytes} bytes of main memory; expected the same",
                    metadata={"driver": name},
                )
            return known
        others = [driver.record for driver in self._drivers.values()]
        record = self._main_memory.allot(name, main_memory_bytes, others, guest)
        driver = self._open(record, ())
        self._ledger.put(_DRIVER, name, record)
        self._drivers[name] = driver
        return driver

    def delete(self, name: str) -> None:
        """End a driver. Raise IN_USE while it is attached to a function."""
        if (driver := self._drivers.get(check_name("driver", name))) is None:
            return
        attached = sorted(function for function in driver.table.by_function if function)
        if attached:
            raise VfleetError(
                Reason.IN_USE,
                f"driver {name!r} is attached to function {attached[0]!r}; detach it first",
                metadata={"driver": name, "function": attached[0]},
            )
        del self._drivers[name]
        driver.close()
        self._ledger.delete(_DRIVER, name)
        if driver.record.file:
            self._ledger.delete_file(driver.record.file)

    def attach(self, message: TableEntry) -> None:
        """Put an entry that etcd has into its driver's table. One that the watch is past already comes too late."""
        entry = self._checked(message, "entry")
        driver = self.require(entry.driver)
        if entry.function in driver.table.by_function or entry.revision > self._followed_revision:
            self._put_entries([entry])

    def detach(self, name: str, function: str, revision: int) -> Entry | None:
        """Take an entry out that etcd deleted at `revision`, and return it; a later entry stays."""
        identifier = check_name("driver", name), check_name("function", function)
        if revision > self._followed_revision:
            self._detached[identifier] = max(revision, self._detached.get(identifier, 0))
        driver, entry = self._drivers.get(name), self._find(identifier)
        if driver is None or entry is None or entry.revision > revision:
            return None
        with self._durably():
            self._ledger.delete(_ENTRY, ledger_key(identifier))
            self._holds.forget([identifier])
        driver.swap(driver.table.without([function]))
        self.attachments_changed.set()
        driver.notify(WatchNotificationsResponse(kind=NOTIFICATION_KIND_DETACHED, function=function))
        return entry

    async def place_hold(self, request: PlaceHoldRequest) -> list[str]:
        """Hold entries (PlaceHold in the contract). Return the drivers that listen and did not acknowledge in time."""
        check_name("migration", request.migration)
        check_deadline(request.resolve_after_ms)
        entries = list(self._checked_names(request.entries))
        for entry in entries:
            self._fences.prepare(entry.function, request.attempt)
        failpoint.reach("hostd.hold.before")
        resolve_time = self._clock.time() + request.resolve_after_ms / 1000
        holds = [
            Hold(
                attempt=request.attempt,
                migration=request.migration,
                driver=entry.driver,
                function=entry.function,
                generation=entry.generation,
                resolve_time=resolve_time,
            )
            for entry in entries
        ]
        self._replace([replace(entry, held=True) for entry in entries], placed=holds)
        self.deadlines.note(resolve_time)
        failpoint.reach("hostd.hold.after")
        return await self._told(entries, request.attempt, request.acknowledge_timeout_ms / 1000)

    def acknowledge(self, driver: str, function: str, attempt: Attempt) -> None:
        """Note that a driver knows of a hold. Raise NOT_FOUND for a driver that isn't here."""
        self.require(driver)
        self._holds.acknowledge((driver, function), attempt)

    def lift(self, request: LiftHoldRequest) -> None:
        """End this attempt's holds; offsets stay as they are (LiftHold in the contract)."""
        _check_count("entries", len(request.entries))
        for name in request.entries:
            self._fences.conclude(name.function, request.attempt)
        names = [(name.driver, name.function) for name in request.entries]
        holds = [hold for name in names if (hold := self._holds.find(name)) is not None]
        with failpoint.around("hostd.lift"):
            self._forget_and_replace([(h.driver, h.function) for h in holds if h.attempt == request.attempt])

    def update(self, request: UpdateTableRequest, fleet_generation: int = 0) -> None:
        """Make entries equal to what etcd says, and lift if asked to (UpdateTable in the contract).

        `fleet_generation` is the present one: only then entries go back.
        """
        _check_count("entries", len(request.entries))
        entries = [self._checked(message, f"entries[{index}]") for index, message in enumerate(request.entries)]
        for entry in entries:
            self._fences.conclude(entry.function, request.attempt)
        # An entry that isn't here was detached since, or comes by the watch: a late call must not bring it back.
        known = [entry for entry in entries if self._find(_id(entry)) is not None]
        goes_back = request.goes_back and request.attempt.fleet_generation == fleet_generation
        with failpoint.around("hostd.update"):
            self._put_entries(known, keep_held=not request.lift, goes_back=goes_back)

    def follow(self, entries: Sequence[TableEntry], revision: int, *, complete: bool) -> None:
        """Take over what the watch tells: entries as they stand in etcd at `revision`.

        If `complete`, they are all that there are, and others of no later revision go; not those of before the fleet
        generation was raised, which a backup may have forgotten.
        """
        by_driver: dict[str, list[Entry]] = defaultdict(list)
        for entry in (self._checked(message, "entry") for message in entries):
            by_driver[entry.driver].append(entry)
        for own in by_driver.values():
            self._put_what_fits(own)
        self._followed_revision = max(self._followed_revision, revision)
        self._detached = {identifier: at for identifier, at in self._detached.items() if at > self._followed_revision}
        if complete:
            there = {(message.driver, message.function) for message in entries}
            for entry in [entry for driver in self.all() for entry in driver.table.entries if entry.function]:
                if _id(entry) not in there and entry.revision:
                    self.detach(entry.driver, entry.function, revision)

    def forget_revisions(self) -> None:
        """Take every revision of etcd for 0, since a raised fleet generation begins a new order of them.

        What etcd says from now on is newer than all that is here; only an entry's generation doesn't go back by that.
        """
        self._followed_revision = 0
        self._detached.clear()
        with self._ledger.together():
            for driver in self.all():
                entries = [replace(entry, revision=0) for entry in driver.table.entries]
                for entry in (entry for entry in entries if entry.function):
                    self._ledger.put(_ENTRY, ledger_key(_id(entry)), entry.to_proto())
                driver.swap(TranslationTable(entries))

    def resolve_holds(self, migration: str, entries: Iterable[TableEntry]) -> None:
        """End a decided migration's holds, all at once, by what etcd says of their entries at one revision.

        A held entry that is gone there is left to the watch, which says since when. Other entries change nothing.
        """
        held = {(hold.driver, hold.function) for hold in self.holds(migration)}
        known = (entry for entry in entries if (entry.driver, entry.function) in held)
        newer, _ = self._newer([self._checked(entry, "entry") for entry in known])
        self._forget_and_replace(sorted(held), [replace(entry, held=False) for entry in newer])

    def postpone(self, migration: str, resolve_time: float) -> None:
        """Give a migration's holds another deadline, in seconds since 1970."""
        self._holds.postpone(migration, resolve_time)

    def holds(self, migration: str | None = None) -> list[Hold]:
        """Return all holds, or those of a migration, by driver and function."""
        return self._holds.of(migration)

    def on_lifted(self, told: Callable[[float], None]) -> None:
        """Let `told` know how long each hold lasted, in seconds, when it ends."""
        self._holds.on_lifted = told

    def oldest_hold_age_s(self) -> float:
        """Return for how long the oldest hold has lasted, in seconds; 0 if there is none."""
        return self._holds.oldest_age_s()

    def close(self) -> None:
        """End all drivers' queues."""
        for driver in self._drivers.values():
            driver.close()

    def _open(self, record: DriverRecord, entries: Iterable[Entry]) -> Driver:
        opened = self._main_memory.open(record)
        if opened is None:
            return Driver(record, None, entries, self._reach, self._receivers)
        memory, own = opened
        return Driver(record, memory, (own, *entries), self._reach, self._receivers)

    def _find(self, identifier: EntryId) -> Entry | None:
        driver = self._drivers.get(identifier[0])
        return driver.table.by_function.get(identifier[1]) if driver is not None else None

    def _checked(self, message: TableEntry, field: str) -> Entry:
        check_name(f"{field}.driver", message.driver)
        check_name(f"{field}.function", message.function)
        if message.host != self._host:
            raise invalid_field(f"{field}.host", message.host, f"this host, {self._host!r}")
        if message.revision < 1:
            raise invalid_field(f"{field}.revision", message.revision, "the revision that wrote the entry's key")
        return Entry.from_proto(message)

    def _checked_names(self, names: Sequence[EntryName]) -> Iterator[Entry]:
        _check_count("entries", len(names))
        for index, name in enumerate(names):
            driver = self.require(name.driver)
            entry = driver.table.by_function.get(check_name(f"entries[{index}].function", name.function))
            about = {"driver": name.driver, "function": name.function}
            if entry is None:
                why = f"driver {name.driver!r} is not attached to function {name.function!r}"
                raise VfleetError(Reason.NOT_FOUND, why, metadata=about)
            if entry.generation != name.generation:
                raise VfleetError(
                    Reason.WRONG_GENERATION,
                    f"driver {name.driver!r} has function {name.function!r} at generation {entry.generation};"
                    f" the request names {name.generation}",
                    metadata={**about, "generation": str(entry.generation)},
                )
            yield entry

    def _put_entries(self, entries: Iterable[Entry], *, keep_held: bool = False, goes_back: bool = False) -> None:
        """Take over entries of etcd that are newer than what is here; a hold that their move ended is lifted."""
        newer, lifted = self._newer(entries, keep_held=keep_held, goes_back=goes_back)
        self._forget_and_replace(lifted, newer)

    def _put_what_fits(self, entries: Sequence[Entry]) -> None:
        """Take over one driver's entries, all at once unless one lies where another is that a backup has forgotten."""
        try:
            self._put_entries(entries)
        except VfleetError as error:
            if len(entries) > 1:
                for entry in entries:
                    self._put_what_fits([entry])
            else:
                driver, function = _id(entries[0])
                about = {"driver": driver, "function": function}
                _log.error("the entry of driver %s for function %s waits: %s", driver, function, error, extra=about)

    def _newer(
        self, entries: Iterable[Entry], *, keep_held: bool = False, goes_back: bool = False
    ) -> tuple[list[Entry], list[EntryId]]:
        """Return which entries are newer than what is here, held or not, and which holds their move has ended."""
        newer: list[Entry] = []
        lifted: list[EntryId] = []
        for entry in entries:
            if entry.driver not in self._drivers or entry.revision <= self._detached.get(_id(entry), 0):
                continue
            own, hold = self._find(_id(entry)), self._holds.find(_id(entry))
            taken, is_lifted = taken_over(entry, own, hold, keep_held=keep_held, goes_back=goes_back)
            if taken is not None:
                newer.append(taken)
            if is_lifted:
                lifted.append(_id(entry))
        return newer, lifted

    def _forget_and_replace(self, lifted: Sequence[EntryId], newer: Sequence[Entry] = ()) -> None:
        if not lifted and not newer:
            return
        named = {_id(entry) for entry in newer}
        own = (self._find(identifier) for identifier in lifted if identifier not in named)
        unheld = [replace(entry, held=False) for entry in own if entry is not None]
        holds = [hold for identifier in lifted if (hold := self._holds.find(identifier)) is not None]
        attached = [entry for entry in newer if self._find(_id(entry)) is None]
        lost = [entry for entry in newer if entry.lost and not getattr(self._find(_id(entry)), "lost", False)]
        self._replace([*newer, *unheld], lifted)
        for hold in holds:
            self._notify(hold.driver, hold.function, NOTIFICATION_KIND_LIFTED, hold.attempt)
        if attached:
            self.attachments_changed.set()
        for entry in attached:
            self._notify(entry.driver, entry.function, NOTIFICATION_KIND_ATTACHED, None)
        for entry in lost:
            self._notify(entry.driver, entry.function, NOTIFICATION_KIND_LOST, None)

    def _replace(self, entries: Sequence[Entry], lifted: Sequence[EntryId] = (), placed: Sequence[Hold] = ()) -> None:
        """Make entries durable, with the end of the holds `lifted` and those `placed`; swap them in, once a driver."""
        by_driver: dict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            by_driver[entry.driver].append(entry)
        # Built first: entries that can't be together raise before anything is durable.
        tables = {name: self._drivers[name].table.with_entries(own) for name, own in by_driver.items()}
        with self._durably():
            self._holds.forget(lifted)
            for hold in placed:
                self._holds.put(hold)
            for entry in entries:
                self._ledger.put(_ENTRY, ledger_key(_id(entry)), entry.to_proto())
        for name, table in tables.items():
            self._drivers[name].swap(table)

    @contextlib.contextmanager
    def _durably(self) -> Iterator[None]:
        """Change entries and holds in the ledger, all or none."""
        try:
            with self._ledger.together():
                yield
        except BaseException:
            # Else an entry would stay held with no hold that could be lifted, or whose deadline comes.
            self._holds.reload()
            raise

    async def _told(self, entries: Sequence[Entry], attempt: Attempt, timeout_s: float) -> list[str]:
        """Tell the drivers that they are held, and wait for those that listen."""
        awaited: list[tuple[str, asyncio.Event]] = []
        for entry in entries:
            if self._drivers[entry.driver].listeners:
                awaited.append((entry.driver, self._holds.expect(_id(entry), attempt)))
            self._notify(entry.driver, entry.function, NOTIFICATION_KIND_HELD, attempt)
        if not awaited:
            return []
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for _, told in awaited:
                    await told.wait()
        return sorted({driver for driver, told in awaited if not told.is_set()})

    def _notify(self, driver: str, function: str, kind: NotificationKind.ValueType, attempt: Attempt | None) -> None:
        if self._drivers[driver].listeners:
            self._drivers[driver].notify(WatchNotificationsResponse(kind=kind, function=function, attempt=attempt))


def _id(entry: Entry) -> EntryId:
    return entry.driver, entry.function


def _check_count(field: str, count: int) -> None:
    if not 1 <= count <= MAX_ENTRIES_A_REQUEST:
        raise invalid_field(field, f"{count} entries", f"1 to {MAX_ENTRIES_A_REQUEST}")
