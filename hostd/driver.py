"""One driver: its virtual address space, its main memory, its translation table, its accesses.

The table is one reference, `table`, which every change swaps; at once the lookaside, `direct`, forgets what it knew,
and the queues, one a function, are told. Accesses of one driver to one function keep their order; a driver's main
memory is this host's and needs none.
"""

import asyncio
import contextlib
import mmap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from hostd.access_queue import AccessQueue
from hostd.direct import DirectAccess
from hostd.dma_receiver import DmaReceiver, Receivers
from hostd.grant import Grant
from hostd.guest.memory import GuestMemory
from hostd.memory import MappedMemory
from hostd.reach import Reach
from hostd.sequencer import Result
from hostd.translation import Entry, TranslationTable
from hostd.waiting import Waiting
from vfleet.address import AddressError, check_access
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.limits import MAIN_MEMORY_VIRTUAL_ADDRESS
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_STATUS_OK, AccessKind
from vfleet.v1.driver_service_pb2 import NOTIFICATION_KIND_INTERRUPT, DriverState, WatchNotificationsResponse
from vfleet.v1.host_records_pb2 import DriverRecord
from vfleet.v1.types_pb2 import GuestState

Listener = Callable[[WatchNotificationsResponse], None]


class Driver:
    """A driver on this host. `record` is what the ledger knows of it; `changed` is set at every change of the table.

    `receivers` are its functions' ways into its main memory, if it has any: `memory`, or of a guest `guest_memory`.
    """

    def __init__(
        self,
        record: DriverRecord,
        memory: mmap.mmap | None,
        entries: Iterable[Entry],
        reach: Reach,
        receivers: Receivers,
    ) -> None:
        self.record = record
        self.guest_memory = GuestMemory() if record.HasField("guest") else None
        self.guest_state: GuestState.ValueType = GuestState.GUEST_STATE_UNSPECIFIED
        self.direct = DirectAccess(self)
        self._table = TranslationTable(entries)
        self.changed = asyncio.Event()
        self.listeners: list[Listener] = []
        self._memory = memory
        self._reach = reach
        self._faults = 0
        self._new_receivers = receivers
        self.receivers: dict[str, DmaReceiver] = {}
        for entry in self._table.entries:
            self._open_receiver(entry)
        self._queues = {entry.function: self._new_queue(entry) for entry in self._table.entries if entry.function}

    @property
    def name(self) -> str:
        """The driver's name."""
        return self.record.driver

    @property
    def table(self) -> TranslationTable:
        """The present snapshot."""
        return self._table

    @property
    def translation_faults(self) -> int:
        """Accesses that the table did not map, since the daemon was started."""
        return self._faults

    @property
    def unanswered(self) -> int:
        """Accesses that wait or have no answer yet."""
        return sum(queue.unanswered for queue in self._queues.values())

    @property
    def memory(self) -> mmap.mmap | None:
        """Its main memory."""
        return self._memory

    def swap(self, table: TranslationTable) -> None:
        """Put a new table in the place of the old one, and let every access go by it from now on."""
        before, self._table = self._table.by_function, table
        self.direct.forget()
        for function, entry in table.by_function.items():
            if not function or before.get(function) == entry:
                continue
            own = before.get(function)
            if own is None or own.lost != entry.lost:
                if own is not None:
                    self._queues[function].close(_lost(entry))
                    self._end_interrupts(function, _lost(entry) if entry.lost else None)
                else:
                    self._open_receiver(entry)
                self._queues[function] = self._new_queue(entry)
            else:
                self._queues[function].follow(entry)
        for function in sorted(before.keys() - table.by_function.keys()):
            detached = VfleetError(
                Reason.TRANSLATION_FAULT,
                f"function {function!r} was detached from driver {self.name!r}",
                metadata={"driver": self.name, "function": function},
            )
            self._queues.pop(function).detach(detached)
            self._end_interrupts(function, detached)
            receiver = self.receivers.pop(function, None)
            if receiver is not None:
                self._new_receivers.discard(self.name, function, receiver)
        self.changed.set()
        self.changed = asyncio.Event()

    def notify(self, notification: WatchNotificationsResponse) -> None:
        """Tell all who listen for this driver."""
        for listener in list(self.listeners):
            listener(notification)

    def find(self, virtual_address: int, length: int) -> Entry:
        """Return the entry that maps an access. Raise INVALID_FIELD if it isn't one, TRANSLATION_FAULT if none does."""
        try:
            check_access(virtual_address, length)
        except AddressError as error:
            raise invalid_field("virtual_address", f"{virtual_address:#x}+{length}", str(error)) from None
        entry = self._table.lookup(virtual_address)
        if entry is None:
            self._faults += 1
            raise VfleetError(
                Reason.TRANSLATION_FAULT,
                f"driver {self.name!r} has nothing at virtual address {virtual_address:#x}",
                metadata={"driver": self.name, "virtual_address": f"{virtual_address:#x}"},
            )
        return entry

    def queue(self, function: str) -> AccessQueue:
        """Return the queue of a function that is attached. Raise TRANSLATION_FAULT if it isn't."""
        found = self._queues.get(function)
        if found is None:
            raise VfleetError(
                Reason.TRANSLATION_FAULT,
                f"driver {self.name!r} is not attached to function {function!r}",
                metadata={"driver": self.name, "function": function},
            )
        return found

    async def submit(
        self, kind: AccessKind.ValueType, virtual_address: int, length: int, data: bytes, *, sequence: int
    ) -> "Submitted":
        """Put an access into its queue; accesses submitted one after the other keep that order.

        `sequence` is 0 to let the queue give the next; a client's own is waited for until the queue knows its place.
        Raise INVALID_FIELD or TRANSLATION_FAULT as `find` does, LIMIT_EXCEEDED or SEQUENCE_GAP as the queue does,
        FUNCTION_LOST for a function that is lost.
        """
        entry = self.find(virtual_address, length)
        access = Waiting(kind, virtual_address, length, data, sequence, may_ask_again=bool(sequence))
        if not entry.function:
            access.finish(self._access_memory(kind, virtual_address - entry.virtual_address, length, data))
            return Submitted(entry, access, None)
        queue = self.queue(entry.function)
        if sequence:
            await queue.synchronized()
        queue.submit(access)
        return Submitted(entry, access, queue)

    def grant(self, virtual_address: int, length: int) -> Grant | None:
        """Return leave to access directly what lies at a virtual address, or None. Raise as `find` does."""
        entry = self.find(virtual_address, length)
        return self._queues[entry.function].grant() if entry.function else None

    def access(self, kind: AccessKind.ValueType, virtual_address: int, length: int, data: bytes) -> Result | None:
        """Carry out an access at once, or return None: then it is to be submitted. Raise as `submit` does."""
        entry = self.find(virtual_address, length)
        if not entry.function:
            return self._access_memory(kind, virtual_address - entry.virtual_address, length, data)
        return self._queues[entry.function].access(kind, virtual_address, length, data)

    def state(self, memory_base: int) -> DriverState:
        """Return the driver as the contract shows it; `memory_base` is the fabric address of its main memory."""
        return DriverState(
            driver=self.name,
            main_memory_bytes=self.record.main_memory_bytes,
            main_memory_virtual_address=MAIN_MEMORY_VIRTUAL_ADDRESS if self._memory else 0,
            main_memory_base=memory_base if self._memory else 0,
            entries=[entry.to_proto() for entry in self._table.entries],
            last_sequences={
                function: queue.last_sequence for function, queue in self._queues.items() if queue.is_synchronized
            },
            unanswered={function: queue.unanswered for function, queue in self._queues.items()},
            translation_faults=self._faults,
            guest_state=self.guest_state,
            guest=self.record.guest if self.record.HasField("guest") else None,
        )

    def close(self) -> None:
        """End all queues and unmap the main memory."""
        self.direct.forget()
        stopped = VfleetError(Reason.HOST_UNAVAILABLE, f"the host of driver {self.name!r} stops")
        for queue in self._queues.values():
            queue.close(stopped)
        for receiver in self.receivers.values():
            receiver.end(stopped)
            receiver.close()
        if self._memory is not None:
            # A workload that was cancelled may have views of it still; it goes with the last of them.
            with contextlib.suppress(BufferError):
                self._memory.close()

    def _open_receiver(self, entry: Entry) -> None:
        memory = self.guest_memory if self._memory is None else MappedMemory(self._memory)
        if memory is None or not entry.function:
            return
        receiver = self._new_receivers.open(self.record, memory, entry)
        receiver.interrupted = partial(self._interrupted, entry.function)
        if entry.lost:
            receiver.end(_lost(entry))
        self.receivers[entry.function] = receiver

    def _end_interrupts(self, function: str, error: VfleetError | None) -> None:
        receiver = self.receivers.get(function)
        if receiver is not None:
            receiver.end(error)

    def _interrupted(self, function: str, vector: int, count: int) -> None:
        if self.listeners:
            self.notify(
                WatchNotificationsResponse(
                    kind=NOTIFICATION_KIND_INTERRUPT, function=function, vector=vector, interrupts=count
                )
            )

    def _new_queue(self, entry: Entry) -> AccessQueue:
        receiver = self.receivers.get(entry.function)
        queue = AccessQueue(self.name, entry, self._reach, receiver.window if receiver is not None else None)
        if entry.lost:
            queue.close(_lost(entry))
        return queue

    def _access_memory(self, kind: AccessKind.ValueType, offset: int, length: int, data: bytes) -> Result:
        assert self._memory is not None  # noqa: S101  # it has an entry
        if kind == ACCESS_KIND_READ:
            return ACCESS_STATUS_OK, self._memory[offset : offset + length]
        self._memory[offset : offset + length] = data
        return ACCESS_STATUS_OK, b""


