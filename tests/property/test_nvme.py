"""The NVMe controller under random commands, moves, discarded reads, aborts, deletions and resets; and under garbage.

Each command completes exactly once, by identifier and content, wherever the controller was when it was worked on.
"""

import struct
from dataclasses import dataclass
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st
from support.nvme_host import MAIN_ADDRESS, NAMESPACE_BYTES, PAGE, Buffer, Completion, NvmeHost

from hostd.models import nvme_admin as admin
from hostd.models import nvme_commands as io
from hostd.models import nvme_completion as status
from hostd.models import nvme_layout as layout

PAGES = NAMESPACE_BYTES // PAGE
BLOCKS_A_PAGE = PAGE // layout.BLOCK_BYTES
QUEUES = {1: (1, 7), 2: (2, 40), 3: (2, 16)}
"""Submission queues: completion queue and entries. Two share one, which is smaller than both together."""


@dataclass
class Sent:
    """A command that has no completion yet, and the part of the namespace that it alone is for."""

    opcode: int
    first: int
    pages: int
    buffer: Buffer
    data: bytes


class World:
    """A host that knows what the namespace must hold, and which commands must still be completed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.host = NvmeHost(main_bytes=4 << 20)
        self.expected = bytearray(NAMESPACE_BYTES)
        self.sent: dict[tuple[int, int], Sent] = {}
        self.uncertain: dict[tuple[int, int], bool] = {}
        self.completed = 0
        self.identifier = 0
        self.set_up()

    def set_up(self) -> None:
        self.host.enable()
        for queue, (completion, entries) in QUEUES.items():
            self.host.create_queues(queue, entries, completion=completion)

    def submit(self) -> None:
        queue = self.random.choice(list(QUEUES))
        pages = min(self.random.choice((1, 1, 1, 2, 3, 8, 31)), PAGES)
        first = self.random.randrange(PAGES - pages + 1)
        busy = {page for sent in self.sent.values() for page in range(sent.first, sent.first + sent.pages)}
        if not self.host.room(queue) or busy & set(range(first, first + pages)):
            return
        opcode = self.random.choice((io.READ, io.READ, io.WRITE, io.WRITE, io.WRITE_ZEROES, io.DATASET_MANAGEMENT))
        offset = self.random.choice((0, 0, 4, 512, PAGE - 4))
        words = (first * BLOCKS_A_PAGE, 0, pages * BLOCKS_A_PAGE - 1)
        data = self.random.randbytes(pages * PAGE)
        if opcode == io.DATASET_MANAGEMENT:
            data = b"".join(
                struct.pack("<IIQ", 0, BLOCKS_A_PAGE, page * BLOCKS_A_PAGE) for page in range(first, first + pages)
            )
            words = (pages - 1, 4, 0)
        buffer = self.host.buffer(len(data), offset, self.random.choice((0, PAGE - 16)))
        if opcode in (io.WRITE, io.DATASET_MANAGEMENT):
            self.host.fill(buffer, data)
        self.identifier = (self.identifier + 1) % 0x10000
        self.host.submit(
            queue,
            opcode,
            identifier=self.identifier,
            prp1=buffer.prp1,
            prp2=buffer.prp2,
            words=words,
            ring=self.random.random() < 0.7,
        )
        self.sent[queue, self.identifier] = Sent(opcode, first, pages, buffer, data)

    def ring(self) -> None:
        for queue in QUEUES:
            self.host.ring(queue)

    def step(self) -> None:
        self.host.rig.step()

    def move(self) -> None:
        before = self.host.model.work(memoryview(self.host.rig.image))
        self.host.rig.move()
        assert self.host.model.work(memoryview(self.host.rig.image)) == before

    def discard(self) -> None:
        """Reads are done for work that the host's next access may change."""
        begun = self.host.rig.begin()
        if begun is not None:
            self.random.choice((self.submit, self.poll, self.move))()
            self.host.rig.end(begun)

    def check_touches(self) -> None:
        self.host.rig.check_touches()

    def abort(self) -> None:
        if self.sent:
            queue, identifier = self.random.choice(list(self.sent))
            self.uncertain[queue, identifier] = True
            assert self.host.command(admin.ABORT, words=(identifier << 16 | queue,)).status == 0

    def delete(self) -> None:
        """Delete a queue and create it anew: what it had in flight ends with it, what it had not begun never does."""
        queue = self.random.choice(list(QUEUES))
        assert self.host.command(admin.DELETE_SUBMISSION_QUEUE, words=(queue,)).status == 0
        completion, entries = QUEUES[queue]
        self.poll(deleted=queue)
        self.forget(queue)
        self.host.create_queues(queue, entries, completion=completion)

    def reset(self) -> None:
        self.host.disable()
        for queue in QUEUES:
            self.forget(queue)
        self.set_up()

    def forget(self, queue: int) -> None:
        """What a queue still had has no completion any more; a write of it may be done in part."""
        for key in [key for key in self.sent if key[0] == queue]:
            self.done_in_part(self.sent.pop(key))
        self.uncertain = {key: True for key in self.uncertain if key in self.sent}

    def done_in_part(self, sent: Sent) -> None:
        start, end = sent.first * PAGE, (sent.first + sent.pages) * PAGE
        found = self.host.medium[start:end]
        if sent.opcode == io.READ:
            assert found == self.expected[start:end]
        data = bytes(end - start) if sent.opcode != io.WRITE else sent.data
        for offset in range(0, end - start, 4):
            old = self.expected[start + offset : start + offset + 4]
            assert found[offset : offset + 4] in (old, data[offset : offset + 4])
        self.expected[start:end] = found

    def poll(self, deleted: int = 0) -> None:
        for completion in {completion for completion, _ in QUEUES.values()}:
            for found in self.host.poll(completion):
                self.check(found, deleted)

    def check(self, found: Completion, deleted: int) -> None:
        key = found.queue, found.identifier
        sent = self.sent.pop(key)  # a second completion, or one of nobody's, finds none
        may_abort = self.uncertain.pop(key, False)
        self.completed += 1
        if found.status == status.SUCCESS:
            start, end = sent.first * PAGE, (sent.first + sent.pages) * PAGE
            if sent.opcode == io.READ:
                assert self.host.content(sent.buffer) == self.expected[start:end]
            else:
                self.expected[start:end] = sent.data if sent.opcode == io.WRITE else bytes(end - start)
        else:
            aborted = may_abort and found.status == status.ABORT_REQUESTED
            assert aborted or (found.queue == deleted and found.status == status.ABORTED_SUBMISSION_QUEUE_DELETED)
            self.done_in_part(sent)
        self.host.give_back(sent.buffer)

    def finish(self) -> None:
        self.ring()
        while self.sent:
            before = len(self.sent)
            self.host.rig.run_with_moves(self.random)
            self.poll()
            assert len(self.sent) < before, "lost"
        assert self.host.medium == self.expected
        assert not self.host.rig.run()
        self.poll()


