"""All that an NVMe controller knows is in its tables, and each field counts.

A controller with commands of every kind under way is moved, with one value falsified: then the host must see something
go wrong, or the field is one of those below that do no harm, each with its reason.
"""

import copy
import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest
from support.nvme_host import ENABLE, MAIN_ADDRESS, NAMESPACE_BYTES, PAGE, Buffer, NvmeHost

from hostd.models import nvme_admin as admin
from hostd.models import nvme_commands as io
from hostd.models import nvme_layout as layout
from hostd.models.nvme_layout import Field

HARMLESS = {
    "core.epoch": "it is compared with what was read at the same home only, and that is thrown away by a move",
    "core.cursor": "commands in flight may be worked on in any order",
    "core.turn": "queues may be served in any order",
    "core.alone": "it is slower, and sees faults as well",
}
STEPS = 8


class Story:
    """A host in the middle of everything, and all that it will see to the end of it."""

    def __init__(self) -> None:
        self.host = host = NvmeHost(main_bytes=1 << 20)
        self.buffers: list[Buffer] = []
        host.enable(entries=8)
        host.create_queues(1, entries=12)
        host.create_queues(2, entries=24)
        host.create_queues(3, entries=6, completion=2)
        start = host.model.local_memory.start
        host.rig.image[start : start + NAMESPACE_BYTES] = bytes(index % 251 for index in range(NAMESPACE_BYTES))
        for feature in (1, 5, 8):
            host.command(admin.SET_FEATURES, words=(feature, 0x107))
        host.command(admin.SET_FEATURES, words=(admin.EVENT_CONFIGURATION, 0x1FF))
        host.command(admin.SET_FEATURES, words=(admin.VOLATILE_WRITE_CACHE, 0))
        host.command(admin.SET_FEATURES, words=(admin.TEMPERATURE_THRESHOLD, 350))
        host.command(admin.SET_FEATURES, words=(admin.INTERRUPT_VECTOR, 1 << 16 | 2))
        host.command(admin.SET_FEATURES, words=(0x0A, 1))
        host.set_register(layout.INTMS, 0b101)
        self._tell_an_event_and_let_another_happen()
        self._let_completions_lie()
        self._put_commands_under_way()

    def _tell_an_event_and_let_another_happen(self) -> None:
        host = self.host
        for _ in range(3):
            host.submit(0, admin.EVENT_REQUEST)
        host.set_register(layout.DOORBELLS + 0x800, 0)
        host.rig.run()
        assert len(host.poll()) == 1
        host.set_register(layout.DOORBELLS + 8, 999)
        assert not host.rig.run()

    def _let_completions_lie(self) -> None:
        """Completion queues that have gone round, so that phases differ, with entries that the host has not taken."""
        host = self.host
        for _ in range(14):
            host.io(io.FLUSH, 0, 1)
        host.set_register(layout.MSIX_TABLE + 16 * 2 + 12, 1)
        for queue in (1, 2, 3):
            for _ in range(2):
                host.submit(queue, io.FLUSH)
        host.rig.run()

    def _put_commands_under_way(self) -> None:
        host = self.host
        long = [self._submit(io.WRITE, 0, 40, 512), self._submit(io.READ, 80, 72, 4)]
        ranges = host.buffer(5 * 16, PAGE - 24)
        host.fill(ranges, b"".join(struct.pack("<IIQ", 0, 3 + index, 200 + 30 * index) for index in range(5)))
        host.submit(2, io.DATASET_MANAGEMENT, prp1=ranges.prp1, prp2=ranges.prp2, words=(4, 4, 0), ring=False)
        self._submit(io.WRITE, 400, 16, 0)
        self._submit(io.WRITE_ZEROES, 420, 40, 0)
        host.ring(2)
        for _ in range(STEPS):
            host.rig.step()
        for block in (470, 480):
            self._submit(io.READ, block, 8, 0, queue=1)
            self._submit(io.READ, block, 4, 0, queue=3)
        host.ring(1)
        host.ring(3)
        host.submit(0, admin.GET_FEATURES, words=(5,))
        assert len(long) == 2

    def _submit(self, opcode: int, block: int, blocks: int, offset: int, queue: int = 2) -> int:
        buffer = self.host.buffer(blocks * layout.BLOCK_BYTES, offset, PAGE - 24)
        if opcode == io.WRITE:
            self.host.fill(buffer, bytes((block + index) % 241 for index in range(buffer.length)))
        self.buffers.append(buffer)
        return self.host.submit(
            queue, opcode, prp1=buffer.prp1, prp2=buffer.prp2, words=(block, 0, blocks - 1), ring=False
        )

    def moved(self) -> "Story":
        """Return the same story with the function at another home."""
        rig = self.host.rig
        model, rig.model = rig.model, None  # type: ignore[assignment]  # it is made anew
        try:
            found = copy.deepcopy(self)
        finally:
            rig.model = model
        found.host.rig.move()
        return found

    def end(self) -> tuple[object, ...]:
        """Return all that the host sees until everything is done, and what the controller says then."""
        host = self.host
        for _ in range(3):
            host.rig.run(3000)
            for queue in (0, 1, 2):
                host.poll(queue)
        registers = [host.register(offset) for offset in (layout.CSTS, layout.CC, layout.AQA, layout.INTMS)]
        bases = [host.register(layout.ASQ, 8), host.register(layout.ACQ, 8)]
        host.set_register(layout.MSIX_TABLE + 16 * 2 + 12, 0)
        features = [host.command(admin.GET_FEATURES, words=(feature, 2)).result for feature in (1, 5, 6, 8, 9, 10, 11)]
        features += [host.command(admin.GET_FEATURES, words=(4, part << 20)).result for part in (0, 1)]
        host.submit(0, admin.GET_LOG_PAGE, prp1=host.take_pages(), words=(15 << 16 | 1,))
        host.rig.run(3000)
        host.poll(0)
        last = [self._alone(queue) for queue in (1, 2, 3)]
        seen = {queue: sorted(map(repr, completions.seen)) for queue, completions in host.completion.items()}
        contents = [host.content(buffer) for buffer in self.buffers]
        told = [found.identifier for found in host.completion[0].seen]
        interrupts = {data: count > 0 for data, count in host.rig.interrupts.items()}
        created = [self._create(number) for number in (1, 4)]
        return registers, bases, features, last, seen, contents, told, interrupts, host.medium, created

    def _alone(self, queue: int) -> object:
        before = dict(self.host.rig.interrupts)
        completion = self.host.io(io.FLUSH, 0, 1, queue=queue)
        return completion, {data: count - before.get(data, 0) for data, count in self.host.rig.interrupts.items()}

    def _create(self, number: int) -> int:
        words = (7 << 16 | number, 3)
        return self.host.command(admin.CREATE_COMPLETION_QUEUE, prp1=MAIN_ADDRESS, words=words).status