def _lost(entry: Entry) -> VfleetError:
    return VfleetError(
        Reason.FUNCTION_LOST,
        f"function {entry.function!r} was lost with the machine that was its home",
        metadata={"function": entry.function, "driver": entry.driver},
    )


@dataclass(frozen=True, slots=True)
class Submitted:
    """An access that is in its queue, or was to main memory and is done."""

    entry: Entry
    access: Waiting
    queue: AccessQueue | None

    async def result(self, timeout_s: float) -> tuple[Result, int]:
        """Return the result and the sequence (0 in main memory).

        Raise HOLD_TIMEOUT after `timeout_s` seconds without an answer, saying whether the access was taken back or will
        still take effect; TRANSLATION_FAULT if the function is detached meanwhile, FUNCTION_LOST if it is lost.
        """
        try:
            async with asyncio.timeout(timeout_s):
                # The answer may also be another caller's, who asked for the same sequence.
                return await asyncio.shield(self.access.answer), self.access.sequence
        except TimeoutError:
            raise self._timed_out(timeout_s) from None

    def _timed_out(self, timeout_s: float) -> VfleetError:
        taken_back = self.queue is not None and self.queue.give_up(self.access)
        if taken_back:
            outcome = "it was taken back and has had no effect"
        else:
            outcome = f"it will still take effect, once, as sequence {self.access.sequence}"
        function = self.entry.function
        return VfleetError(
            Reason.HOLD_TIMEOUT,
            f"function {function!r} gave no answer for {timeout_s:g} s (on hold, or its home out of reach); {outcome}",
            metadata={
                "function": function,
                "sequence": str(self.access.sequence),
                "taken_back": str(taken_back).lower(),
            },
        )
