"""The holds on entries of this host's tables: whose each is, until when, and which driver knows. Durable."""

import asyncio
from collections.abc import Callable, Iterable

from hostd.deadlines import Deadlines
from hostd.ledger import Ledger
from vfleet.clock import Clock
from vfleet.v1.hold_service_pb2 import Hold
from vfleet.v1.types_pb2 import Attempt

EntryId = tuple[str, str]
"""An entry's driver and function."""

_KIND = "hold"


class Holds:
    """All holds of the host. `deadlines` are theirs. Each has the generation of the entry that it was placed on."""

    def __init__(self, ledger: Ledger, clock: Clock) -> None:
        """`on_lifted` is told for how long each hold lasted, in seconds; a restarted daemon counts from its start."""
        self._ledger = ledger
        self._clock = clock
        self.on_lifted: Callable[[float], None] = lambda _: None
        self._by_entry: dict[EntryId, Hold] = {}
        self._placed_s: dict[EntryId, float] = {}
        self._acknowledgements: dict[EntryId, tuple[Attempt, asyncio.Event]] = {}
        self.deadlines = Deadlines()
        self.reload()

    def reload(self) -> None:
        """Have the holds that the ledger has: at a start, and after changes that it could not take."""
        self._by_entry = {(h.driver, h.function): h for h in self._ledger.all(_KIND, Hold)}
        self._placed_s = {entry: self._placed_s.get(entry, self._clock.monotonic()) for entry in self._by_entry}

    def find(self, entry: EntryId) -> Hold | None:
        """Return the hold of an entry, or None."""
        return self._by_entry.get(entry)

    def of(self, migration: str | None) -> list[Hold]:
        """Return all holds (None), or those of a migration, by driver and function."""
        holds = (self._by_entry[entry] for entry in sorted(self._by_entry))
        return [hold for hold in holds if migration in (None, hold.migration)]

    def put(self, hold: Hold) -> None:
        """Write a hold, in the place of the one that its entry has."""
        entry = hold.driver, hold.function
        self._ledger.put(_KIND, ledger_key(entry), hold)
        self._by_entry[entry] = hold
        self._placed_s.setdefault(entry, self._clock.monotonic())

    def forget(self, entries: Iterable[EntryId]) -> None:
        """Delete the holds of entries; of one that has none, nothing."""
        for entry in entries:
            if self._by_entry.pop(entry, None) is not None:
                self._ledger.delete(_KIND, ledger_key(entry))
                self.on_lifted(self._clock.monotonic() - self._placed_s.pop(entry))

    def oldest_age_s(self) -> float:
        """Return for how long the oldest hold has lasted, in seconds; 0 if there is none."""
        return self._clock.monotonic() - min(self._placed_s.values()) if self._placed_s else 0.0

    def postpone(self, migration: str, resolve_time: float) -> None:
        """Give a migration's holds another deadline, in seconds since 1970."""
        with self._ledger.together():
            for hold in self.of(migration):
                later = Hold()
                later.CopyFrom(hold)
                later.resolve_time = resolve_time
                self.put(later)
        self.deadlines.note(resolve_time)

    def expect(self, entry: EntryId, attempt: Attempt) -> asyncio.Event:
        """Return what is set once an entry's driver has acknowledged this attempt's hold: one for all who ask."""
        of, told = self._acknowledgements.get(entry, (None, asyncio.Event()))
        if of != attempt:
            told = asyncio.Event()
            self._acknowledgements[entry] = attempt, told
        return told

    def acknowledge(self, entry: EntryId, attempt: Attempt) -> None:
        """Note that an entry's driver knows of this attempt's hold. If another's is expected, that one stays so."""
        of, told = self._acknowledgements.get(entry, (None, None))
        if told is not None and of == attempt:
            told.set()


def ledger_key(entry: EntryId) -> str:
    """Return the key of an entry, and of its hold, in the ledger."""
    return f"{entry[0]}/{entry[1]}"
