"""For a program that is a driver itself: reads and writes in its virtual address space, told of holds.

Every access to a function carries its sequence, so that one whose answer was lost is sent again and takes effect once,
and nothing overtakes anything. A driver therefore has one `DriverClient` at a time, and that one access at a time, or
one stream of many.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import grpc

from vfleet.address import AddressError, check_access
from vfleet.caller import is_silence
from vfleet.errors import Reason, VfleetError, from_rpc_error, invalid_field
from vfleet.host_client import HostClient
from vfleet.limits import WINDOW
from vfleet.names import check_name
from vfleet.v1 import driver_service_pb2 as driver_pb2
from vfleet.v1.access_pb2 import AccessKind
from vfleet.v1.driver_service_pb2_grpc import DriverServiceStub
from vfleet.v1.types_pb2 import TableEntry

# An access may wait for as long as a hold may last.
ACCESS_TIMEOUT_S = 120.0
# What grpc.aio makes of a stream that ends while a request is written, whatever the server said: asking again tells.
_ENDED_WHILE_WRITING = "Internal error from Core"
_TABLE_CHANGES = frozenset(
    {
        driver_pb2.NOTIFICATION_KIND_ATTACHED,
        driver_pb2.NOTIFICATION_KIND_DETACHED,
        driver_pb2.NOTIFICATION_KIND_LOST,
    }
)


@dataclass(frozen=True, slots=True)
class Read:
    """A read of `length_bytes`, a power of two from 1 to 4096, at an address aligned to it."""

    virtual_address: int
    length_bytes: int

    def __post_init__(self) -> None:
        _check_access(self.virtual_address, self.length_bytes)


@dataclass(frozen=True, slots=True)
class Write:
    """A write of bytes, as many as a power of two from 1 to 4096, at an address aligned to their number."""

    virtual_address: int
    data: bytes

    def __post_init__(self) -> None:
        _check_access(self.virtual_address, len(self.data))


def _check_access(virtual_address: int, length: int) -> None:
    try:
        check_access(virtual_address, length)
    except AddressError as error:
        raise invalid_field("access", f"{length} bytes at {virtual_address:#x}", str(error)) from None


class DriverClient:
    """The driver `driver` on the host of a `HostClient`. It is there once it is attached (`FleetClient.attach_driver`).

    An access that its host doesn't answer is sent again for as long as the host client's patience lasts. All methods
    raise VfleetError, of which TRANSLATION_FAULT (nothing is mapped there) and HOLD_TIMEOUT (held for too long) are the
    driver's own.
    """

    def __init__(self, host: HostClient, driver: str) -> None:
        self._host = host
        self._driver = check_name("driver", driver)
        self._turn = asyncio.Lock()
        self._entries: list[TableEntry] = []  # empty: the host is to be asked
        self._last_sequences: dict[str, int] = {}

    async def read(self, virtual_address: int, length_bytes: int) -> bytes:
        """Return the bytes there; all ones if nobody claims the address. Waits while the function is held."""
        access = Read(virtual_address, length_bytes)
        async with self._sequence(access) as sequence:
            request = driver_pb2.ReadRequest(
                driver=self._driver, virtual_address=virtual_address, length_bytes=length_bytes, sequence=sequence
            )
            response = await self._host.caller.call(
                lambda channel: DriverServiceStub(channel).Read, request, timeout_s=ACCESS_TIMEOUT_S
            )
        return response.data

    async def write(self, virtual_address: int, data: bytes) -> None:
        """Write the bytes; once this returns they have taken effect. Waits while the function is held."""
        access = Write(virtual_address, data)
        async with self._sequence(access) as sequence:
            request = driver_pb2.WriteRequest(
                driver=self._driver, virtual_address=virtual_address, data=data, sequence=sequence
            )
            await self._host.caller.call(
                lambda channel: DriverServiceStub(channel).Write, request, timeout_s=ACCESS_TIMEOUT_S
            )

    async def access_many(self, accesses: Sequence[Read | Write]) -> list[bytes]:
        """Carry out accesses in order and return what each read (all ones if nobody claims it), b"" for a write.

        They go in messages of up to 64, which costs far less an access than one by one. If one fails, its error is
        raised, and those that follow it may or may not be done.
        """
        async with self._turn:
            await self._load()
            requests = [self._batched(access) for access in accesses]
            read: list[bytes] = []
            try:
                while len(read) < len(requests):
                    request = driver_pb2.AccessManyRequest(
                        driver=self._driver, accesses=requests[len(read) : len(read) + WINDOW]
                    )
                    response = await self._host.caller.call(
                        lambda channel: DriverServiceStub(channel).AccessMany, request, timeout_s=ACCESS_TIMEOUT_S
                    )
                    read += [answer.data for answer in response.answers]
            except BaseException:
                self._entries.clear()
                raise
            return read

    async def stream(self, accesses: Sequence[Read | Write]) -> AsyncGenerator[driver_pb2.StreamAccessesResponse, None]:
        """Carry out accesses in order, up to 64 on the way at once, and yield an answer each; tags count from 0.

        Close the generator (`contextlib.aclosing`) if you don't take all of it: the rest may or may not be done then.
        """
        async with self._turn:
            await self._load()
            requests = [self._request(tag, access) for tag, access in enumerate(accesses)]
            answered = 0
            patience = self._host.caller.patience()
            try:
                while answered < len(requests):
                    try:
                        async with aclosing(self._exchange(requests[answered:])) as answers:
                            async for answer in answers:
                                answered += 1
                                patience.renew()
                                yield answer
                    except VfleetError as error:
                        if not is_silence(error, self._host.caller.address):
                            raise
                        await patience.pause(self._host.caller.who, error)
            except BaseException:
                self._entries.clear()
                raise

    async def notifications(self) -> AsyncGenerator[driver_pb2.WatchNotificationsResponse, None]:
        """Yield what the driver is told, for ever; first LISTENING, and again whenever the host had to be found again.

        A hold is acknowledged when the caller asks for the next notification, that is, when it has dealt with this one.
        """
        request = driver_pb2.WatchNotificationsRequest(driver=self._driver)
        stream = self._host.caller.stream(lambda channel: DriverServiceStub(channel).WatchNotifications, request)
        async with aclosing(stream) as notifications:
            async for notification in notifications:
                if notification.kind in _TABLE_CHANGES:
                    self._entries.clear()
                yield notification
                if notification.kind == driver_pb2.NOTIFICATION_KIND_HELD:
                    acknowledgement = driver_pb2.AcknowledgeHoldRequest(
                        driver=self._driver, function=notification.function, attempt=notification.attempt
                    )
                    await self._host.caller.call(
                        lambda channel: DriverServiceStub(channel).AcknowledgeHold, acknowledgement
                    )

    async def _exchange(
        self, requests: Sequence[driver_pb2.StreamAccessesRequest]
    ) -> AsyncGenerator[driver_pb2.StreamAccessesResponse, None]:
        address = self._host.caller.address
        room = asyncio.Semaphore(WINDOW)

        async def paced() -> AsyncIterator[driver_pb2.StreamAccessesRequest]:
            for request in requests:
                await room.acquire()
                yield request

        call = DriverServiceStub(self._host.caller.channel()).StreamAccesses(paced())
        answered = 0
        try:
            async for answer in call:
                answered += 1
                room.release()
                yield answer
        except grpc.aio.AioRpcError as error:
            if error.details() == _ENDED_WHILE_WRITING:
                message = f"{address} ended the stream"
                raise VfleetError(Reason.UNREACHABLE, message, metadata={"address": address}) from None
            raise from_rpc_error(error, address) from None
        finally:
            call.cancel()
        if answered < len(requests):
            message = f"{address} ended a stream of {len(requests)} accesses after {answered} answers"
            raise VfleetError(Reason.INTERNAL, message)

    def _batched(self, access: Read | Write) -> driver_pb2.BatchedAccess:
        batched = driver_pb2.BatchedAccess(
            virtual_address=access.virtual_address, sequence=self._take_sequence(access.virtual_address)
        )
        if isinstance(access, Read):
            batched.kind, batched.length_bytes = AccessKind.ACCESS_KIND_READ, access.length_bytes
        else:
            batched.kind, batched.data = AccessKind.ACCESS_KIND_WRITE, access.data
        return batched

    def _request(self, tag: int, access: Read | Write) -> driver_pb2.StreamAccessesRequest:
        request = driver_pb2.StreamAccessesRequest(
            driver=self._driver,
            tag=tag,
            virtual_address=access.virtual_address,
            sequence=self._take_sequence(access.virtual_address),
        )
        if isinstance(access, Read):
            request.kind, request.length_bytes = AccessKind.ACCESS_KIND_READ, access.length_bytes
        else:
            request.kind, request.data = AccessKind.ACCESS_KIND_WRITE, access.data
        return request

    @asynccontextmanager
    async def _sequence(self, access: Read | Write) -> AsyncIterator[int]:
        """Give one access its turn and its sequence. After a failure the host is asked anew how far it got."""
        async with self._turn:
            if self._entry_at(access.virtual_address) is None:
                await self._load()
            try:
                yield self._take_sequence(access.virtual_address)
            except BaseException:
                self._entries.clear()
                raise

    async def _load(self) -> None:
        patience = self._host.caller.patience()
        while True:
            state = await self._host.get_driver(self._driver)
            known = {"", *state.last_sequences}
            unknown = sorted({entry.function for entry in state.entries if not entry.lost} - known)
            if not unknown:
                break
            message = f"the home of function {unknown[0]!r} has not told yet how far it got with {self._driver!r}"
            await patience.pause(self._host.caller.who, VfleetError(Reason.HOLD_TIMEOUT, message))
        self._entries = list(state.entries)
        self._last_sequences = dict(state.last_sequences)

    def _entry_at(self, virtual_address: int) -> TableEntry | None:
        for entry in self._entries:
            if entry.virtual_address <= virtual_address < entry.virtual_address + entry.length_bytes:
                return entry
        return None

    def _take_sequence(self, virtual_address: int) -> int:
        """Return the sequence of the next access there; 0, none, for main memory and for what isn't mapped."""
        entry = self._entry_at(virtual_address)
        if entry is None or not entry.function:
            return 0
        self._last_sequences[entry.function] = self._last_sequences.get(entry.function, 0) + 1
        return self._last_sequences[entry.function]
