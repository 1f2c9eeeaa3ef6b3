"""An image and its file: what a copy writes through the file is in memory, and what was never written is not read."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import BinaryIO

import pytest

from hostd.image import SHORT_GAP_PAGES, FunctionImage, image_bytes
from hostd.ledger import Ledger
from vfleet.address import PAGE_BYTES
from vfleet.v1.access_pb2 import ACCESS_STATUS_OK as OK

PAGES = 2048
ALL = range(PAGES)


class World:
    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path)
        self.image = self.open(is_new=True)
        self.file: BinaryIO = self.ledger.open_file("image")

    def open(self, *, is_new: bool = False) -> FunctionImage:
        return FunctionImage(self.ledger.map_file("image", image_bytes(PAGES * PAGE_BYTES)), is_new=is_new)

    def written(self, pages: range = ALL) -> list[int]:
        return [page for found in self.image.written(self.file, pages) for page in found]

    def close(self) -> None:
        self.file.close()
        self.image.close()
        self.ledger.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    opened = World(tmp_path)
    yield opened
    opened.close()


def test_what_goes_through_the_file_is_in_memory_at_once_and_the_other_way_round(world: World):
    world.image.store_through(world.file, 5 * PAGE_BYTES, b"a" * PAGE_BYTES)
    assert world.image.memory[5 * PAGE_BYTES : 6 * PAGE_BYTES] == b"a" * PAGE_BYTES
    world.image.store([(5 * PAGE_BYTES + 8, b"b")])
    world.image.store_through(world.file, 6 * PAGE_BYTES, b"c" * PAGE_BYTES)
    assert bytes(world.image.memory[5 * PAGE_BYTES + 7 : 5 * PAGE_BYTES + 10]) == b"aba"
    assert world.open().memory == world.image.memory


def test_what_goes_through_the_file_is_dirty(world: World):
    dirty = world.image.track()
    world.image.store_through(world.file, 5 * PAGE_BYTES, b"a" * 2 * PAGE_BYTES)
    assert dirty == {5, 6}


def test_of_a_new_image_nothing_is_written(world: World):
    assert world.written() == []


def test_short_gaps_are_taken_along_and_long_ones_are_not(world: World):
    far = 100 + SHORT_GAP_PAGES + 2
    for page in (100, 100 + SHORT_GAP_PAGES, far + 200):
        world.image.store([(page * PAGE_BYTES, b"x")])
    assert world.written() == [*range(100, 100 + SHORT_GAP_PAGES + 1), far + 200]
    assert world.written(range(100, 101)) == [100]
    assert world.written(range(101, 102)) == []


@pytest.mark.parametrize("seed", range(5))
def test_no_page_that_is_not_zero_is_left_out(world: World, seed: int):
    random = Random(seed)
    for _ in range(40):
        page = random.randrange(PAGES)
        if random.random() < 0.5:
            world.image.store([(page * PAGE_BYTES + random.randrange(PAGE_BYTES), b"x")])
        else:
            count = min(random.randrange(1, 70), PAGES - page)
            world.image.store_through(world.file, page * PAGE_BYTES, b"y" * count * PAGE_BYTES)
    first, last = sorted(random.sample(ALL, 2))
    memory = world.image.memory
    other_than_zero = {p for p in range(first, last) if any(memory[p * PAGE_BYTES : (p + 1) * PAGE_BYTES])}
    found = world.written(range(first, last))
    assert other_than_zero <= set(found) <= set(range(first, last))
    assert found == sorted(found)


def test_a_new_image_keeps_what_any_other_does(world: World):
    sequencer = world.image.sequencer("d1")
    world.image.apply(sequencer, 1, OK, b"one", [(0, b"stored")])
    world.image.forget("d1")
    world.image.apply(world.image.sequencer("d2"), 1, OK, b"two", ())
    again = world.open()
    assert [(each.driver, each.last, each.answer(1)) for each in again.sequencers()] == [("d2", 1, (OK, b"two"))]
    assert bytes(again.memory[:6]) == b"stored"
