"""A driver's leave to access a function's plain memory directly: what an access needs to be arithmetic and a copy."""

from struct import Struct
from typing import Final

from hostd.plain_redo import ONE_WRITE, ONE_WRITE_TAG
from hostd.sequencer import Sequencer

_DATA: Final = {length: Struct(f"{length}s") for length in ONE_WRITE_TAG}


class Grant:
    """Leave to access plain memory, at `low` in the image and at `base` + `low` for the driver, until it is revoked.

    The function's window has `span` bytes. `length` is that of the last access, which is known to be legal. An offset
    is one of such an access if its bits in `select` are those of `low`: plain memory and accesses have a power of two
    of bytes, and are aligned to it. The name of one write of that length (`tag`) and how its bytes are read and written
    (twice as fast as by slices) go with it.
    """

    __slots__ = (
        "base",
        "bytes",
        "last_word",
        "length",
        "low",
        "memory",
        "pack",
        "pack_redo",
        "select",
        "sequencer",
        "size",
        "span",
        "tag",
        "unpack",
        "words",
    )

    def __init__(
        self,
        image: memoryview,
        words: memoryview,
        memory: memoryview,
        sequencer: Sequencer,
        base: int,
        span: int,
        plain: range,
    ) -> None:
        """Take the image as bytes and as words, and its memory, of which `plain` is what may be accessed."""
        self.base = base
        self.span = span
        # Where none of it is plain, no offset is selected.
        self.low, self.size = (plain.start, len(plain)) if plain else (-1, 0)
        self.bytes, self.words, self.memory = image, words, memory
        self.sequencer = sequencer
        self.last_word = sequencer.last_word
        self.take_length(1)

    def take_length(self, length: int) -> bool:
        """Note the length of an access. Return False if none has it."""
        if length not in ONE_WRITE_TAG:
            return False
        self.length = length
        self.select = -self.size | length - 1
        self.tag = ONE_WRITE_TAG[length] | self.sequencer.index
        self.unpack, self.pack = _DATA[length].unpack_from, _DATA[length].pack_into
        self.pack_redo = ONE_WRITE[length].pack_into
        return True

    def revoke(self) -> None:
        """Let it map nothing from now on."""
        self.low, self.select, self.size, self.span = -1, 0, 0, 0
