"""One guest: the accesses that its VMM's messages become, in order, until the holder is told that they are done.

holder ──► messages ──► device ──► accesses, numbered ──► the driver's queue
   ◄── done up to a message, and the sequence that follows its last access's: where the next hostd goes on
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from hostd.dma_receiver import DmaReceiver
from hostd.driver import Driver
from hostd.guest.device import DMA_KEY, Answered, GuestDevice
from hostd.guest.dma_messages import DmaMessages
from hostd.guest.frames import HELLO_DATA, SAID, VERSION, Kind
from hostd.guest.holder_link import Frame, HolderLink
from hostd.guest.memory import GuestMemory
from hostd.guest.vfio_user import Message
from hostd.models.pci import pci_function
from hostd.sequencer import Result
from hostd.waiting import Waiting
from vfleet.errors import Reason, VfleetError
from vfleet.v1.access_pb2 import ACCESS_STATUS_UNSUPPORTED_REQUEST, AccessKind
from vfleet.v1.types_pb2 import GUEST_STATE_CONNECTED, GUEST_STATE_WAITING, GuestState

MAX_IN_PROGRESS = 1024
"""Messages, and accesses, without an answer, past which no more are taken from the holder."""
ACCESSES_AT_ONCE = 32
"""After so many accesses and messages others have their turn."""
TELL_WITHIN_S = 0.001
"""How long the holder may wait to be told of what is done, so that it is told of several messages at once."""
MAX_UNTOLD = 16
"""After so many accesses it is told at once: answers to those that a successor repeats must still be kept (WINDOW)."""

_CONNECTED_KEY = b"connected"

_log = logging.getLogger(__name__)


class HolderVersionError(Exception):
    """The holder's frames are of another version."""


@dataclass(slots=True, eq=False)
class Progress:
    """A message that is being carried out: the sequence of its last access, and how many have no answer yet."""

    number: int
    sequence: int
    pending: int = 1


