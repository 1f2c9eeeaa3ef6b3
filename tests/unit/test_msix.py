"""MSI-X in a model's BAR: what the table says, what is pending, and what goes out."""

import pytest

from hostd.models.base import DmaWrite
from hostd.models.msix import NO_VECTOR, Msix
from vfleet.errors import Reason, VfleetError

TABLE, PENDING = 0x100, 0x900
ADDRESS = 0xFEE00000


class Device:
    """Memory with MSI-X in it."""

    def __init__(self, vectors: int = 70) -> None:
        self.msix = Msix(vectors, TABLE, PENDING)
        self.memory = memoryview(bytearray(4096))
        self.put(self.msix.reset())

    def put(self, stores) -> None:
        for offset, data in stores:
            self.memory[offset : offset + len(data)] = data

    def write(self, offset: int, data: bytes) -> None:
        self.put(self.msix.write(offset, data))

    def set_up(self, vector: int, data: int, *, masked: bool = False) -> None:
        entry = TABLE + 16 * vector
        self.write(entry, ADDRESS.to_bytes(8, "little"))
        self.write(entry + 8, data.to_bytes(4, "little") + bytes([masked]) + bytes(3))

    def interrupt(self, *vectors: int) -> list[DmaWrite]:
        stores, sends = self.msix.interrupt(self.memory, vectors)
        self.put(stores)
        return list(sends)

    def release(self) -> list[DmaWrite]:
        """Do all that is due."""
        sends: list[DmaWrite] = []
        while (vector := self.msix.due(self.memory)) is not None:
            step = self.msix.release(self.memory, vector)
            self.put(step.stores)
            sends.extend(step.sends)
        return sends


def sent(*data: int) -> list[DmaWrite]:
    return [DmaWrite(ADDRESS, number.to_bytes(4, "little")) for number in data]


def test_an_interrupt_is_a_write_of_the_vectors_data_to_its_address():
    device = Device()
    device.set_up(0, 7)
    device.set_up(69, 1234)
    assert device.interrupt(0, 69, 0) == sent(7, 1234, 7)
    assert device.msix.due(device.memory) is None


def test_after_a_reset_every_vector_is_masked():
    device = Device()
    assert device.interrupt(3) == []
    assert device.msix.read(device.memory, TABLE + 3 * 16 + 12, 4) == b"\1\0\0\0"
    assert device.msix.due(device.memory) is None


@pytest.mark.parametrize("vectors", [(5,), (5, 5), (63, 64, 5)])
def test_masked_interrupts_are_pending_and_go_out_once_when_they_are_unmasked(vectors: tuple[int, ...]):
    device = Device()
    for vector in vectors:
        device.set_up(vector, vector, masked=True)
    assert device.interrupt(*vectors) == []
    words = [device.msix.read(device.memory, PENDING + offset, 8) for offset in (0, 8)]
    pending = int.from_bytes(b"".join(words), "little")
    assert pending == sum(1 << vector for vector in set(vectors))
    assert device.release() == []
    for vector in vectors:
        device.write(TABLE + vector * 16 + 12, bytes(4))
    assert device.release() == sent(*sorted(set(vectors)))
    assert device.release() == []


def test_a_vector_that_there_is_not_interrupts_nobody():
    device = Device()
    assert device.interrupt(70, NO_VECTOR) == []
    assert device.msix.due(device.memory) is None


def test_accesses_are_of_4_or_8_bytes_and_pending_bits_are_only_read():
    device = Device()
    msix = device.msix
    assert [msix.claims(offset) for offset in (TABLE - 1, TABLE, TABLE + 70 * 16 - 1, TABLE + 70 * 16)] == [
        False,
        True,
        True,
        False,
    ]
    assert [msix.claims(offset) for offset in (PENDING, PENDING + 15, PENDING + 16)] == [True, True, False]
    sizes = (1, 2, 4, 8, 16)
    assert [size for size in sizes if msix.read(device.memory, TABLE, size) is not None] == [4, 8]
    assert [size for size in sizes if msix.write(TABLE, bytes(size)) is not None] == [4, 8]
    assert msix.write(PENDING, b"\xff" * 8) == ()


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((0, 0, 64), "vectors"),
        ((257, 0, 8192), "vectors"),
        ((1, 4, 64), "table"),
        ((1, 0, 60), "pending"),
        ((2, 0, 24), "pending"),
    ],
)
def test_what_cannot_be_is_refused(arguments: tuple[int, int, int], field: str):
    with pytest.raises(VfleetError) as caught:
        Msix(*arguments)
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_FIELD, field)
