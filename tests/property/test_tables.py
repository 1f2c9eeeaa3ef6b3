"""Translation tables: a lookup equals a linear search, in whatever snapshot a history of changes leads to."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hostd.translation import Entry, TranslationTable
from vfleet.errors import VfleetError

PAGE = 4096
PAGES = 1 << 52

# Pages crowd at both ends of the address space and at one place between, so that ranges meet and lie unevenly.
pages = st.one_of(st.integers(0, 40), st.integers(PAGES - 40, PAGES - 1), st.integers(0x5000, 0x5040))
entries = st.builds(
    lambda function, page, length, generation, revision: Entry(
        "d", f"vf{function}", page * PAGE, min(length, PAGES - page) * PAGE, 0, generation, "h", revision=revision
    ),
    st.integers(0, 12),
    pages,
    st.integers(1, 8) | st.integers(1, 1 << 50),
    st.integers(1, 3),
    st.integers(0, 3),
)
changes = st.lists(
    st.tuples(st.just("put"), st.lists(entries, max_size=4))
    | st.tuples(st.just("hold"), st.lists(entries, max_size=4))
    | st.tuples(st.just("remove"), st.lists(entries, max_size=2)),
    max_size=12,
)


def changed(table: TranslationTable, kind: str, chosen: list[Entry]) -> TranslationTable:
    functions = [entry.function for entry in chosen]
    if kind == "put":
        return table.with_entries(chosen)
    if kind == "hold":
        return table.with_held(functions, held=True)
    return table.without(functions)


def expected(model: dict[str, Entry], kind: str, chosen: list[Entry]) -> dict[str, Entry]:
    model = dict(model)
    for entry in chosen:
        if kind == "put":
            own = model.get(entry.function, entry)
            if own.revision < entry.revision or (own.revision == entry.revision and own.generation <= entry.generation):
                model[entry.function] = entry
        elif kind == "hold":
            if entry.function in model:
                model[entry.function] = replace(model[entry.function], held=True)
        else:
            model.pop(entry.function, None)
    return model


def overlaps(entry: Entry, other: Entry) -> bool:
    return (
        entry.virtual_address < other.virtual_address + other.length_bytes
        and other.virtual_address < entry.virtual_address + entry.length_bytes
    )


def linear(entries: list[Entry], address: int) -> Entry | None:
    return next((e for e in entries if e.virtual_address <= address < e.virtual_address + e.length_bytes), None)


@given(changes, st.lists(pages))
def test_a_history_of_changes_leads_to_what_a_linear_search_sees(
    history: list[tuple[str, list[Entry]]], probes: list[int]
) -> None:
    table, model = TranslationTable(), {}
    for kind, chosen in history:
        wanted = expected(model, kind, chosen)
        clash = any(overlaps(a, b) for a in wanted.values() for b in wanted.values() if a.function < b.function)
        try:
            table = changed(table, kind, chosen)
        except VfleetError:
            assert clash
        else:
            assert not clash
            model = wanted
    assert dict(table.by_function) == model
    assert all(not overlaps(entry, following) for entry, following in pairwise(table.entries))
    edges = [edge for e in model.values() for edge in (e.virtual_address, e.virtual_address + e.length_bytes)]
    addresses = [page * PAGE for page in probes] + [edge + step for edge in edges for step in (-1, 0, 1)]
    for address in addresses:
        if 0 <= address < 1 << 64:
            assert table.lookup(address) == linear(list(model.values()), address)


@given(st.sets(st.integers(0, PAGES - 1), min_size=1, max_size=60), st.integers(0, PAGES - 1))
def test_lookups_in_evenly_and_unevenly_spread_tables(starts: set[int], probe: int) -> None:
    placed = [Entry("d", f"vf{start}", start * PAGE, PAGE, 0, 1, "h") for start in starts]
    table = TranslationTable(placed)
    for page in {probe, *starts, *(start + 1 for start in starts)}:
        assert table.lookup(page * PAGE) == linear(placed, page * PAGE)
