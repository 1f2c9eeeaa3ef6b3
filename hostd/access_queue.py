"""One driver's accesses to one function, in program order, until each has its answer.

    submitted --> [ waiting ][ sent, without an answer ] --> answered

What has no answer is not lost and not in doubt: after a hold, a broken link or a refusal it is sent again, with the
same sequence, to the home that the table names by then. While the entry is held nothing is sent. A queue that has just
been made (also by a restart of the daemon) asks the function first how far it got, and goes on from there.
"""

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from hostd.arrival import Range
from hostd.fabric import MAX_JOINED, Link
from hostd.grant import Grant
from hostd.instance import Instance, SequenceGapError
from hostd.reach import Reach, segment_of
from hostd.sequencer import Result, Sequencer, order_of
from hostd.translation import Entry
from hostd.waiting import Waiting, exchange_request
from vfleet.address import translate, window_offset
from vfleet.clock import backoff_delays
from vfleet.errors import Reason, VfleetError
from vfleet.limits import WINDOW
from vfleet.v1.access_pb2 import AccessKind, Session
from vfleet.v1.fabric_service_pb2 import (
    REFUSAL_NOT_YET,
    REFUSAL_UNSPECIFIED,
    DmaWindow,
    ExchangeResponse,
)

MAX_WAITING = 4096  # accesses in a queue, sent or not
RETRY_FIRST_S = 0.002
RETRY_LONGEST_S = 0.2


