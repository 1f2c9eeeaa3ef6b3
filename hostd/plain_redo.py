"""The redo record of writes to plain memory, which no device model has to see.

    page 4 of the image:  | name | offsets in memory, 8 bytes each | data, all of one length |

A write, or a batch of up to 64 of one length, writes the record's offsets and data first, then its name, one word that
says whose it is, of which length, and the last sequence; then the effect; then the sequence. So a kill leaves all of a
batch or nothing of it, and whoever opens the image finishes what has a name that the sequence has not reached.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final

from hostd.models.base import Store
from vfleet.address import MAX_ACCESS_BYTES, PAGE_BYTES
from vfleet.limits import WINDOW

WORD_BYTES: Final = 8

# Where the record lies in the image: after the other redo record (hostd/image.py). The name is a word, the rest bytes.
PLAIN_REDO_START: Final = 4 * PAGE_BYTES
PLAIN_REDO_END: Final = 8 * PAGE_BYTES
PLAIN_REDO_NAME: Final = PLAIN_REDO_START // WORD_BYTES
PLAIN_REDO_BODY: Final = PLAIN_REDO_START + WORD_BYTES

# The name's fields, from bit 0: the sequencer's index, the length's exponent, the number of writes, the sequence.
_EXPONENT_SHIFT: Final = 4
COUNT_SHIFT: Final = 8
SEQUENCE_SHIFT: Final = 15

_EXPONENTS: Final = range(MAX_ACCESS_BYTES.bit_length())
ONE_WRITE_TAG: Final = {1 << exponent: 1 << COUNT_SHIFT | exponent << _EXPONENT_SHIFT for exponent in _EXPONENTS}
"""By the length of an access: the name of one write, but for its sequence and its sequencer's index."""
ONE_WRITE: Final = {length: Struct(f"<Q{length}s") for length in ONE_WRITE_TAG}
"""By the length of an access: the body of one write, offset and data."""
OFFSETS: Final = [Struct(f"<{count}Q") for count in range(WINDOW + 1)]
"""By the number of writes: where the body begins."""


@dataclass(frozen=True, slots=True)
class PlainWrites:
    """What a record says: whose writes it is of, their last sequence, how many, and of which length in bytes."""

    sequencer_index: int
    sequence: int
    count: int
    length: int

    def stores(self, image: memoryview) -> Iterator[Store]:
        """Yield the writes, as the record has them."""
        start = PLAIN_REDO_BODY + self.count * WORD_BYTES
        for number, offset in enumerate(OFFSETS[self.count].unpack_from(image, PLAIN_REDO_BODY)):
            yield offset, bytes(image[start + number * self.length : start + (number + 1) * self.length])


def record_plain_write(
    image: memoryview, words: memoryview, sequencer_index: int, sequence: int, offset: int, data: bytes
) -> None:
    """Write the record of one write, by a driver that may be on another host and ask for the answer again."""
    length = len(data)
    ONE_WRITE[length].pack_into(image, PLAIN_REDO_BODY, offset, data)
    words[PLAIN_REDO_NAME] = sequence << SEQUENCE_SHIFT | ONE_WRITE_TAG[length] | sequencer_index


def recorded_plain_writes(words: memoryview) -> PlainWrites:
    """Return what the record says, done or not."""
    name: int = words[PLAIN_REDO_NAME]
    return PlainWrites(
        sequencer_index=name & (1 << _EXPONENT_SHIFT) - 1,
        sequence=name >> SEQUENCE_SHIFT,
        count=name >> COUNT_SHIFT & (1 << SEQUENCE_SHIFT - COUNT_SHIFT) - 1,
        length=1 << (name >> _EXPONENT_SHIFT & (1 << COUNT_SHIFT - _EXPONENT_SHIFT) - 1),
    )
