"""A guest's memory in pieces: what can be mapped, read and written, and what can't."""

import os
from collections.abc import Iterator

import pytest
from support.vmm import SharedMemory

from hostd.guest.memory import MAX_PIECES, GuestMemory
from vfleet.errors import VfleetError

PAGE = 4096
LIMIT = 1 << 30


@pytest.fixture
def shared() -> Iterator[SharedMemory]:
    memory = SharedMemory(8 * PAGE)
    yield memory
    memory.close()


@pytest.fixture
def guest() -> Iterator[GuestMemory]:
    memory = GuestMemory()
    yield memory
    memory.clear()


def test_reads_and_writes_reach_the_piece_that_is_there(guest: GuestMemory, shared: SharedMemory):
    guest.add(PAGE, 2 * PAGE, shared.descriptor, 4 * PAGE, LIMIT, is_writable=True)
    assert guest.write(PAGE + 100, b"hello")
    assert shared.content[4 * PAGE + 100 : 4 * PAGE + 105] == b"hello"
    shared.content[6 * PAGE - 3 : 6 * PAGE] = b"end"
    assert guest.read(3 * PAGE - 3, 3) == b"end"
    for start, length in ((PAGE - 1, 2), (3 * PAGE - 1, 2), (0, 1), (3 * PAGE, 1)):
        assert guest.read(start, length) is None
        assert not guest.write(start, b"x" * length)


def test_an_access_may_go_from_one_piece_to_the_next(guest: GuestMemory, shared: SharedMemory):
    guest.add(PAGE, PAGE, shared.descriptor, 0, LIMIT, is_writable=True)
    guest.add(2 * PAGE, PAGE, shared.descriptor, 5 * PAGE, LIMIT, is_writable=True)
    assert guest.write(2 * PAGE - 3, b"abcdefgh")
    assert (shared.content[PAGE - 3 : PAGE], shared.content[5 * PAGE : 5 * PAGE + 5]) == (b"abc", b"defgh")
    assert guest.read(2 * PAGE - 3, 8) == b"abcdefgh"


def test_what_only_half_fits_is_not_begun(guest: GuestMemory, shared: SharedMemory):
    guest.add(0, PAGE, shared.descriptor, 0, LIMIT, is_writable=True)
    guest.add(PAGE, PAGE, shared.descriptor, PAGE, LIMIT, is_writable=False)
    assert not guest.write(PAGE - 4, b"12345678")
    assert shared.content[: 2 * PAGE] == bytes(2 * PAGE)
    assert guest.read(PAGE - 4, 8) == bytes(8)


def test_a_piece_without_a_descriptor_can_not_be_reached(guest: GuestMemory):
    guest.add(0xFFFC0000, 256 << 10, None, 0, LIMIT, is_writable=False)
    assert guest.read(0xFFFC0000, 4) is None
    assert not guest.write(0xFFFC0000, b"1234")


@pytest.mark.parametrize(
    ("start", "length", "offset"),
    [(1, PAGE, 0), (0, 0, 0), (0, 100, 0), (0, PAGE, 5), (0, 9 * PAGE, 0), (0, PAGE, 8 * PAGE)],
)
def test_a_piece_is_whole_pages_within_its_file(
    guest: GuestMemory, shared: SharedMemory, start: int, length: int, offset: int
):
    with pytest.raises(VfleetError, match="region"):
        guest.add(start, length, shared.descriptor, offset, LIMIT, is_writable=True)
    assert guest.read(0, 1) is None


def test_a_file_that_can_shrink_is_not_mapped(guest: GuestMemory):
    unsealed = SharedMemory(PAGE, is_sealed=False)
    with pytest.raises(VfleetError, match="can't shrink"):
        guest.add(0, PAGE, unsealed.descriptor, 0, LIMIT, is_writable=True)
    unsealed.close()
    read_end, write_end = os.pipe()
    with pytest.raises(VfleetError, match="can't shrink"):
        guest.add(0, PAGE, read_end, 0, LIMIT, is_writable=True)
    os.close(read_end)
    os.close(write_end)


def test_huge_pages_are_not_mapped(guest: GuestMemory, shared: SharedMemory, monkeypatch: pytest.MonkeyPatch):
    """A hole can be punched into them, sealed as they may be. Not every kernel has any: so its word is changed."""
    of_pages = os.fstatvfs

    def of_huge_pages(descriptor: int) -> os.statvfs_result:
        return os.statvfs_result((2 << 20, *of_pages(descriptor)[1:]))

    with monkeypatch.context() as kernel:
        kernel.setattr(os, "fstatvfs", of_huge_pages)
        with pytest.raises(VfleetError, match="without huge pages"):
            guest.add(0, PAGE, shared.descriptor, 0, LIMIT, is_writable=True)
    assert guest.read(0, 1) is None
    guest.add(0, PAGE, shared.descriptor, 0, LIMIT, is_writable=True)
    assert guest.read(0, 1) == b"\0"


@pytest.mark.parametrize(("start", "length"), [(0, 2), (3, 2), (1, 1), (2, 1), (0, 8)])
def test_pieces_do_not_overlap(guest: GuestMemory, shared: SharedMemory, start: int, length: int):
    guest.add(PAGE, 3 * PAGE, shared.descriptor, 0, LIMIT, is_writable=True)
    with pytest.raises(VfleetError, match="overlaps"):
        guest.add(start * PAGE, length * PAGE, shared.descriptor, 0, LIMIT, is_writable=True)


def test_the_same_piece_again_changes_nothing(guest: GuestMemory, shared: SharedMemory):
    for _ in range(2):
        guest.add(0, PAGE, shared.descriptor, 0, LIMIT, is_writable=True)
    assert guest.remove(0, PAGE) == [(0, PAGE)]
    assert guest.read(0, 1) is None


def test_memory_ends_at_the_limit(guest: GuestMemory, shared: SharedMemory):
    with pytest.raises(VfleetError, match="--main-memory-bytes"):
        guest.add(PAGE, 2 * PAGE, shared.descriptor, 0, 2 * PAGE, is_writable=True)


def test_there_are_only_so_many_pieces(guest: GuestMemory, shared: SharedMemory):
    for number in range(MAX_PIECES):
        guest.add(number * PAGE, PAGE, shared.descriptor, 0, LIMIT, is_writable=True)
    with pytest.raises(VfleetError, match="at most 256"):
        guest.add(MAX_PIECES * PAGE, PAGE, shared.descriptor, 0, LIMIT, is_writable=True)
    assert len(guest.clear()) == MAX_PIECES


def test_whole_pieces_are_unmapped_and_no_others(guest: GuestMemory, shared: SharedMemory):
    for start in (0, 2, 4):
        guest.add(start * PAGE, 2 * PAGE, shared.descriptor, 0, LIMIT, is_writable=True)
    with pytest.raises(VfleetError, match="whole regions"):
        guest.remove(0, 3 * PAGE)
    assert guest.remove(PAGE * 2, PAGE * 4) == [(2 * PAGE, 2 * PAGE), (4 * PAGE, 2 * PAGE)]
    assert guest.remove(PAGE * 2, PAGE * 4) == []
    assert guest.read(0, 2 * PAGE) is not None
