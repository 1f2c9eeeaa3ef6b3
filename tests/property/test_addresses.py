"""Addresses: no two windows overlap, and offsets lead where they should."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from vfleet.address import (
    ADDRESS_SPACE,
    WINDOW_BYTES,
    Location,
    bar_layout,
    bar_span,
    location_of,
    table_offset,
    translate,
    window_offset,
)

uint16 = st.integers(0, 0xFFFF)
locations = st.builds(Location, uint16, uint16)
addresses = st.integers(0, ADDRESS_SPACE - 1)
bar_sizes = st.integers(12, 30).map(lambda bits: 1 << bits)
bars = st.dictionaries(st.sampled_from([0, 2, 4]), bar_sizes, min_size=1)


@given(st.lists(locations, min_size=2, unique=True))
def test_no_two_windows_overlap(places: list[Location]) -> None:
    bases = sorted(place.base for place in places)
    assert all(base + WINDOW_BYTES <= following for base, following in pairwise(bases))
    assert bases[-1] + WINDOW_BYTES <= ADDRESS_SPACE


@given(locations, st.integers(0, WINDOW_BYTES - 1))
def test_every_address_of_a_window_leads_to_its_place(place: Location, offset: int) -> None:
    assert location_of(place.base + offset) == place
    assert window_offset(place.base + offset) == offset


@given(addresses)
def test_every_address_is_in_one_window(address: int) -> None:
    assert location_of(address).base + window_offset(address) == address


@given(locations, addresses, st.integers(0, WINDOW_BYTES - 1))
def test_an_offset_carries_the_whole_window(place: Location, virtual_address: int, distance: int) -> None:
    offset = table_offset(place.base, virtual_address)
    assert 0 <= offset < ADDRESS_SPACE
    assert translate((virtual_address + distance) % ADDRESS_SPACE, offset) == place.base + distance


@given(bars)
def test_bars_of_a_function_are_aligned_apart_and_within_the_span(sizes: dict[int, int]) -> None:
    layout = bar_layout(sizes)
    assert list(layout) == sorted(sizes)
    assert all(start % sizes[index] == 0 for index, start in layout.items())
    ranges = sorted((start, start + sizes[index]) for index, start in layout.items())
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert ranges[-1][1] == bar_span(sizes) <= WINDOW_BYTES