@pytest.fixture(scope="module")
def story() -> Story:
    return Story()


@pytest.fixture(scope="module")
def truth(story: Story) -> tuple[object, ...]:
    return story.moved().end()


def registers() -> Iterator[Field]:
    yield Field("CC", layout.CC, 4)
    yield Field("CSTS", layout.CSTS, 4)
    yield Field("AQA", layout.AQA, 4)
    yield Field("ASQ", layout.ASQ, 8)
    yield Field("ACQ", layout.ACQ, 8)
    yield Field("INTMS", layout.INTMS, 4)
    for vector in (0, 1, 2):
        yield Field("msix.address", layout.MSIX_TABLE + 16 * vector, 8)
        yield Field("msix.data", layout.MSIX_TABLE + 16 * vector + 8, 4)
        yield Field("msix.control", layout.MSIX_TABLE + 16 * vector + 12, 4)
    yield Field("msix.pending", layout.MSIX_PENDING, 8)


def falsified(value: int, length: int) -> set[int]:
    top = 1 << 8 * length - 1
    return {0, 1, value ^ 1, value ^ 2, value ^ 8, value ^ 0x1000, value ^ top, value + 512} - {value}


def fields_of_tables() -> Iterator[tuple[str, list[Field]]]:
    found: dict[str, list[Field]] = {}
    tables = Story().host.model.layout.tables()
    for field in (*registers(), *(field for table in tables for field in table.each_field())):
        table, _, name = field.name.partition(".")
        found.setdefault(f"{table.partition('[')[0]}.{name}" if name else table, []).append(field)
    yield from found.items()


FIELDS = dict(fields_of_tables())


def sees_something_wrong(story: Story, truth: tuple[object, ...], field: Field, value: int) -> bool:
    told = story.moved()
    told.host.rig.image[field.offset : field.offset + field.length] = value.to_bytes(field.length, "little")
    try:
        return told.end() != truth
    except Exception:  # noqa: BLE001  # whatever it is that went wrong
        return True


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_counts(story: Story, truth: tuple[object, ...], name: str) -> None:
    image = story.host.rig.image
    caught = False
    for field in FIELDS[name]:
        before = int.from_bytes(image[field.offset : field.offset + field.length], "little")
        for value in sorted(falsified(before, field.length)):
            if value < 1 << 8 * field.length and sees_something_wrong(story, truth, field, value):
                caught = True
                break
        if caught:
            break
    assert caught != (name in HARMLESS)


def test_the_story_has_everything_under_way(story: Story) -> None:
    host = story.host
    memory = memoryview(host.rig.image)
    state = host.model.layout
    core = layout.Core(*state.core.get(memory))
    commands = [layout.Command(*state.commands.get(memory, number)) for number in range(32) if core.busy >> number & 1]
    assert {command.kind for command in commands} == {io.READ, io.WRITE, io.DATASET_MANAGEMENT, io.WRITE_ZEROES}
    assert any(command.listed and 0 < command.done < command.length for command in commands)
    assert any(0 < command.extent < command.extents for command in commands)
    assert (core.requests, core.events.bit_count(), core.masked) == (2, 1, 1)
    for queue in (0, 1, 3):
        assert state.heads.get(memory, queue) != state.tails.get(memory, queue)
    phases = {layout.CompletionQueue(*state.completion.get(memory, queue)).phase for queue in (0, 1, 2)}
    assert phases == {0, 1}
    assert host.register(layout.MSIX_PENDING) != 0
    assert host.register(layout.CC) == ENABLE


def test_the_tables_lie_side_by_side(story: Story) -> None:
    tables = story.host.model.layout.tables()
    for table, following in pairwise(tables):
        assert table.end == following.start
    assert tables[-1].end - tables[0].start <= layout.PRIVATE_BYTES


def test_an_image_moves_whole(story: Story, truth: tuple[object, ...]) -> None:
    """The same end with no move, one, and one at each step."""
    assert Story().end() == truth
    often = story.moved()
    while often.host.rig.step():
        often.host.rig.move()
    assert often.end() == truth
