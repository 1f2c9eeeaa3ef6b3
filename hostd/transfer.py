"""A function's state, out of the source and into the target, which pulls it.

    header -> (pages -> round end) ... -> the source is stopped -> pages -> sequences, end

Rounds are sent while the function runs: first all pages that aren't zero (a new instance's are), then those that
changed meanwhile, until few are left or the rounds are used up. Then the source waits to be stopped by the same
attempt, and sends the last difference. An import takes all or nothing: its instance is complete only after the end was
checked.
"""

import struct
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence

from hostd.functions import Functions
from hostd.instance import Instance
from vfleet import failpoint
from vfleet.address import PAGE_BYTES
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.rpc import Channels, stream
from vfleet.v1.transfer_service_pb2 import (
    DriverSequence,
    ExportStateRequest,
    ExportStateResponse,
    ImportStateRequest,
    ImportStateResponse,
    RoundEnd,
    StateEnd,
    StateHeader,
    StatePages,
)
from vfleet.v1.transfer_service_pb2_grpc import TransferServiceStub
from vfleet.v1.types_pb2 import (
    DEVICE_STATE_PRE_COPY,
    DEVICE_STATE_RESUMING,
    DEVICE_STATE_RUNNING,
    DEVICE_STATE_STOP_COPY,
    Attempt,
)

FORMAT_VERSION = 1
MAX_ROUNDS = 1000
CHUNK_PAGES = 64
FEW_DIRTY_PAGES = 64  # 256 KiB: cheaper to send while stopped than to chase in another round

_ZERO_PAGE = bytes(PAGE_BYTES)
_CRC = struct.Struct("<I")
_OFFSET = struct.Struct("<Q")


