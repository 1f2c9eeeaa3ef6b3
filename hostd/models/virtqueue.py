"""The device's side of a split virtqueue (virtio 1.2, 2.7): how it takes chains of descriptors, and returns them.

    kick -> poll the available ring's index -> fetch chains, up to 16 -> (the device uses them) -> publish -> poll
              |  nothing there                                                     flags and index ----+
              v
            idle, with notifications on

All is a function of `Queue`, a record in the function's image, and of what was read from main memory. While there are
chains to be used the driver is told not to kick (`quiet`). Before the queue falls idle it is polled once more, with
kicks wanted again and none come since the poll before: else a chain that came between would wait for ever.
"""

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Final, NamedTuple

from hostd.models.base import DmaRead, DmaWrite, Store, Work

MAX_QUEUE_SIZE: Final = 256
"""Entries: so many that a whole descriptor table is one read."""
MAX_TAKEN: Final = 16
NO_VECTOR: Final = 0xFFFF

DESCRIPTOR_NEXT: Final = 1 << 0
DESCRIPTOR_WRITE: Final = 1 << 1
DESCRIPTOR_INDIRECT: Final = 1 << 2
AVAILABLE_NO_INTERRUPT: Final = 1 << 0
USED_NO_NOTIFY: Final = 1 << 0

POLL: Final = "poll"
FETCH: Final = "fetch"
BROKEN: Final = "broken"

_ADDRESS_SPACE = 1 << 64
_INDEX_MASK = 0xFFFF
_COUNT_MASK = 0xFFFF_FFFF
_TWO_WORDS = Struct("<HH")  # flags and index of a ring; in `taken`: a chain's head and its number of segments
_DESCRIPTOR = Struct("<QIHH")  # address, length, flags, next
_SEGMENT = Struct("<QI")  # address, length
_USED_ELEMENT = Struct("<II")  # head, bytes written
_SEGMENTS_OFFSET = MAX_TAKEN * _TWO_WORDS.size

TAKEN_BYTES: Final = 4096
"""The chains that were taken and not yet returned: (head, segments) of each, then all the segments."""

Segment = tuple[int, int]
"""An address in the driver's main memory, and the bytes there, at least 1."""


class RingError(Exception):
    """The driver broke a rule of the virtqueue, or its rings can't be reached: the device needs a reset."""


class Queue(NamedTuple):
    """What the device knows of one queue: the record's fields, in their order in memory."""

    size: int
    """Entries: a power of two up to 256."""
    vector: int
    enabled: int
    last: int
    """Index in the available ring of the next chain to be taken, mod 2**16."""
    available: int
    """The available ring's index, as last polled."""
    used: int
    """The used ring's index, as published."""
    first: int
    """Position of the first taken chain that is not returned."""
    taken: int
    """Taken chains that are not returned."""
    first_segment: int
    """Position of that first chain's first segment."""
    looking: int
    """Whether chains may have become available since the queue was idle."""
    quiet: int
    """Whether the driver was told not to kick."""
    signal: int
    """Whether chains were published of which the driver was not told."""
    kicks: int
    """Notifications that came, mod 2**32."""
    kicks_seen: int
    """`kicks` when the last poll had found nothing."""
    descriptors: int
    driver: int
    device: int
    """Addresses of the descriptor table, the available ring and the used ring."""


QUEUE: Final = Struct("<9H3BxII3Q")
_FRESH = Queue(MAX_QUEUE_SIZE, NO_VECTOR, *(0,) * 15)


class Chain(NamedTuple):
    """Descriptors that belong together: the first one's index, and what they point to."""

    head: int
    segments: Sequence[Segment]

    @property
    def length(self) -> int:
        """Bytes in all."""
        return sum(length for _, length in self.segments)


def fresh(size: int = MAX_QUEUE_SIZE) -> Queue:
    """Return a queue after a reset."""
    return _FRESH._replace(size=size)


def kicked(queue: Queue) -> Queue:
    """Return the queue after its driver said that there is something in it."""
    return queue._replace(looking=1, kicks=queue.kicks + 1 & _COUNT_MASK)


