"""The engine's part of a bus master's image, after the model's own memory: it moves, and is tracked, as the rest does.

    +-------------------------------------+---------------+-----------------+-----------------+
    | steps, attachment, DMA table, ends  | frames taken, | DMA writes not  | frames not      |
    | of the two rings                    | by sender     | acknowledged    | acknowledged    |
    +-------------------------------------+---------------+-----------------+-----------------+

What a step of the device sends becomes durable with what it stores, in a ring, and stays there until its receiver says
that it has it. DMA writes and frames have sequences of their own, from 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Final

from hostd.image import MAX_STEP_BYTES, FunctionImage
from hostd.models.base import Section, Store
from vfleet.address import PAGE_BYTES
from vfleet.limits import INTERRUPT_PAGE_ADDRESS, MAIN_MEMORY_VIRTUAL_ADDRESS
from vfleet.v1.fabric_service_pb2 import DmaAttachment, DmaWindow

RING_BYTES: Final = 1 << 16
MAX_SENDERS: Final = PAGE_BYTES // 16

# Offsets in the part. The image counts the steps in its first word.
_ATTACHMENT = 8  # fleet generation, revision, session, window's base, window's bytes
_NAME = 48
_FAULTS = 112
_WRITES = 120
_FRAMES = 144
_FROM_ZERO = 168  # whether the driver sees its main memory from address 0 on
_SENDERS = PAGE_BYTES
_WRITE_RING = 2 * PAGE_BYTES
_FRAME_RING = _WRITE_RING + RING_BYTES
ENGINE_BYTES: Final = _FRAME_RING + RING_BYTES

_WORD = Struct("<Q")
_WORDS_5 = Struct("<5Q")
_NAME_BYTES = 64
_ENTRY = Struct("<QQII")  # sequence, address, bytes, whether it was cancelled
_CANCELLED_SHIFT = 32


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing sent. `data` is empty if it was cancelled; `end` is where in the ring the next one begins."""

    sequence: int
    address: int
    data: bytes
    end: int


