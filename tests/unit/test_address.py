"""Fabric addresses: the arithmetic of design.md, and what it refuses."""

import pytest

from vfleet.address import (
    AddressError,
    Location,
    bar_layout,
    bar_span,
    check_access,
    format_routing_id,
    location_of,
    routing_id,
    table_offset,
    translate,
    vf_routing_id,
    window_offset,
)


def test_a_base_is_segment_and_routing_id() -> None:
    place = Location(segment=2, routing_id=routing_id(0x11, 2, 3))
    assert place.base == 0x0002_1113_0000_0000
    assert str(place) == "0002:11:02.3"
    assert format_routing_id(0xFFFF) == "ff:1f.7"


def test_an_address_leads_back_to_its_place() -> None:
    place = Location(0xFFFF, 0xFFFF)
    assert location_of(place.base + 0x1234) == place
    assert window_offset(place.base + 0x1234) == 0x1234


@pytest.mark.parametrize(("segment", "rid"), [(-1, 0), (0x10000, 0), (0, -1), (0, 0x10000)])
def test_a_place_outside_16_bits_is_refused(segment: int, rid: int) -> None:
    with pytest.raises(AddressError, match="expected 0 to 65535"):
        Location(segment, rid)


@pytest.mark.parametrize("numbers", [(256, 0, 0), (0, 32, 0), (0, 0, 8), (-1, 0, 0)])
def test_bus_device_and_function_have_8_5_and_3_bits(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(AddressError, match="number is"):
        routing_id(*numbers)


def test_vfs_begin_at_the_offset_and_go_by_the_stride() -> None:
    assert [vf_routing_id(0x100, 0x10, 4, index) for index in (1, 2, 3)] == [0x110, 0x114, 0x118]
    assert vf_routing_id(0xFFFE, 1, 1, 1) == 0xFFFF


@pytest.mark.parametrize(("pf", "index"), [(0x100, 0), (0xFFFF, 1), (0xFFFE, 2)])
def test_a_vf_that_cannot_exist_is_refused(pf: int, index: int) -> None:
    with pytest.raises(AddressError, match="expected an index from 1 and 16 bits"):
        vf_routing_id(pf, 1, 1, index)


@pytest.mark.parametrize("virtual_address", [0, 0x1000, 0x0002_1113_0000_0000, 0xFFFF_FFFF_FFFF_F000])
def test_an_offset_translates_back_modulo_2_to_the_64(virtual_address: int) -> None:
    base = Location(2, 0x1113).base
    offset = table_offset(base, virtual_address)
    assert 0 <= offset < 1 << 64
    assert translate(virtual_address, offset) == base


def test_bars_lie_at_natural_alignment_in_index_order() -> None:
    bars = {4: 0x1000, 2: 0x10_0000, 0: 0x1000}
    assert bar_layout(bars) == {0: 0, 2: 0x10_0000, 4: 0x20_0000}
    assert bar_span(bars) == 0x20_1000
    assert bar_span({}) == 0


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        ({1: 0x1000}, "BAR index is 1"),
        ({6: 0x1000}, "BAR index is 6"),
        ({0: 0}, "BAR 0 has 0 bytes"),
        ({0: 0x800}, "BAR 0 has 2048 bytes"),
        ({0: 0x1800}, "BAR 0 has 6144 bytes"),
        ({0: 1 << 32}, "BAR 0 has 4294967296 bytes"),
        ({0: 1 << 31, 2: 1 << 31, 4: 0x1000}, "the BARs span"),
    ],
)
def test_bars_that_cannot_exist_are_refused(bars: dict[int, int], message: str) -> None:
    with pytest.raises(AddressError, match=message):
        bar_span(bars)


def test_two_bars_may_fill_the_window() -> None:
    assert bar_span({0: 1 << 31, 2: 1 << 31}) == 1 << 32


@pytest.mark.parametrize(("address", "length"), [(0, 1), (3, 1), (6, 2), (0x1000, 4096), (8, 8)])
def test_an_aligned_power_of_two_is_an_access(address: int, length: int) -> None:
    check_access(address, length)


@pytest.mark.parametrize(
    ("address", "length", "message"),
    [
        (0, 0, "length is 0 bytes"),
        (0, -1, "length is -1 bytes"),
        (0, 3, "length is 3 bytes"),
        (0, 8192, "length is 8192 bytes"),
        (4, 8, "address 0x4 is not aligned to its length of 8 bytes"),
    ],
)
def test_other_accesses_are_refused(address: int, length: int, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        check_access(address, length)