class AccessQueue:
    """The queue. Its entry is the one of the driver's present table; `follow` tells it of every change."""

    def __init__(self, driver: str, entry: Entry, reach: Reach, dma: DmaWindow | None = None) -> None:
        """Take the window that the function's DMA may go to, if there is one; it is told before the first access."""
        self._driver = driver
        self._dma = dma
        self._entry = entry
        self._segment = segment_of(entry)
        self._reach = reach
        self._accesses: deque[Waiting] = deque()
        self._repeats: dict[int, Waiting] = {}
        self._repeats_sent: set[int] = set()
        self._sent = 0
        self._next_sequence = 0  # 0: not known yet
        self._session = Session()  # that of the last question, until the sequence is known
        self._acknowledged = 0
        self._link: Link | None = None
        self._home: tuple[Instance, Sequencer] | None = None
        self._grant: Grant | None = None
        self._repair: asyncio.Task[None] | None = None
        self._proof: asyncio.Task[None] | None = None
        self._delays = self._new_delays()
        self._synchronized = asyncio.Event()
        self._closed: VfleetError | None = None
        self._start_repair()

    @property
    def last_sequence(self) -> int:
        """The last sequence given to an access; 0 for none, or if it isn't known yet."""
        self._count_direct()
        return max(self._next_sequence - 1, 0)

    @property
    def is_synchronized(self) -> bool:
        """Whether the next sequence is known."""
        return bool(self._next_sequence)

    @property
    def unanswered(self) -> int:
        """Accesses that wait or have no answer yet."""
        return len(self._accesses)

    def submit(self, access: Waiting) -> None:
        """Put an access at the end of the queue, and send it if nothing is in the way.

        Raise LIMIT_EXCEEDED if the queue is full, SEQUENCE_GAP if the access has a sequence that is not its turn's, and
        what the queue was ended with.
        """
        self._check_room(1)
        self._count_direct()
        if access.sequence and not self._take_sequence(access):
            return
        self._accesses.append(access)
        self._pump()

    def submit_many(self, accesses: Sequence[Waiting]) -> None:
        """Put accesses without a sequence of their own at the end of the queue: all, or if it raises, none.

        On their way to another host they share messages. Raise as `submit` does.
        """
        self._check_room(len(accesses))
        self._count_direct()
        self._accesses.extend(accesses)
        self._pump()

    def grant(self) -> Grant | None:
        """Return leave to access the function's plain memory directly, if it is here and nothing waits before that."""
        if not self._is_idle() or self._admit() is None:
            return None
        assert self._home is not None  # noqa: S101  # it is admitted
        instance, sequencer = self._home
        self._count_direct()
        self._grant = instance.grant(sequencer, self._entry.virtual_address, self._entry.length_bytes)
        return self._grant

    def access(self, kind: AccessKind.ValueType, virtual_address: int, length: int, data: bytes) -> Result | None:
        """Carry out an access at once, if its function is here and nothing makes it wait; None if not."""
        home = self._admit() if self._is_idle() else None
        if home is None or home.is_gated:
            return None
        self._count_direct()
        try:
            result = self._carry_out(self._next_sequence, kind, virtual_address, length, data)
        except SequenceGapError:
            self._start_repair()
            return None
        self._acknowledged = self._next_sequence
        self._next_sequence += 1
        return result

    def give_up(self, access: Waiting) -> bool:
        """Take an access back that was never sent. Return False if it was: then it will still take effect, once."""
        if access.sequence or access not in self._accesses:
            return False
        self._accesses.remove(access)
        return True

    async def synchronized(self) -> None:
        """Wait until the next sequence is known."""
        await self._synchronized.wait()

    def follow(self, entry: Entry) -> None:
        """Go by another entry: after the lift, what has no answer is sent again, to the home that it names."""
        self._revoke()
        is_moved = entry.generation != self._entry.generation
        self._entry = entry
        self._segment = segment_of(entry)
        self._home = None
        self._forget_sent()
        self._delays = self._new_delays()
        if self._proof is not None and is_moved:
            self._proof.cancel()
            self._proof = None
        if self._repair is not None:
            self._repair.cancel()
            self._repair = None
        if not self._next_sequence:
            self._start_repair()
            return
        self._pump()
        if is_moved and self._dma is not None and not self._closed:
            self._proof = asyncio.create_task(self._run_proof(), name=f"prove {self._entry.function}")

    def detach(self, error: VfleetError) -> None:
        """End the queue, and let the function forget the driver. What has no answer fails with `error`."""
        self.close(error)
        self._reach.forget(self._entry, self._session, self._dma)

    def close(self, error: VfleetError) -> None:
        """End the queue. What has no answer fails with `error`."""
        self._revoke()
        self._closed = error
        self._synchronized.set()
        for task in (self._repair, self._proof):
            if task is not None:
                task.cancel()
        if self._link is not None:
            self._link.leave(self._driver, self._entry.function)
        for access in (*self._accesses, *self._repeats.values()):
            access.finish(error)
        self._accesses.clear()
        self._repeats.clear()

    def answered(self, response: ExchangeResponse) -> None:
        """Take the answers, or the refusal, of a batch (as the link's sender)."""
        if response.session != self._session:
            return
        if response.answers or response.refusal == REFUSAL_NOT_YET:
            self._delays = self._new_delays()
        accesses, repeats = self._accesses, self._repeats
        for answer in response.answers:
            sequence = answer.sequence
            if accesses and accesses[0].sequence == sequence:
                self._finish_head((answer.status, answer.data))
            elif sequence in repeats:
                self._repeats_sent.discard(sequence)
                repeats.pop(sequence).finish((answer.status, answer.data))
        if response.refusal != REFUSAL_UNSPECIFIED and response.generation == self._entry.generation:
            self._start_repair()
        else:
            self._pump()

    def connected(self) -> None:
        """Send again what has no answer: the link is new (as the link's sender)."""
        self._forget_sent()
        self._pump()

    def _check_room(self, count: int) -> None:
        if self._closed is not None:
            raise self._closed
        if len(self._accesses) + len(self._repeats) + count > MAX_WAITING:
            raise VfleetError(
                Reason.LIMIT_EXCEEDED,
                f"driver {self._driver!r} has {MAX_WAITING} accesses to function {self._entry.function!r} without an"
                " answer; expected fewer",
            )

    def _take_sequence(self, access: Waiting) -> bool:
        """Check a client's own sequence. Return False if the access is a repeated one, and is dealt with."""
        if not self._next_sequence:
            raise VfleetError(Reason.SEQUENCE_GAP, "the sequences are not known yet; call again")
        # Those before it keep their places whatever happens to their callers.
        for waiting in self._accesses:
            self._give_sequence(waiting)
        if access.sequence == self._next_sequence:
            self._next_sequence += 1
            return True
        if access.sequence > self._next_sequence:
            raise VfleetError(
                Reason.SEQUENCE_GAP,
                f"sequence is {access.sequence}; expected at most {self._next_sequence}, the next",
                metadata={"expected": str(self._next_sequence)},
            )
        unanswered = (*self._repeats.values(), *self._accesses)
        first = next((waiting for waiting in unanswered if waiting.sequence == access.sequence), None)
        if first is not None:
            access.finish_as(first)
        else:
            self._repeats[access.sequence] = access
            self._pump()
        return False

    def _give_sequence(self, access: Waiting) -> None:
        if not access.sequence:
            access.sequence = self._next_sequence
            self._next_sequence += 1

    def _finish_head(self, result: Result) -> None:
        access = self._accesses.popleft()
        if self._sent:
            self._sent -= 1
        acknowledged = access.sequence - WINDOW if access.may_ask_again else access.sequence
        if acknowledged > self._acknowledged:
            self._acknowledged = acknowledged
        access.finish(result)

    def _pump(self) -> None:
        """Send what may be sent. The one place from which accesses leave."""
        if self._closed or self._entry.held or not (self._accesses or self._repeats):
            return
        if not self._next_sequence:
            self._start_repair()
        elif self._repair is not None and not self._repair.done():
            return
        elif self._segment == self._reach.segment:
            self._pump_local()
        else:
            self._pump_remote()

    def _is_idle(self) -> bool:
        """Whether the function is here, and an access may be carried out before anything else happens."""
        return not (
            self._accesses
            or self._repeats
            or self._closed
            or self._entry.held
            or not self._next_sequence
            or (self._repair is not None and not self._repair.done())
            or self._segment != self._reach.segment
        )

    def _admit(self) -> Instance | None:
        """Find the home on this host. Return None if the function isn't served here."""
        if self._home is None or not self._home[0].answers:
            entry, reach = self._entry, self._reach
            address = translate(entry.virtual_address, entry.offset)
            session = order_of(self._session)
            admitted = reach.functions.admit(self._driver, entry.function, entry.generation, session, address)
            if not isinstance(admitted, tuple):
                return None
            self._home = admitted
            self._delays = self._new_delays()
        return self._home[0]

    def _count_direct(self) -> None:
        """Take note of the accesses that were done directly, in the queue's stead."""
        if self._grant is not None:
            self._next_sequence = max(self._next_sequence, self._grant.sequencer.last + 1)

    def _revoke(self) -> None:
        if self._grant is not None:
            self._count_direct()
            self._grant.revoke()
            self._grant = None

    def _pump_local(self) -> None:
        while self._accesses or self._repeats:
            home = self._admit()
            if home is None:
                self._start_repair()
                return
            if self._repeats:
                self._finish_repeat(self._repeats.pop(next(iter(self._repeats))))
                continue
            access = self._accesses[0]
            if home.is_gated and self._has_to_wait(home, access):
                return
            self._give_sequence(access)
            try:
                result = self._carry_out_waiting(access)
            except SequenceGapError:
                self._start_repair()
                return
            self._finish_head(result)

    def _has_to_wait(self, instance: Instance, access: Waiting) -> bool:
        """Return whether something blocks what an access touches; then it goes on once that is over."""
        offset = window_offset(translate(access.virtual_address, self._entry.offset))
        ranges = ((offset, access.length),)
        if not instance.blocks(ranges):
            return False
        self._repair = asyncio.create_task(self._wait_to_pass(instance, ranges))
        return True

    async def _wait_to_pass(self, instance: Instance, ranges: tuple[Range, ...]) -> None:
        await instance.passed(ranges)
        self._repair = None
        self._pump()

    def _finish_repeat(self, access: Waiting) -> None:
        access.finish(self._carry_out_waiting(access))

    def _carry_out_waiting(self, access: Waiting) -> Result:
        return self._carry_out(access.sequence, access.kind, access.virtual_address, access.length, access.data)

    def _carry_out(
        self, sequence: int, kind: AccessKind.ValueType, virtual_address: int, length: int, data: bytes
    ) -> Result:
        assert self._home is not None  # noqa: S101  # the caller admitted it
        instance, sequencer = self._home
        sequencer.acknowledged = self._acknowledged
        return instance.access(sequencer, sequence, kind, translate(virtual_address, self._entry.offset), length, data)

    def _pump_remote(self) -> None:
        asks_again = bool(self._repeats) and not self._repeats_sent
        if self._sent >= min(len(self._accesses), WINDOW) and not asks_again:
            return
        link = self._reach.fabric.to(self._segment)
        if self._link is not None and self._link is not link:
            self._link.leave(self._driver, self._entry.function)
        self._link = link
        # What was asked for again is on its way in one message at a time: there may be many, of many clients.
        batch = list(islice(self._repeats.values(), MAX_JOINED)) if asks_again else []
        self._repeats_sent.update(access.sequence for access in batch)
        # A link that answers at once changes what there is to send.
        while batch or self._sent < min(len(self._accesses), WINDOW):
            end = min(len(self._accesses), WINDOW, self._sent + max(MAX_JOINED - len(batch), 0))
            for access in islice(self._accesses, self._sent, end):
                self._give_sequence(access)
                batch.append(access)
            self._sent = end
            if not link.send(exchange_request(self._entry, self._session, self._acknowledged, batch), self):
                self._forget_sent()
                return
            batch = []

    def _forget_sent(self) -> None:
        """Take it that nothing is on its way."""
        self._sent = 0
        self._repeats_sent.clear()

    def _start_repair(self) -> None:
        self._revoke()
        if not self._closed and not self._entry.held and (self._repair is None or self._repair.done()):
            self._repair = asyncio.create_task(self._run_repair(), name=f"repair {self._driver} {self._entry.function}")

    def _new_delays(self) -> Iterator[float]:
        return backoff_delays(self._reach.random, RETRY_FIRST_S, RETRY_LONGEST_S)

    async def _run_repair(self) -> None:
        """After a refusal, or before the first access: find the home's sequence, wait, send again."""
        if self._next_sequence:
            await self._reach.clock.sleep(next(self._delays))
        while not self._next_sequence:
            try:
                last = await self._ask_sequence()
            except VfleetError:
                await self._reach.clock.sleep(next(self._delays))
                continue
            self._next_sequence = last + 1
            self._acknowledged = max(last - WINDOW, 0)
            self._synchronized.set()
        self._repair = None
        self._home = None
        self._forget_sent()
        self._pump()

    async def _run_proof(self) -> None:
        """Let the new home know that it is one: a bus master has work also when its driver has no access to make."""
        delays = self._new_delays()
        while True:
            try:
                await self._ask_sequence()
            except VfleetError:
                await self._reach.clock.sleep(next(delays))
            else:
                return

    async def _ask_sequence(self) -> int:
        if not self._next_sequence:
            self._session = self._reach.new_session(self._entry)
        return await self._reach.ask_sequence(self._entry, self._session, self._dma)
