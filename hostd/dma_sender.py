"""A function's DMA, on its way to its driver's host: writes in order until each is acknowledged, and reads.

What is not acknowledged is in the engine's part of the image, so it moves with the function's state and is sent again
by the new home, with the same sequences. While the function doesn't run nothing is sent, and no answer changes the
image.
"""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from hostd.dma_exchange import admit
from hostd.dma_link import DmaLink, DmaLinks
from hostd.dma_receiver import DmaReceiver
from hostd.drivers import Drivers
from hostd.engine_part import EnginePart, Entry
from hostd.instance import Instance
from hostd.memory import MemoryBusyError
from vfleet.address import location_of
from vfleet.background import in_background
from vfleet.clock import Clock, backoff_delays
from vfleet.v1.fabric_service_pb2 import (
    DMA_REFUSAL_UNSPECIFIED,
    DmaAttachment,
    DmaRead,
    DmaWrite,
    ExchangeDmaRequest,
    ExchangeDmaResponse,
)

MAX_BATCH_BYTES = 1 << 16
RETRY_FIRST_S = 0.002
RETRY_LONGEST_S = 0.2


class NotNowError(Exception):
    """What was to be read can't be read now: the driver's host is out of reach, or refuses. Try again later."""


@dataclass(frozen=True, slots=True)
class DmaReach:
    """How functions reach drivers' main memory: this host's own drivers, and the fabric."""

    segment: int
    drivers: Drivers
    links: DmaLinks
    clock: Clock
    random: Random


