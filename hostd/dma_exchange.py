"""What comes from a function's home for a driver's main memory: let in by the driver's table, in order, or refused."""

import asyncio
from collections.abc import AsyncIterator, Callable

from hostd.dma_receiver import DmaReceiver
from hostd.drivers import Drivers
from hostd.memory import MemoryBusyError, NotAtHandError
from hostd.models.base import MAX_DMA_BYTES
from vfleet.errors import invalid_field
from vfleet.names import check_name
from vfleet.v1.fabric_service_pb2 import (
    DMA_REFUSAL_NOT_ATTACHED,
    DMA_REFUSAL_SEQUENCE_GAP,
    DMA_REFUSAL_UNSPECIFIED,
    DMA_REFUSAL_WRONG_GENERATION,
    DmaAttachment,
    DmaRefusal,
    ExchangeDmaRequest,
    ExchangeDmaResponse,
)

MAX_FETCHING = 32
"""Batches of one stream for one driver whose reads wait for its virtual machine, past which more are refused."""


def admit(
    drivers: Drivers, driver: str, function: str, generation: int, attachment: DmaAttachment
) -> DmaReceiver | DmaRefusal.ValueType:
    """Find where a function's DMA goes, or say why it is refused.

    Only the generation that the driver's entry names may write or read: one that is over is cut off, though it may
    not know. That the entry is held changes nothing: until the commit its generation is the home's.
    """
    found = drivers.find(driver)
    entry = found.table.by_function.get(function) if found is not None else None
    receiver = found.receivers.get(function) if found is not None else None
    if entry is None or receiver is None or entry.lost or receiver.attachment != attachment or not receiver.accepts:
        return DMA_REFUSAL_NOT_ATTACHED
    if entry.generation != generation:
        return DMA_REFUSAL_WRONG_GENERATION
    return receiver


async def exchange_all(
    drivers: Drivers, requests: AsyncIterator[ExchangeDmaRequest], check: Callable[[ExchangeDmaRequest], None]
) -> AsyncIterator[ExchangeDmaResponse]:
    """Carry out what a stream brings, each batch after `check`. What has to be fetched keeps no other batch waiting."""
    incoming = aiter(requests)
    coming: asyncio.Future[ExchangeDmaRequest | None] | None = None
    fetching: dict[asyncio.Future[ExchangeDmaResponse], str] = {}  # for a driver
    something = asyncio.Event()
    try:
        while True:
            if fetching:
                if coming is None:
                    coming = asyncio.ensure_future(anext(incoming, None))
                    coming.add_done_callback(lambda _: something.set())
                await something.wait()
                something.clear()
                for fetched in [each for each in fetching if each.done()]:
                    del fetching[fetched]
                    yield fetched.result()
                if not coming.done():
                    continue
            request = await (coming or anext(incoming, None))
            coming = None
            if request is None:
                return
            check(request)
            try:
                yield exchange_dma(drivers, request)
            except NotAtHandError:
                # By driver, so that virtual machines that never answer take nothing from others.
                if list(fetching.values()).count(request.driver) < MAX_FETCHING:
                    fetch = asyncio.ensure_future(fetch_dma(drivers, request))
                    fetch.add_done_callback(lambda _: something.set())
                    fetching[fetch] = request.driver
                else:
                    yield _response(request, DMA_REFUSAL_NOT_ATTACHED)
    finally:
        for each in (coming, *fetching):
            if each is not None:
                each.cancel()


def exchange_dma(drivers: Drivers, request: ExchangeDmaRequest) -> ExchangeDmaResponse:
    """Carry out a batch from the fabric. Raise INVALID_FIELD for what no hostd sends; nothing was done then.

    Raise NotAtHandError if its reads have to be fetched; then its writes are done.
    """
    response, receiver = _write(drivers, request)
    if receiver is not None:
        response.data.extend(receiver.read(request.reads) or ())
    return response


async def fetch_dma(drivers: Drivers, request: ExchangeDmaRequest) -> ExchangeDmaResponse:
    """Carry out a batch as `exchange_dma` does, also one whose reads have to be fetched."""
    response, receiver = _write(drivers, request)
    if receiver is not None:
        try:
            response.data.extend(await receiver.fetch(request.reads) or ())
        except MemoryBusyError:
            response.refusal = DMA_REFUSAL_NOT_ATTACHED
    return response


def _write(drivers: Drivers, request: ExchangeDmaRequest) -> tuple[ExchangeDmaResponse, DmaReceiver | None]:
    """Do the writes of a batch, and return where its reads, if they may be done, are to be done."""
    _check(request)
    response = _response(request)
    receiver = admit(drivers, request.driver, request.function, request.generation, request.attachment)
    if not isinstance(receiver, DmaReceiver):
        response.refusal = receiver
        return response, None
    for sequence, write in enumerate(request.writes, request.first_sequence):
        if sequence > receiver.last + 1:
            response.refusal = DMA_REFUSAL_SEQUENCE_GAP
            break
        if sequence == receiver.last + 1:
            try:
                receiver.write(sequence, write.address, write.data)
            except MemoryBusyError:
                response.refusal = DMA_REFUSAL_NOT_ATTACHED
                break
    response.last_sequence = receiver.last
    if request.read_number and response.refusal == DMA_REFUSAL_UNSPECIFIED:
        if receiver.last >= request.after_sequence:
            return response, receiver
        response.refusal = DMA_REFUSAL_SEQUENCE_GAP
    return response, None


def _response(
    request: ExchangeDmaRequest, refusal: DmaRefusal.ValueType = DMA_REFUSAL_UNSPECIFIED
) -> ExchangeDmaResponse:
    return ExchangeDmaResponse(
        driver=request.driver,
        function=request.function,
        generation=request.generation,
        attachment=request.attachment,
        read_number=request.read_number,
        refusal=refusal,
    )


def _check(request: ExchangeDmaRequest) -> None:
    check_name("driver", request.driver)
    check_name("function", request.function)
    if request.writes and not request.first_sequence:
        raise invalid_field("first_sequence", 0, "from 1 on")
    for index, write in enumerate(request.writes):
        if len(write.data) > MAX_DMA_BYTES:
            raise invalid_field(f"writes[{index}].data", f"{len(write.data)} bytes", f"at most {MAX_DMA_BYTES}")
    for index, read in enumerate(request.reads):
        if not 1 <= read.length_bytes <= MAX_DMA_BYTES:
            raise invalid_field(f"reads[{index}].length_bytes", read.length_bytes, f"1 to {MAX_DMA_BYTES}")
    if bool(request.reads) != bool(request.read_number):
        raise invalid_field("read_number", request.read_number, "from 1 on with reads, 0 without")
