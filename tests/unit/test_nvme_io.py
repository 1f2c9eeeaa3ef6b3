"""The NVMe controller's I/O commands: data and its pages, arbitration, full queues, and how they are refused."""

import struct
from random import Random

import pytest
from support.nvme_host import MAIN_ADDRESS, NAMESPACE_BYTES, PAGE, NvmeHost

from hostd.models import nvme_commands as io
from hostd.models import nvme_completion as status
from hostd.models import nvme_layout as layout

BLOCK = 512
BLOCKS = NAMESPACE_BYTES // BLOCK
DEALLOCATE = 4


@pytest.fixture
def host() -> NvmeHost:
    found = NvmeHost()
    found.enable()
    found.create_queues()
    return found


def data_of(length: int, seed: int = 1) -> bytes:
    return Random(seed).randbytes(length)


@pytest.mark.parametrize("list_offset", [0, 8, PAGE - 256, PAGE - 64, PAGE - 16, PAGE - 8])
@pytest.mark.parametrize("offset", [0, 4, 512, PAGE - 4])
@pytest.mark.parametrize("blocks", [1, 7, 8, 9, 16, 17, 24, 100, 256])
def test_data_of_any_length_at_any_place(host: NvmeHost, blocks: int, offset: int, list_offset: int) -> None:
    data, first = data_of(blocks * BLOCK), 3
    buffer = host.buffer(len(data), offset, list_offset)
    host.fill(buffer, data)
    assert host.io(io.WRITE, first, blocks, buffer.prp1, buffer.prp2).status == 0
    assert host.medium == bytes(first * BLOCK) + data + bytes(NAMESPACE_BYTES - first * BLOCK - len(data))
    buffer = host.buffer(len(data), offset, list_offset)
    assert host.io(io.READ, first, blocks, buffer.prp1, buffer.prp2).status == 0
    assert host.content(buffer) == data


def test_a_read_changes_no_byte_beside_its_buffer(host: NvmeHost) -> None:
    buffer = host.take_pages()
    host.put(buffer, b"\xee" * PAGE)
    assert host.io(io.READ, 0, 1, buffer + 100).status == 0
    assert host.get(buffer, PAGE) == b"\xee" * 100 + bytes(BLOCK) + b"\xee" * (PAGE - 100 - BLOCK)


@pytest.mark.parametrize("opcode", [0x03, 0x04, 0x05, 0x0C, 0x0D, 0x0E, 0x11, 0x15, 0x80, 0xFF])
def test_what_there_is_not_is_an_invalid_opcode(host: NvmeHost, opcode: int) -> None:
    assert host.io(opcode, 0, 1).status == status.INVALID_OPCODE


@pytest.mark.parametrize("opcode", [io.READ, io.WRITE, io.WRITE_ZEROES, io.FLUSH, io.DATASET_MANAGEMENT])
def test_namespaces_and_flags_are_refused_that_cannot_be(host: NvmeHost, opcode: int) -> None:
    buffer = host.take_pages()
    for namespace in (0, 2, 0xFFFFFFFE) if opcode == io.FLUSH else (0, 2, 0xFFFFFFFE, 0xFFFFFFFF):
        answer = host.command(opcode, 1, namespace=namespace, prp1=buffer)
        assert answer.status == status.INVALID_NAMESPACE
    for flags in (1, 2, 0x40, 0x80):
        assert host.command(opcode, 1, flags=flags, prp1=buffer).status == status.INVALID_FIELD
    assert host.medium == bytes(NAMESPACE_BYTES)


def test_flush_is_for_one_namespace_or_all(host: NvmeHost) -> None:
    assert host.command(io.FLUSH, 1).status == 0
    assert host.command(io.FLUSH, 1, namespace=0xFFFFFFFF).status == 0


@pytest.mark.parametrize("opcode", [io.READ, io.WRITE, io.WRITE_ZEROES])
@pytest.mark.parametrize(("block", "blocks"), [(BLOCKS, 1), (BLOCKS - 1, 2), (1 << 32, 1), ((1 << 64) - 1, 1)])
def test_blocks_beyond_the_namespace_are_refused(host: NvmeHost, opcode: int, block: int, blocks: int) -> None:
    assert host.io(opcode, block, blocks, host.take_pages()).status == status.LBA_OUT_OF_RANGE


