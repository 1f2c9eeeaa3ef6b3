"""The home's side of accesses: batches of one driver, carried out in order, for this host's own drivers and others'.

What is refused has had no effect and changes nothing; the sender sends it again, to where its table says by then.
"""

import asyncio
from collections.abc import Iterable
from typing import NoReturn

from hostd.functions import Functions
from hostd.instance import SequenceGapError
from hostd.sequencer import order_of
from vfleet.address import MAX_ACCESS_BYTES, WINDOW_SHIFT, AddressError, check_access, window_offset
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.names import check_name
from vfleet.v1.access_pb2 import (
    ACCESS_KIND_FENCE,
    ACCESS_KIND_READ,
    ACCESS_KIND_RESET,
    ACCESS_KIND_WRITE,
    Access,
    AccessKind,
)
from vfleet.v1.fabric_service_pb2 import (
    REFUSAL_NOT_YET,
    REFUSAL_SEQUENCE_GAP,
    REFUSAL_UNSPECIFIED,
    ExchangeRequest,
    ExchangeResponse,
    ForgetDriverRequest,
    GetSequenceRequest,
    Refusal,
)

ARRIVAL_WAIT_S = 0.005

_KINDS = (ACCESS_KIND_READ, ACCESS_KIND_WRITE, ACCESS_KIND_RESET, ACCESS_KIND_FENCE)
_WITHOUT_DATA = frozenset(_KINDS) - {ACCESS_KIND_WRITE}
_LENGTHS = frozenset(1 << exponent for exponent in range(MAX_ACCESS_BYTES.bit_length()))


async def let_arrive(functions: Functions, request: ExchangeRequest) -> None:
    """Ask for all that a batch touches and that is still at its source (post-copy), and wait for its first access's.

    Others' batches wait behind it, so it is for a moment only; then the batch is refused, and sent again.
    """
    instance = functions.find(request.function, request.generation) if request.generation else None
    if instance is None or instance.arrival is None:
        return
    functions.prove(instance)
    ranges = [
        (window_offset(access.address), access.length_bytes)
        for access in request.accesses
        if access.length_bytes <= MAX_ACCESS_BYTES
    ]
    instance.arrival.ask(ranges)
    try:
        async with asyncio.timeout(ARRIVAL_WAIT_S):
            await instance.arrival.arrived(ranges[:1])
    except TimeoutError:
        return


def exchange(functions: Functions, request: ExchangeRequest) -> ExchangeResponse:
    """Carry out a batch from the fabric. Raise INVALID_FIELD for what no hostd sends; nothing was done then."""
    check_name("driver", request.driver)
    check_name("function", request.function)
    accesses = _checked(request.accesses)
    response = refused(request, REFUSAL_UNSPECIFIED)
    add, session = response.answers.add, order_of(request.session)
    window = -1
    is_gated = False
    for sequence, kind, address, length, data in accesses:
        # Nothing comes between two accesses of a batch: what leads to the same window is the same home still.
        if address >> WINDOW_SHIFT != window:
            window = address >> WINDOW_SHIFT
            admitted = functions.admit(request.driver, request.function, request.generation, session, address)
            if not isinstance(admitted, tuple):
                response.refusal = admitted
                break
            instance, sequencer = admitted
            is_gated = instance.is_gated
            sequencer.acknowledged = max(sequencer.acknowledged, request.acknowledged_sequence)
        if is_gated and instance.blocks([(window_offset(address), length)]):
            response.refusal = REFUSAL_NOT_YET
            break
        try:
            status, answer = instance.access(sequencer, sequence, kind, address, length, data)
        except SequenceGapError as gap:
            response.refusal = REFUSAL_SEQUENCE_GAP
            response.expected_sequence = gap.expected
            break
        message = add()
        message.sequence = sequence
        message.status = status
        if answer:
            message.data = answer
    return response


