"""A function's state, out of the source and into the target, which pulls it.

    header -> (pages -> round end) ... -> the source is stopped -> pages, sequences, end

Rounds are sent while the function runs: first all pages that aren't zero (a new instance's are), then those that
changed meanwhile, as `hostd.rounds` decides. Then the source waits to be stopped by the same attempt, and sends the
last difference. An import takes all or nothing: its instance is complete only after the end was checked. In post-copy
the same is done for everything but the local memory, which the stopped source hands out afterwards (`hostd.rest`).
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import BinaryIO

from hostd.functions import Functions
from hostd.instance import Instance
from hostd.rounds import FEW_DIRTY_BYTES, Pace, Rounds, Throttle
from hostd.state_stream import (
    CHUNK_PAGES,
    Receiver,
    Writer,
    check_exists,
    is_zero,
    local_pages,
    moving_pages,
    not_stopped,
    pages_crc,
)
from vfleet import failpoint
from vfleet.address import PAGE_BYTES
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError, invalid_field, is_broken
from vfleet.principal import server_name
from vfleet.roles import Role
from vfleet.rpc import Channels, stream
from vfleet.v1.host_records_pb2 import RestSource
from vfleet.v1.transfer_service_pb2 import (
    CopyOptions,
    ExportStateRequest,
    ExportStateResponse,
    FetchStateRequest,
    FetchStateResponse,
    ImportStateRequest,
    ImportStateResponse,
    RoundEnd,
)
from vfleet.v1.transfer_service_pb2_grpc import TransferServiceStub
from vfleet.v1.types_pb2 import (
    DEVICE_STATE_PRE_COPY,
    DEVICE_STATE_RESUMING,
    DEVICE_STATE_RUNNING,
    DEVICE_STATE_STOP_COPY,
    TRANSFER_MODE_POST_COPY,
    TRANSFER_MODE_PRE_COPY,
    Attempt,
)

MAX_ROUNDS = 1000
REFRESH_S = 0.05  # while the source waits to be stopped, the difference is kept small
PROGRESS_BYTES = 8 << 20
EARLY_PAGES = FEW_DIRTY_BYTES // PAGE_BYTES


class Export:
    """One export of one instance that runs; its driver writes on meanwhile."""

    def __init__(self, instance: Instance, file: BinaryIO, clock: Clock, options: CopyOptions) -> None:
        """Take the instance and the file of its image."""
        self._instance = instance
        self._file = file
        self._clock = clock
        self._writer = Writer(instance, options.mode)
        self._pace = Pace(clock, options.bandwidth_bytes_per_s)
        self._rounds = Rounds(options)
        self._moving = moving_pages(instance, options.mode)
        self._throttle = Throttle(clock)

    async def until_stopped(self, dirty: set[int]) -> AsyncIterator[ExportStateResponse]:
        """Yield the header and rounds of pages, until the function is stopped.

        `dirty` gets the pages that change meanwhile; those in it at the end have still to be sent.
        """
        instance = self._instance
        failpoint.reach("hostd.export.header")
        yield self._writer.header()
        async for part in self._round(_written(instance, self._file, self._moving), dirty, skip_zero=True):
            yield part
        while instance.state == DEVICE_STATE_PRE_COPY and not instance.is_closed:
            if self._rounds.is_ready and not await self._refresh_is_due(dirty):
                continue
            pages = self._take(dirty)
            async for part in self._round(iter(pages), dirty, skip_zero=False):
                yield part

    def rest(self, dirty: set[int]) -> Iterator[ExportStateResponse]:
        """Yield the last pages and the end. The function is stopped.

        In post-copy a few pages of local memory go along: what was written just now is likely to be touched next.
        """
        local = local_pages(self._instance) if self._writer.mode == TRANSFER_MODE_POST_COPY else range(0)
        early = sorted(page for page in dirty if page in local)[:EARLY_PAGES]
        yield from self._writer.rest(self._take(dirty), early)

    def release(self) -> None:
        """Slow the function down no more."""
        if self._instance.throttle is self._throttle:
            self._instance.throttle = None

    def _take(self, dirty: set[int]) -> list[int]:
        """Return the dirty pages that move now, and forget them all."""
        pages = sorted(dirty)
        dirty.clear()
        first, last = (self._moving[0].start, self._moving[-1].stop) if self._moving else (0, 0)
        if sum(map(len, self._moving)) == last - first:
            return [page for page in pages if first <= page < last]
        return [page for page in pages if any(page in own for own in self._moving)]

    async def _round(
        self, pages: Iterator[int], dirty: set[int], *, skip_zero: bool
    ) -> AsyncIterator[ExportStateResponse]:
        clock, rounds, instance = self._clock, self._rounds, self._instance
        began_s = clock.monotonic()
        sent_bytes = 0
        chunk_s = began_s
        for part in self._writer.pages(pages, skip_zero=skip_zero):
            if part is not None:
                yield part
                count_bytes = len(part.pages.data)
                sent_bytes += count_bytes
                rounds.sent(count_bytes, clock.monotonic() - chunk_s)
                # The function's own accesses have their turn between two chunks.
                await self._pace.sent(count_bytes, lambda: instance.is_serving)
            else:
                await clock.sleep(0)
            chunk_s = clock.monotonic()
        moving = {page for page in dirty if any(page in own for own in self._moving)}
        rounds.end(len(moving) * PAGE_BYTES, clock.monotonic() - began_s, is_serving=instance.is_serving)
        self._slow_down()
        failpoint.reach("hostd.export.round")
        yield self._writer.round_end(
            RoundEnd(
                round=rounds.number,
                sent_bytes=sent_bytes,
                dirty_bytes=rounds.dirty_bytes,
                last_before_stop=rounds.is_ready,
                dirty_bytes_per_s=rounds.dirty_bytes_per_s,
                last_copy_us=rounds.last_copy_us,
                throttle_percent=rounds.throttle_percent,
            )
        )

    def _slow_down(self) -> None:
        self._throttle.percent = self._rounds.throttle_percent
        if self._throttle.percent and self._instance.state == DEVICE_STATE_PRE_COPY:
            self._instance.throttle = self._throttle

    async def _refresh_is_due(self, dirty: set[int]) -> bool:
        """Wait for the stop, or for a while; return whether much has become dirty meanwhile."""
        changed = asyncio.ensure_future(self._instance.changed.wait())
        pause = asyncio.ensure_future(self._clock.sleep(REFRESH_S))
        try:
            await asyncio.wait((changed, pause), return_when=asyncio.FIRST_COMPLETED)
        finally:
            changed.cancel()
            pause.cancel()
        return len(dirty) * PAGE_BYTES > FEW_DIRTY_BYTES


async def export_state(
    functions: Functions, clock: Clock, request: ExportStateRequest
) -> AsyncGenerator[ExportStateResponse, None]:
    """Yield the state of a home, for the attempt that stops it (ExportState in the contract).

    Raise STALE_ATTEMPT, NOT_FOUND, WRONG_GENERATION; ILLEGAL_STATE if it is being exported already, or is destroyed or
    stopped by another attempt meanwhile.
    """
    options = _checked(request.options)
    instance = functions.fence_for_export(request.function, request.generation, request.attempt)
    if instance.state == DEVICE_STATE_STOP_COPY:
        _check_stopped(instance, request.attempt)
        if options.mode == TRANSFER_MODE_POST_COPY:
            functions.keep_rest(instance)
        writer = Writer(instance, options.mode)
        with functions.open_image(instance) as file:
            yield writer.header()
            pages = _written(instance, file, moving_pages(instance, options.mode))
            for part in writer.pages(pages, skip_zero=True):
                if part is not None:
                    yield part
        yield writer.end()
        return
    if instance.state != DEVICE_STATE_RUNNING:
        raise VfleetError(
            Reason.ILLEGAL_STATE,
            f"function {request.function!r} is being exported already",
            metadata={"function": request.function},
        )
    file = functions.open_image(instance)
    # An export of an attempt that was aborted may still end later than this one begins; it has another set.
    dirty = instance.image.track()
    instance.is_post_copied = False
    if options.mode == TRANSFER_MODE_POST_COPY:
        functions.keep_rest(instance)
    instance.exported_to = request.attempt
    instance.go_to(DEVICE_STATE_PRE_COPY)
    export = Export(instance, file, clock, options)
    try:
        async for part in export.until_stopped(dirty):
            yield part
        _check_stopped(instance, request.attempt)
        failpoint.reach("hostd.export.last")
        for part in export.rest(dirty):
            yield part
        failpoint.reach("hostd.export.end")
    finally:
        file.close()
        export.release()
        if not instance.is_closed and instance.image.untrack(dirty) and instance.state == DEVICE_STATE_PRE_COPY:
            instance.go_to(DEVICE_STATE_RUNNING)


def _written(instance: Instance, file: BinaryIO, moving: Sequence[range]) -> Iterator[int]:
    """Return the pages, among those that move, that may be other than zero; short of those that change meanwhile."""
    return chain.from_iterable(chain.from_iterable(instance.image.written(file, pages) for pages in moving))


async def fetch_state(
    functions: Functions, clock: Clock, request: FetchStateRequest
) -> AsyncGenerator[FetchStateResponse, None]:
    """Yield pages of a stopped instance's local memory (FetchState in the contract).

    Raise NOT_FOUND, WRONG_GENERATION, ILLEGAL_STATE unless this attempt has stopped it, INVALID_FIELD for other pages.
    """
    instance = functions.require(request.function, request.generation)
    # Only what is stopped hands out the rest, and only to the attempt that stopped it.
    _check_stopped(instance, request.attempt)
    first, count = request.image_offset // PAGE_BYTES, request.length_bytes // PAGE_BYTES
    local = local_pages(instance)
    if request.image_offset % PAGE_BYTES or request.length_bytes % PAGE_BYTES or not count:
        raise invalid_field("length_bytes", request.length_bytes, "whole pages, 1 or more")
    if first < local.start or first + count > local.stop:
        raise invalid_field("image_offset", request.image_offset, "pages of local memory")
    functions.hand_out_rest(instance)
    arrived = request.arrived
    pace = Pace(clock, request.bandwidth_bytes_per_s)
    memory = instance.image.memory
    for start in range(0, count, CHUNK_PAGES):
        for begin, end in _missing_runs(arrived, start, min(start + CHUNK_PAGES, count)):
            _check_stopped(instance, request.attempt)
            offset, length = (first + begin) * PAGE_BYTES, (end - begin) * PAGE_BYTES
            response = FetchStateResponse()
            pages, data = response.pages, bytes(memory[offset : offset + length])
            pages.image_offset = offset
            if is_zero(data):
                pages.zero_bytes, data = length, b""
            pages.data, pages.crc = data, pages_crc(offset, data, pages.zero_bytes)
            yield response
            await pace.sent(len(data))


def _missing_runs(arrived: bytes, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) for runs of pages, from `start` to `end`, whose bit isn't set."""
    begin = start
    for page in range(start, end if arrived else start):
        if page // 8 < len(arrived) and arrived[page // 8] >> page % 8 & 1:
            if begin < page:
                yield begin, page
            begin = page + 1
    if begin < end:
        yield begin, end


