"""The admin commands of the simulated NVMe controller (NVMe 1.4, 5). None of them takes longer than one step."""

from collections.abc import Mapping
from typing import Final, NamedTuple, Protocol

from hostd.models import nvme_identity
from hostd.models.base import DmaWrite
from hostd.models.nvme_commands import NAMESPACE, prps_fit
from hostd.models.nvme_completion import (
    ABORT_REQUESTED,
    ABORTED_SUBMISSION_QUEUE_DELETED,
    COMMAND_SEQUENCE_ERROR,
    COMPLETION_QUEUE_INVALID,
    EVENT_REQUEST_LIMIT_EXCEEDED,
    FEATURE_NOT_SAVEABLE,
    INVALID_FIELD,
    INVALID_INTERRUPT_VECTOR,
    INVALID_LOG_PAGE,
    INVALID_NAMESPACE,
    INVALID_OPCODE,
    INVALID_QUEUE_DELETION,
    INVALID_QUEUE_IDENTIFIER,
    INVALID_QUEUE_SIZE,
    PRP_OFFSET_INVALID,
    SUCCESS,
    Outcome,
    in_flight,
)
from hostd.models.nvme_layout import (
    CC,
    EVENT_REQUESTS,
    IO_QUEUES,
    MAX_ENTRIES,
    QUEUES,
    VECTORS,
    Core,
    Entry,
    Layout,
)
from vfleet.address import PAGE_BYTES

ADMIN_QUEUE: Final = 0

DELETE_SUBMISSION_QUEUE: Final = 0x00
CREATE_SUBMISSION_QUEUE: Final = 0x01
GET_LOG_PAGE: Final = 0x02
DELETE_COMPLETION_QUEUE: Final = 0x04
CREATE_COMPLETION_QUEUE: Final = 0x05
IDENTIFY: Final = 0x06
ABORT: Final = 0x08
SET_FEATURES: Final = 0x09
GET_FEATURES: Final = 0x0A
EVENT_REQUEST: Final = 0x0C

TEMPERATURE_THRESHOLD: Final = 0x04
VOLATILE_WRITE_CACHE: Final = 0x06
NUMBER_OF_QUEUES: Final = 0x07
INTERRUPT_VECTOR: Final = 0x09
EVENT_CONFIGURATION: Final = 0x0B

FEATURE_DEFAULTS: Final[Mapping[int, int]] = {TEMPERATURE_THRESHOLD: 0xFFFF, VOLATILE_WRITE_CACHE: 1}
"""Those that aren't 0. The thresholds of a temperature are two halves: over in bits 15:0, under in bits 31:16."""

_WRITABLE: Final[Mapping[int, int]] = {
    0x01: 0xFFFFFF07,  # arbitration
    0x02: 0,  # power management: one state
    TEMPERATURE_THRESHOLD: 0xFFFFFFFF,
    0x05: 0x0001FFFF,  # error recovery
    VOLATILE_WRITE_CACHE: 1,
    NUMBER_OF_QUEUES: 0xFFFFFFFF,
    0x08: 0xFFFF,  # interrupt coalescing, a hint
    INTERRUPT_VECTOR: 0xFFFFFFFF,
    0x0A: 1,  # write atomicity
    EVENT_CONFIGURATION: 0xFF | nvme_identity.EVENT_NOTICES,
}
_QUEUE_COUNTS: Final = (IO_QUEUES - 1) << 16 | (IO_QUEUES - 1)
_SAVE: Final = 1 << 31
_NOT_ABORTED: Final = 1
_PHYSICALLY_CONTIGUOUS: Final = 1
_INTERRUPTS_ENABLED: Final = 2
_RETAIN_EVENT: Final = 1 << 15
_ENTRY_SIZES: Final = 0x46
"""CC.IOCQES and CC.IOSQES: entries of 2**4 and 2**6 bytes."""
_ALL_ENTRIES: Final = 0xFFFF
_LAST_NAMESPACE: Final = 0xFFFFFFFE


class Reply(NamedTuple):
    """How a command ends, and what the controller's core is after it."""

    core: Core
    status: int = SUCCESS
    result: int = 0