class LiveGuest:
    """A guest whose holder is connected, as one driver's device behind one link. It is its device's port."""

    def __init__(
        self, driver: Driver, function: str, link: HolderLink, changed: Callable[[GuestState.ValueType], None]
    ) -> None:
        """`changed` is told when a VMM comes or goes."""
        assert driver.guest_memory is not None  # noqa: S101  # it is a guest's
        guest = driver.record.guest
        self._driver = driver
        self._function = function
        self._virtual_address = driver.table.by_function[function].virtual_address
        self._link = link
        self._changed = changed
        self._memory: GuestMemory = driver.guest_memory
        self._timeout_s = guest.message_timeout_ms / 1000
        self._messages = DmaMessages(self, self._timeout_s, asyncio.get_running_loop().time)
        self._expiry: asyncio.TimerHandle | None = None
        self._vmm_number = 0
        limit = driver.record.main_memory_bytes
        self._device = GuestDevice(guest, pci_function(guest.model), self._memory, self._messages, limit, self)
        self._receiver: DmaReceiver = driver.receivers[function]
        self._told = self._receiver.interrupted
        self._receiver.interrupted = self._interrupted
        self._in_progress: deque[Progress] = deque()
        self._at_hand = Progress(0, 0)
        self._sequence = 0
        self._queued_before = 0
        self._resets = 0
        self._accesses = 0
        self._telling: asyncio.TimerHandle | None = None
        self._told_sequence = 0
        self._spent = 0
        self._is_over = False
        self._has_room = asyncio.Event()
        self._waiting: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Take over from the predecessor, and carry out what comes. Raise HolderGoneError, or HolderVersionError."""
        await self._driver.queue(self._function).synchronized()
        while True:
            frames = deque(self._link.take())
            if not frames:
                await self._link.readable()
                self._spent = 0
            try:
                while frames:
                    self._take(frames[0])
                    frames.popleft().close()
                    self._spent += 1
                    if self._spent >= ACCESSES_AT_ONCE:
                        self._tell()
                        await asyncio.sleep(0)
                        self._spent = 0
            finally:
                for frame in frames:
                    frame.close()
            while not self._may_take_more:
                self._has_room.clear()
                await self._has_room.wait()

    def reset(self) -> None:
        """Reset the function of a guest that is lost, so that it does no DMA any more."""
        self._at_hand = Progress(0, 0)
        self._device.gone()

    def end(self) -> None:
        """Let go of guest memory; the holder has descriptors of its own. Answers that come later are nobody's."""
        self._is_over = True
        if self._telling is not None:
            self._telling.cancel()
        for task in self._waiting:
            task.cancel()
        self._receiver.interrupted = self._told
        self._receiver.is_cut_off = False
        self._memory.is_present = False
        self._memory.messages = None
        self._memory.clear()
        self._messages.end()
        if self._expiry is not None:
            self._expiry.cancel()

    @property
    def _may_take_more(self) -> bool:
        # Until all is there that a predecessor may have taken no DMA comes, which the oldest may wait for.
        is_full = self._memory.is_present and len(self._in_progress) > MAX_IN_PROGRESS
        return not is_full and self._accesses <= MAX_IN_PROGRESS

    # As the device's port

    def access(
        self, kind: AccessKind.ValueType, offset: int, length: int, data: bytes, answered: Answered | None
    ) -> None:
        """Put an access into the driver's queue, with the sequence that follows."""
        progress = self._at_hand
        self._sequence += 1
        self._accesses += 1
        self._spent += 1
        progress.pending += 1
        access = Waiting(kind, self._virtual_address + offset, length, data, self._sequence, may_ask_again=True)
        try:
            self._submit(access)
        except VfleetError as error:
            access.finish(error)
        progress.sequence = self._sequence
        if access.outcome is not None:
            self._settle(progress, answered, access.outcome)
        else:
            access.answer.add_done_callback(partial(self._answered, progress, answered))

    def reply(self, message: bytes, after_write: int = 0) -> None:
        """Answer the message at hand, once the DMA write with this sequence has taken effect."""
        progress = self._at_hand
        if after_write <= self._receiver.last:
            self._link.answer(progress.number, message)
            return
        progress.pending += 1
        task = asyncio.create_task(self._reply_later(progress, message, after_write))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    def cut_off(self) -> None:
        """Let no DMA reach the guest until the reset that is asked for next has been done."""
        self._resets += 1
        self._receiver.is_cut_off = True

    def reset_done(self, last_write: int) -> None:
        """Let DMA reach the guest again, but none up to a sequence."""
        self._resets -= 1
        self._receiver.skip_to(last_write)
        self._receiver.is_cut_off = self._resets > 0

    def keep(self, key: bytes, data: bytes, descriptor: int = -1) -> None:
        """Let the holder keep something for the next hostd."""
        self._link.keep(key, data, descriptor)

    def drop(self, key: bytes) -> None:
        """Let the holder keep it no longer."""
        self._link.drop(key)

    def ring(self, key: bytes) -> None:
        """Let the holder tell of an interrupt by the eventfd that it keeps by a key (as the messages' port)."""
        # A VMM's message may ask for many of them.
        self._spent += 1
        self._link.ring(key)

    def say(self, message: bytes, *, completes: bool) -> int:
        """Send a message to the VMM (as the messages' port)."""
        number = self._link.say(self._vmm_number, message, self._receiver.last + 1 if completes else 0)
        if self._expiry is None:
            self._expiry = asyncio.get_running_loop().call_later(self._timeout_s, self._expire)
        return number

    def write_failed(self) -> None:
        """Count a DMA write that the VMM hasn't done (as the messages' port)."""
        self._receiver.faults += 1

    def learned(self, state: bytes) -> None:
        """Let the holder keep what is known of the VMM (as the messages' port)."""
        self.keep(DMA_KEY, state)

    def _expire(self) -> None:
        self._messages.expire()
        next_s = self._messages.expires_s
        self._expiry = None if next_s is None else asyncio.get_running_loop().call_at(next_s, self._expire)

    # From the holder

    def _take(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.HELLO:
                self._greet(frame)
                return
            case Kind.KEPT:
                if frame.key == _CONNECTED_KEY:
                    self._vmm_number = int.from_bytes(frame.data, "little")
                    self._changed(GUEST_STATE_CONNECTED)
                else:
                    self._device.restore(frame.key, frame.data, frame.descriptors)
                return
            case Kind.READY:
                pass
            case _:
                self._carry_out(frame)
        # What the predecessor had been told, a reset perhaps, comes before any DMA.
        if frame.number >= self._queued_before and not self._memory.is_present:
            self._memory.is_present = True
            self._device.interrupts.raise_all()

    def _greet(self, frame: Frame) -> None:
        self._queued_before, version = HELLO_DATA.unpack(frame.data.ljust(HELLO_DATA.size, b"\0"))
        if version != VERSION:
            raise HolderVersionError(f"the holder's frames are of version {version}; expected {VERSION}")
        self._sequence = frame.position - 1
        self._link.said, written = SAID.unpack(frame.key)
        self._memory.messages = self._messages
        # Said, but not noted before the predecessor was killed.
        if written == self._receiver.last + 1:
            self._receiver.skip_to(written)
        if not frame.position:
            # A new holder: where its first message's accesses begin has to be known before there are any.
            self._sequence = self._driver.queue(self._function).last_sequence
            self._link.done(0, self._sequence + 1)
        if frame.number == self._queued_before:
            self._queued_before = 0
        self._changed(GUEST_STATE_WAITING)

    def _carry_out(self, frame: Frame) -> None:
        progress = self._at_hand = Progress(frame.number, self._sequence)
        self._in_progress.append(progress)
        if frame.kind == Kind.CONNECTED:
            self._vmm_number = frame.number
            self.keep(_CONNECTED_KEY, frame.number.to_bytes(8, "little"))
            self._device.connected()
            self._changed(GUEST_STATE_CONNECTED)
        elif frame.kind == Kind.GONE:
            self.drop(_CONNECTED_KEY)
            self._device.gone()
            self._changed(GUEST_STATE_WAITING)
        else:
            self._device.handle(Message.parse(frame.data), frame.descriptors, refused=frame.position)
        self._finish(progress)

    def _submit(self, access: Waiting) -> None:
        queue = self._driver.queue(self._function)
        try:
            queue.submit(access)
        except VfleetError as error:
            if error.reason is not Reason.SEQUENCE_GAP:
                raise
            # Accesses that the holder knows of have been undone with the function's state: it was restored.
            _log.error("the guest goes on from another sequence: %s", error.message)
            self._sequence = access.sequence = queue.last_sequence + 1
            queue.submit(access)

    def _answered(self, progress: Progress, answered: Answered | None, answer: "asyncio.Future[Result]") -> None:
        self._settle(progress, answered, answer.exception() or answer.result())

    def _settle(self, progress: Progress, answered: Answered | None, outcome: Result | BaseException) -> None:
        # A receiver that is the attachment's no more is closed, and the holder about to end.
        if self._is_over or self._driver.receivers.get(self._function) is not self._receiver:
            return
        self._accesses -= 1
        if self._accesses == MAX_IN_PROGRESS:
            self._has_room.set()
        if answered is not None:
            self._at_hand = progress
            # Of a function that is lost or detached: as of one that isn't there.
            answered(outcome if isinstance(outcome, tuple) else (ACCESS_STATUS_UNSUPPORTED_REQUEST, b""))
        self._finish(progress)

    async def _reply_later(self, progress: Progress, message: bytes, after_write: int) -> None:
        await self._receiver.reached(after_write)
        self._link.answer(progress.number, message)
        self._finish(progress)

    def _finish(self, progress: Progress) -> None:
        progress.pending -= 1
        if progress.pending:
            return
        if self._sequence - self._told_sequence >= MAX_UNTOLD:
            self._tell()
        elif self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(TELL_WITHIN_S, self._tell)

    def _tell(self) -> None:
        """Tell the holder how far all is done."""
        if self._telling is not None:
            self._telling.cancel()
            self._telling = None
        done = None
        while self._in_progress and not self._in_progress[0].pending:
            done = self._in_progress.popleft()
        if done is not None:
            self._told_sequence = done.sequence
            self._link.done(done.number, done.sequence + 1)
            self._has_room.set()

    def _interrupted(self, vector: int, count: int) -> None:
        if self._told is not None:
            self._told(vector, count)
        self._device.interrupts.raise_(vector)