class Virtqueue:
    """Queue `index`, whose record lies at `offset` in the image and whose taken chains at `taken_offset`.

    Its chains are for the device to write, or for it to read; never both.
    """

    def __init__(self, index: int, offset: int, taken_offset: int, *, device_writes: bool) -> None:
        self._index = index
        self._offset = offset
        self._taken_offset = taken_offset
        self._write_flag = DESCRIPTOR_WRITE if device_writes else 0

    def load(self, memory: memoryview) -> Queue:
        """Return the queue as the image has it."""
        return Queue._make(QUEUE.unpack_from(memory, self._offset))

    def store(self, queue: Queue) -> Store:
        """Return what puts the queue into the image."""
        return self._offset, QUEUE.pack(*queue)

    def chains(self, memory: memoryview, queue: Queue) -> Iterator[Chain]:
        """Yield the taken chains that were not returned, in order."""
        segment = self._taken_offset + _SEGMENTS_OFFSET + queue.first_segment * _SEGMENT.size
        for position in range(queue.first, min(queue.first + queue.taken, MAX_TAKEN)):
            head, count = _TWO_WORDS.unpack_from(memory, self._taken_offset + position * _TWO_WORDS.size)
            end = min(segment + count * _SEGMENT.size, self._taken_offset + TAKEN_BYTES)
            yield Chain(head, tuple(_SEGMENT.iter_unpack(memory[segment:end])))
            segment = end

    def look(self, queue: Queue, epoch: int) -> Work | None:
        """Return what is to be read of the rings next, if anything: chains that are needed, or whether to interrupt."""
        needs = queue.looking and not queue.taken
        if not needs and not queue.signal:
            return None
        if not _fits(queue):
            return Work((BROKEN, self._index, epoch))
        if queue.signal or queue.available == queue.last:
            return Work((POLL, self._index, epoch, queue.last, queue.used), (DmaRead(queue.driver, 4),))
        entry = queue.last % queue.size
        count = min(queue.size - entry, queue.available - queue.last & _INDEX_MASK, MAX_TAKEN)
        return Work(
            (FETCH, self._index, epoch, queue.last, count),
            (DmaRead(queue.driver + 4 + 2 * entry, 2 * count), DmaRead(queue.descriptors, 16 * queue.size)),
        )

    def polled(self, queue: Queue, flags_and_index: bytes) -> tuple[Queue, Sequence[DmaWrite], bool]:
        """Return the queue after a poll, the writes that go with it, and whether the driver is to be interrupted."""
        flags, available = _TWO_WORDS.unpack(flags_and_index)
        if available - queue.last & _INDEX_MASK > queue.size:
            raise RingError
        interrupts = bool(queue.signal) and not flags & AVAILABLE_NO_INTERRUPT
        queue = queue._replace(signal=0)
        if queue.taken or not queue.looking:
            return queue, (), interrupts
        if available != queue.last:
            writes = () if queue.quiet else (_used_flags(queue, USED_NO_NOTIFY),)
            return queue._replace(available=available, quiet=1), writes, interrupts
        if queue.quiet or queue.kicks_seen != queue.kicks:
            writes = (_used_flags(queue, 0),) if queue.quiet else ()
            return queue._replace(quiet=0, kicks_seen=queue.kicks), writes, interrupts
        return queue._replace(looking=0), (), interrupts

    def fetched(self, queue: Queue, ring: bytes, table: bytes) -> tuple[Queue, Sequence[Store]]:
        """Return the queue with the chains that `ring` names taken, as many as there is room for."""
        chains: list[bytes] = []
        segments: list[bytes] = []
        for position in range(0, len(ring), 2):
            head = int.from_bytes(ring[position : position + 2], "little")
            found = self._walk(head, table)
            if chains and len(segments) + len(found) > MAX_QUEUE_SIZE:
                break
            chains.append(_TWO_WORDS.pack(head, len(found)))
            segments += found
        taken = len(chains)
        queue = queue._replace(last=queue.last + taken & _INDEX_MASK, first=0, taken=taken, first_segment=0)
        stores = [self.store(queue), (self._taken_offset, b"".join(chains))]
        if segments:
            stores.append((self._taken_offset + _SEGMENTS_OFFSET, b"".join(segments)))
        return queue, stores

    def published(self, queue: Queue, used: Sequence[tuple[Chain, int]]) -> tuple[Queue, Sequence[DmaWrite]]:
        """Return the queue with its first taken chains returned, each with the bytes written to it, and the writes.

        The index follows the elements, in one store of its own: until then the driver sees none of them.
        """
        writes = []
        elements = [_USED_ELEMENT.pack(chain.head, written) for chain, written in used]
        entry = queue.used % queue.size
        before_the_end = queue.size - entry
        for start, part in ((entry, elements[:before_the_end]), (0, elements[before_the_end:])):
            if part:
                writes.append(DmaWrite(queue.device + 4 + start * _USED_ELEMENT.size, b"".join(part)))
        index = queue.used + len(used) & _INDEX_MASK
        writes.append(DmaWrite(queue.device + 2, index.to_bytes(2, "little")))
        queue = queue._replace(
            used=index,
            first=queue.first + len(used),
            taken=queue.taken - len(used),
            first_segment=queue.first_segment + sum(len(chain.segments) for chain, _ in used),
            signal=1,
        )
        return queue, writes

    def _walk(self, head: int, table: bytes) -> list[bytes]:
        """Return the segments of the chain that begins at `head`, without empty ones."""
        segments, index = [], head
        # A chain is no longer than the table; a longer one is a loop.
        for _ in range(0, len(table), _DESCRIPTOR.size):
            if index * _DESCRIPTOR.size >= len(table):
                raise RingError
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, index * _DESCRIPTOR.size)
            if flags & (DESCRIPTOR_WRITE | DESCRIPTOR_INDIRECT) != self._write_flag:
                raise RingError
            if address + length > _ADDRESS_SPACE:
                raise RingError
            if length:
                segments.append(_SEGMENT.pack(address, length))
            if not flags & DESCRIPTOR_NEXT:
                return segments
            index = following
        raise RingError


def _used_flags(queue: Queue, flags: int) -> DmaWrite:
    return DmaWrite(queue.device, flags.to_bytes(2, "little"))


def _fits(queue: Queue) -> bool:
    """Return whether the rings can be where the driver says (virtio 1.2, 2.7: alignment), with a size that can be."""
    aligned = not (queue.descriptors % 16 or queue.driver % 2 or queue.device % 4)
    ends = (
        queue.descriptors + 16 * queue.size,
        queue.driver + 4 + 2 * queue.size,
        queue.device + 4 + 8 * queue.size,
    )
    return aligned and 1 <= queue.size <= MAX_QUEUE_SIZE and max(ends) <= _ADDRESS_SPACE
