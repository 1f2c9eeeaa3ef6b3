"""A driver's translation table: immutable snapshots, each change a new one.

The driver that owns the table holds one reference to a snapshot and swaps it in one assignment, so a reader sees all
of a change or none of it. A snapshot is sorted by virtual address and searched by bisection, which starts from where
the address would be if the entries lay evenly: then a large table takes hardly longer than a small one.
"""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import attrgetter
from types import MappingProxyType
from typing import Final, Self

from vfleet.address import ADDRESS_SPACE, PAGE_BYTES
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.v1.types_pb2 import TableEntry


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry of a table, as vfleet.v1.TableEntry describes it: `function` is empty for the driver's main memory.

    Raise VfleetError INVALID_FIELD unless `virtual_address`, `length_bytes` and `offset` are multiples of 4096, the
    offset has 64 bits and the range is not empty and ends within them.
    """

    driver: str
    function: str
    virtual_address: int
    length_bytes: int
    offset: int
    generation: int
    host: str
    held: bool = False
    revision: int = 0
    lost: bool = False

    def __post_init__(self) -> None:
        for field, value, limit in (
            ("virtual_address", self.virtual_address, ADDRESS_SPACE - 1),
            ("length_bytes", self.length_bytes, ADDRESS_SPACE - self.virtual_address),
            ("offset", self.offset, ADDRESS_SPACE - 1),
        ):
            if not 0 <= value <= limit or value % PAGE_BYTES:
                raise invalid_field(field, value, f"a multiple of {PAGE_BYTES}, at most {limit}")
        if not self.length_bytes:
            raise invalid_field("length_bytes", self.length_bytes, "at least one page")
        if self.generation < 0:
            raise invalid_field("generation", self.generation, "0 for main memory, from 1 for a function")

    @classmethod
    def from_proto(cls, entry: TableEntry) -> Self:
        """Return the entry that a message describes. Raise VfleetError INVALID_FIELD as the constructor does."""
        return cls(
            driver=entry.driver,
            function=entry.function,
            virtual_address=entry.virtual_address,
            length_bytes=entry.length_bytes,
            offset=entry.offset,
            generation=entry.generation,
            host=entry.host,
            held=entry.held,
            revision=entry.revision,
            lost=entry.lost,
        )

    def to_proto(self) -> TableEntry:
        """Return the message that describes the entry."""
        return TableEntry(
            driver=self.driver,
            function=self.function,
            virtual_address=self.virtual_address,
            length_bytes=self.length_bytes,
            offset=self.offset,
            generation=self.generation,
            host=self.host,
            held=self.held,
            revision=self.revision,
            lost=self.lost,
        )


class TranslationTable:
    """One snapshot: `entries` sorted by virtual address, and the same `by_function`; none may be changed.

    Raise VfleetError INVALID_FIELD if a function has two entries, ALREADY_EXISTS if two entries overlap.
    """

    __slots__ = ("_bounds", "_origin", "_ranks", "_shift", "by_function", "entries")

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        self.entries: Final = tuple(sorted(entries, key=attrgetter("virtual_address")))
        self.by_function: Final[Mapping[str, Entry]] = MappingProxyType({e.function: e for e in self.entries})
        if len(self.by_function) != len(self.entries):
            functions = [entry.function for entry in self.entries]
            raise invalid_field("entries", functions, "one entry a function")
        for entry, following in pairwise(self.entries):
            if entry.virtual_address + entry.length_bytes > following.virtual_address:
                raise _overlap(entry, following)
        # An address with an odd number of bounds up to it lies in an entry. Packed: large tables strain the caches.
        bounds = [bound for e in self.entries for bound in (e.virtual_address, e.virtual_address + e.length_bytes)]
        self._bounds: Final = array("Q", bounds) if not bounds or bounds[-1] < ADDRESS_SPACE else bounds
        # Buckets of 2**shift addresses, about as many as bounds; ranks[k] bounds lie up to the start of bucket k.
        self._origin: Final = bounds[0] if bounds else ADDRESS_SPACE
        span = bounds[-1] - self._origin if bounds else 0
        self._shift: Final = (span // max(1, len(bounds))).bit_length()
        bucket_starts = range(self._origin, self._origin + span + (1 << self._shift), 1 << self._shift)
        self._ranks: Final = array("I", [bisect_right(bounds, start) for start in bucket_starts])

    def lookup(self, virtual_address: int) -> Entry | None:
        """Return the entry that maps a virtual address; None if none does: a translation fault."""
        bucket = (virtual_address - self._origin) >> self._shift
        if bucket < 0:
            return None
        ranks = self._ranks
        try:
            rank = bisect_right(self._bounds, virtual_address, ranks[bucket], ranks[bucket + 1])
        except IndexError:  # past the last entry
            return None
        return self.entries[rank >> 1] if rank & 1 else None

    def with_entries(self, entries: Iterable[Entry]) -> "TranslationTable":
        """Return a snapshot in which each entry stands in the place of its function's, or is new.

        What is older changes nothing: by revision, since a function that was deleted and made anew begins again at
        generation 1; by generation where the revisions are equal. Where both are, the given one stands, `held`
        included. Raise as the constructor does.
        """
        by_function = dict(self.by_function)
        for entry in entries:
            own = by_function.get(entry.function)
            if own is None or (own.revision, own.generation) <= (entry.revision, entry.generation):
                by_function[entry.function] = entry
        return TranslationTable(by_function.values())

    def with_held(self, functions: Iterable[str], *, held: bool) -> "TranslationTable":
        """Return a snapshot in which the entries of `functions` are held or not; a function without one is passed."""
        changed = (self.by_function[function] for function in functions if function in self.by_function)
        return self.with_entries([replace(entry, held=held) for entry in changed])

    def without(self, functions: Iterable[str]) -> "TranslationTable":
        """Return a snapshot without the entries of `functions`; a function without one is passed."""
        gone = frozenset(functions)
        return TranslationTable(entry for entry in self.entries if entry.function not in gone)


def _overlap(entry: Entry, following: Entry) -> VfleetError:
    end = entry.virtual_address + entry.length_bytes
    return VfleetError(
        Reason.ALREADY_EXISTS,
        f"driver {following.driver!r}: the entry of {following.function or 'main memory'!r} begins at"
        f" {following.virtual_address:#x}; expected an address from {end:#x}, where that of"
        f" {entry.function or 'main memory'!r} ends",
        metadata={"driver": following.driver, "function": following.function},
    )
