"""The memory of what is gone, freed a piece at a time."""

import asyncio
import mmap
import os
from pathlib import Path

import pytest
from support.manual_clock import ManualClock

from hostd.remains import PIECE_BYTES, Remains

BYTES = 2 * PIECE_BYTES + mmap.PAGESIZE
BLOCK_BYTES = 512


class Pauses(ManualClock):
    """Looks at a file whenever somebody pauses."""

    def __init__(self, file: int) -> None:
        super().__init__()
        self.file = file
        self.seen: list[int] = []

    async def sleep(self, seconds: float) -> None:
        self.seen.append(held_bytes(self.file))
        await super().sleep(seconds)


def held_bytes(file: int) -> int:
    return os.fstat(file).st_blocks * BLOCK_BYTES


@pytest.fixture
def file(tmp_path: Path):
    """A deleted file, all of it written."""
    path = tmp_path / "memory"
    opened = os.open(path, os.O_RDWR | os.O_CREAT)
    path.unlink()
    os.write(opened, b"\x5a" * BYTES)
    yield opened
    os.close(opened)


async def test_memory_is_freed_a_piece_at_a_time_and_then_unmapped(file: int):
    clock = Pauses(file)
    remains = Remains(clock)
    running = asyncio.create_task(remains.run())
    for mapped in (mmap.mmap(file, BYTES), mmap.mmap(file, BYTES)):
        begun = held_bytes(file)
        clock.seen.clear()
        remains.add(mapped)
        while not mapped.closed:
            await asyncio.sleep(0)
        assert clock.seen == [max(begun - (1 + piece) * PIECE_BYTES, 0) for piece in range(3)]
    running.cancel()
    assert held_bytes(file) == 0


async def test_what_is_small_goes_at_once(file: int):
    mapped = mmap.mmap(file, PIECE_BYTES)
    Remains(ManualClock()).add(mapped)
    assert mapped.closed


async def test_what_is_left_at_the_end_is_unmapped(file: int):
    remains = Remains(ManualClock())
    mapped = mmap.mmap(file, BYTES)
    remains.add(mapped)
    remains.close()
    assert mapped.closed


class Solid(mmap.mmap):
    """On a file system that has no holes."""

    def madvise(self, *_: int) -> None:
        raise OSError


async def test_where_a_file_has_no_holes_it_goes_as_a_whole(file: int):
    remains = Remains(ManualClock())
    running = asyncio.create_task(remains.run())
    solid, other = Solid(file, BYTES), mmap.mmap(-1, BYTES)
    remains.add(solid)
    remains.add(other)
    while not other.closed:
        await asyncio.sleep(0)
    assert solid.closed
    running.cancel()