class Export:
    """One export of one instance: what has been sent, and the checksum over it."""

    def __init__(self, instance: Instance, clock: Clock) -> None:
        self._instance = instance
        self._clock = clock
        self._messages = 0
        self._crc = 0

    def header(self) -> ExportStateResponse:
        """Return the first part of the stream."""
        about, image = self._instance.about, self._instance.image
        return ExportStateResponse(
            header=StateHeader(
                format_version=FORMAT_VERSION,
                model=about.model,
                bars=about.bars,
                identity=about.identity,
                image_bytes=len(image.memory),
            )
        )

    async def rounds(self, max_rounds: int, dirty: set[int]) -> AsyncIterator[ExportStateResponse]:
        """Yield rounds of pages while the function runs; the last says that the source waits to be stopped.

        `dirty` gets the pages that change meanwhile; those in it at the end have still to be sent.
        """
        pages: Sequence[int] = range(len(self._instance.image.memory) // PAGE_BYTES)
        skip_zero = True
        for number in range(1, max_rounds + 1):
            sent_bytes = 0
            for part in self._pages(pages, skip_zero=skip_zero):
                sent_bytes += len(part.pages.data)
                yield part
                # The function's own accesses have their turn between two chunks.
                await self._clock.sleep(0)
            last = number == max_rounds or len(dirty) <= FEW_DIRTY_PAGES or not self._instance.is_serving
            failpoint.reach("hostd.export.round")
            yield ExportStateResponse(
                round_end=RoundEnd(
                    round=number,
                    sent_bytes=sent_bytes,
                    dirty_bytes=len(dirty) * PAGE_BYTES,
                    last_before_stop=last,
                )
            )
            if last:
                return
            pages, skip_zero = sorted(dirty), False
            dirty.clear()

    def rest(self, pages: Iterable[int], *, skip_zero: bool) -> Iterator[ExportStateResponse]:
        """Yield the last pages and the end. The function is stopped."""
        yield from self._pages(pages, skip_zero=skip_zero)
        self._check_exists()
        sequences = [sequencer.export() for sequencer in self._instance.image.sequencers()]
        yield ExportStateResponse(
            end=StateEnd(
                sequences=sequences,
                page_messages=self._messages,
                pages_crc=self._crc,
                sequences_crc=sequences_crc(sequences),
            )
        )

    def _pages(self, pages: Iterable[int], *, skip_zero: bool) -> Iterator[ExportStateResponse]:
        memory = self._instance.image.memory
        for first, count in _runs(pages):
            self._check_exists()
            offset = first * PAGE_BYTES
            data = bytes(memory[offset : offset + count * PAGE_BYTES])
            if skip_zero and data == _ZERO_PAGE * count:
                continue
            crc = pages_crc(offset, data)
            self._messages += 1
            self._crc = zlib.crc32(_CRC.pack(crc), self._crc)
            yield ExportStateResponse(pages=StatePages(image_offset=offset, data=data, crc=crc))

    def _check_exists(self) -> None:
        if self._instance.is_closed:
            raise _not_stopped(self._instance)


async def export_state(
    functions: Functions, clock: Clock, request: ExportStateRequest
) -> AsyncGenerator[ExportStateResponse, None]:
    """Yield the state of a home, for the attempt that stops it (ExportState in the contract).

    Raise STALE_ATTEMPT, NOT_FOUND, WRONG_GENERATION; ILLEGAL_STATE if it is being exported already, or is destroyed or
    stopped by another attempt meanwhile.
    """
    _check_rounds(request.max_rounds)
    instance = functions.fence_for_export(request.function, request.generation, request.attempt)
    export = Export(instance, clock)
    all_pages = range(len(instance.image.memory) // PAGE_BYTES)
    if instance.state == DEVICE_STATE_STOP_COPY:
        _check_stopped(instance, request.attempt)
        yield export.header()
        for part in export.rest(all_pages, skip_zero=True):
            yield part
        return
    if instance.state != DEVICE_STATE_RUNNING:
        raise VfleetError(
            Reason.ILLEGAL_STATE,
            f"function {request.function!r} is being exported already",
            metadata={"function": request.function},
        )
    # An export of an attempt that was aborted may still end later than this one begins; it has another set.
    dirty = instance.image.track()
    instance.go_to(DEVICE_STATE_PRE_COPY)
    try:
        failpoint.reach("hostd.export.header")
        yield export.header()
        async for part in export.rounds(request.max_rounds, dirty):
            yield part
        while instance.state == DEVICE_STATE_PRE_COPY and not instance.is_closed:
            await instance.changed.wait()
        _check_stopped(instance, request.attempt)
        failpoint.reach("hostd.export.last")
        for part in export.rest(sorted(dirty), skip_zero=False):
            yield part
        failpoint.reach("hostd.export.end")
    finally:
        if not instance.is_closed and instance.image.untrack(dirty) and instance.state == DEVICE_STATE_PRE_COPY:
            instance.go_to(DEVICE_STATE_RUNNING)


async def import_state(
    functions: Functions, channels: Channels, request: ImportStateRequest
) -> AsyncGenerator[ImportStateResponse, None]:
    """Pull the state of an instance from its source, and yield the progress (ImportState in the contract).

    Raise BAD_STATE if what comes is damaged, incomplete, of another version or another device; STALE_ATTEMPT, NOT_FOUND
    or WRONG_GENERATION by the fence; UNREACHABLE, or what the source answers.
    """
    _check_rounds(request.max_rounds)
    if not request.source_address:
        raise invalid_field("source_address", "", "HOST:PORT of the source's hostd")
    instance = functions.fence_for_import(request.function, request.generation, request.attempt)
    progress = ImportStateResponse()
    if instance.about.complete:
        progress.complete = True
        yield progress
        return
    if instance.state != DEVICE_STATE_RESUMING or instance.is_importing:
        raise VfleetError(
            Reason.ILLEGAL_STATE,
            f"function {request.function!r} is being imported already",
            metadata={"function": request.function},
        )
    export = stream(
        TransferServiceStub(channels.to(request.source_address)).ExportState,
        ExportStateRequest(
            attempt=request.attempt,
            function=request.function,
            generation=request.source_generation,
            max_rounds=request.max_rounds,
        ),
        address=request.source_address,
        incarnation=request.source_incarnation,
    )
    instance.is_importing = True
    try:
        # What an import before this one left is not of this stream.
        instance.image.clear()
        receiver = Receiver(instance)
        async for part in export:
            _check_not_gone(instance)
            if receiver.take(part):
                progress.received_bytes = receiver.received_bytes
                progress.rounds = part.round_end.round
                progress.dirty_bytes = part.round_end.dirty_bytes
                progress.ready_to_stop = part.round_end.last_before_stop
                failpoint.reach("hostd.import.round")
                yield progress
        receiver.check_complete()
        _check_not_gone(instance)
        functions.complete_import(instance)
    finally:
        instance.is_importing = False
        await export.aclose()
    progress.received_bytes = receiver.received_bytes
    progress.dirty_bytes = 0
    progress.complete = True
    yield progress


class Receiver:
    """Takes the parts of a stream in and checks each; complete only after the end."""

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._has_header = False
        self._ended = False
        self._messages = 0
        self._crc = 0
        self.received_bytes = 0

    def take(self, part: ExportStateResponse) -> bool:
        """Take one part in; return True at the end of a round. Raise BAD_STATE."""
        kind = part.WhichOneof("part")
        if self._ended or (kind == "header") is self._has_header:
            raise _bad(self._instance, f"a part ({kind}) comes out of order")
        if part.HasField("header"):
            self._check_header(part.header)
            self._has_header = True
        elif part.HasField("pages"):
            self._take_pages(part.pages)
        elif part.HasField("end"):
            self._take_end(part.end)
        elif not part.HasField("round_end"):
            raise _bad(self._instance, "a part is of a kind that this version does not know")
        return part.HasField("round_end")

    def check_complete(self) -> None:
        """Raise BAD_STATE if the stream ended before its end."""
        if not self._ended:
            raise _bad(self._instance, "the stream broke off before its end")

    def _check_header(self, header: StateHeader) -> None:
        about = self._instance.about
        for field, came, expected in (
            ("format version", header.format_version, FORMAT_VERSION),
            ("model", header.model, about.model),
            ("BARs", _bars(header.bars), _bars(about.bars)),
            ("identity", header.identity, about.identity),
            ("image bytes", header.image_bytes, len(self._instance.image.memory)),
        ):
            if came != expected:
                raise _bad(self._instance, f"the {field} of the state is {came!r}; expected {expected!r}")

    def _take_pages(self, pages: StatePages) -> None:
        memory = self._instance.image.memory
        start, data = pages.image_offset, pages.data
        if start % PAGE_BYTES or not data or len(data) % PAGE_BYTES or start + len(data) > len(memory):
            raise _bad(self._instance, f"pages at {start:#x}+{len(data):#x} are not of an image of {len(memory):#x}")
        if pages_crc(start, data) != pages.crc:
            raise _bad(self._instance, f"the checksum of the pages at {start:#x} is wrong")
        self._messages += 1
        self._crc = zlib.crc32(_CRC.pack(pages.crc), self._crc)
        self.received_bytes += len(data)
        self._instance.image.store([(start, data)])

    def _take_end(self, end: StateEnd) -> None:
        if (end.page_messages, end.pages_crc) != (self._messages, self._crc):
            raise _bad(self._instance, f"{self._messages} page messages came; the source sent {end.page_messages}")
        if end.sequences_crc != sequences_crc(end.sequences):
            raise _bad(self._instance, "the checksum of the sequences is wrong")
        for sequence in end.sequences:
            self._instance.image.sequencer(sequence.driver).load(sequence)
        self._ended = True


def pages_crc(offset: int, data: bytes) -> int:
    """Return the checksum of pages and of their place."""
    return zlib.crc32(data, zlib.crc32(_OFFSET.pack(offset)))


def sequences_crc(sequences: Iterable[DriverSequence]) -> int:
    """Return the checksum of the drivers' sequences, in the order given."""
    crc = 0
    for sequence in sequences:
        crc = zlib.crc32(sequence.SerializeToString(deterministic=True), crc)
    return crc


def _bars(bars: Iterable[object]) -> list[str]:
    return [str(bar).replace("\n", " ").strip() for bar in bars]


def _runs(pages: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) for runs of consecutive pages, none longer than a chunk."""
    first = count = 0
    for page in pages:
        if count and page == first + count and count < CHUNK_PAGES:
            count += 1
            continue
        if count:
            yield first, count
        first, count = page, 1
    if count:
        yield first, count


def _check_stopped(instance: Instance, attempt: Attempt) -> None:
    stopped = not instance.is_closed and instance.state == DEVICE_STATE_STOP_COPY
    if not stopped or instance.about.stopped_by != attempt:
        raise _not_stopped(instance)


def _not_stopped(instance: Instance) -> VfleetError:
    return VfleetError(
        Reason.ILLEGAL_STATE,
        f"function {instance.about.function!r} was destroyed, or stopped by another attempt: its state is not its last",
        metadata={"function": instance.about.function},
    )


def _check_not_gone(instance: Instance) -> None:
    if instance.is_closed:
        raise VfleetError(
            Reason.STALE_ATTEMPT,
            f"the instance of function {instance.about.function!r} was destroyed during the import",
            metadata={"function": instance.about.function},
        )


def _check_rounds(max_rounds: int) -> None:
    if not 1 <= max_rounds <= MAX_ROUNDS:
        raise invalid_field("max_rounds", max_rounds, f"1 to {MAX_ROUNDS}")


def _bad(instance: Instance, why: str) -> VfleetError:
    return VfleetError(
        Reason.BAD_STATE,
        f"the state of function {instance.about.function!r} is refused: {why}",
        metadata={"function": instance.about.function},
    )
