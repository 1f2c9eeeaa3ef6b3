"""What of a function's local memory has arrived at its new home, page by page, while it runs there (post-copy).

    missing --asked for, or pushed--> its bytes are stored --> its byte in the image's `arrived` is set --> there

Only then may an access, or work, touch the page; and what comes for it later is dropped, since the function may have
written to it. A daemon that is killed in between finds the page missing, and gets it again.
"""

import asyncio
from collections.abc import Iterable
from typing import BinaryIO

from hostd.image import FunctionImage
from vfleet.address import PAGE_BYTES

Range = tuple[int, int]
"""An offset in the function's image, and how many bytes."""

FETCH_PAGES = 16  # fetched together: what is next to a page is likely to be touched next

_ALL = b"\x01"
_DIGITS = b"01" + bytes(254)  # of a page's byte


class Arrival:
    """The pages of `local_memory` that are there, and those that somebody waits for."""

    def __init__(self, image: FunctionImage, local_memory: range, *, is_new: bool = False) -> None:
        """`is_new` says that nothing is there: then nobody looks, however many pages there are."""
        self._image = image
        self._file: BinaryIO | None = None
        self._pages = range(local_memory.start // PAGE_BYTES, local_memory.stop // PAGE_BYTES)
        self._bytes = local_memory
        self._missing = len(self._pages) if is_new else len(self._pages) - self._count_there(self._pages)
        self._news = asyncio.Event()
        self.is_over = False
        self.wanted: set[int] = set()
        self.asked = asyncio.Event()

    @property
    def pages(self) -> range:
        """The pages of local memory."""
        return self._pages

    @property
    def missing_pages(self) -> int:
        """How many pages are not there."""
        return self._missing

    def is_missing(self, ranges: Iterable[Range]) -> bool:
        """Return whether a page of these bytes isn't there."""
        arrived = self._image.arrived
        return any(not arrived[page] for page in self._touched(ranges))

    async def arrived(self, ranges: Iterable[Range]) -> None:
        """Ask for what is missing of these bytes, and wait until it is there, or will not come (`is_over`)."""
        asked_for = list(ranges)
        while not self.is_over and self.ask(asked_for):
            await self._news.wait()

    def ask(self, ranges: Iterable[Range]) -> bool:
        """Ask for what is missing of these bytes; return whether anything is."""
        arrived = self._image.arrived
        blocks = {page // FETCH_PAGES for page in self._touched(ranges) if not arrived[page]}
        if not blocks <= self.wanted:
            self.wanted |= blocks
            self.asked.set()
        return bool(blocks)

    def take(self, first: int, data: bytes, zero_pages: int = 0) -> None:
        """Take pages of the local memory from the source, from page `first` on: their bytes, or so many of zero."""
        count = zero_pages or len(data) // PAGE_BYTES
        there = self._image.arrived[first : first + count]
        if not any(there):
            if data:
                self._store(first * PAGE_BYTES, data)
            there[:] = _ALL * count
            self._missing -= count
        else:
            for page in (page for page in range(count) if not there[page]):
                if data:
                    start = page * PAGE_BYTES
                    self._store((first + page) * PAGE_BYTES, data[start : start + PAGE_BYTES])
                there[page] = 1
                self._missing -= 1
        self._tell()

    def through(self, file: BinaryIO | None) -> None:
        """Take pages through the image's file from now on, or (None) no more."""
        self._file = file

    def need_nothing(self) -> None:
        """Take no more from the source: the function has forgotten what was there."""
        self._image.arrived[self._pages.start : self._pages.stop] = _ALL * len(self._pages)
        self._missing = 0
        self._tell()

    def end(self) -> None:
        """Let everybody go who waits."""
        self.is_over = True
        self._tell()

    def as_bits(self, pages: range) -> bytes:
        """Return which of these pages are there: a bit for each, the lowest of a byte first; empty if none is."""
        if not self._count_there(pages):
            return b""
        digits = bytes(self._image.arrived[pages.start : pages.stop]).translate(_DIGITS)
        return int(digits[::-1], 2).to_bytes(-(-len(pages) // 8), "little")

    def is_all_there(self, pages: range) -> bool:
        """Return whether none of these pages is missing."""
        return self._count_there(pages) == len(pages)

    async def news(self) -> None:
        """Wait until something has arrived, or it is over."""
        await self._news.wait()

    def _count_there(self, pages: range) -> int:
        return bytes(self._image.arrived[pages.start : pages.stop]).count(1)

    def _touched(self, ranges: Iterable[Range]) -> Iterable[int]:
        for offset, length in ranges:
            start, end = max(offset, self._bytes.start), min(offset + length, self._bytes.stop)
            if start < end:
                yield from range(start // PAGE_BYTES, (end - 1) // PAGE_BYTES + 1)

    def _store(self, offset: int, data: bytes) -> None:
        if self._file is not None:
            self._image.store_through(self._file, offset, data)
        else:
            self._image.store([(offset, data)])

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()
