"""A lookup in a translation table of 10,000 entries over one in a table of 10.

Both look up the same number of addresses, spread over the entries; between the entries are gaps of different sizes, as
functions with different BARs leave them. In random order, which has the goal, the large table costs the processor's
caches as well: an entry that nobody has looked at for a while has to be fetched. In ascending order it doesn't.
"""

from random import Random

from benchmarks.measure import Figure, Size, alternate, at_most

from hostd.translation import Entry, TranslationTable
from vfleet.address import PAGE_BYTES

LOOKUPS = 1000


def table_of(count: int, random: Random) -> TranslationTable:
    entries, address = [], 1 << 40
    for number in range(count):
        length = PAGE_BYTES << random.randrange(6)
        entries.append(Entry("d1", f"vf{number}", address, length, 0, 1, "h1"))
        address += length + PAGE_BYTES * random.randrange(64)
    return TranslationTable(entries)


def lookups(table: TranslationTable, random: Random, *, in_order: bool):
    """Return work that looks up LOOKUPS addresses that are mapped."""
    entries = random.choices(table.entries, k=LOOKUPS)
    if in_order:
        first = random.randrange(max(1, len(table.entries) - LOOKUPS + 1))
        entries = [table.entries[(first + number) % len(table.entries)] for number in range(LOOKUPS)]
    addresses = [entry.virtual_address + random.randrange(entry.length_bytes) for entry in entries]
    assert all(table.lookup(address) is entry for address, entry in zip(addresses, entries, strict=True))

    def work() -> None:
        lookup = table.lookup
        for address in addresses:
            lookup(address)

    return work


async def run(size: Size) -> list[Figure]:
    random = Random(1)
    tables = [table_of(count, random) for count in (size.of(10_000, 100), 10)]
    figures = []
    for name, in_order, goal in (("in random order", False, at_most(1.6)), ("in ascending order", True, None)):
        large, small = (lookups(table, random, in_order=in_order) for table in tables)
        measured = alternate(size.of(1000, 3), large, small, times=1, scale=1e9 / LOOKUPS)
        figures.append(measured.slowness(f"lookup among 10,000 / among 10, {name}", "ns a lookup", goal))
    return figures