EVENTS = ["submit"] * 12 + ["step"] * 12 + ["poll", "poll", "ring", "move", "move", "discard", "check_touches"]
RARE = ["abort", "delete", "reset"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([*EVENTS, *RARE]), min_size=30, max_size=150), st.integers(0, 1 << 32))
def test_each_command_completes_once(events: list[str], seed: int) -> None:
    world = World(seed)
    for event in events:
        getattr(world, event)()
    world.finish()


def test_each_command_completes_once_in_a_long_life() -> None:
    world = World(7)
    for event in world.random.choices([*EVENTS * 8, *RARE], k=4000):
        getattr(world, event)()
    world.finish()
    assert world.completed > 500


INTERESTING = (0, 1, 2, 3, 7, 8, 0x7FFF, 0xFFFF, 0x10000, 0xFFFFFFFF, 1 << 31)
ADDRESSES = (
    0,
    MAIN_ADDRESS,
    MAIN_ADDRESS + 8,
    MAIN_ADDRESS + PAGE - 8,
    MAIN_ADDRESS + PAGE + 4,
    MAIN_ADDRESS + (1 << 20) - 8,
    1 << 60,
    (1 << 64) - PAGE,
    (1 << 64) - 8,
    (1 << 64) - 1,
)
OPCODES = (*range(0x0D), 0x10, 0x18, 0x80, 0xFF)


