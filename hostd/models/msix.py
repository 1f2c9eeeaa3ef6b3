"""MSI-X for device models: the table and the pending bits, as they lie in a BAR (PCI Express Base 4.0, 7.7.2).

An interrupt is a 4-byte write of the vector's data to its address, both as the driver put them into the table. While
the vector is masked its pending bit is set instead, and the interrupt goes out once it is unmasked: that is work, which
a model asks for with `due` and does with `release`. Several interrupts of a masked vector are one.
"""

from collections.abc import Iterable, Sequence
from struct import Struct
from typing import Final

from hostd.models.base import DmaWrite, Step, Store
from vfleet.errors import invalid_field

ENTRY_BYTES: Final = 16
MAX_VECTORS: Final = 256
MASKED: Final = 1
NO_VECTOR: Final = 0xFFFF

_ENTRY = Struct("<QII")  # address, data, vector control
_RESET_ENTRY = _ENTRY.pack(0, 0, MASKED)
_PENDING_BYTES = 8
_PENDING_BITS = 64


class Msix:
    """`vectors` (1 to 256) of a function, with the table at `table` and the pending bits at `pending` in the image.

    Both are offsets in the window, multiples of 8. Raise VfleetError INVALID_FIELD for anything else.
    """

    def __init__(self, vectors: int, table: int, pending: int) -> None:
        if not 1 <= vectors <= MAX_VECTORS:
            raise invalid_field("vectors", vectors, f"1 to {MAX_VECTORS}")
        for field, value in (("table", table), ("pending", pending)):
            if value < 0 or value % _PENDING_BYTES:
                raise invalid_field(field, value, "a multiple of 8")
        self.vectors: Final = vectors
        self.table: Final = range(table, table + vectors * ENTRY_BYTES)
        pending_words = -(-vectors // _PENDING_BITS)
        self.pending: Final = range(pending, pending + pending_words * _PENDING_BYTES)
        if table < self.pending.stop and pending < self.table.stop:
            raise invalid_field("pending", pending, f"a place outside the table, {table} to {self.table.stop}")

    def reset(self) -> Sequence[Store]:
        """Return the stores after a reset, over zeroed memory: every vector is masked."""
        return ((self.table.start, _RESET_ENTRY * self.vectors),)

    def claims(self, offset: int) -> bool:
        """Return whether an access at this offset is to the table or the pending bits."""
        return offset in self.table or offset in self.pending

    def read(self, memory: memoryview, offset: int, length: int) -> bytes | None:
        """Return what an access to the table or the pending bits reads; None if it isn't one of 4 or 8 bytes."""
        return bytes(memory[offset : offset + length]) if length in (4, 8) else None

    def write(self, offset: int, data: bytes) -> Sequence[Store] | None:
        """Return what an access to the table changes, nothing for the pending bits; None unless of 4 or 8 bytes."""
        if len(data) not in (4, 8):
            return None
        return ((offset, data),) if offset in self.table else ()

    def interrupt(self, memory: memoryview, vectors: Iterable[int]) -> tuple[Sequence[Store], Sequence[DmaWrite]]:
        """Return what one interrupt of each of these vectors stores and sends: put both into one Step.

        A vector that the function doesn't have (NO_VECTOR, for example) makes none.
        """
        sends: list[DmaWrite] = []
        words: dict[int, int] = {}
        for vector in vectors:
            if not 0 <= vector < self.vectors:
                continue
            address, data, control = self._entry(memory, vector)
            if control & MASKED:
                offset = self._pending_offset(vector)
                word = words.get(offset, _word(memory, offset))
                words[offset] = word | 1 << vector % _PENDING_BITS
            else:
                sends.append(DmaWrite(address, data.to_bytes(4, "little")))
        return [(offset, word.to_bytes(_PENDING_BYTES, "little")) for offset, word in words.items()], sends

    def due(self, memory: memoryview) -> int | None:
        """Return the lowest vector that is pending and not masked any more, or None."""
        for offset in range(self.pending.start, self.pending.stop, _PENDING_BYTES):
            word = _word(memory, offset)
            while word:
                bit = (word & -word).bit_length() - 1
                vector = (offset - self.pending.start) * 8 + bit
                if vector < self.vectors and not self._entry(memory, vector)[2] & MASKED:
                    return vector
                word &= word - 1
        return None

    def release(self, memory: memoryview, vector: int) -> Step:
        """Return the step that sends a pending interrupt and clears its bit."""
        offset = self._pending_offset(vector)
        word = _word(memory, offset) & ~(1 << vector % _PENDING_BITS)
        address, data, _ = self._entry(memory, vector)
        return Step(
            [(offset, word.to_bytes(_PENDING_BYTES, "little"))], [DmaWrite(address, data.to_bytes(4, "little"))]
        )

    def _entry(self, memory: memoryview, vector: int) -> tuple[int, int, int]:
        address, data, control = _ENTRY.unpack_from(memory, self.table.start + vector * ENTRY_BYTES)
        return address, data, control

    def _pending_offset(self, vector: int) -> int:
        return self.pending.start + vector // _PENDING_BITS * _PENDING_BYTES


def _word(memory: memoryview, offset: int) -> int:
    return int.from_bytes(memory[offset : offset + _PENDING_BYTES], "little")
