"""The "virtio-net": a network interface after virtio 1.2, section 5.1, with one receive and one transmit queue.

docs/device-model.md is its data sheet. A frame from the network waits in a backlog until the driver gives a buffer;
with the backlog full no more is taken, and the sender keeps it. Without a driver that wants frames they are dropped.

    private memory:   0                1 page          3 pages
                      | registers,     | chains taken  | backlog: 64 frames |
                      | queues         | of each queue |                    |
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from struct import Struct
from typing import Final, NamedTuple

from hostd.models.base import MAX_FRAME_BYTES, DmaRead, DmaWrite, Frame, Section, Step, Store, Work
from hostd.models.ethernet import HEADER_BYTES, mac_address
from hostd.models.msix import Msix
from hostd.models.virtio import DEVICE_NEEDS_RESET, ISR_CONFIGURATION, ISR_QUEUE, Registers, Transport
from hostd.models.virtqueue import BROKEN, FETCH, NO_VECTOR, TAKEN_BYTES, Chain, Queue, RingError, Virtqueue
from vfleet.address import PAGE_BYTES
from vfleet.errors import invalid_field

FEATURE_MAC: Final = 1 << 5
FEATURE_STATUS: Final = 1 << 16
LINK_UP: Final = 1
RECEIVE: Final = 0
TRANSMIT: Final = 1
VECTORS: Final = 3
HEADER: Final = bytes(10) + b"\x01\x00"
"""struct virtio_net_hdr of a frame without offloads: num_buffers is 1."""

COMMON: Final = 0x0000
ISR: Final = 0x1000
CONFIGURATION: Final = 0x2000
COUNTERS: Final = 0x2100
NOTIFY: Final = 0x3000
NOTIFY_MULTIPLIER: Final = 4
MSIX_TABLE: Final = 0x4000
MSIX_PENDING: Final = 0x4800
BAR_BYTES: Final = 0x8000

BACKLOG_FRAMES: Final = 64
FRAMES_A_STEP: Final = 4
"""So many of the largest, with all that goes with them, are less than 12 KiB."""
MAX_PIECES: Final = 56
"""Writes of frames in one step: with the used ring's and an interrupt, less than 64."""

SEND: Final = "send"
DELIVER: Final = "deliver"
INTERRUPT: Final = "interrupt"

_STATE_OFFSET = 0x40
_QUEUE_OFFSETS = (0x80, 0xC0)
_SLOT = Struct("<H")  # bytes of the frame that follows
_SLOT_BYTES = 1536
_BACKLOG_OFFSET = PAGE_BYTES + 2 * TAKEN_BYTES
_COUNTERS = Struct("<QQ")
_COUNT_MASK = (1 << 64) - 1


class State(NamedTuple):
    """What lasts of the interface besides registers and queues, in its order in memory."""

    received_dropped: int
    """Frames from the network that no buffer was there for: no driver, or a buffer too small."""
    sent_dropped: int
    """Chains of the driver that held no frame of 14 to 1518 bytes."""
    first: int
    """Slot of the backlog's oldest frame."""
    waiting: int
    """Frames in the backlog."""
    turn: int
    """The queue that was served last: the other one has precedence."""


STATE: Final = Struct("<QQHHB")