def hostile_entry(random: Random) -> bytes:
    """An entry of random bytes, or one that looks good in most of its fields."""
    if random.random() < 0.2:
        return random.randbytes(64)
    words = [
        random.choice((random.choice(INTERESTING), random.getrandbits(32), random.getrandbits(4))) for _ in "123456"
    ]
    return struct.pack(
        "<BBHI16xQQ6I",
        random.choice(OPCODES),
        random.choice((0, 0, 0, 0, random.getrandbits(8))),
        random.getrandbits(16),
        random.choice((1, 1, 1, 0, 2, 0xFFFFFFFF)),
        random.choice(ADDRESSES),
        random.choice(ADDRESSES),
        *words,
    )


def hostile_access(random: Random, host: NvmeHost) -> None:
    """A write or read of any register or doorbell, of any size."""
    length = random.choice((1, 2, 4, 4, 4, 8, 16, 4096))
    regions = ((0, 0x40), (layout.DOORBELLS, 0x60), (layout.MSIX_TABLE, 0x90), (layout.MSIX_PENDING, 16), (0, 1 << 14))
    start, size = random.choice(regions)
    offset = (start + random.randrange(size)) // length * length
    if random.random() < 0.3:
        host.rig.read(offset, length)
    else:
        value = random.choice((random.choice(INTERESTING), random.getrandbits(5), random.getrandbits(8 * length)))
        host.rig.write(offset, (value % (1 << 8 * length)).to_bytes(length, "little"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 32))
def test_garbage_never_raises_and_a_reset_mends_all(seed: int) -> None:
    random = Random(seed)
    host = NvmeHost(main_bytes=1 << 20)
    host.enable()
    for queue in (1, 2):
        host.create_queues(queue)
    host.rig.main[:PAGE] = random.randbytes(PAGE)
    for _ in range(25):
        if random.random() < 0.3:
            hostile_access(random, host)
        else:
            queue = random.choice((0, 1, 2))
            found = host.submission[queue]
            host.put(found.base + found.tail * 64, hostile_entry(random))
            found.tail = (found.tail + 1) % found.entries
            host.ring(queue)
        for _ in range(random.choice((0, 1, 5, 20))):
            host.rig.step()
            if random.random() < 0.1:
                host.rig.move()
            host.rig.check_touches()
    host.set_register(layout.CC, 0)
    host.rig.run()
    host._free = MAIN_ADDRESS
    host.rig.main[:] = bytes(len(host.rig.main))
    host.enable()
    host.create_queues()
    buffer = host.take_pages()
    host.put(buffer, b"as before")
    assert host.io(io.WRITE, 3, 1, buffer).status == 0
    assert host.medium[1536:].startswith(b"as before")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_each_bad_command_has_its_completion_or_is_fatal(seed: int) -> None:
    """Whatever is put into a queue, the host hears of it: unless the controller says that it can't go on."""
    random = Random(seed)
    host = NvmeHost(main_bytes=1 << 20)
    host.enable()
    host.create_queues(entries=64)
    host.rig.main[:PAGE] = bytes(PAGE)
    sent = []
    for _ in range(60):
        entry = hostile_entry(random)
        (identifier,) = struct.unpack_from("<H", entry, 2)
        sent.append(identifier)
        # Reads go where no queue is.
        host.submit_raw(
            1, entry[:24] + struct.pack("<QQ", *(random.choice((0, 1 << 60, 8, 7)) for _ in "12")) + entry[40:]
        )
    host.rig.run_with_moves(random)
    if host.register(layout.CSTS) == 1:
        assert sorted(found.identifier for found in host.poll(1)) == sorted(sent)
    else:
        assert host.register(layout.CSTS) & layout.CSTS_FATAL
