"""What has arrived of a function's local memory, page by page, and who waits for the rest."""

import asyncio
import mmap

import pytest
from support.manual_clock import settle

from hostd.arrival import FETCH_PAGES, Arrival
from hostd.image import FunctionImage, image_bytes
from vfleet.address import PAGE_BYTES

PAGES = 64
FIRST = 32
LOCAL = range(FIRST * PAGE_BYTES, PAGES * PAGE_BYTES)
PAGE = b"\x5a" * PAGE_BYTES


@pytest.fixture
def mapped() -> mmap.mmap:
    return mmap.mmap(-1, image_bytes(PAGES * PAGE_BYTES))


def bytes_of(page: int, length: int = 8) -> list[tuple[int, int]]:
    return [(page * PAGE_BYTES, length)]


def test_only_local_memory_is_missing_and_only_until_it_arrives(mapped: mmap.mmap):
    image = FunctionImage(mapped)
    arrival = Arrival(image, LOCAL)
    assert (arrival.missing_pages, list(arrival.pages)) == (32, list(range(32, 64)))
    assert not arrival.is_missing([(0, FIRST * PAGE_BYTES)])
    assert arrival.is_missing(bytes_of(FIRST))
    arrival.take(FIRST, PAGE)
    assert not arrival.is_missing(bytes_of(FIRST, PAGE_BYTES))
    assert arrival.is_missing(bytes_of(FIRST, PAGE_BYTES + 1))
    assert image.memory[FIRST * PAGE_BYTES : (FIRST + 1) * PAGE_BYTES] == PAGE
    assert arrival.missing_pages == 31
    image.close()


def test_what_has_arrived_is_not_overwritten_by_what_comes_late(mapped: mmap.mmap):
    image = FunctionImage(mapped)
    arrival = Arrival(image, LOCAL)
    arrival.take(41, PAGE)
    image.store([(41 * PAGE_BYTES, b"written")])
    arrival.take(40, PAGE * 3)
    arrival.take(41, b"", 1)
    assert bytes(image.memory[41 * PAGE_BYTES : 41 * PAGE_BYTES + 8]) == b"writtenZ"
    for page in (40, 42):
        assert image.memory[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] == PAGE
    assert arrival.missing_pages == 29
    image.close()


def test_pages_of_zero_arrive_without_their_bytes(mapped: mmap.mmap):
    image = FunctionImage(mapped)
    arrival = Arrival(image, LOCAL)
    arrival.take(FIRST, b"", 32)
    assert (arrival.missing_pages, any(image.memory)) == (0, False)
    image.close()


def test_what_has_arrived_outlives_the_daemon(mapped: mmap.mmap):
    image = FunctionImage(mapped)
    Arrival(image, LOCAL).take(35, PAGE * 2)
    again = Arrival(FunctionImage(mapped), LOCAL)
    assert again.missing_pages == 30
    assert again.as_bits(range(32, 64)) == bytes([0b0001_1000, 0, 0, 0])


def test_a_new_import_begins_with_nothing(mapped: mmap.mmap):
    image = FunctionImage(mapped)
    arrival = Arrival(image, LOCAL)
    arrival.take(FIRST, PAGE * 32)
    image.clear()
    assert Arrival(image, LOCAL).missing_pages == 32
    assert not any(image.memory)
    image.close()


def test_after_a_reset_nothing_is_needed_and_nothing_is_taken(mapped: mmap.mmap):
    image = FunctionImage(mapped)
    arrival = Arrival(image, LOCAL)
    arrival.need_nothing()
    arrival.take(FIRST, PAGE)
    assert (arrival.missing_pages, any(image.memory)) == (0, False)
    image.close()


async def test_who_waits_asks_once_for_what_is_around_and_goes_on_when_it_is_there(mapped: mmap.mmap):
    image = FunctionImage(mapped)
    arrival = Arrival(image, LOCAL)
    touched = [*bytes_of(40), *bytes_of(55)]
    waiting = asyncio.create_task(arrival.arrived(touched))
    await settle()
    assert arrival.wanted == {40 // FETCH_PAGES, 55 // FETCH_PAGES}
    assert arrival.asked.is_set()
    arrival.wanted.clear()
    arrival.take(40, PAGE)
    await settle()
    assert not waiting.done()
    arrival.take(55, PAGE)
    await settle()
    assert waiting.done()
    await arrival.arrived(touched)
    image.close()


async def test_the_end_lets_everybody_go(mapped: mmap.mmap):
    image = FunctionImage(mapped)
    arrival = Arrival(image, LOCAL)
    waiting = asyncio.create_task(arrival.arrived(bytes_of(40)))
    await settle()
    arrival.end()
    await settle()
    assert waiting.done()
    assert arrival.is_missing(bytes_of(40))
    image.close()
