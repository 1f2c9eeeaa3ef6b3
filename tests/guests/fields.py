"""Every field of what moves with an NVMe function, how it is falsified, and what Linux's driver has to do with it.

The fields of a table are those of one row: of the queue that the guest has for I/O, of a command in flight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hostd import engine_part
from hostd.models import nvme_layout as layout
from hostd.models.nvme import Nvme
from hostd.models.nvme_commands import READ, WRITE
from hostd.models.nvme_layout import Command, CompletionQueue, Core, Layout, Table
from vfleet.address import PAGE_BYTES, bar_layout, bar_span

BARS = {0: 16 << 10, 2: 16 << 20}
QUEUE = 1  # the guest has one of each for I/O
LAYOUT = Layout(bar_span(BARS))
NAMESPACE = range(bar_layout(BARS)[2], bar_layout(BARS)[2] + BARS[2])
ENGINE = bar_span(BARS) + Nvme.private_bytes
IMAGE_BYTES = ENGINE + engine_part.ENGINE_BYTES
STRIDE = 8
USED_BYTES = 1 << 20  # of the namespace
WRITES = engine_part._WRITES

Place = Callable[[memoryview], int | None]
"""Where a field is in the image; None if there is nothing of the kind at the moment."""
Change = Callable[[memoryview, int], int]
"""What a field is changed to, in an image, from what it is."""

OUT_OF_USE = "the driver sets it anew before it counts"
NEVER = "it counts after an event that the guest can't bring about: tests/property/test_nvme_state.py has one"
NO_NETWORK = "a storage controller sends no frames"


@dataclass(frozen=True)
class Field:
    """A field that a guest must notice when it is false, unless it is `harmless`, for a reason.

    `is_kept` says that a reset of the function doesn't bring the right value back.
    """

    name: str
    length: int
    place: Place
    change: Change
    harmless: str = ""
    is_kept: bool = False

    def falsify(self, image: memoryview) -> bool:
        """Change the field, and return whether it is another now."""
        offset = self.place(image)
        if offset is None:
            return False
        before = bytes(image[offset : offset + self.length])
        value = self.change(image, int.from_bytes(before, "little"))
        image[offset : offset + self.length] = (value % (1 << 8 * self.length)).to_bytes(self.length, "little")
        return bytes(image[offset : offset + self.length]) != before


def at(offset: int) -> Place:
    return lambda _: offset


def to(value: int) -> Change:
    return lambda _image, _before: value


def plus(value: int) -> Change:
    return lambda _image, before: before + value


def flip(bits: int) -> Change:
    return lambda _image, before: before ^ bits


def register(name: str, offset: int, length: int, change: Change, harmless: str = "") -> Field:
    return Field(name, length, at(offset), change, harmless)


def row_of(table: Table, row: int, changes: Mapping[str, Change | str]) -> list[Field]:
    """Return all fields of a row, each with what it is changed to, or why it is harmless."""
    fields = list(table.each_field())[row * len(table.fields) :]
    found = []
    for (name, _), field in zip(table.fields, fields, strict=False):
        change = changes[name]
        reason, change = (change, flip(1)) if isinstance(change, str) else ("", change)
        found.append(Field(f"{table.name}.{name}", field.length, at(field.offset), change, reason))
    return found


def busy(image: memoryview) -> Command | None:
    """Return a command in flight that is not at its end yet."""
    number = busy_number(image)
    return None if number is None else Command(*LAYOUT.commands.get(image, number))


def busy_number(image: memoryview) -> int | None:
    mask = Core(*LAYOUT.core.get(image)).busy
    return (mask & -mask).bit_length() - 1 if mask else None


def command(name: str, change: Callable[[Command], int | None]) -> Field:
    """Return a field of a command in flight; `change` is None where its value makes no difference any more."""
    offsets = {field.name.rpartition(".")[2]: field for field in LAYOUT.commands.each_field() if "[0]" in field.name}
    found = offsets[name]

    def place(image: memoryview) -> int | None:
        number, at_hand = busy_number(image), busy(image)
        if number is None or at_hand is None or change(at_hand) is None:
            return None
        return found.offset + number * LAYOUT.commands.row_bytes

    def changed(image: memoryview, before: int) -> int:
        at_hand = busy(image)
        value = change(at_hand) if at_hand is not None else None
        return before if value is None else value

    return Field(f"commands.{name}", found.length, place, changed)


def page_of_list(image: memoryview) -> int | None:
    """Return the place of the last page of a command that has its list and has not come there."""
    number, at_hand = busy_number(image), busy(image)
    if number is None or at_hand is None or not at_hand.listed or at_hand.done + PAGE_BYTES > at_hand.length:
        return None
    return LAYOUT.lists.place(number * layout.LIST_ENTRIES + at_hand.listed - 1)


def page_before(image: memoryview, before: int) -> int:
    place = page_of_list(image)
    assert place is not None
    return before if place == LAYOUT.lists.start else int.from_bytes(image[place - 8 : place], "little")


def engine(name: str, offset: int, change: Change, harmless: str = "", *, length: int = 8, kept: bool = False) -> Field:
    return Field(f"engine.{name}", length, at(ENGINE + offset), change, harmless, kept)


def writes_on_their_way(start: int) -> tuple[Field, ...]:
    """Return the fields, in an engine's part, of DMA writes that nobody has said to have.

    While the link holds they arrive whatever becomes of these: tests/unit/test_engine.py falsifies them with one that
    breaks.
    """
    head, tail = start + WRITES, start + WRITES + 8

    def word(image: memoryview, offset: int) -> int:
        return int.from_bytes(image[offset : offset + 8], "little")

    def of_oldest(name: str, offset: int, length: int, change: Change) -> Field:
        def place(image: memoryview) -> int | None:
            ring, oldest = start + engine_part._WRITE_RING, word(image, head)
            return None if oldest == word(image, tail) else ring + (oldest + offset) % engine_part.RING_BYTES

        return Field(f"engine.write.{name}", length, place, change)

    return (
        Field("engine.writes.head", 8, at(head), lambda image, _: word(image, tail)),
        Field("engine.writes.tail", 8, at(tail), lambda image, _: word(image, head)),
        of_oldest("sequence", 0, 8, plus(1)),
        of_oldest("address", 8, 8, flip(1 << 33)),
        of_oldest("cancelled", 20, 4, to(1)),
        of_oldest("data", 24, 4, flip(0xFFFFFFFF)),
    )


def entries(image: memoryview) -> int:
    return LAYOUT.submission.get(image, QUEUE)[1]


def full_if_idle(image: memoryview, before: int) -> int:
    """Return the head that says that nothing is taken, of a queue that waits for nothing: a doorbell puts it right."""
    tail = tail_of_completions(image)
    is_idle = before == tail and not Core(*LAYOUT.core.get(image)).busy
    return (tail + 1) % entries_of_completions(image) if is_idle else before


def tail_of_completions(image: memoryview) -> int:
    return CompletionQueue(*LAYOUT.completion.get(image, QUEUE)).tail


def entries_of_completions(image: memoryview) -> int:
    return max(CompletionQueue(*LAYOUT.completion.get(image, QUEUE)).entries, 1)


VECTOR = layout.MSIX_TABLE + 16 * QUEUE
REGISTERS = (
    register("CAP", layout.CAP, 8, flip(1), "the driver's host answers for it"),
    register("VS", layout.VS, 4, flip(1), "the driver's host answers for it"),
    register("INTMS", layout.INTMS, 4, flip(1), "there are no interrupts but MSI-X"),
    register("INTMC", layout.INTMC, 4, flip(1), "there are no interrupts but MSI-X"),
    register("CC", layout.CC, 4, flip(1 << 14)),
    register("CSTS", layout.CSTS, 4, to(0)),
    register("AQA", layout.AQA, 4, flip(1), OUT_OF_USE),
    register("ASQ", layout.ASQ, 8, flip(PAGE_BYTES), OUT_OF_USE),
    register("ACQ", layout.ACQ, 8, flip(PAGE_BYTES), OUT_OF_USE),
    register("msix.address", VECTOR, 8, flip(1 << 20)),
    register("msix.data", VECTOR + 8, 4, to(7)),
    register("msix.control", VECTOR + 12, 4, to(1)),
    register("msix.pending", layout.MSIX_PENDING, 8, flip(1 << QUEUE), "the driver finds nothing new, and goes on"),
)
CORE = row_of(
    LAYOUT.core,
    0,
    {
        "epoch": "it is compared with what was read at the same home only, and that is thrown away by a move",
        "busy": to(0),
        "cursor": "commands in flight may be worked on in any order",
        "turn": "queues may be served in any order",
        "alone": "it is slower, and sees faults as well",
        "requests": NEVER,
        "events": "the driver looks for an event that there is not, and goes on",
        "masked": NEVER,
        "media_errors": to(500),
    },
)
QUEUES = (
    *row_of(LAYOUT.features, 1, {"value": "Linux's driver never asks for it"}),
    *row_of(LAYOUT.requests, 0, {"identifier": NEVER}),
    *row_of(LAYOUT.heads, QUEUE, {"head": lambda image, before: (before - STRIDE) % entries(image)}),
    *row_of(LAYOUT.tails, QUEUE, {"tail": lambda image, before: (before + STRIDE) % entries(image)}),
    *row_of(
        LAYOUT.submission,
        QUEUE,
        {
            "base": plus(PAGE_BYTES),
            "entries": lambda image, _: LAYOUT.tails.get(image, QUEUE)[0] + 2,
            "completion": to(0),
        },
    ),
    *row_of(
        LAYOUT.completion,
        QUEUE,
        {
            "base": plus(PAGE_BYTES),
            "entries": lambda image, _: tail_of_completions(image) + 2,
            "vector": to(7),
            "head": full_if_idle,
            "tail": to(0),
            "phase": flip(1),
            "interrupts": to(0),
        },
    ),
)
COMMANDS = (
    command("kind", lambda found: READ + WRITE - found.kind),
    command("queue", lambda _: 0),
    command("identifier", lambda found: found.identifier ^ 1),
    command("extents", lambda _: 0),
    command("extent", lambda _: 1),
    command("listed", lambda found: found.listed - 1 if found.listed > 1 else None),
    command("start", lambda found: found.start ^ PAGE_BYTES),
    command("length", lambda found: max(found.done, layout.BLOCK_BYTES)),
    command("done", lambda found: found.length),
    command("prp1", lambda found: found.prp1 + layout.BLOCK_BYTES),
    command("prp2", lambda found: None if found.listed else found.prp2 + 8),
    Field("lists.page", 8, page_of_list, page_before),
)
ENGINE_PART = (
    engine("steps", 0, plus(7), "each home counts on from what it finds"),
    engine("fleet generation", 8, plus(1), kept=True),
    engine("revision", 16, plus(1), kept=True),
    engine("session", 24, plus(1), kept=True),
    engine("window base", 32, flip(1 << 48), kept=True),
    engine("window bytes", 40, to(0), kept=True),
    engine("driver", 48, flip(1), length=64, kept=True),
    engine("faults", 112, plus(7), "it is a figure for operators"),
    engine("writes.last", WRITES + 16, plus(1)),
    engine("frames.head", 144, plus(8), NO_NETWORK),
    engine("frames.tail", 152, plus(8), NO_NETWORK),
    engine("frames.last", 160, plus(1), NO_NETWORK),
    engine("from zero", 168, to(0), kept=True),
    engine("senders", PAGE_BYTES, flip(1), NO_NETWORK, length=PAGE_BYTES),
    engine("frame", engine_part._FRAME_RING, flip(1), NO_NETWORK),
)
MEDIUM = Field("namespace", USED_BYTES, at(NAMESPACE.start), flip((1 << 8 * USED_BYTES) - 1), is_kept=True)

FIELDS = (*REGISTERS, *CORE, *QUEUES, *COMMANDS, *ENGINE_PART, MEDIUM)


def unknown(image: memoryview) -> list[int]:
    """Return the pages of a controller's image, but for its medium, that have something which is in no field here."""
    known = bytearray(image)
    # Of what there are many, each row has the fields of the one that is falsified.
    tables = [range(table.start, table.end) for table in LAYOUT.tables()]
    rings = range(ENGINE + engine_part._WRITE_RING, ENGINE + engine_part.ENGINE_BYTES)
    vectors = range(layout.MSIX_TABLE, layout.MSIX_TABLE + 16 * layout.VECTORS)
    fields = [
        (place, field.length)
        for field in (*FIELDS, *writes_on_their_way(ENGINE))
        if (place := field.place(image)) is not None
    ]
    for start, length in (*fields, *((each.start, len(each)) for each in (*tables, rings, vectors, NAMESPACE))):
        known[start : start + length] = bytes(length)
    return [start for start in range(0, len(known), PAGE_BYTES) if any(known[start : start + PAGE_BYTES])]