def test_the_last_block_can_be_used(host: NvmeHost) -> None:
    buffer = host.take_pages()
    host.put(buffer, data_of(BLOCK))
    assert host.io(io.WRITE, BLOCKS - 1, 1, buffer).status == 0
    assert host.medium[-BLOCK:] == data_of(BLOCK)


@pytest.mark.parametrize("opcode", [io.READ, io.WRITE])
def test_a_transfer_longer_than_the_controller_says_is_refused(host: NvmeHost, opcode: int) -> None:
    assert host.io(opcode, 0, 257, host.take_pages()).status == status.INVALID_FIELD


@pytest.mark.parametrize("opcode", [io.READ, io.WRITE])
@pytest.mark.parametrize(
    ("blocks", "prp1", "prp2"),
    [(1, 1, 0), (1, 2, 0), (1, 7, 0), (16, 0, 4), (16, 0, 512), (24, 0, 4), (24, 0, 1), (24, 3, 0)],
)
def test_pointers_that_cannot_be_are_refused(host: NvmeHost, opcode: int, blocks: int, prp1: int, prp2: int) -> None:
    buffer = host.take_pages(2)
    answer = host.io(opcode, 0, blocks, buffer + prp1, buffer + PAGE + prp2)
    assert answer.status == status.PRP_OFFSET_INVALID


@pytest.mark.parametrize("place", [0, 1, 30])
def test_an_entry_of_a_list_must_be_a_page(host: NvmeHost, place: int) -> None:
    buffer = host.buffer(256 * BLOCK)
    host.put(buffer.prp2 + 8 * place, struct.pack("<Q", buffer.pieces[1 + place] + 8))
    assert host.io(io.READ, 0, 256, buffer.prp1, buffer.prp2).status == status.PRP_OFFSET_INVALID


def test_a_list_that_leads_to_no_page_is_refused(host: NvmeHost) -> None:
    place = host.take_pages() + PAGE - 8
    host.put(place, struct.pack("<Q", place))  # it would lead to itself for ever
    assert host.io(io.READ, 0, 24, host.take_pages(), place).status == status.PRP_OFFSET_INVALID


@pytest.mark.parametrize("nowhere", [1 << 60, (1 << 64) - PAGE, MAIN_ADDRESS - PAGE])
def test_pointers_that_point_nowhere_are_transfer_errors(host: NvmeHost, nowhere: int) -> None:
    assert host.io(io.WRITE, 0, 8, nowhere).status == status.DATA_TRANSFER_ERROR
    assert host.io(io.WRITE, 0, 16, host.take_pages(), nowhere).status == status.DATA_TRANSFER_ERROR
    for opcode in (io.READ, io.WRITE):
        assert host.io(opcode, 0, 24, host.take_pages(), nowhere).status == status.DATA_TRANSFER_ERROR
        last_of_page = nowhere + PAGE - 8
        assert host.io(opcode, 0, 24, host.take_pages(), last_of_page).status == status.DATA_TRANSFER_ERROR
    assert host.io(io.READ, 0, 8, nowhere).status == 0, "a posted write's fault is not the device's to see"
    assert host.command(io.DATASET_MANAGEMENT, 1, prp1=nowhere, words=(0, DEALLOCATE)).status == (
        status.DATA_TRANSFER_ERROR
    )


def test_write_zeroes(host: NvmeHost) -> None:
    start = host.model.local_memory.start
    host.rig.image[start : start + NAMESPACE_BYTES] = b"\xaa" * NAMESPACE_BYTES
    assert host.io(io.WRITE_ZEROES, 3, 300).status == 0
    assert host.medium == b"\xaa" * 3 * BLOCK + bytes(300 * BLOCK) + b"\xaa" * (NAMESPACE_BYTES - 303 * BLOCK)
    assert host.io(io.WRITE_ZEROES, 0, BLOCKS).status == 0
    assert host.medium == bytes(NAMESPACE_BYTES)


def ranges(*extents: tuple[int, int]) -> bytes:
    return b"".join(struct.pack("<IIQ", 0, blocks, first) for first, blocks in extents)