async def import_state(
    functions: Functions, channels: Channels, request: ImportStateRequest
) -> AsyncGenerator[ImportStateResponse, None]:
    """Pull the state of an instance from its source, and yield the progress (ImportState in the contract).

    Raise BAD_STATE if what comes is damaged, incomplete, of another version or another device; STALE_ATTEMPT, NOT_FOUND
    or WRONG_GENERATION by the fence; UNREACHABLE, or what the source answers.
    """
    options = _checked(request.options)
    if not request.source_address:
        raise invalid_field("source_address", "", "HOST:PORT of the source's hostd")
    instance = functions.fence_for_import(request.function, request.generation, request.attempt)
    progress = ImportStateResponse(total_bytes=len(instance.image.memory))
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
    export = _exported(channels, request, options)
    file = functions.open_image(instance)
    instance.is_importing = True
    try:
        if not instance.is_blank:
            # What an import before this one left is not of this stream.
            instance.image.clear()
        instance.is_blank = False
        receiver = Receiver(instance, options.mode, partial(instance.image.store_through, file))
        async for part in export:
            _check_not_gone(instance)
            receiver.take(part)
            if part.HasField("round_end"):
                _note_round(progress, part.round_end)
                failpoint.reach("hostd.import.round")
            elif part.HasField("end"):
                break
            elif receiver.received_bytes < progress.received_bytes + PROGRESS_BYTES:
                continue
            progress.received_bytes = receiver.received_bytes
            yield progress
        receiver.check_complete()
        _check_not_gone(instance)
        functions.complete_import(instance, _rest_source(instance, request, options), receiver.early)
        progress.received_bytes = receiver.received_bytes
        progress.dirty_bytes = 0
        progress.complete = True
        yield progress
        # A driver waits for the word that it is complete; the stream may end afterwards, however it does.
        with contextlib.suppress(VfleetError):
            async for _ in export:
                pass
    finally:
        file.close()
        instance.is_importing = False
        await export.aclose()