class DmaSender:
    """The sender of one instance. `kick` is called when there may be room for more, or reads may be tried again."""

    def __init__(self, instance: Instance, part: EnginePart, reach: DmaReach, kick: Callable[[], None]) -> None:
        self._instance = instance
        self._part = part
        self._reach = reach
        self._kick = kick
        self._attachment = DmaAttachment()
        self._sent = 0
        self._must_send_again = False
        self._link: DmaLink | None = None
        self._reads: dict[int, asyncio.Future[list[bytes] | None]] = {}
        self._read_number = 0
        self._retry: asyncio.Task[None] | None = None
        self._delays = self._new_delays()

    @property
    def is_local(self) -> bool:
        """Whether the driver is on this host."""
        return location_of(self._part.window_base).segment == self._reach.segment

    def pump(self) -> None:
        """Send what may be sent. The one place from which writes leave."""
        part = self._part
        if not self._runs or not part.driver or self._waits:
            return
        attachment = part.attachment
        if self._must_send_again or attachment != self._attachment:
            self._must_send_again = False
            self._attachment, self._sent = attachment, part.writes.head
        if self._sent >= part.writes.tail:
            return
        if self.is_local:
            self._pump_local()
        else:
            self._pump_remote()

    def read_local(self, reads: Sequence[DmaRead]) -> list[bytes] | None:
        """Return what is in a local driver's main memory, None for a DMA fault. Raise NotNowError, NotAtHandError."""
        return self._reader().read(reads)

    async def fetch_local(self, reads: Sequence[DmaRead]) -> list[bytes] | None:
        """Return what is in a local driver's main memory, wherever that is, as `read_local`. Raise NotNowError."""
        fetching = asyncio.ensure_future(self._reader().fetch(reads))
        # As of a remote driver: who stops, or closes, waits for nothing.
        self._read_number += 1
        number = self._read_number
        answer = self._reads[number] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait((answer, fetching), return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else fetching.result()
        except MemoryBusyError:
            raise NotNowError from None
        finally:
            fetching.cancel()
            self._reads.pop(number, None)

    async def read_remote(self, reads: Sequence[DmaRead]) -> list[bytes] | None:
        """Return what is in a remote driver's main memory, None for a DMA fault. Raise NotNowError."""
        if self._waits:
            raise NotNowError
        self._read_number += 1
        number = self._read_number
        request = self._request()
        request.reads.extend(reads)
        request.read_number = number
        request.after_sequence = self._part.writes.last
        answer: asyncio.Future[list[bytes] | None] = asyncio.get_running_loop().create_future()
        self._reads[number] = answer
        try:
            if not self._send(request):
                raise NotNowError
            return await answer
        finally:
            self._reads.pop(number, None)

    def answered(self, response: ExchangeDmaResponse) -> None:
        """Take the answer to a batch (as the link's sender)."""
        if not self._runs or response.attachment != self._part.attachment:
            # If it runs again, what this answers is sent once more.
            self._must_send_again = True
            self._fail_reads()
            return
        self._acknowledge(response.last_sequence)
        read = self._reads.get(response.read_number)
        if response.refusal != DMA_REFUSAL_UNSPECIFIED:
            self.wait()
        elif read is not None and not read.done():
            self._delays = self._new_delays()
            read.set_result(list(response.data) or None)
        self.pump()

    def connected(self) -> None:
        """Send again what has no answer: the link is new (as the link's sender)."""
        self._must_send_again = True
        self._fail_reads()
        self.pump()

    def wait(self) -> None:
        """After a refusal: do nothing for a while, then send again from the oldest on."""
        self._fail_reads()
        if not self._waits:
            self._retry = in_background(self._run_retry(), name=f"retry DMA of {self._instance.about.function}")

    def close(self) -> None:
        """End it: what was to be read won't be."""
        self._fail_reads()
        if self._retry is not None:
            self._retry.cancel()
        self._leave_link()

    @property
    def _runs(self) -> bool:
        return self._instance.is_serving and not self._instance.is_closed

    @property
    def _waits(self) -> bool:
        return self._retry is not None and not self._retry.done()

    def _reader(self) -> DmaReceiver:
        receiver = self._admit()
        # Reads don't overtake writes.
        if receiver is None or receiver.last < self._part.writes.last:
            raise NotNowError
        return receiver

    def _admit(self) -> DmaReceiver | None:
        about, part = self._instance.about, self._part
        receiver = admit(self._reach.drivers, part.driver, about.function, about.generation, part.attachment)
        return receiver if isinstance(receiver, DmaReceiver) else None

    def _pump_local(self) -> None:
        receiver = self._admit()
        if receiver is None:
            self.wait()
            return
        try:
            for entry in self._part.writes.entries(self._part.writes.head):
                # Between these two a kill leaves it received and not acknowledged: then it is a repeated one.
                if entry.sequence > receiver.last:
                    receiver.write(entry.sequence, entry.address, entry.data)
        except MemoryBusyError:
            self.wait()
        self._acknowledge(receiver.last)

    def _pump_remote(self) -> None:
        batch: list[Entry] = []
        size = 0
        for entry in self._part.writes.entries(self._sent):
            batch.append(entry)
            size += len(entry.data)
            if size >= MAX_BATCH_BYTES:
                break
        request = self._request()
        request.first_sequence = batch[0].sequence
        request.writes.extend(DmaWrite(address=entry.address, data=entry.data) for entry in batch)
        if self._send(request):
            self._sent = batch[-1].end
            self.pump()

    def _request(self) -> ExchangeDmaRequest:
        about, part = self._instance.about, self._part
        return ExchangeDmaRequest(
            driver=part.driver, function=about.function, generation=about.generation, attachment=part.attachment
        )

    def _send(self, request: ExchangeDmaRequest) -> bool:
        link = self._reach.links.to(location_of(self._part.window_base).segment)
        if self._link is not link:
            self._leave_link()
        self._link = link
        return link.send(request, self)

    def _leave_link(self) -> None:
        if self._link is not None:
            self._link.leave(self._instance.about.function, self._instance.about.generation)

    def _acknowledge(self, sequence: int) -> None:
        writes = self._part.writes
        before = writes.head
        writes.acknowledge(min(sequence, writes.last))
        if writes.head != before:
            self._delays = self._new_delays()
            self._sent = max(self._sent, writes.head)
            self._kick()

    async def _run_retry(self) -> None:
        await self._reach.clock.sleep(next(self._delays))
        self._retry = None
        self._must_send_again = True
        self.pump()
        self._kick()

    def _fail_reads(self) -> None:
        for answer in self._reads.values():
            if not answer.done():
                answer.set_exception(NotNowError())

    def _new_delays(self) -> Iterator[float]:
        return backoff_delays(self._reach.random, RETRY_FIRST_S, RETRY_LONGEST_S)