class VirtioNet:
    """One virtio-net function. VfleetError INVALID_FIELD unless it has one BAR, BAR 0, of 32 KiB at least."""

    name = "virtio-net"
    version = 1
    keeps_local_memory = False
    private_bytes = _BACKLOG_OFFSET + BACKLOG_FRAMES * _SLOT_BYTES
    local_memory = plain_memory = range(0)

    def __init__(self, identity: int, bar_bytes: Mapping[int, int]) -> None:
        if bar_bytes.keys() != {0} or bar_bytes[0] < BAR_BYTES:
            raise invalid_field("bars", dict(bar_bytes), f"BAR 0, of {BAR_BYTES} bytes at least, and no other")
        self._configuration = mac_address(identity) + LINK_UP.to_bytes(2, "little")
        self._end = private = bar_bytes[0]
        self._msix = Msix(VECTORS, MSIX_TABLE, MSIX_PENDING)
        self._state_offset = private + _STATE_OFFSET
        self._backlog_offset = private + _BACKLOG_OFFSET
        self._queues = tuple(
            Virtqueue(
                index,
                private + _QUEUE_OFFSETS[index],
                private + PAGE_BYTES + index * TAKEN_BYTES,
                device_writes=index == RECEIVE,
            )
            for index in (RECEIVE, TRANSMIT)
        )
        self._transport = Transport(private, FEATURE_MAC | FEATURE_STATUS, self._queues, VECTORS)
        self.sections: Sequence[Section] = (
            Section("MSI-X", MSIX_TABLE, PAGE_BYTES),
            Section("registers", private, PAGE_BYTES),
            Section("chains taken", private + PAGE_BYTES, 2 * TAKEN_BYTES),
            Section("backlog", self._backlog_offset, BACKLOG_FRAMES * _SLOT_BYTES),
        )

    def reset(self) -> Sequence[Store]:
        """Return the registers that aren't 0 after a reset."""
        return (*self._msix.reset(), *self._transport.reset())

    def read(self, memory: memoryview, offset: int, length: int) -> tuple[bytes, Sequence[Store]] | None:
        """Read a register; where none is, the BAR reads as 0."""
        if offset >= self._end:
            return None
        stores: Sequence[Store] = ()
        area, content = offset & ~(PAGE_BYTES - 1), b""
        if area == COMMON:
            content = self._transport.read_common(memory)
        elif offset == ISR:
            isr, stores = self._transport.read_isr(memory)
            content = isr.to_bytes(1, "little")
        elif COUNTERS <= offset < NOTIFY:
            area, content = COUNTERS, _COUNTERS.pack(*self._state(memory)[:2])
        elif area == CONFIGURATION:
            content = self._configuration
        elif self._msix.claims(offset):
            area, content = offset, self._msix.read(memory, offset, length) or b""
        return content[offset - area : offset - area + length].ljust(length, b"\0"), stores

    def write(self, memory: memoryview, offset: int, data: bytes) -> Sequence[Store] | None:
        """Write a register; a write where none is changes nothing."""
        if NOTIFY <= offset < NOTIFY + NOTIFY_MULTIPLIER * len(self._queues):
            return self._transport.kick(memory, (offset - NOTIFY) // NOTIFY_MULTIPLIER)
        if offset >= self._end:
            return None
        if self._msix.claims(offset):
            return self._msix.write(offset, data) or ()
        if offset >= ISR:
            return ()
        stores = self._transport.write_common(memory, offset, data)
        return stores if stores is not None else self._driver_reset(memory)

    def work(self, memory: memoryview) -> Work | None:
        """Return an interrupt that was unmasked, else what a queue needs: the one that was not served last, first."""
        return self._next_work(memory, may_send=True)

    def work_without_frames(self, memory: memoryview) -> Work | None:
        """Return what `work` does if no frame may be sent: chains that were taken wait, all else goes on."""
        return self._next_work(memory, may_send=False)

    def _next_work(self, memory: memoryview, *, may_send: bool) -> Work | None:
        vector = self._msix.due(memory)
        if vector is not None:
            return Work((INTERRUPT, vector))
        registers = self._transport.load(memory)
        if not registers.is_live:
            return None
        state = self._state(memory)
        for index in (TRANSMIT, RECEIVE) if state.turn == RECEIVE else (RECEIVE, TRANSMIT):
            queue = self._queues[index].load(memory)
            if queue.enabled:
                work = self._queue_work(memory, index, queue, state, registers.epoch, may_send=may_send)
                if work is not None:
                    return work
        return None

    def finish(self, memory: memoryview, work: Work, data: Sequence[bytes] | None) -> Step:
        """Do a piece of work. Rings that break the rules, or can't be reached, leave the device in need of a reset."""
        match work.what:
            case "interrupt", int(vector):
                return self._msix.release(memory, vector)
            case str(kind), int(index), *_:
                try:
                    return self._serve(memory, kind, index, data)
                except RingError:
                    return self._fail(memory)
            case _:
                return Step()

    def receive(self, memory: memoryview, frame: bytes) -> Step | None:
        """Put a frame into the backlog; drop it, counted, without a driver that wants frames."""
        state = self._state(memory)
        if not self._transport.load(memory).is_live or not self._queues[RECEIVE].load(memory).enabled:
            return Step((self._store_state(_received_dropped(state)),))
        if state.waiting >= BACKLOG_FRAMES:
            return None
        slot = self._slot_offset(state.first + state.waiting)
        return Step(
            ((slot, _SLOT.pack(len(frame)) + frame), self._store_state(state._replace(waiting=state.waiting + 1)))
        )

    def _queue_work(
        self, memory: memoryview, index: int, queue: Queue, state: State, epoch: int, *, may_send: bool
    ) -> Work | None:
        virtqueue = self._queues[index]
        if queue.taken and index == RECEIVE and state.waiting:
            return Work((DELIVER, index, epoch, queue.used, state.first))
        if queue.taken and index == TRANSMIT and may_send:
            chains = filter(_holds_frame, _first(virtqueue.chains(memory, queue)))
            reads = tuple(DmaRead(*segment) for chain in chains for segment in chain.segments)
            return Work((SEND, index, epoch, queue.used), reads)
        return virtqueue.look(queue, epoch)

    def _serve(self, memory: memoryview, kind: str, index: int, data: Sequence[bytes] | None) -> Step:
        virtqueue = self._queues[index]
        queue = virtqueue.load(memory)
        if data is None or kind == BROKEN:
            raise RingError
        if kind == SEND:
            return self._send(memory, virtqueue, queue, data)
        if kind == DELIVER:
            return self._deliver(memory, virtqueue, queue)
        turn = self._store_state(self._state(memory)._replace(turn=index))
        if kind == FETCH:
            _, stores = virtqueue.fetched(queue, *data)
            return Step((*stores, turn))
        queue, writes, interrupts = virtqueue.polled(queue, *data)
        stores = (virtqueue.store(queue), turn)
        if not interrupts:
            return Step(stores, writes)
        raised, message = self._raise(memory, self._transport.load(memory), queue.vector, ISR_QUEUE)
        return Step((*stores, *raised), (*writes, *message))

    def _send(self, memory: memoryview, virtqueue: Virtqueue, queue: Queue, data: Sequence[bytes]) -> Step:
        state = self._state(memory)._replace(turn=TRANSMIT)
        chains, frames, parts = _first(virtqueue.chains(memory, queue)), [], iter(data)
        for chain in chains:
            if _holds_frame(chain):
                frames.append(Frame(b"".join(islice(parts, len(chain.segments)))[len(HEADER) :]))
            else:
                state = state._replace(sent_dropped=state.sent_dropped + 1 & _COUNT_MASK)
        queue, writes = virtqueue.published(queue, [(chain, 0) for chain in chains])
        return Step((virtqueue.store(queue), self._store_state(state)), (*frames, *writes))

    def _deliver(self, memory: memoryview, virtqueue: Virtqueue, queue: Queue) -> Step:
        state = self._state(memory)._replace(turn=RECEIVE)
        writes: list[DmaWrite] = []
        used: list[tuple[Chain, int]] = []
        for chain in _first(virtqueue.chains(memory, queue))[: state.waiting]:
            packet = HEADER + self._frame(memory, state.first)
            pieces = _scattered(packet, chain.segments) if chain.length >= len(packet) else ()
            if used and len(writes) + len(pieces) > MAX_PIECES:
                break
            if 0 < len(pieces) <= MAX_PIECES:
                writes += pieces
                used.append((chain, len(packet)))
            else:
                # The buffer goes back empty, so that the driver learns of it.
                used.append((chain, 0))
                state = _received_dropped(state)
            state = state._replace(first=(state.first + 1) % BACKLOG_FRAMES, waiting=state.waiting - 1)
        queue, published = virtqueue.published(queue, used)
        return Step((virtqueue.store(queue), self._store_state(state)), (*writes, *published))

    def _fail(self, memory: memoryview) -> Step:
        registers = self._transport.load(memory)
        registers = registers._replace(status=registers.status | DEVICE_NEEDS_RESET)
        stores, message = self._raise(memory, registers, registers.configuration_vector, ISR_CONFIGURATION)
        return Step((self._transport.store(registers), *stores), message)

    def _raise(
        self, memory: memoryview, registers: Registers, vector: int, isr: int
    ) -> tuple[Sequence[Store], Sequence[DmaWrite]]:
        """Return what tells the driver of an event: an interrupt, or a bit of the ISR status if it has no vector."""
        if vector == NO_VECTOR:
            return (self._transport.store(registers._replace(isr=registers.isr | isr)),), ()
        return self._msix.interrupt(memory, [vector])

    def _driver_reset(self, memory: memoryview) -> Sequence[Store]:
        """Return what a reset by the driver changes: the MSI-X table and the counters are not virtio's, and stay."""
        epoch = self._transport.load(memory).epoch + 1
        state = self._state(memory)._replace(first=0, waiting=0, turn=0)
        return (*self._transport.reset(epoch), self._store_state(state))

    def _state(self, memory: memoryview) -> State:
        return State._make(STATE.unpack_from(memory, self._state_offset))

    def _store_state(self, state: State) -> Store:
        return self._state_offset, STATE.pack(*state)

    def _slot_offset(self, slot: int) -> int:
        return self._backlog_offset + slot % BACKLOG_FRAMES * _SLOT_BYTES

    def _frame(self, memory: memoryview, slot: int) -> bytes:
        start = self._slot_offset(slot)
        (length,) = _SLOT.unpack_from(memory, start)
        return bytes(memory[start + _SLOT.size : start + _SLOT.size + min(length, MAX_FRAME_BYTES)])


def _first(chains: Iterable[Chain]) -> Sequence[Chain]:
    return tuple(islice(chains, FRAMES_A_STEP))


def _holds_frame(chain: Chain) -> bool:
    return HEADER_BYTES <= chain.length - len(HEADER) <= MAX_FRAME_BYTES


def _received_dropped(state: State) -> State:
    return state._replace(received_dropped=state.received_dropped + 1 & _COUNT_MASK)


def _scattered(packet: bytes, segments: Iterable[tuple[int, int]]) -> list[DmaWrite]:
    """Return the writes that put a packet into buffers, the first ones first."""
    writes, done = [], 0
    for address, length in segments:
        if done == len(packet):
            break
        writes.append(DmaWrite(address, packet[done : done + length]))
        done += len(writes[-1].data)
    return writes
