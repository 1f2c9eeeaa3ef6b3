"""Where functions lie in a driver's virtual address space: where it wants them, or the first free place. Pure."""

from collections.abc import Sequence

from vfleet.address import ADDRESS_SPACE, PAGE_BYTES
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.limits import MAIN_MEMORY_VIRTUAL_ADDRESS
from vfleet.v1.types_pb2 import TableEntry

FIRST_VIRTUAL_ADDRESS = 0x1000_0000_0000
LEAST_ALIGNMENT_BYTES = 2 << 20


def check_free(virtual_address: int, length_bytes: int, entries: Sequence[TableEntry], main_memory_bytes: int) -> None:
    """Raise INVALID_FIELD, for `virtual_address`, unless the range is whole pages, exists, and overlaps nothing."""
    field = "virtual_address"
    if virtual_address % PAGE_BYTES:
        raise invalid_field(field, f"{virtual_address:#x}", f"a multiple of {PAGE_BYTES}")
    end = virtual_address + length_bytes
    if end > ADDRESS_SPACE:
        raise invalid_field(field, f"{virtual_address:#x}", f"{length_bytes} bytes before the end of the 64-bit space")
    for start, taken_end, what in _taken(entries, main_memory_bytes):
        if virtual_address < taken_end and start < end:
            raise invalid_field(
                field, f"{virtual_address:#x}", f"{length_bytes} bytes clear of {what} at {start:#x} to {taken_end:#x}"
            )


def first_free(length_bytes: int, entries: Sequence[TableEntry], main_memory_bytes: int) -> int:
    """Return the first place from FIRST_VIRTUAL_ADDRESS on for so many bytes, aligned to their next power of two.

    The alignment is at least 2 MiB, as huge pages have it. Raise LIMIT_EXCEEDED if there is none.
    """
    alignment = max(LEAST_ALIGNMENT_BYTES, 1 << (length_bytes - 1).bit_length())
    place = -(-FIRST_VIRTUAL_ADDRESS // alignment) * alignment
    for start, end, _ in _taken(entries, main_memory_bytes):
        if place + length_bytes <= start:
            break
        if end > place:
            place = -(-end // alignment) * alignment
    if place + length_bytes > ADDRESS_SPACE:
        raise VfleetError(Reason.LIMIT_EXCEEDED, f"the driver's address space has no place for {length_bytes} bytes")
    return place


def _taken(entries: Sequence[TableEntry], main_memory_bytes: int) -> list[tuple[int, int, str]]:
    taken = [
        (entry.virtual_address, entry.virtual_address + entry.length_bytes, f"function {entry.function!r}")
        for entry in entries
    ]
    if main_memory_bytes:
        end = MAIN_MEMORY_VIRTUAL_ADDRESS + main_memory_bytes
        taken.append((MAIN_MEMORY_VIRTUAL_ADDRESS, end, "the driver's main memory"))
    return sorted(taken)
