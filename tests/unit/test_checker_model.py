"""The checker's data sheet (docs/device-model.md), point by point."""

import struct
from collections.abc import Mapping, Sequence

import pytest

from hostd.models import checker as registers
from hostd.models import create_model
from hostd.models.base import Store
from vfleet.address import bar_span
from vfleet.errors import Reason, VfleetError

IDENTITY = 0x1122_3344_5566_7788
LOCAL = 0x10_0000
ALL_ONES = (1 << 64) - 1
BAD_ACCESS = 1 << 1


class Bench:
    """A device on the bench: a model with memory, and stores applied at once."""

    def __init__(self, bars: Mapping[int, int]) -> None:
        self.model = create_model("checker", IDENTITY, bars)
        self.memory = bytearray(bar_span(bars) + self.model.private_bytes)
        self._apply(self.model.reset())

    def _apply(self, stores: Sequence[Store]) -> None:
        for offset, data in stores:
            assert offset >= 0
            assert offset + len(data) <= len(self.memory)
            self.memory[offset : offset + len(data)] = data

    def read_bytes(self, offset: int, length: int) -> bytes | None:
        before = bytes(self.memory)
        answer = self.model.read(memoryview(self.memory), offset, length)
        assert self.memory == before, "a model puts nothing into memory itself"
        if answer is None:
            return None
        data, stores = answer
        assert len(data) == length
        self._apply(stores)
        return data

    def write_bytes(self, offset: int, data: bytes) -> bool:
        stores = self.model.write(memoryview(self.memory), offset, data)
        self._apply(stores or ())
        return stores is not None

    def read(self, offset: int) -> int:
        data = self.read_bytes(offset, 8)
        assert data is not None
        return int.from_bytes(data, "little")

    def write(self, offset: int, value: int) -> None:
        assert self.write_bytes(offset, value.to_bytes(8, "little"))

    def ring(self, *numbers: int, channel: int = 0) -> None:
        for number in numbers:
            self.write(registers.channel_offset(channel) + registers.DOORBELL, number)

    def channel(self, channel: int = 0) -> tuple[int, ...]:
        """LAST, ACCEPTED, LOST, REPEATED, REORDERED."""
        return tuple(self.read(registers.channel_offset(channel) + offset) for offset in range(0x08, 0x30, 8))


@pytest.fixture
def bench() -> Bench:
    return Bench({0: 4096, 2: 1 << 20})


def test_identification_after_a_reset(bench: Bench) -> None:
    assert bench.read_bytes(0, 8) == b"VFCK\x01\0\0\0"
    assert bench.read(registers.IDENTITY) == IDENTITY
    assert bench.read(registers.LOCAL_MEMORY_BYTES) == 1 << 20
    assert bench.read(registers.STATUS) == 1
    assert [bench.read(offset) for offset in (registers.ERRORS, registers.SCRATCH, registers.CONTROL)] == [0, 0, 0]
    assert [bench.channel(channel) for channel in range(8)] == [(0,) * 5] * 8


def test_scratch_keeps_what_was_written(bench: Bench) -> None:
    bench.write(registers.SCRATCH, ALL_ONES - 5)
    assert bench.read(registers.SCRATCH) == ALL_ONES - 5


@pytest.mark.parametrize("length", [1 << power for power in range(13)])
def test_local_memory_takes_every_legal_size(bench: Bench, length: int) -> None:
    for offset in (LOCAL, LOCAL + 4096, LOCAL + (1 << 20) - length):
        data = bytes((offset + index) % 251 for index in range(length))
        assert bench.write_bytes(offset, data)
        assert bench.read_bytes(offset, length) == data
    assert bench.read(registers.ERRORS) == 0


@pytest.mark.parametrize("offset", [0x1000, LOCAL - 8, LOCAL + (1 << 20), (1 << 32) - 8])
def test_outside_the_bars_nobody_claims_an_access(bench: Bench, offset: int) -> None:
    before = bytes(bench.memory)
    assert bench.read_bytes(offset, 8) is None
    assert not bench.write_bytes(offset, bytes(8))
    assert bench.memory == before


def test_local_memory_may_be_absent() -> None:
    bench = Bench({0: 8192})
    assert bench.read(registers.LOCAL_MEMORY_BYTES) == 0
    assert bench.read_bytes(0x2000, 8) is None
    assert bench.read(0x1000) == ALL_ONES
    assert bench.read(registers.ERRORS) == 1


READ_ONLY = (registers.IDENTIFICATION, registers.IDENTITY, registers.STATUS, registers.ERRORS,
             registers.LOCAL_MEMORY_BYTES, *(0x1C0 + offset for offset in range(0x08, 0x38, 8)))  # fmt: skip
NO_REGISTER = (0x38, 0xF8, 0x138, 0x2F8, 0x300, 0xFF8)


@pytest.mark.parametrize("offset", [*READ_ONLY, *NO_REGISTER])
def test_a_write_where_none_is_taken_is_counted_and_changes_nothing_else(bench: Bench, offset: int) -> None:
    bench.write(registers.SCRATCH, 7)
    before = bytearray(bench.memory)
    bench.write(offset, ALL_ONES)
    before[registers.ERRORS] = 1
    assert bench.memory == before


@pytest.mark.parametrize("offset", NO_REGISTER)
def test_a_read_where_no_register_is_reads_all_ones_and_is_counted(bench: Bench, offset: int) -> None:
    assert bench.read(offset) == ALL_ONES
    assert bench.read(registers.ERRORS) == 1