@pytest.mark.parametrize("offset", [0, 4, PAGE - 16, PAGE - 20, PAGE - 4])
def test_deallocated_blocks_read_as_zero(host: NvmeHost, offset: int) -> None:
    start = host.model.local_memory.start
    host.rig.image[start : start + NAMESPACE_BYTES] = b"\xaa" * NAMESPACE_BYTES
    extents = ((0, 1), (5, 0), (10, 20), (BLOCKS, 0), (BLOCKS - 1, 1), (40, 100))
    data = ranges(*extents)
    buffer = host.buffer(len(data), offset)
    host.fill(buffer, data)
    answer = host.command(
        io.DATASET_MANAGEMENT, 1, prp1=buffer.prp1, prp2=buffer.prp2, words=(len(extents) - 1, DEALLOCATE)
    )
    assert answer.status == 0
    expected = bytearray(b"\xaa" * NAMESPACE_BYTES)
    for first, blocks in extents:
        expected[first * BLOCK : (first + blocks) * BLOCK] = bytes(blocks * BLOCK)
    assert host.medium == expected


def test_256_ranges(host: NvmeHost) -> None:
    start = host.model.local_memory.start
    host.rig.image[start : start + NAMESPACE_BYTES] = b"\xaa" * NAMESPACE_BYTES
    buffer = host.take_pages()
    host.put(buffer, ranges(*((2 * index, 1) for index in range(256))))
    assert host.command(io.DATASET_MANAGEMENT, 1, prp1=buffer, words=(255, DEALLOCATE)).status == 0
    assert host.medium == (bytes(BLOCK) + b"\xaa" * BLOCK) * 256


def test_ranges_are_refused_that_cannot_be(host: NvmeHost) -> None:
    buffer = host.take_pages(2)
    for first, blocks in ((BLOCKS, 1), ((1 << 64) - 1, 1), (0, 0xFFFFFFFF), (1 << 55, 0)):
        host.put(buffer, ranges((first, blocks)))
        answer = host.command(io.DATASET_MANAGEMENT, 1, prp1=buffer, words=(0, DEALLOCATE))
        assert answer.status == status.LBA_OUT_OF_RANGE
    for prp1, prp2 in ((buffer + 2, 0), (buffer + PAGE - 8, buffer + PAGE + 8)):
        answer = host.command(io.DATASET_MANAGEMENT, 1, prp1=prp1, prp2=prp2, words=(0, DEALLOCATE))
        assert answer.status == status.PRP_OFFSET_INVALID


def test_hints_are_taken_and_do_nothing(host: NvmeHost) -> None:
    assert host.command(io.DATASET_MANAGEMENT, 1, prp1=1, words=(0, 3)).status == 0


def test_a_full_completion_queue_holds_commands_back_and_loses_none() -> None:
    host = NvmeHost()
    host.enable()
    host.create_queues(1, entries=4)
    host.create_queues(2, entries=64, completion=1)
    commands = [host.submit(2, io.READ, prp1=host.take_pages(), words=(0, 0, 7)) for _ in range(40)]
    commands += [host.submit(1, io.FLUSH) for _ in range(3)]
    seen: list[int] = []
    while len(seen) < len(commands):
        host.rig.run()
        found = host.poll(1)
        assert len(found) == 3 or len(seen) + len(found) == len(commands), "the queue has room for three"
        seen += [completion.identifier for completion in found]
    assert sorted(seen) == sorted(commands)
    assert not host.rig.run()


def test_queues_take_turns() -> None:
    host = NvmeHost()
    host.enable()
    for queue in (1, 2, 3):
        host.create_queues(queue, entries=128)
        for _ in range(100):
            host.submit(queue, io.FLUSH, ring=False)
    for queue in (1, 2, 3):
        host.ring(queue)
    order: list[int] = []
    while host.rig.step():
        order += [queue for queue in (1, 2, 3) for _ in host.poll(queue)]
    assert len(order) == 300
    for queue in (1, 2, 3):
        last = max(index for index, found in enumerate(order) if found == queue)
        assert last >= 200, f"queue {queue} was done before the others had their turn"
        assert queue in order[: 3 * 32]


def test_long_commands_take_turns(host: NvmeHost) -> None:
    long = [host.submit(1, io.WRITE_ZEROES, words=(0, 0, 255)) for _ in range(2)]
    host.rig.step()
    host.rig.step()
    short = host.submit(1, io.WRITE_ZEROES, words=(256, 0, 7), ring=True)
    host.rig.run()
    found = [completion.identifier for completion in host.poll(1)]
    assert sorted(found) == sorted([*long, short])
    assert abs(found.index(long[0]) - found.index(long[1])) == 1, "they end together"