async def _exported(
    channels: Channels, request: ImportStateRequest, options: CopyOptions
) -> AsyncGenerator[ExportStateResponse, None]:
    """Yield what the source sends. It is asked once more if the connection breaks before it has said anything.

    A connection of before a cut may break only when it is next used; the source is there all the same.
    """
    address = request.source_address
    export_request = ExportStateRequest(
        attempt=request.attempt,
        function=request.function,
        generation=request.source_generation,
        options=options,
    )
    # In post-copy it is little, and what accesses wait for comes by the connection that it has opened.
    is_bulk = options.mode != TRANSFER_MODE_POST_COPY
    broken: VfleetError | None = None
    while True:
        stub = channels.stub(TransferServiceStub, address, server_name(Role.HOST, request.source_host), bulk=is_bulk)
        parts = stream(stub.ExportState, export_request, address=address, incarnation=request.source_incarnation)
        has_begun = False
        try:
            async with contextlib.aclosing(parts):
                async for part in parts:
                    has_begun = True
                    yield part
        except VfleetError as error:
            if has_begun:
                raise
            if broken is not None or not is_broken(error, address):
                # A source that has not noticed yet what broke says that it is being exported already.
                raise broken or error from None
            broken = error
        else:
            return


def _note_round(progress: ImportStateResponse, end: RoundEnd) -> None:
    progress.rounds = end.round
    progress.dirty_bytes = end.dirty_bytes
    progress.ready_to_stop = end.last_before_stop
    progress.dirty_bytes_per_s = end.dirty_bytes_per_s
    progress.last_copy_us = end.last_copy_us
    progress.throttle_percent = end.throttle_percent