def refused(request: ExchangeRequest, refusal: Refusal.ValueType) -> ExchangeResponse:
    """Return the response to a batch of which nothing was done, yet or at all."""
    return ExchangeResponse(
        driver=request.driver,
        function=request.function,
        generation=request.generation,
        session=request.session,
        refusal=refusal,
    )


def last_sequence(functions: Functions, request: GetSequenceRequest) -> int:
    """Return the last sequence of a driver that the function applied, and refuse the driver's earlier sessions.

    From now on a bus master's DMA goes to the window that the request names, if it names one. Raise ILLEGAL_STATE if
    the function isn't served here at this generation, or has a driver of a later attachment.
    """
    check_name("driver", request.driver)
    check_name("function", request.function)
    found = functions.find(request.function, request.generation) if request.generation else None
    base = found.about.base if found is not None else 0
    instance = functions.answering(request.function, request.generation, base) if found is not None else None
    admitted = None
    if instance is not None:
        instance.image.sequencer(request.driver)
        session = order_of(request.session)
        admitted = functions.admit(request.driver, request.function, request.generation, session, base)
    if not isinstance(admitted, tuple):
        raise not_served(request, Refusal.Name(admitted) if admitted is not None else "it has no such instance")
    master = admitted[0].master
    if master is not None and request.HasField("dma") and not master.attach(request.driver, request.dma):
        raise VfleetError(
            Reason.ILLEGAL_STATE,
            f"function {request.function!r} has driver {master.driver!r} since; driver {request.driver!r} was detached",
            metadata={"function": request.function, "driver": request.driver},
        )
    return admitted[1].last


def not_served(request: GetSequenceRequest, why: str) -> VfleetError:
    """Return the error for a function that isn't served here, or not to who asks."""
    return VfleetError(
        Reason.ILLEGAL_STATE,
        f"function {request.function!r} at generation {request.generation} is not served here: {why}",
        metadata={"function": request.function},
    )


def forget_driver(functions: Functions, request: ForgetDriverRequest) -> None:
    """Free what a function keeps for a driver that was detached, unless a later session has come since."""
    instance = functions.find(request.function, request.generation) if request.generation else None
    sequencer = instance.image.known_sequencer(request.driver) if instance is not None else None
    if instance is not None and sequencer is not None and sequencer.session <= order_of(request.session):
        instance.image.forget(request.driver)
        if instance.master is not None:
            instance.master.detach(request.attachment)


_CheckedAccess = tuple[int, AccessKind.ValueType, int, int, bytes]
"""Sequence, kind, address, length and data."""


def _checked(accesses: Iterable[Access]) -> list[_CheckedAccess]:
    """Return a batch's accesses if each of them is one."""
    checked: list[_CheckedAccess] = []
    for access in accesses:
        sequence, kind, address, length, data = (
            access.sequence,
            access.kind,
            access.address,
            access.length_bytes,
            access.data,
        )
        is_sound = len(data) == length if kind == ACCESS_KIND_WRITE else kind in _WITHOUT_DATA and not data
        if not (is_sound and sequence and length in _LENGTHS and not address & (length - 1)):
            _refuse(len(checked), access)
        checked.append((sequence, kind, address, length, data))
    return checked


def _refuse(index: int, access: Access) -> NoReturn:
    """Say what is wrong with an access."""
    try:
        check_access(access.address, access.length_bytes)
    except AddressError as error:
        raise invalid_field(f"accesses[{index}]", f"{access.address:#x}+{access.length_bytes}", str(error)) from None
    if access.kind not in _KINDS:
        raise invalid_field(f"accesses[{index}].kind", access.kind, "1 (READ), 2 (WRITE), 3 (RESET) or 4 (FENCE)")
    if len(access.data) != (access.length_bytes if access.kind == ACCESS_KIND_WRITE else 0):
        expected = "length_bytes for a write, none for anything else"
        raise invalid_field(f"accesses[{index}].data", f"{len(access.data)} bytes", expected)
    raise invalid_field(f"accesses[{index}].sequence", access.sequence, "from 1 on")
