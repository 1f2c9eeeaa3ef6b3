"""What the NVMe workload does: its commands as a function of their number, so that nothing but numbers is remembered.

The namespace is divided among lanes, one for each command under way. In a lane, commands take turns: an extent of one
to four pages is written, with content that no other write has, and one of those written before is read back. Extents
are written round and round, so the last write of one that is read is known by arithmetic.
"""

from dataclasses import dataclass
from itertools import accumulate
from struct import Struct
from typing import Final

from vfleet.address import PAGE_BYTES
from vfleet.errors import invalid_field
from vfleet.v1.driver_service_pb2 import WorkloadOptions

EXTENT_PAGES_MAX: Final = 4
_PATTERN: Final = (1, 1, 2, 1, 1, 1, EXTENT_PAGES_MAX, 1)  # pages of extents that follow each other
_SMALL_PATTERN: Final = (1,)
_STRIDE: Final = 7919  # a prime, so that the extents that are read back are spread
_CONTENT: Final = Struct("<QQQQ")
_MASK: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Operation:
    """One command: `page` is that of the namespace, in 4 KiB. A read finds what `version` wrote."""

    is_write: bool
    page: int
    pages: int
    version: int


class NvmeScript:
    """The commands of `lanes` lanes on a namespace. `run` tells the content of one start from that of another.

    Raise VfleetError INVALID_FIELD for options that the namespace has no room for.
    """

    def __init__(self, options: WorkloadOptions, namespace_bytes: int, lanes: int, run: int) -> None:
        start, size = options.memory_offset_bytes, options.memory_bytes
        if start % PAGE_BYTES or start > namespace_bytes:
            raise invalid_field("options.memory_offset_bytes", start, f"a multiple of 4096, at most {namespace_bytes}")
        if size % PAGE_BYTES or start + size > namespace_bytes:
            raise invalid_field("options.memory_bytes", size, f"a multiple of 4096, at most {namespace_bytes - start}")
        self._first = start // PAGE_BYTES
        self._area = (size or namespace_bytes - start) // PAGE_BYTES // lanes
        if not self._area:
            expected = f"at most the pages of 4 KiB that it uses, {(size or namespace_bytes - start) // PAGE_BYTES}"
            raise invalid_field("options.window", lanes, expected)
        self._pattern = _PATTERN if self._area >= sum(_PATTERN) else _SMALL_PATTERN
        self._pattern_pages = sum(self._pattern)
        self._places = (0, *accumulate(self._pattern))
        self._extents = self._area // self._pattern_pages * len(self._pattern)
        self._run = (options.seed * _STRIDE ^ run) & _MASK

    def operation(self, lane: int, number: int) -> Operation:
        """Return a lane's command by its number, from 0."""
        version = number // 2
        is_write = number % 2 == 0
        if not is_write:
            version -= version * _STRIDE % min(version + 1, self._extents)
        group, index = divmod(version % self._extents, len(self._pattern))
        page = self._first + lane * self._area + group * self._pattern_pages + self._places[index]
        return Operation(is_write, page, self._pattern[index], version)

    def content(self, operation: Operation) -> bytes:
        """Return what the operation writes, or must read."""
        repeats = PAGE_BYTES // _CONTENT.size
        return b"".join(
            _CONTENT.pack(self._run, page, operation.version, ~page & _MASK) * repeats
            for page in range(operation.page, operation.page + operation.pages)
        )
