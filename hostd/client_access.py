"""Drivers that are gRPC clients: their accesses, one at a time or streamed, and what they are told.

A stream's accesses are on their way together, up to a window, and answered in the order in which they came.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

from hostd.driver import Submitted
from hostd.drivers import Drivers
from hostd.sequencer import Result
from hostd.workload import Workloads
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.limits import WINDOW
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE, ACCESS_STATUS_FORGOTTEN, AccessKind
from vfleet.v1.driver_service_pb2 import (
    NOTIFICATION_KIND_INTERRUPT,
    NOTIFICATION_KIND_LISTENING,
    BatchedAccess,
    BatchedAnswer,
    StreamAccessesRequest,
    StreamAccessesResponse,
    WatchNotificationsResponse,
)
from vfleet.v1.types_pb2 import TableEntry

HOLD_WAIT_S = 30.0
MAX_NOTIFICATIONS = 1024


class ClientAccess:
    """What a client may do and learn as one of this host's drivers."""

    def __init__(self, drivers: Drivers, workloads: Workloads) -> None:
        self._drivers = drivers
        self._workloads = workloads

    async def access(
        self,
        driver: str,
        kind: AccessKind.ValueType,
        virtual_address: int,
        length: int,
        data: bytes,
        sequence: int,
    ) -> tuple[Result, int]:
        """Do one access, and return its result and its sequence.

        Raise as `Driver.submit` and `Submitted.result` do; NOT_FOUND for the driver; IN_USE while a workload runs on
        the function; SEQUENCE_GAP for a sequence so old that its answer is forgotten.
        """
        submitted = await self._submit(driver, kind, virtual_address, length, data, sequence)
        return await _result(submitted)

    async def access_many(self, driver: str, accesses: Sequence[BatchedAccess]) -> list[BatchedAnswer]:
        """Do up to 64 accesses in order; return the answers to those before the first that fails.

        Raise as `access` does if that is the first of all; INVALID_FIELD for another number of accesses.
        """
        if not 1 <= len(accesses) <= WINDOW:
            raise invalid_field("accesses", f"{len(accesses)} accesses", f"1 to {WINDOW}")
        answers: list[BatchedAnswer] = []
        try:
            for submitted in await self._submit_while_possible(driver, accesses):
                (status, data), sequence = await _result(submitted)
                answers.append(BatchedAnswer(status=status, data=data, sequence=sequence))
        except VfleetError:
            if not answers:
                raise
        return answers

    async def stream(
        self, requests: AsyncIterator[StreamAccessesRequest]
    ) -> AsyncGenerator[StreamAccessesResponse, None]:
        """Yield the answers to a stream of accesses, in its order. The first that fails ends it, as `access` fails."""
        taken: asyncio.Queue[tuple[int, Submitted] | VfleetError | None] = asyncio.Queue(WINDOW)
        taking = asyncio.create_task(self._take_all(requests, taken))
        try:
            while (item := await taken.get()) is not None:
                if isinstance(item, VfleetError):
                    raise item
                tag, submitted = item
                (status, data), sequence = await _result(submitted)
                yield StreamAccessesResponse(tag=tag, status=status, data=data, sequence=sequence)
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def notifications(self, driver: str) -> AsyncGenerator[WatchNotificationsResponse, None]:
        """Yield what the driver is told. It counts as listening meanwhile. Raise LIMIT_EXCEEDED if it falls behind.

        Interrupts of a vector that come before the last of it was taken are one, with the later count.
        """
        found = self._drivers.require(driver)
        told: asyncio.Queue[WatchNotificationsResponse] = asyncio.Queue()
        interrupts: dict[tuple[str, int], WatchNotificationsResponse] = {}

        def tell(notification: WatchNotificationsResponse) -> None:
            if notification.kind == NOTIFICATION_KIND_INTERRUPT:
                waiting = interrupts.setdefault((notification.function, notification.vector), notification)
                if waiting is not notification:
                    waiting.interrupts = notification.interrupts
                    return
            told.put_nowait(notification)

        found.listeners.append(tell)
        try:
            yield WatchNotificationsResponse(kind=NOTIFICATION_KIND_LISTENING)
            while told.qsize() <= MAX_NOTIFICATIONS:
                notification = await told.get()
                if notification.kind == NOTIFICATION_KIND_INTERRUPT:
                    interrupts.pop((notification.function, notification.vector), None)
                yield notification
        finally:
            found.listeners.remove(tell)
        raise VfleetError(Reason.LIMIT_EXCEEDED, f"driver {driver!r} has not taken {MAX_NOTIFICATIONS} notifications")

    async def tables(self, driver: str) -> AsyncGenerator[list[TableEntry], None]:
        """Yield the driver's table now and after each change; of changes that come faster, the last."""
        found = self._drivers.require(driver)
        while True:
            changed = found.changed
            yield [entry.to_proto() for entry in found.table.entries]
            await changed.wait()

    async def _take_all(
        self,
        requests: AsyncIterator[StreamAccessesRequest],
        taken: "asyncio.Queue[tuple[int, Submitted] | VfleetError | None]",
    ) -> None:
        driver = ""
        try:
            async for request in requests:
                driver = driver or request.driver
                if request.driver != driver:
                    raise invalid_field("driver", request.driver, f"{driver!r}, as in the stream's first message")
                await taken.put((request.tag, await self._submit_message(driver, request)))
        except VfleetError as error:
            await taken.put(error)
        else:
            await taken.put(None)

    async def _submit_while_possible(self, driver: str, accesses: Sequence[BatchedAccess]) -> list[Submitted]:
        submitted: list[Submitted] = []
        try:
            for access in accesses:
                submitted.append(await self._submit_message(driver, access))  # noqa: PERF401  # kept if a later one fails
        except VfleetError:
            if not submitted:
                raise
        return submitted

    async def _submit_message(self, driver: str, access: StreamAccessesRequest | BatchedAccess) -> Submitted:
        if access.kind not in (ACCESS_KIND_READ, ACCESS_KIND_WRITE):
            raise invalid_field("kind", access.kind, "1 (READ) or 2 (WRITE)")
        is_read = access.kind == ACCESS_KIND_READ
        if (is_read and access.data) or (not is_read and access.length_bytes):
            raise invalid_field("data", access.data, "length_bytes for a read, data for a write, not the other")
        length = access.length_bytes if is_read else len(access.data)
        return await self._submit(driver, access.kind, access.virtual_address, length, access.data, access.sequence)

    async def _submit(
        self,
        driver: str,
        kind: AccessKind.ValueType,
        virtual_address: int,
        length: int,
        data: bytes,
        sequence: int,
    ) -> Submitted:
        found = self._drivers.require(driver)
        entry = found.find(virtual_address, length)
        if found.guest_memory is not None:
            raise VfleetError(
                Reason.IN_USE,
                f"driver {driver!r} is a virtual machine's: its accesses come from there",
                metadata={"driver": driver, "function": entry.function},
            )
        if self._workloads.is_running(driver, entry.function):
            raise VfleetError(
                Reason.IN_USE,
                f"a workload of driver {driver!r} runs on function {entry.function!r}; its sequences number its steps",
                metadata={"driver": driver, "function": entry.function},
            )
        try:
            async with asyncio.timeout(HOLD_WAIT_S):
                return await found.submit(kind, virtual_address, length, data, sequence=sequence)
        except TimeoutError:
            raise VfleetError(
                Reason.HOLD_TIMEOUT,
                f"function {entry.function!r} did not tell its sequence for {HOLD_WAIT_S:g} s (on hold, or its home out"
                " of reach); the access has had no effect",
                metadata={"function": entry.function, "sequence": str(sequence), "taken_back": "true"},
            ) from None


async def _result(submitted: Submitted) -> tuple[Result, int]:
    result, sequence = await submitted.result(HOLD_WAIT_S)
    if result[0] == ACCESS_STATUS_FORGOTTEN:
        raise VfleetError(
            Reason.SEQUENCE_GAP,
            f"sequence {sequence} took effect more than {WINDOW} accesses ago, and its answer is no longer kept",
            metadata={"sequence": str(sequence)},
        )
    return result, sequence
