"""Where an NVMe controller keeps all that it knows: its registers in BAR 0, and the tables of its own memory.

Each table is named here, field by field, and nothing else is kept anywhere: a controller whose image is copied goes on
where it was, and what a wrong copy of any one field does can be tried. All values are little-endian.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct, calcsize
from typing import Final, NamedTuple

from hostd.models.base import Store
from vfleet.address import PAGE_BYTES

# Registers in BAR 0 (NVMe 1.4, 3.1).
CAP: Final = 0x00
VS: Final = 0x08
INTMS: Final = 0x0C
INTMC: Final = 0x10
CC: Final = 0x14
CSTS: Final = 0x1C
NSSR: Final = 0x20
AQA: Final = 0x24
ASQ: Final = 0x28
ACQ: Final = 0x30
DOORBELLS: Final = 0x1000
MSIX_TABLE: Final = 0x2000
MSIX_PENDING: Final = 0x3000
REGISTER_BYTES: Final = 0x4000

CC_ENABLE: Final = 1 << 0
CC_SHUTDOWN: Final = 3 << 14
CSTS_READY: Final = 1 << 0
CSTS_FATAL: Final = 1 << 1
CSTS_SHUTDOWN_OCCURRING: Final = 1 << 2
CSTS_SHUTDOWN_COMPLETE: Final = 2 << 2

IO_QUEUES: Final = 8
QUEUES: Final = 1 + IO_QUEUES
VECTORS: Final = QUEUES
MAX_ENTRIES: Final = 1024
ENTRY_BYTES: Final = 64
COMPLETION_BYTES: Final = 16
COMMANDS: Final = 32
EVENT_REQUESTS: Final = 4
BLOCK_BYTES: Final = 512
MAX_TRANSFER_SHIFT: Final = 5
MAX_TRANSFER_BYTES: Final = PAGE_BYTES << MAX_TRANSFER_SHIFT
LIST_ENTRIES: Final = 1 << MAX_TRANSFER_SHIFT
"""Pages of the longest transfer after its first: one more than its bytes need, when it begins inside a page."""
FEATURES: Final = 12


@dataclass(frozen=True, slots=True)
class Field:
    """One value of one row of a table: where in the image, and its bytes."""

    name: str
    offset: int
    length: int


class Table:
    """Rows of the same fields, from `start` in the image. `fields` are names with their formats (`struct`)."""

    __slots__ = ("_struct", "fields", "name", "row_bytes", "rows", "start")

    def __init__(self, name: str, start: int, fields: tuple[tuple[str, str], ...], rows: int = 1) -> None:
        self.name = name
        self.start = start
        self.fields = fields
        self.rows = rows
        self._struct = Struct("<" + "".join(letters for _, letters in fields))
        self.row_bytes = self._struct.size

    @property
    def end(self) -> int:
        """Where the table ends in the image."""
        return self.start + self.rows * self.row_bytes

    def get(self, memory: memoryview, row: int = 0) -> tuple[int, ...]:
        """Return a row's values."""
        return self._struct.unpack_from(memory, self.start + row * self.row_bytes)

    def place(self, row: int) -> int:
        """Return where a row begins in the image."""
        return self.start + row * self.row_bytes

    def put(self, row: int, *values: int) -> Store:
        """Return the store that gives a row its values."""
        return self.start + row * self.row_bytes, self._struct.pack(*values)

    def each_field(self) -> Iterator[Field]:
        """Yield every value of every row."""
        for row in range(self.rows):
            offset = self.start + row * self.row_bytes
            for name, letters in self.fields:
                length = calcsize("<" + letters)
                yield Field(f"{self.name}[{row}].{name}" if self.rows > 1 else f"{self.name}.{name}", offset, length)
                offset += length


class Entry(NamedTuple):
    """An entry of a submission queue, without the words that no command here uses (NVMe 1.4, 4.2)."""

    opcode: int
    flags: int
    identifier: int
    namespace: int
    prp1: int
    prp2: int
    word10: int
    word11: int
    word12: int
    word13: int


ENTRY: Final = Struct("<BBHI16xQQ4I8x")


class Core(NamedTuple):
    """What a controller knows beside its queues."""

    epoch: int
    """Resets of the controller: what was read for a queue before one is not what its successor holds."""
    busy: int
    """A bit for each command in flight."""
    cursor: int
    """The command whose turn it is."""
    turn: int
    """The submission queue whose turn it is."""
    alone: int
    """1: work on one command at a time, to find the one whose DMA faults."""
    requests: int
    """Asynchronous event requests outstanding."""
    events: int
    """A bit for each event that happened and was not told yet."""
    masked: int
    """1: no event is told until the error log has been read."""
    media_errors: int
    """Reads and writes that the medium fails, from the next one on: it was injected."""


class CompletionQueue(NamedTuple):
    """A completion queue: `entries` is 0 where there is none."""

    base: int
    entries: int
    vector: int
    head: int
    tail: int
    phase: int
    interrupts: int


class Command(NamedTuple):
    """An I/O command in flight, by its opcode, `kind`."""

    kind: int
    queue: int
    identifier: int
    extents: int
    """Parts of the namespace that it is for: 1, or the ranges of a deallocation."""
    extent: int
    """Parts that are done."""
    listed: int
    """Pages of main memory after the first that are in `lists`."""
    start: int
    """Where in the namespace the part at hand begins, in bytes."""
    length: int
    """Bytes of the part at hand; 0 if its range has not been read yet."""
    done: int
    """Bytes of it that are done."""
    prp1: int
    prp2: int
    """The second page, or where the list goes on."""


_CORE: Final = "IIBBBBBBH"
_COMPLETION_QUEUE: Final = "QHHHHBB"
_COMMAND: Final = "BHHHHHQIIQQ"


class Layout:
    """The tables of a controller whose own memory begins at `start` in the image."""

    def __init__(self, start: int) -> None:
        self.start = start
        self.core = Table("core", start, _fields(Core._fields, _CORE))
        self.features = Table("features", self.core.end, (("value", "I"),), FEATURES)
        self.requests = Table("requests", self.features.end, (("identifier", "H"),), EVENT_REQUESTS)
        self.heads = Table("heads", self.requests.end, (("head", "H"),), QUEUES)
        self.tails = Table("tails", self.heads.end, (("tail", "H"),), QUEUES)
        submission = (("base", "Q"), ("entries", "H"), ("completion", "H"))
        self.submission = Table("submission", self.tails.end, submission, QUEUES)
        completion = _fields(CompletionQueue._fields, _COMPLETION_QUEUE)
        self.completion = Table("completion", self.submission.end, completion, QUEUES)
        self.commands = Table("commands", self.completion.end, _fields(Command._fields, _COMMAND), COMMANDS)
        self.lists = Table("lists", self.commands.end, (("page", "Q"),), COMMANDS * LIST_ENTRIES)

    def tables(self) -> tuple[Table, ...]:
        """Return all of them, in the order in which they lie."""
        return (
            self.core,
            self.features,
            self.requests,
            self.heads,
            self.tails,
            self.submission,
            self.completion,
            self.commands,
            self.lists,
        )


def _fields(names: tuple[str, ...], letters: str) -> tuple[tuple[str, str], ...]:
    return tuple(zip(names, letters, strict=True))


PRIVATE_BYTES: Final = -(-(Layout(0).lists.end) // PAGE_BYTES) * PAGE_BYTES
