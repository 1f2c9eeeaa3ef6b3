"""A guest's configuration space: what is there, what can be written, what a reset does."""

import struct
from collections.abc import Iterator

import pytest

from hostd.guest.configuration import SPACE_BYTES, ConfigurationSpace
from hostd.models.pci import pci_function

MANUFACTURER = (0x1AF4, 0x10C5)
BARS = {"nvme": {0: 16 << 10, 2: 1 << 20}, "virtio-net": {0: 32 << 10}, "accelerator": {0: 8 << 10, 2: 1 << 20}}
BAR, CAPABILITIES, EXPRESS, MSIX, VENDOR = 0x10, 0x34, 0x10, 0x11, 0x09
RESET = 1 << 15


def space(model: str = "nvme") -> ConfigurationSpace:
    return ConfigurationSpace(pci_function(model), BARS[model], MANUFACTURER)


def word(found: ConfigurationSpace, offset: int) -> int:
    return int.from_bytes(found.read(offset, 4), "little")


def capabilities(found: ConfigurationSpace) -> Iterator[tuple[int, int]]:
    at = found.read(CAPABILITIES, 1)[0]
    while at:
        yield found.read(at, 1)[0], at
        at = found.read(at + 1, 1)[0]


@pytest.mark.parametrize(
    ("model", "vendor_and_device", "class_and_revision"),
    [("nvme", 0x10C51AF4, 0x01080200), ("virtio-net", 0x10411AF4, 0x02000001), ("accelerator", 0x10C51AF4, 0x12000000)],
)
def test_it_says_what_the_function_is(model: str, vendor_and_device: int, class_and_revision: int):
    found = space(model)
    assert word(found, 0x00) == word(found, 0x2C) == vendor_and_device
    assert word(found, 0x08) == class_and_revision


@pytest.mark.parametrize("model", BARS)
def test_a_bar_tells_its_size_and_keeps_its_address(model: str):
    found = space(model)
    shown = {bar: size for bar, size in BARS[model].items() if bar in pci_function(model).bars}
    for bar in range(0, 6, 2):
        found.write(BAR + 4 * bar, b"\xff" * 8)
        told = int.from_bytes(found.read(BAR + 4 * bar, 8), "little")
        assert told == ((1 << 64) - shown[bar] | 4 if bar in shown else 0)
        found.write(BAR + 4 * bar, (0xFE600000).to_bytes(8, "little"))
        assert int.from_bytes(found.read(BAR + 4 * bar, 8), "little") == (0xFE600004 if bar in shown else 0)


@pytest.mark.parametrize("model", BARS)
def test_capabilities_are_a_chain_without_overlap(model: str):
    found = space(model)
    chain = list(capabilities(found))
    assert [identifier for identifier, _ in chain[:2]] == [EXPRESS, MSIX]
    assert all(identifier == VENDOR for identifier, _ in chain[2:])
    lengths = {EXPRESS: 0x3C, MSIX: 12}
    ends = [at + lengths.get(identifier, found.read(at + 2, 1)[0]) for identifier, at in chain]
    assert all(end <= at for end, (_, at) in zip(ends, chain[1:], strict=False))
    assert ends[-1] <= 256


def test_virtio_finds_its_structures():
    found = space("virtio-net")
    structures = {}
    for identifier, at in capabilities(found):
        if identifier == VENDOR:
            kind, bar = found.read(at + 3, 2)
            structures[kind] = (bar, *struct.unpack("<II", found.read(at + 8, 8)))
            if kind == 2:
                assert word(found, at + 16) == 4
    assert structures == {1: (0, 0, 60), 2: (0, 0x3000, 8), 3: (0, 0x1000, 1), 4: (0, 0x2000, 8)}


def test_what_is_only_read_stays():
    found = space()
    before = found.read(0, SPACE_BYTES)
    for offset in (0x00, 0x08, 0x2C, 0x34, 0x40, 0x44, 0x80, 0x84, 0x88, 0x100, SPACE_BYTES - 4):
        found.write(offset, b"\xff\xff" if offset in (0x40, 0x80) else b"\xff" * 4)
    assert found.read(0, SPACE_BYTES)[:4] == before[:4]
    changed = [at for at, (old, new) in enumerate(zip(before, found.read(0, SPACE_BYTES), strict=True)) if old != new]
    assert changed == []


@pytest.mark.parametrize(
    ("offset", "data"), [(0x48, b"\0\x80"), (0x49, b"\x80"), (0x48, b"\0\x80\0\0"), (0x40, b"\xff" * 16)]
)
def test_a_function_level_reset_is_told_and_puts_all_back(offset: int, data: bytes):
    found = space()
    fresh = found.state()
    found.write(0x04, b"\x06\x04")
    found.write(0x82, b"\x08\xc0")
    assert found.state() != fresh
    assert found.write(offset, data)
    assert found.state() == fresh


def test_other_writes_are_no_reset():
    found = space()
    assert not any(found.write(at, b"\xff") for at in range(256) if at != 0x49)
    assert not found.write(0x48, b"\0\x7f")


def test_its_state_comes_back():
    found, again = space(), space()
    found.write(0x04, b"\x06\x04")
    found.write(0x82, b"\x08\x80")
    found.write(BAR, (0xFE600000).to_bytes(8, "little"))
    again.restore(found.state())
    assert again.read(0, SPACE_BYTES) == found.read(0, SPACE_BYTES)


def test_past_the_end_nothing_is():
    found = space()
    assert found.read(SPACE_BYTES - 2, 4)[2:] == found.read(SPACE_BYTES, 2) == b"\xff\xff"
    assert not found.write(SPACE_BYTES - 2, b"1234")
    assert not found.write(SPACE_BYTES + 100, b"1234")