@pytest.mark.parametrize("length", [1, 2, 4, 16, 32, 4096])
def test_registers_take_8_bytes_alone(bench: Bench, length: int) -> None:
    offset = registers.SCRATCH if length < 16 else 0
    assert bench.read_bytes(offset, length) == b"\xff" * length
    assert bench.write_bytes(offset, b"\x05" * length)
    assert bench.read(registers.ERRORS) == 2
    assert bench.read(registers.SCRATCH) == 0
    assert bench.read(registers.STATUS) == 1 | BAD_ACCESS


def test_every_register_of_a_channel_can_be_read(bench: Bench) -> None:
    bench.ring(1, channel=7)
    assert [bench.read(0x2C0 + offset) for offset in range(0, 0x38, 8)] == [0, 1, 1, 0, 0, 0, 1]
    assert bench.read(registers.ERRORS) == 0


RINGS = [
    ((1, 2, 3), (3, 3, 0, 0, 0)),
    ((1, 4), (4, 2, 2, 0, 0)),
    ((1, 3, 2), (3, 3, 0, 0, 1)),
    ((1, 1), (1, 1, 0, 1, 0)),
    ((1, 3, 2, 2), (3, 3, 0, 1, 1)),
    ((2, 1), (2, 2, 0, 0, 1)),
    ((64, 1), (64, 2, 62, 0, 1)),
    ((65, 1), (65, 1, 64, 1, 0)),
    ((1, 64, 1), (64, 2, 62, 1, 0)),
    ((1, 65, 2), (65, 3, 62, 0, 1)),
    ((5, 5 + 63, 5), (68, 2, 66, 1, 0)),
    ((5, 5 + 64, 5), (69, 2, 67, 1, 0)),
    ((ALL_ONES, ALL_ONES - 1, ALL_ONES), (ALL_ONES, 2, ALL_ONES - 2, 1, 1)),
    ((7, ALL_ONES, 7), (ALL_ONES, 2, ALL_ONES - 2, 1, 0)),
]


@pytest.mark.parametrize(("numbers", "expected"), RINGS)
def test_the_sequence_checker_tells_lost_repeated_and_reordered(
    bench: Bench, numbers: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    bench.ring(*numbers, channel=3)
    assert bench.channel(3) == expected
    assert [bench.channel(channel) for channel in range(8) if channel != 3] == [(0,) * 5] * 7
    disorder = 1 << 8 + 3 if any(expected[2:]) else 0
    assert bench.read(registers.STATUS) == 1 | disorder


def test_a_doorbell_of_0_is_a_bad_access(bench: Bench) -> None:
    bench.ring(1, 0)
    assert bench.channel() == (1, 1, 0, 0, 0)
    assert bench.read(registers.ERRORS) == 1


def test_control_clears_the_channels_and_the_errors_that_it_names(bench: Bench) -> None:
    for channel in range(8):
        bench.ring(1, 3, 3, channel=channel)
    bench.read(0x38)
    bench.write(registers.CONTROL, 1 << 0 | 1 << 7)
    assert [bench.channel(channel) for channel in range(8)] == [
        (3, 2, 1, 1, 0) if 0 < channel < 7 else (0,) * 5 for channel in range(8)
    ]
    assert bench.read(registers.STATUS) == 1 | BAD_ACCESS | 0b0111_1110 << 8
    bench.write(registers.CONTROL, 1 << 8)
    assert bench.read(registers.ERRORS) == 0
    assert bench.read(registers.CONTROL) == 0
    bench.ring(1, 2)
    assert bench.channel() == (2, 2, 0, 0, 0)


@pytest.mark.parametrize("bits", [1 << 9, 1 << 63, 0x3FF])
def test_control_refuses_bits_that_it_does_not_have(bench: Bench, bits: int) -> None:
    bench.ring(1)
    bench.write(registers.CONTROL, bits)
    assert bench.channel() == (1, 1, 0, 0, 0)
    assert bench.read(registers.ERRORS) == 1


@pytest.mark.parametrize("content", [b"\xff", b"\x80", b"\x01"])
def test_no_access_raises_whatever_state_was_imported(bench: Bench, content: bytes) -> None:
    bench.memory[:4096] = content * 4096
    for offset in range(0, 4096, 8):
        for value in (0, 1, 2, 1 << 40, ALL_ONES):
            assert bench.write_bytes(offset, value.to_bytes(8, "little"))
        assert bench.read_bytes(offset, 8) is not None


def test_counts_wrap_at_64_bits(bench: Bench) -> None:
    # LAST 9 with nothing in WINDOW and nothing LOST: no device gets there by itself.
    bench.memory[0x108:0x138] = struct.pack("<6Q", 9, ALL_ONES, 0, ALL_ONES, ALL_ONES, 0)
    bench.ring(5, 5)
    assert bench.channel() == (9, 0, ALL_ONES, 0, 0)


@pytest.mark.parametrize(
    ("name", "identity", "bars", "message"),
    [
        ("toaster", 1, {0: 4096}, "model is 'toaster'; expected one of accelerator"),
        ("checker", 0, {0: 4096}, "identity is 0; expected 1 to"),
        ("checker", 1 << 64, {0: 4096}, "identity is 18446744073709551616; expected 1 to"),
        ("checker", 1, {}, "bars is {}; expected BAR 0 for registers"),
        ("checker", 1, {2: 4096}, "bars is {2: 4096}; expected BAR 0 for registers"),
        ("checker", 1, {0: 4096, 4: 4096}, "bars is {0: 4096, 4: 4096}; expected BAR 0 for registers"),
        ("checker", 1, {0: 5}, "bars is {0: 5}; expected BARs that can exist: BAR 0 has 5 bytes"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused(name: str, identity: int, bars: dict[int, int], message: str) -> None:
    with pytest.raises(VfleetError) as caught:
        create_model(name, identity, bars)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.message.startswith(message)
