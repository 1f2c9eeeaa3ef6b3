"""The host's side of an NVMe controller in the rig: admin and I/O queues, commands of any kind, their completions."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from support.bus_master_rig import Rig

from hostd.models import create_model
from hostd.models import nvme_admin as admin
from hostd.models import nvme_layout as layout
from hostd.models.nvme import Nvme
from vfleet.address import bar_span
from vfleet.limits import INTERRUPT_PAGE_ADDRESS

IDENTITY = 0x1122_3344_5566_7788
MAIN_ADDRESS = 1 << 32
NAMESPACE_BYTES = 256 << 10
BARS: Mapping[int, int] = {0: 16 << 10, 2: NAMESPACE_BYTES}
PAGE = 4096
ENABLE = 0x00460001
SUCCESS = 0


@dataclass
class Completion:
    result: int
    head: int
    queue: int
    identifier: int
    status: int

    @property
    def code(self) -> int:
        """The status without "do not retry"."""
        return self.status & 0x7FF


@dataclass
class Submission:
    base: int
    entries: int
    completion: int
    tail: int = 0
    used: int = 0


@dataclass
class Completions:
    base: int
    entries: int
    head: int = 0
    phase: int = 1
    seen: list[Completion] = field(default_factory=list)


@dataclass
class Buffer:
    """Main memory for a command's data: its PRP entries, the addresses of its pieces, and all pages that it takes."""

    length: int
    prp1: int
    prp2: int
    pieces: list[int]
    pages: list[int]


def new_model() -> Nvme:
    model = create_model("nvme", IDENTITY, BARS)
    assert isinstance(model, Nvme)
    return model


