"""The translation table: snapshots, lookups and what a change may do."""

from dataclasses import FrozenInstanceError, replace

import pytest

from hostd.translation import Entry, TranslationTable
from vfleet.errors import Reason, VfleetError
from vfleet.v1.types_pb2 import TableEntry

MEMORY = Entry("d1", "", 0x1000, 0x3000, 0x10_0000, 0, "h1")
VF1 = Entry("d1", "vf1", 0x10_0000, 0x20_0000, 0x5000, 3, "h1")
VF2 = Entry("d1", "vf2", 0x30_0000, 0x1000, 0x6000, 1, "h1")
TABLE = TranslationTable([VF2, MEMORY, VF1])


def test_entries_are_sorted_and_found_by_function() -> None:
    assert TABLE.entries == (MEMORY, VF1, VF2)
    assert dict(TABLE.by_function) == {"": MEMORY, "vf1": VF1, "vf2": VF2}


@pytest.mark.parametrize(
    ("virtual_address", "entry"),
    [
        (0, None),
        (0xFFF, None),
        (0x1000, MEMORY),
        (0x3FFF, MEMORY),
        (0x4000, None),
        (0xF_FFFF, None),
        (0x10_0000, VF1),
        (0x2F_FFFF, VF1),
        (0x30_0000, VF2),
        (0x30_0FFF, VF2),
        (0x30_1000, None),
        ((1 << 64) - 1, None),
    ],
)
def test_a_lookup_finds_the_entry_that_maps_the_address(virtual_address: int, entry: Entry | None) -> None:
    assert TABLE.lookup(virtual_address) is entry


class CountingAddress(int):
    """A virtual address that counts how often a search compares it."""

    comparisons = 0

    def __lt__(self, other: int) -> bool:
        type(self).comparisons += 1
        return int(self) < other


def test_a_lookup_in_a_large_even_table_compares_few_entries() -> None:
    start = 1 << 40
    addresses = {f"vf{n}": start + n * 0x20_0000 for n in range(10_000)}
    table = TranslationTable(replace(VF1, function=f, virtual_address=at) for f, at in addresses.items())
    for page in range(0, 10_000 * 0x200, 997):
        CountingAddress.comparisons = 0
        found = table.lookup(CountingAddress(start + page * 0x1000))
        assert found is table.by_function[f"vf{page // 0x200}"]
        assert CountingAddress.comparisons <= 2


@pytest.mark.parametrize("virtual_address", [0, 0x1000, (1 << 64) - 1])
def test_an_empty_table_maps_nothing(virtual_address: int) -> None:
    assert TranslationTable().lookup(virtual_address) is None


def test_main_memory_has_no_generation() -> None:
    assert replace(MEMORY, generation=0) == MEMORY


def test_an_entry_may_end_with_the_address_space() -> None:
    top = replace(VF1, virtual_address=(1 << 64) - 0x1000, length_bytes=0x1000)
    assert TranslationTable([top]).lookup((1 << 64) - 1) is top
    assert TranslationTable([VF2, top]).lookup((1 << 64) - 1) is top


def test_a_change_makes_a_new_snapshot_and_leaves_the_old() -> None:
    moved = replace(VF1, generation=4, offset=0x9000)
    table = TABLE.with_entries([moved])
    assert table.lookup(VF1.virtual_address) is moved
    assert TABLE.lookup(VF1.virtual_address) is VF1


def test_a_snapshot_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TABLE.by_function["vf9"] = VF1  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        VF1.held = True  # type: ignore[misc]


def test_many_entries_change_in_one_step() -> None:
    table = TABLE.with_entries([replace(VF1, generation=4), replace(VF2, generation=2), replace(VF1, generation=5)])
    assert [entry.generation for entry in table.entries] == [0, 5, 2]


def test_a_generation_never_goes_back() -> None:
    late = replace(VF1, generation=2, offset=0x9000)
    assert TABLE.with_entries([late]).entries == TABLE.entries
    newest_first = TABLE.with_entries([replace(VF1, generation=5), replace(VF1, generation=4)])
    assert newest_first.by_function["vf1"].generation == 5


def test_the_revision_says_which_entry_is_older() -> None:
    table = TranslationTable([replace(VF1, revision=8)])
    late = replace(VF1, generation=4, revision=7)
    assert table.with_entries([late]).entries == table.entries
    made_anew = replace(VF1, generation=1, revision=9)
    assert table.with_entries([made_anew]).entries == (made_anew,)