def test_many_commands_are_fetched_at_once_and_moved_in_flight(host: NvmeHost) -> None:
    host.create_queues(2, entries=64)
    for block in range(32):
        host.submit(2, io.WRITE_ZEROES, words=(block, 0, 0), ring=False)
    host.ring(2)
    host.rig.step()
    core = host.model.layout.core.get(memoryview(host.rig.image))
    assert core[1].bit_count() == 32
    host.rig.move()
    host.rig.run()
    assert len({completion.identifier for completion in host.poll(2)}) == 32


def test_queues_wrap(host: NvmeHost) -> None:
    host.create_queues(2, entries=5)
    for _ in range(40):
        commands = [host.submit(2, io.FLUSH, ring=False) for _ in range(3)]
        host.ring(2)
        host.rig.run()
        assert [completion.identifier for completion in host.poll(2)] == commands


def test_completions_tell_the_head(host: NvmeHost) -> None:
    for _ in range(3):
        host.submit(1, io.FLUSH, ring=False)
    host.ring(1)
    host.rig.run()
    assert {completion.head for completion in host.poll(1)} == {3}


def test_what_is_read_too_early_is_read_again(host: NvmeHost) -> None:
    """A doorbell between read and finish makes another fetch."""
    first = host.submit(1, io.FLUSH)
    begun = host.rig.begin()
    assert begun is not None
    second = host.submit(1, io.FLUSH)
    assert not host.rig.end(begun)
    host.rig.run()
    assert [completion.identifier for completion in host.poll(1)] == [first, second]


def test_work_says_what_of_the_namespace_it_touches(host: NvmeHost) -> None:
    data = data_of(64 * BLOCK)
    buffer = host.buffer(len(data), 512)
    host.fill(buffer, data)
    for opcode in (io.WRITE, io.READ, io.WRITE_ZEROES):
        host.submit(1, opcode, prp1=buffer.prp1, prp2=buffer.prp2, words=(5, 0, 63))
    place = host.take_pages()
    host.put(place, ranges((9, 30)))
    host.submit(1, io.DATASET_MANAGEMENT, prp1=place, words=(0, DEALLOCATE))
    while True:
        host.rig.check_touches()
        if not host.rig.step():
            break
    assert len(host.poll(1)) == 4


def test_commands_beyond_those_in_flight_wait(host: NvmeHost) -> None:
    host.create_queues(2, entries=128)
    for _ in range(100):
        host.submit(2, io.WRITE_ZEROES, words=(0, 0, 0), ring=False)
    host.ring(2)
    most = 0
    while host.rig.step():
        most = max(most, host.model.layout.core.get(memoryview(host.rig.image))[1].bit_count())
    assert most == layout.COMMANDS
    assert len(host.poll(2)) == 100


def inject(host: NvmeHost, name: str, count: int) -> bool:
    stores = host.model.inject(memoryview(host.rig.image), name, count)
    host.rig._apply(stores or ())
    return stores is not None


def test_an_injected_media_error_ends_reads_and_writes(host: NvmeHost) -> None:
    buffer = host.take_pages()
    host.put(buffer, data_of(BLOCK))
    assert inject(host, "media", 2)
    assert inject(host, "media", 1)
    assert host.io(io.FLUSH, 0, 1).status == 0
    assert host.io(io.READ, BLOCKS, 1, buffer).status == status.LBA_OUT_OF_RANGE
    assert host.io(io.WRITE, 0, 1, buffer).status == status.WRITE_FAULT
    host.rig.move()
    assert host.io(io.READ, 0, 1, buffer).status == status.UNRECOVERED_READ_ERROR
    assert host.io(io.WRITE, 0, 1, buffer).status == status.WRITE_FAULT
    assert host.medium == bytes(NAMESPACE_BYTES)
    assert host.io(io.WRITE, 0, 1, buffer).status == 0


def test_injected_errors_end_with_a_reset(host: NvmeHost) -> None:
    assert inject(host, "media", 1 << 16)
    host.disable()
    host.enable()
    host.create_queues()
    assert host.io(io.READ, 0, 1, host.take_pages()).status == 0


def test_what_it_cannot_inject_is_refused(host: NvmeHost) -> None:
    assert not inject(host, "completion", 1)