def _rest_source(instance: Instance, request: ImportStateRequest, options: CopyOptions) -> RestSource | None:
    """Return where the rest comes from after COMMIT; None if there is no rest."""
    if options.mode != TRANSFER_MODE_POST_COPY or not local_pages(instance):
        return None
    return RestSource(
        host=request.source_host,
        address=request.source_address,
        incarnation=request.source_incarnation,
        generation=request.source_generation,
        bandwidth_bytes_per_s=options.bandwidth_bytes_per_s,
    )


def _checked(options: CopyOptions) -> CopyOptions:
    """Return the options, PRE_COPY for no mode. Raise INVALID_FIELD."""
    if not 1 <= options.max_rounds <= MAX_ROUNDS:
        raise invalid_field("options.max_rounds", options.max_rounds, f"1 to {MAX_ROUNDS}")
    checked = CopyOptions()
    checked.CopyFrom(options)
    checked.mode = options.mode or TRANSFER_MODE_PRE_COPY
    if checked.mode not in (TRANSFER_MODE_PRE_COPY, TRANSFER_MODE_POST_COPY):
        raise invalid_field("options.mode", options.mode, "1 (PRE_COPY) or 2 (POST_COPY)")
    return checked


def _check_stopped(instance: Instance, attempt: Attempt) -> None:
    check_exists(instance)
    if instance.state != DEVICE_STATE_STOP_COPY or instance.about.stopped_by != attempt:
        raise not_stopped(instance)


def _check_not_gone(instance: Instance) -> None:
    if instance.is_closed:
        raise VfleetError(
            Reason.STALE_ATTEMPT,
            f"the instance of function {instance.about.function!r} was destroyed during the import",
            metadata={"function": instance.about.function},
        )