class _Command(Protocol):
    def __call__(self, outcome: Outcome, memory: memoryview, core: Core, entry: Entry, /) -> Reply: ...


class Admin:
    """The admin commands of the controller with this identity and a namespace of this many bytes."""

    def __init__(self, layout: Layout, identity: int, namespace_bytes: int) -> None:
        self._layout = layout
        self._controller = nvme_identity.controller(identity)
        self._namespace = nvme_identity.namespace(identity, namespace_bytes)
        self._descriptors = nvme_identity.namespace_descriptors(identity)
        self._commands: Mapping[int, _Command] = {
            DELETE_SUBMISSION_QUEUE: self._delete_submission_queue,
            CREATE_SUBMISSION_QUEUE: self._create_submission_queue,
            GET_LOG_PAGE: self._get_log_page,
            DELETE_COMPLETION_QUEUE: self._delete_completion_queue,
            CREATE_COMPLETION_QUEUE: self._create_completion_queue,
            IDENTIFY: self._identify,
            ABORT: self._abort,
            SET_FEATURES: self._set_features,
            GET_FEATURES: self._get_features,
        }

    def execute(self, outcome: Outcome, memory: memoryview, core: Core, head: int, entry: Entry) -> Core:
        """Carry out one command, fetched so that the queue's head is at `head`. Return what the core is after it."""
        command = self._commands.get(entry.opcode)
        if entry.opcode == EVENT_REQUEST and not entry.flags:
            if core.requests < EVENT_REQUESTS:
                outcome.stores.append(self._layout.requests.put(core.requests, entry.identifier))
                return core._replace(requests=core.requests + 1)
            reply = Reply(core, EVENT_REQUEST_LIMIT_EXCEEDED)
        elif entry.flags:
            reply = Reply(core, INVALID_FIELD)
        elif command is None:
            reply = Reply(core, INVALID_OPCODE)
        else:
            reply = command(outcome, memory, core, entry)
        outcome.complete(ADMIN_QUEUE, head, entry.identifier, reply.status, reply.result)
        return reply.core

    def tell_event(self, outcome: Outcome, memory: memoryview, core: Core) -> Core:
        """Complete the oldest asynchronous event request with the lowest event that happened (NVMe 1.4, 5.2)."""
        identifiers = [self._layout.requests.get(memory, row)[0] for row in range(core.requests)]
        for row, identifier in enumerate(identifiers[1:]):
            outcome.stores.append(self._layout.requests.put(row, identifier))
        event = (core.events & -core.events).bit_length() - 1
        head = self._layout.heads.get(memory, ADMIN_QUEUE)[0]
        # Its type is 0, an error.
        result = event << 8 | nvme_identity.ERROR_LOG << 16
        outcome.complete(ADMIN_QUEUE, head, identifiers[0], SUCCESS, result)
        return core._replace(requests=core.requests - 1, events=core.events & core.events - 1, masked=1)

    def _create_completion_queue(self, outcome: Outcome, memory: memoryview, core: Core, entry: Entry) -> Reply:
        queue, entries = entry.word10 & 0xFFFF, (entry.word10 >> 16) + 1
        vector, interrupts = entry.word11 >> 16, entry.word11 & _INTERRUPTS_ENABLED
        status = self._check_new_queue(memory, entry, self._layout.completion.get(memory, queue % QUEUES)[1])
        if status == SUCCESS and interrupts and vector >= VECTORS:
            status = INVALID_INTERRUPT_VECTOR
        if status == SUCCESS:
            enabled = 1 if interrupts else 0
            outcome.stores.append(self._layout.completion.put(queue, entry.prp1, entries, vector, 0, 0, 1, enabled))
        return Reply(core, status)

    def _create_submission_queue(self, outcome: Outcome, memory: memoryview, core: Core, entry: Entry) -> Reply:
        queue, entries = entry.word10 & 0xFFFF, (entry.word10 >> 16) + 1
        number = entry.word11 >> 16
        status = self._check_new_queue(memory, entry, self._layout.submission.get(memory, queue % QUEUES)[1])
        if status == SUCCESS and not (0 < number < QUEUES and self._layout.completion.get(memory, number)[1]):
            status = COMPLETION_QUEUE_INVALID
        if status == SUCCESS:
            self._put_submission_queue(outcome, queue, entry.prp1, entries, number)
        return Reply(core, status)

    def _check_new_queue(self, memory: memoryview, entry: Entry, existing_entries: int) -> int:
        queue, last = entry.word10 & 0xFFFF, entry.word10 >> 16
        if not 0 < queue < QUEUES or existing_entries:
            return INVALID_QUEUE_IDENTIFIER
        if not 0 < last < MAX_ENTRIES:
            return INVALID_QUEUE_SIZE
        if not entry.word11 & _PHYSICALLY_CONTIGUOUS or memory[CC + 2] != _ENTRY_SIZES:
            return INVALID_FIELD
        return PRP_OFFSET_INVALID if entry.prp1 % PAGE_BYTES else SUCCESS

    def _delete_submission_queue(self, outcome: Outcome, memory: memoryview, core: Core, entry: Entry) -> Reply:
        queue = entry.word10 & 0xFFFF
        if not 0 < queue < QUEUES or not self._layout.submission.get(memory, queue)[1]:
            return Reply(core, INVALID_QUEUE_IDENTIFIER)
        busy = core.busy
        for number, command in in_flight(self._layout, memory, core.busy):
            if command.queue == queue:
                outcome.complete_command(command, ABORTED_SUBMISSION_QUEUE_DELETED)
                busy &= ~(1 << number)
        self._put_submission_queue(outcome, queue, 0, 0, 0)
        return Reply(core._replace(busy=busy))

    def _put_submission_queue(self, outcome: Outcome, queue: int, base: int, entries: int, completion: int) -> None:
        layout = self._layout
        outcome.stores.append(layout.submission.put(queue, base, entries, completion))
        outcome.stores += (layout.heads.put(queue, 0), layout.tails.put(queue, 0))

    def _delete_completion_queue(self, outcome: Outcome, memory: memoryview, core: Core, entry: Entry) -> Reply:
        queue = entry.word10 & 0xFFFF
        if not 0 < queue < QUEUES or not self._layout.completion.get(memory, queue)[1]:
            return Reply(core, INVALID_QUEUE_IDENTIFIER)
        users = (self._layout.submission.get(memory, number) for number in range(1, QUEUES))
        if any(entries and completion == queue for _, entries, completion in users):
            return Reply(core, INVALID_QUEUE_DELETION)
        outcome.stores.append(self._layout.completion.put(queue, 0, 0, 0, 0, 0, 0, 0))
        return Reply(core)

    def _identify(self, outcome: Outcome, _memory: memoryview, core: Core, entry: Entry) -> Reply:
        structure, status = entry.word10 & 0xFF, SUCCESS
        data = b""
        if structure == 0x00:
            data, status = self._namespace, SUCCESS if entry.namespace == NAMESPACE else INVALID_NAMESPACE
        elif structure == 0x01:
            data = self._controller
        elif structure == 0x02:
            active = NAMESPACE if entry.namespace < NAMESPACE else 0
            data = active.to_bytes(4, "little").ljust(PAGE_BYTES, b"\0")
            status = INVALID_NAMESPACE if entry.namespace >= _LAST_NAMESPACE else SUCCESS
        elif structure == 0x03:
            data, status = self._descriptors, SUCCESS if entry.namespace == NAMESPACE else INVALID_NAMESPACE
        else:
            status = INVALID_FIELD
        return Reply(core, _send(outcome, entry, data) if status == SUCCESS else status)

    def _get_log_page(self, outcome: Outcome, _memory: memoryview, core: Core, entry: Entry) -> Reply:
        page = entry.word10 & 0xFF
        log = nvme_identity.LOGS.get(page)
        if log is None:
            return Reply(core, INVALID_LOG_PAGE)
        length = ((entry.word10 >> 16 | (entry.word11 & 0xFFFF) << 16) + 1) * 4
        offset = entry.word12 | entry.word13 << 32
        if length > PAGE_BYTES or offset % 4 or offset > len(log):
            return Reply(core, INVALID_FIELD)
        status = _send(outcome, entry, log[offset : offset + length].ljust(length, b"\0"))
        if status == SUCCESS and page == nvme_identity.ERROR_LOG and not entry.word10 & _RETAIN_EVENT:
            core = core._replace(masked=0)
        return Reply(core, status)

    def _abort(self, outcome: Outcome, memory: memoryview, core: Core, entry: Entry) -> Reply:
        queue, identifier = entry.word10 & 0xFFFF, entry.word10 >> 16
        for number, command in in_flight(self._layout, memory, core.busy):
            if (command.queue, command.identifier) == (queue, identifier):
                outcome.complete_command(command, ABORT_REQUESTED)
                return Reply(core._replace(busy=core.busy & ~(1 << number)))
        return Reply(core, SUCCESS, _NOT_ABORTED)

    def _set_features(self, outcome: Outcome, memory: memoryview, core: Core, entry: Entry) -> Reply:
        feature, value = entry.word10 & 0xFF, entry.word11
        writable = _WRITABLE.get(feature)
        if writable is None or value & ~writable:
            return Reply(core, INVALID_FIELD)
        if entry.word10 & _SAVE:
            return Reply(core, FEATURE_NOT_SAVEABLE)
        if feature == NUMBER_OF_QUEUES:
            return self._set_number_of_queues(memory, core, value)
        before = self._layout.features.get(memory, feature)[0]
        place = _part(feature, value)
        if place is None:
            return Reply(core, INVALID_FIELD)
        shift, mask = place
        part = value >> 16 & 1 if feature == INTERRUPT_VECTOR else value & mask
        outcome.stores.append(self._layout.features.put(feature, before & ~(mask << shift) | part << shift))
        return Reply(core)

    def _set_number_of_queues(self, memory: memoryview, core: Core, value: int) -> Reply:
        if _ALL_ENTRIES in (value & 0xFFFF, value >> 16):
            return Reply(core, INVALID_FIELD)
        if any(self._layout.completion.get(memory, queue)[1] for queue in range(1, QUEUES)):
            return Reply(core, COMMAND_SEQUENCE_ERROR)
        return Reply(core, SUCCESS, _QUEUE_COUNTS)

    def _get_features(self, _outcome: Outcome, memory: memoryview, core: Core, entry: Entry) -> Reply:
        feature, select = entry.word10 & 0xFF, entry.word10 >> 8 & 7
        if feature not in _WRITABLE or select:
            return Reply(core, INVALID_FIELD)
        if feature == NUMBER_OF_QUEUES:
            return Reply(core, SUCCESS, _QUEUE_COUNTS)
        place = _part(feature, entry.word11)
        if place is None:
            return Reply(core, INVALID_FIELD)
        shift, mask = place
        part = self._layout.features.get(memory, feature)[0] >> shift & mask
        return Reply(core, SUCCESS, entry.word11 & 0xFFFF | part << 16 if feature == INTERRUPT_VECTOR else part)


def _part(feature: int, word11: int) -> tuple[int, int] | None:
    """Return which part of a feature's value a command is for, as a shift and a mask; None if there is no such part."""
    if feature == TEMPERATURE_THRESHOLD:
        sensor, under = word11 >> 16 & 0xF, word11 >> 20 & 3
        return (16 * under, 0xFFFF) if sensor in (0, 0xF) and under < 2 else None
    if feature == INTERRUPT_VECTOR:
        vector = word11 & 0xFFFF
        return (vector, 1) if vector < VECTORS else None
    return 0, 0xFFFFFFFF


def _send(outcome: Outcome, entry: Entry, data: bytes) -> int:
    """Send at most a page to where a command's PRP entries say. Return the command's status."""
    if not prps_fit(entry.prp1, entry.prp2, len(data)):
        return PRP_OFFSET_INVALID
    first = PAGE_BYTES - entry.prp1 % PAGE_BYTES
    outcome.sends.append(DmaWrite(entry.prp1, data[:first]))
    if len(data) > first:
        outcome.sends.append(DmaWrite(entry.prp2, data[first:]))
    return SUCCESS
