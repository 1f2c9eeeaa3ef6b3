"""Where functions lie in a driver's address space."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.virtual import FIRST_VIRTUAL_ADDRESS, check_free, first_free
from vfleet.errors import Reason, VfleetError
from vfleet.limits import MAIN_MEMORY_VIRTUAL_ADDRESS
from vfleet.v1.types_pb2 import TableEntry

PAGE = 4096
MIB = 1 << 20


def entry(virtual_address: int, length: int = 2 * MIB) -> TableEntry:
    return TableEntry(function="vf1", virtual_address=virtual_address, length_bytes=length)


@given(st.lists(st.integers(1, 1 << 26).map(lambda pages: pages * PAGE), max_size=8))
def test_places_are_aligned_and_never_overlap(lengths):
    entries: list[TableEntry] = []
    for length in lengths:
        place = first_free(length, entries, 1 << 30)
        check_free(place, length, entries, 1 << 30)
        assert place >= FIRST_VIRTUAL_ADDRESS
        assert place % max(2 * MIB, 1 << (length - 1).bit_length()) == 0
        entries.append(entry(place, length))


def test_the_first_gap_that_is_large_enough_is_taken():
    taken = [entry(FIRST_VIRTUAL_ADDRESS), entry(FIRST_VIRTUAL_ADDRESS + 4 * MIB)]
    assert first_free(2 * MIB, taken, 0) == FIRST_VIRTUAL_ADDRESS + 2 * MIB
    assert first_free(4 * MIB, taken, 0) == FIRST_VIRTUAL_ADDRESS + 8 * MIB


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (PAGE + 1, "multiple of 4096"),
        ((1 << 64) - PAGE, "end of the 64-bit space"),
        (1 << 40, "clear of function 'vf1'"),
        ((1 << 40) - PAGE, "clear of function 'vf1'"),
        (MAIN_MEMORY_VIRTUAL_ADDRESS + MIB - PAGE, "main memory"),
        (MAIN_MEMORY_VIRTUAL_ADDRESS - PAGE, "main memory"),
    ],
)
def test_a_place_that_can_not_be_had_is_refused(address, words):
    with pytest.raises(VfleetError, match=words) as caught:
        check_free(address, 2 * PAGE, [entry(1 << 40)], MIB)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == "virtual_address"


@pytest.mark.parametrize("address", [(1 << 40) - 2 * PAGE, (1 << 40) + 2 * MIB, (1 << 64) - 2 * PAGE, 0])
def test_neighbours_may_touch(address):
    check_free(address, 2 * PAGE, [entry(1 << 40)], MIB)


def test_without_main_memory_its_place_is_free():
    check_free(MAIN_MEMORY_VIRTUAL_ADDRESS, PAGE, [], 0)