class Fifo:
    """A bounded queue of what was sent and is not acknowledged, in a ring of the image.

    Three words tell of it: where its oldest entry begins and its newest ends, both counted on without end, and the
    newest's sequence. An acknowledgement stores the first of them alone, a step the others.
    """

    def __init__(self, image: FunctionImage, words: int, ring: int) -> None:
        self._image = image
        self._words = words
        self._ring = ring

    @property
    def head(self) -> int:
        """Where the oldest entry begins."""
        return self._image.word(self._words)

    @property
    def tail(self) -> int:
        """Where the newest entry ends."""
        return self._image.word(self._words + 8)

    @property
    def last(self) -> int:
        """The newest entry's sequence, acknowledged or not; 0 if there never was one."""
        return self._image.word(self._words + 16)

    @property
    def has_room(self) -> bool:
        """Whether all that one step can send has a place."""
        return RING_BYTES - (self.tail - self.head) >= MAX_STEP_BYTES

    def put(self, sends: Sequence[tuple[int, bytes]]) -> list[Store]:
        """Return the stores that append (address, data), each with the next sequence."""
        if not sends:
            return []
        last, tail = self.last, self.tail
        parts: list[bytes] = []
        for address, data in sends:
            last += 1
            parts += (_ENTRY.pack(last, address, len(data), 0), data, bytes(-len(data) % 8))
        body = b"".join(parts)
        at = tail % RING_BYTES
        before_end = min(len(body), RING_BYTES - at)
        stores = [(self._ring + at, body[:before_end])]
        if before_end < len(body):
            stores.append((self._ring, body[before_end:]))
        stores.append((self._words + 8, _WORD.pack(tail + len(body)) + _WORD.pack(last)))
        return stores

    def entries(self, position: int) -> Iterator[Entry]:
        """Yield what lies from a position on: `head`, or an entry's end."""
        tail = self.tail
        while position < tail:
            sequence, address, length, cancelled = _ENTRY.unpack(self._bytes(position, _ENTRY.size))
            start = position + _ENTRY.size
            position = start + -(-length // 8) * 8
            yield Entry(sequence, address, b"" if cancelled else self._bytes(start, length), position)

    def acknowledge(self, sequence: int) -> None:
        """Let go of all up to a sequence."""
        head = self.head
        for entry in self.entries(head):
            if entry.sequence > sequence:
                break
            head = entry.end
        if head != self.head:
            self._image.put_word(self._words, head)

    def cancel(self) -> None:
        """Take the data out of all that is not acknowledged; the sequences stay, for the receiver counts on them."""
        position = self.head
        for entry in list(self.entries(position)):
            offset = self._ring + (position + 16) % RING_BYTES
            self._image.put_word(offset, self._image.word(offset) & 0xFFFFFFFF | 1 << _CANCELLED_SHIFT)
            position = entry.end

    def _bytes(self, position: int, length: int) -> bytes:
        at, memory = position % RING_BYTES, self._image.memory
        start = self._ring + at
        if at + length <= RING_BYTES:
            return bytes(memory[start : start + length])
        rest = at + length - RING_BYTES
        return bytes(memory[start : self._ring + RING_BYTES]) + bytes(memory[self._ring : self._ring + rest])


class EnginePart:
    """The part at `start` of an image."""

    def __init__(self, image: FunctionImage, start: int) -> None:
        self._image = image
        self._start = start
        self.writes: Final = Fifo(image, start + _WRITES, start + _WRITE_RING)
        self.frames: Final = Fifo(image, start + _FRAMES, start + _FRAME_RING)
        self.section: Final = Section("engine", start, ENGINE_BYTES)
        self._known = (b"", "", DmaAttachment(), 0, 0)  # the words, and what they say
        self._sender_indices: dict[int, int] = {}  # where each was found last, to be looked at first

    @property
    def driver(self) -> str:
        """The driver whose main memory the DMA table leads to; empty if there is none."""
        return self._decoded()[1]

    @property
    def attachment(self) -> DmaAttachment:
        """The attachment that the DMA table is of; zeros if there is none."""
        return self._decoded()[2]

    @property
    def window_base(self) -> int:
        """The fabric address of the driver's main memory."""
        return self._decoded()[3]

    @property
    def faults(self) -> int:
        """DMA reads and writes that were not mapped."""
        return self._image.word(self._start + _FAULTS)

    def translate(self, address: int, length: int) -> int | None:
        """Return the fabric address of an I/O virtual address: this is the DMA table. None is a DMA fault.

        It has two entries: main memory, from the virtual address on at which the driver sees it, and the interrupt
        page, which is at the same offset in the window of every host's root complex.
        """
        _, _, _, base, size = self._decoded()
        start = 0 if self._image.word(self._start + _FROM_ZERO) else MAIN_MEMORY_VIRTUAL_ADDRESS
        if size and start <= address <= start + size - length:
            return base + address - start
        if size and INTERRUPT_PAGE_ADDRESS <= address <= INTERRUPT_PAGE_ADDRESS + PAGE_BYTES - length:
            return base >> 32 << 32 | address
        return None

    def attach(self, driver: str, window: DmaWindow) -> bool:
        """Let DMA go to a driver's main memory, with sequences from 1. False if a later attachment is known."""
        came, own = order_of(window.attachment), order_of(self.attachment)
        if came > own:
            name = driver.encode().ljust(_NAME_BYTES, b"\0")
            attachment = _WORDS_5.pack(*came, window.base, window.length_bytes)
            self._begin(attachment + name, from_zero=window.from_zero)
        return came >= own

    def detach(self, attachment: DmaAttachment) -> None:
        """Let no DMA go any further, if the table is of this attachment."""
        if attachment == self.attachment and self.driver:
            self._begin(bytes(_FAULTS - _ATTACHMENT))

    def fault(self, count: int) -> list[Store]:
        """Return the store that counts faults."""
        return [(self._start + _FAULTS, _WORD.pack(self.faults + count))] if count else []

    def last_from(self, sender: int) -> int:
        """Return the sequence of the last frame taken from a sender, by its function's identity; 0 for none."""
        index = self._sender_index(sender)
        return self._image.word(self._start + _SENDERS + index * 16 + 8) if index is not None else 0

    def took_from(self, sender: int, sequence: int) -> list[Store] | None:
        """Return the store that notes a frame as taken; None if 256 other senders have a place already."""
        index = self._sender_index(sender)
        if index is None:
            index = self._sender_index(0)
        if index is None:
            return None
        return [(self._start + _SENDERS + index * 16, _WORD.pack(sender) + _WORD.pack(sequence))]

    @property
    def is_full(self) -> bool:
        """Whether there is no place for another sender."""
        return self._sender_index(0) is None

    def senders(self) -> list[int]:
        """Return the identities of all from whom frames were taken."""
        place, word = self._start + _SENDERS, self._image.word
        return [sender for index in range(MAX_SENDERS) if (sender := word(place + index * 16))]

    def forget_sender(self, sender: int) -> None:
        """Free the place of a sender that is no more."""
        index = self._sender_index(sender)
        if index is not None:
            self._image.step([(self._start + _SENDERS + index * 16, bytes(16))])

    def _sender_index(self, sender: int) -> int | None:
        place, word = self._start + _SENDERS, self._image.word
        known = self._sender_indices.get(sender)
        if known is not None and word(place + known * 16) == sender:
            return known
        found = next((index for index in range(MAX_SENDERS) if word(place + index * 16) == sender), None)
        if found is not None:
            self._sender_indices[sender] = found
        return found

    def _decoded(self) -> tuple[bytes, str, DmaAttachment, int, int]:
        """Return the words of the attachment, and what they say: driver, attachment, base and bytes of the window."""
        words = bytes(self._image.memory[self._start + _ATTACHMENT : self._start + _FAULTS])
        if words != self._known[0]:
            generation, revision, session, base, size = _WORDS_5.unpack_from(words)
            name = words[_NAME - _ATTACHMENT :].rstrip(b"\0").decode()
            attachment = DmaAttachment(fleet_generation=generation, revision=revision, session=session)
            self._known = (words, name, attachment, base, size)
        return self._known

    def _begin(self, attachment: bytes, *, from_zero: bool = False) -> None:
        # What was sent and not acknowledged was for another, which is no more.
        self._image.step(
            [
                (self._start + _ATTACHMENT, attachment),
                (self._start + _WRITES, bytes(24)),
                (self._start + _FROM_ZERO, _WORD.pack(from_zero)),
            ]
        )


def order_of(attachment: DmaAttachment) -> tuple[int, int, int]:
    """Return what attachments are compared by."""
    return attachment.fleet_generation, attachment.revision, attachment.session
