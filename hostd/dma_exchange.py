"""What comes from a function's home for a driver's main memory: let in by the driver's table, in order, or refused."""

from hostd.dma_receiver import DmaReceiver
from hostd.drivers import Drivers
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


def exchange_dma(drivers: Drivers, request: ExchangeDmaRequest) -> ExchangeDmaResponse:
    """Carry out a batch from the fabric. Raise INVALID_FIELD for what no hostd sends; nothing was done then."""
    _check(request)
    response = ExchangeDmaResponse(
        driver=request.driver,
        function=request.function,
        generation=request.generation,
        attachment=request.attachment,
        read_number=request.read_number,
    )
    receiver = admit(drivers, request.driver, request.function, request.generation, request.attachment)
    if not isinstance(receiver, DmaReceiver):
        response.refusal = receiver
        return response
    for sequence, write in enumerate(request.writes, request.first_sequence):
        if sequence > receiver.last + 1:
            response.refusal = DMA_REFUSAL_SEQUENCE_GAP
            break
        if sequence == receiver.last + 1:
            receiver.write(sequence, write.address, write.data)
    response.last_sequence = receiver.last
    if request.read_number and response.refusal == DMA_REFUSAL_UNSPECIFIED:
        if receiver.last < request.after_sequence:
            response.refusal = DMA_REFUSAL_SEQUENCE_GAP
        else:
            response.data.extend(receiver.read(request.reads) or ())
    return response


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