def test_holds_are_placed_and_lifted_in_one_step() -> None:
    held = TABLE.with_held(["vf1", "vf2", "unknown"], held=True)
    assert [entry.held for entry in held.entries] == [False, True, True]
    lifted = held.with_held(["vf2"], held=False)
    assert [entry.held for entry in lifted.entries] == [False, True, False]


def test_an_entry_of_the_same_generation_lifts_its_hold() -> None:
    held = TABLE.with_held(["vf1"], held=True)
    assert held.with_entries([VF1]).entries == TABLE.entries


def test_entries_are_taken_out() -> None:
    assert TABLE.without(["vf1", "unknown"]).entries == (MEMORY, VF2)


@pytest.mark.parametrize("virtual_address", [0x10_0000, 0xF_F000, 0x2F_F000])
def test_an_overlap_is_refused_and_changes_nothing(virtual_address: int) -> None:
    other = replace(VF2, function="vf3", virtual_address=virtual_address, length_bytes=0x2000)
    with pytest.raises(VfleetError, match=r"driver 'd1': the entry of '\w+' begins at 0x\w+; expected") as caught:
        TABLE.with_entries([other])
    assert caught.value.reason is Reason.ALREADY_EXISTS
    assert "vf3" not in TABLE.by_function


def test_an_overlap_is_told_with_both_entries_and_the_first_address_that_is_free() -> None:
    for other, function, reaching in (
        (replace(VF2, virtual_address=0x2F_F000), "vf2", "vf1"),
        (replace(VF2, function="", virtual_address=0x2F_F000), "main memory", "vf1"),
        (replace(VF2, virtual_address=0xF_F000, length_bytes=0x2000), "vf1", "vf2"),
        (replace(VF2, function="", virtual_address=0xF_F000, length_bytes=0x2000), "vf1", "main memory"),
    ):
        with pytest.raises(VfleetError) as refused:
            TranslationTable([VF1, other])
        begins, free = sorted([(other.virtual_address, other.length_bytes), (VF1.virtual_address, VF1.length_bytes)])
        assert refused.value.message == (
            f"driver 'd1': the entry of {function!r} begins at {free[0]:#x}; expected an address from"
            f" {sum(begins):#x}, where that of {reaching!r} ends"
        )
        assert refused.value.metadata == {"driver": "d1", "function": function.replace("main memory", "")}


def test_a_function_has_one_entry() -> None:
    with pytest.raises(VfleetError) as refused:
        TranslationTable([VF1, VF2, replace(VF1, virtual_address=0x100_0000)])
    assert refused.value.message == "entries is ['vf1', 'vf2', 'vf1']; expected one entry a function"
    assert refused.value.metadata == {"field": "entries"}


PAGES = "a multiple of 4096, at most"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("virtual_address", -0x1000, f"{PAGES} {(1 << 64) - 1}"),
        ("virtual_address", 0x10_0800, f"{PAGES} {(1 << 64) - 1}"),
        ("virtual_address", 1 << 64, f"{PAGES} {(1 << 64) - 1}"),
        ("length_bytes", 0, "at least one page"),
        ("length_bytes", -0x1000, f"{PAGES} {(1 << 64) - VF1.virtual_address}"),
        ("length_bytes", 0x1800, f"{PAGES} {(1 << 64) - VF1.virtual_address}"),
        ("length_bytes", 1 << 64, f"{PAGES} {(1 << 64) - VF1.virtual_address}"),
        ("offset", -0x1000, f"{PAGES} {(1 << 64) - 1}"),
        ("offset", 0x800, f"{PAGES} {(1 << 64) - 1}"),
        ("offset", 1 << 64, f"{PAGES} {(1 << 64) - 1}"),
        ("generation", -1, "0 for main memory, from 1 for a function"),
    ],
)
def test_an_entry_that_cannot_exist_is_refused(field: str, value: int, expected: str) -> None:
    with pytest.raises(VfleetError) as caught:
        replace(VF1, **{field: value})
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.message == f"{field} is {value}; expected {expected}"


def test_an_entry_comes_back_from_its_message() -> None:
    entry = Entry("d1", "vf1", 0x1000, 0x2000, (1 << 64) - 0x1000, 7, "h2", held=True, revision=9, lost=True)
    message = TableEntry.FromString(entry.to_proto().SerializeToString())
    assert Entry.from_proto(message) == entry
    # Every field of the message is carried.
    assert {field.name for field, _ in message.ListFields()} == set(TableEntry.DESCRIPTOR.fields_by_name)
