"""What one step of an NVMe controller does, put together: stores, data, completions and interrupts, in that order."""

from collections.abc import Iterator
from struct import Struct
from typing import Final

from hostd.models.base import DmaWrite, Frame, Step, Store
from hostd.models.msix import Msix
from hostd.models.nvme_layout import COMPLETION_BYTES, Command, CompletionQueue, Layout

# Status field of a completion (NVMe 1.4, 4.6.1): status code type in bits 10:8, status code in bits 7:0. Bit 14, "do
# not retry", goes with whatever would fail in the same way again.
_DO_NOT_RETRY: Final = 1 << 14
SUCCESS: Final = 0x000
INVALID_OPCODE: Final = 0x001 | _DO_NOT_RETRY
INVALID_FIELD: Final = 0x002 | _DO_NOT_RETRY
DATA_TRANSFER_ERROR: Final = 0x004 | _DO_NOT_RETRY
ABORT_REQUESTED: Final = 0x007
ABORTED_SUBMISSION_QUEUE_DELETED: Final = 0x008
COMMAND_SEQUENCE_ERROR: Final = 0x00C | _DO_NOT_RETRY
INVALID_NAMESPACE: Final = 0x00B | _DO_NOT_RETRY
PRP_OFFSET_INVALID: Final = 0x013 | _DO_NOT_RETRY
LBA_OUT_OF_RANGE: Final = 0x080 | _DO_NOT_RETRY
COMPLETION_QUEUE_INVALID: Final = 0x100 | _DO_NOT_RETRY
INVALID_QUEUE_IDENTIFIER: Final = 0x101 | _DO_NOT_RETRY
INVALID_QUEUE_SIZE: Final = 0x102 | _DO_NOT_RETRY
EVENT_REQUEST_LIMIT_EXCEEDED: Final = 0x105 | _DO_NOT_RETRY
INVALID_INTERRUPT_VECTOR: Final = 0x108 | _DO_NOT_RETRY
INVALID_LOG_PAGE: Final = 0x109 | _DO_NOT_RETRY
INVALID_QUEUE_DELETION: Final = 0x10C | _DO_NOT_RETRY
FEATURE_NOT_SAVEABLE: Final = 0x10D | _DO_NOT_RETRY
WRITE_FAULT: Final = 0x280
UNRECOVERED_READ_ERROR: Final = 0x281

_COMPLETION: Final = Struct("<IIHHHH")  # result, reserved, SQ head, SQ identifier, command identifier, status and phase


class Outcome:
    """The step under way. Its stores come from `memory` as it was before the step, except for the completion queues'.

    Whoever adds a completion has seen to it that the queue has room (`room`).
    """

    __slots__ = ("_layout", "_memory", "_msix", "_queues", "sends", "stores")

    def __init__(self, layout: Layout, msix: Msix, memory: memoryview) -> None:
        self._layout = layout
        self._msix = msix
        self._memory = memory
        self._queues: dict[int, CompletionQueue] = {}
        self.stores: list[Store] = []
        self.sends: list[DmaWrite | Frame] = []

    def complete(self, queue: int, head: int, identifier: int, status: int, result: int = 0) -> None:
        """Complete a command of a submission queue whose head is at `head` with a 15-bit status, and a result."""
        number = self._layout.submission.get(self._memory, queue)[2]
        found = self._queues.get(number)
        if found is None:
            found = CompletionQueue(*self._layout.completion.get(self._memory, number))
        base, entries, vector, first, tail, phase, interrupts = found
        entry = _COMPLETION.pack(result, 0, head, queue, identifier, status << 1 | phase)
        self.sends.append(DmaWrite(base + tail * COMPLETION_BYTES, entry))
        tail += 1
        if tail == entries:
            tail, phase = 0, phase ^ 1
        self._queues[number] = CompletionQueue(base, entries, vector, first, tail, phase, interrupts)

    def complete_command(self, command: Command, status: int) -> None:
        """Complete a command in flight."""
        head = self._layout.heads.get(self._memory, command.queue)[0]
        self.complete(command.queue, head, command.identifier, status)

    def step(self) -> Step:
        """Return the step, with one interrupt for each completion queue that it added to, after its completions."""
        vectors = []
        for number, queue in self._queues.items():
            self.stores.append(self._layout.completion.put(number, *queue))
            if queue.interrupts:
                vectors.append(queue.vector)
        if vectors:
            stores, sends = self._msix.interrupt(self._memory, vectors)
            self.stores += stores
            self.sends += sends
        return Step(self.stores, self.sends)


def room(layout: Layout, memory: memoryview, number: int, busy: int) -> int:
    """Return how many more commands a completion queue can take: those in flight (`busy`) have their entry already.

    A command is fetched only when its completion has room, so that none ever waits for it.
    """
    queue = CompletionQueue(*layout.completion.get(memory, number))
    free = queue.entries - 1 - (queue.tail - queue.head) % queue.entries
    for _, command in in_flight(layout, memory, busy):
        if layout.submission.get(memory, command.queue)[2] == number:
            free -= 1
    return free


def in_flight(layout: Layout, memory: memoryview, busy: int) -> Iterator[tuple[int, Command]]:
    """Yield the commands that a mask names, with their numbers."""
    while busy:
        number = (busy & -busy).bit_length() - 1
        yield number, Command(*layout.commands.get(memory, number))
        busy &= busy - 1