class NvmeHost:
    """A controller in the rig, not enabled yet."""

    def __init__(self, main_bytes: int = 2 << 20) -> None:
        self.rig = Rig(new_model, bar_span(BARS) + Nvme.private_bytes, main_bytes, MAIN_ADDRESS)
        self._free = MAIN_ADDRESS
        self.submission: dict[int, Submission] = {}
        self.completion: dict[int, Completions] = {}
        self._identifier = 0
        self._given_back: list[int] = []

    @property
    def model(self) -> Nvme:
        assert isinstance(self.rig.model, Nvme)
        return self.rig.model

    @property
    def medium(self) -> bytes:
        local = self.model.local_memory
        return bytes(self.rig.image[local.start : local.stop])

    def take_pages(self, count: int = 1) -> int:
        """Return the address of pages of main memory that nothing else uses: zeros."""
        if count == 1 and self._given_back:
            address = self._given_back.pop()
            self.put(address, bytes(PAGE))
            return address
        address, self._free = self._free, self._free + count * PAGE
        assert self._free <= MAIN_ADDRESS + len(self.rig.main)
        return address

    def buffer(self, length: int, offset: int = 0, list_offset: int = 0) -> Buffer:
        """Return a buffer in scattered pages, with the place in their pages where it and its PRP list begin."""
        pages = [self.take_pages() for _ in range(-(-(offset + length) // PAGE))][::-1]
        found = Buffer(length, pages[0] + offset, 0xDEAD, [pages[0] + offset, *pages[1:]], pages)
        if len(pages) == 2:
            found.prp2 = pages[1]
        elif len(pages) > 2:
            found.prp2 = self._put_list(found, pages[1:], list_offset)
        return found

    def _put_list(self, buffer: Buffer, pages: list[int], offset: int) -> int:
        place = self.take_pages() + offset
        buffer.pages = [*buffer.pages, place - offset]
        room = (PAGE - place % PAGE) // 8
        if len(pages) > room:
            pages = [*pages[: room - 1], self._put_list(buffer, pages[room - 1 :], 0)]
        self.put(place, struct.pack(f"<{len(pages)}Q", *pages))
        return place

    def give_back(self, buffer: Buffer) -> None:
        """Let others have a buffer's pages."""
        self._given_back += buffer.pages

    def fill(self, buffer: Buffer, data: bytes) -> None:
        for address in buffer.pieces:
            length = min(PAGE - address % PAGE, len(data))
            self.put(address, data[:length])
            data = data[length:]

    def content(self, buffer: Buffer) -> bytes:
        found = b""
        for address in buffer.pieces:
            found += self.get(address, min(PAGE - address % PAGE, buffer.length - len(found)))
        return found

    def put(self, address: int, data: bytes) -> None:
        start = address - MAIN_ADDRESS
        self.rig.main[start : start + len(data)] = data

    def get(self, address: int, length: int) -> bytes:
        start = address - MAIN_ADDRESS
        return bytes(self.rig.main[start : start + length])

    def register(self, offset: int, length: int = 4) -> int:
        return int.from_bytes(self.rig.read(offset, length), "little")

    def set_register(self, offset: int, value: int, length: int = 4) -> None:
        self.rig.write(offset, value.to_bytes(length, "little"))

    def enable(self, entries: int = 16) -> None:
        """Give the controller an admin queue, all vectors unmasked, and enable it."""
        self.submission = {0: Submission(self.take_pages(-(-entries * 64 // PAGE)), entries, 0)}
        self.completion = {0: Completions(self.take_pages(-(-entries * 16 // PAGE)), entries)}
        self.set_register(layout.AQA, (entries - 1) << 16 | (entries - 1))
        for register, base in ((layout.ASQ, self.submission[0].base), (layout.ACQ, self.completion[0].base)):
            self.set_register(register, base & 0xFFFFFFFF)
            self.set_register(register + 4, base >> 32)
        for vector in range(layout.VECTORS):
            entry = struct.pack("<QQ", INTERRUPT_PAGE_ADDRESS, vector)
            self.rig.write(layout.MSIX_TABLE + 16 * vector, entry[:8])
            self.rig.write(layout.MSIX_TABLE + 16 * vector + 8, entry[8:])
        self.set_register(layout.CC, ENABLE)
        assert self.register(layout.CSTS) == 1

    def disable(self) -> None:
        self.set_register(layout.CC, ENABLE & ~1)
        self.submission, self.completion = {}, {}

    def create_queues(self, queue: int = 1, entries: int = 16, *, completion: int | None = None) -> None:
        """Create a submission queue, and its completion queue unless that exists."""
        number = queue if completion is None else completion
        if number not in self.completion:
            base = self.take_pages(-(-entries * 16 // PAGE))
            created = self.command(
                admin.CREATE_COMPLETION_QUEUE, prp1=base, words=((entries - 1) << 16 | number, number << 16 | 3)
            )
            assert created.status == SUCCESS
            self.completion[number] = Completions(base, entries)
        base = self.take_pages(-(-entries * 64 // PAGE))
        created = self.command(
            admin.CREATE_SUBMISSION_QUEUE, prp1=base, words=((entries - 1) << 16 | queue, number << 16 | 1)
        )
        assert created.status == SUCCESS
        self.submission[queue] = Submission(base, entries, number)

    def room(self, queue: int) -> int:
        """How many commands a submission queue can take, by the head that the last completion told."""
        ring = self.submission[queue]
        return ring.entries - 1 - ring.used

    def submit(
        self,
        queue: int,
        opcode: int,
        *,
        identifier: int | None = None,
        namespace: int = 1,
        prp1: int = 0,
        prp2: int = 0,
        words: tuple[int, ...] = (),
        flags: int = 0,
        ring: bool = True,
    ) -> int:
        """Put a command into a queue; return its identifier."""
        if identifier is None:
            self._identifier = identifier = (self._identifier + 1) % 0x10000
        words = (*words, *(0,) * (6 - len(words)))
        entry = struct.pack("<BBHI16xQQ6I", opcode, flags, identifier, namespace, prp1, prp2, *words)
        self.submit_raw(queue, entry, ring=ring)
        return identifier

    def submit_raw(self, queue: int, entry: bytes, *, ring: bool = True) -> None:
        found = self.submission[queue]
        assert self.room(queue), "the queue is full"
        self.put(found.base + found.tail * 64, entry)
        found.tail, found.used = (found.tail + 1) % found.entries, found.used + 1
        if ring:
            self.ring(queue)

    def ring(self, queue: int) -> None:
        self.set_register(layout.DOORBELLS + queue * 8, self.submission[queue].tail)

    def poll(self, number: int = 0, *, ring: bool = True) -> list[Completion]:
        """Take all completions of a queue, and ring for them."""
        queue = self.completion[number]
        found = []
        while True:
            result, _, head, submission, identifier, status = struct.unpack(
                "<IIHHHH", self.get(queue.base + queue.head * 16, 16)
            )
            if status & 1 != queue.phase:
                break
            queue.head += 1
            if queue.head == queue.entries:
                queue.head, queue.phase = 0, queue.phase ^ 1
            taken = Completion(result, head, submission, identifier, status >> 1)
            source = self.submission.get(submission)
            if source is not None:
                source.used = (source.tail - head) % source.entries
            found.append(taken)
        if found and ring:
            self.set_register(layout.DOORBELLS + number * 8 + 4, queue.head)
        queue.seen += found
        return found

    def command(self, opcode: int, queue: int = 0, **arguments: object) -> Completion:
        """Do one command to its end, alone."""
        identifier = self.submit(queue, opcode, **arguments)  # type: ignore[arg-type]  # passed on
        self.rig.run()
        (completion,) = self.poll(self.submission[queue].completion)
        assert (completion.queue, completion.identifier) == (queue, identifier)
        return completion

    def io(self, opcode: int, block: int, blocks: int, prp1: int = 0, prp2: int = 0, queue: int = 1) -> Completion:
        """Do one I/O command to its end, alone."""
        words = (block & 0xFFFFFFFF, block >> 32, blocks - 1)
        return self.command(opcode, queue, prp1=prp1, prp2=prp2, words=words)
