"""A driver at work: numbered accesses through its host's DriverService, each answer checked against program order.

It lives outside of its host's daemon and asks again, with the same sequence, whenever no answer came. Each driver of a
function has words and a channel of its own, so that what a read must return is known when it is asked for.
"""

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulation.vopr.loop import Life

from hostd.models import checker
from vfleet.errors import Reason, VfleetError
from vfleet.rpc import Channels, call, stream
from vfleet.v1.access_pb2 import ACCESS_STATUS_OK
from vfleet.v1.driver_service_pb2 import (
    NOTIFICATION_KIND_HELD,
    AcknowledgeHoldRequest,
    ReadRequest,
    ReadResponse,
    WatchNotificationsRequest,
    WriteRequest,
    WriteResponse,
)
from vfleet.v1.driver_service_pb2_grpc import DriverServiceStub

if TYPE_CHECKING:
    from simulation.vopr.world import World

LOCAL_MEMORY_OFFSET = 8192
WORDS = 16
HESITATION_S = 5.0
ACTIONS_PER_S = 2.4
_COUNTERS = (checker.LOST, checker.REPEATED, checker.REORDERED)


@dataclass(frozen=True)
class _Access:
    sequence: int
    offset: int
    value: int
    is_read: bool


class _Lost(Exception):  # noqa: N818
    """The function is lost, or detached."""


class _Program:
    """A driver's accesses to one function, in order, and what they leave behind."""

    def __init__(self, world: "World", number: int) -> None:
        self._random = world.random
        self._number = number
        self._channel = checker.channel_offset(number)
        self._sequence = 0
        self._rings = 0
        self._words = dict.fromkeys(range(WORDS), 0)

    def next(self) -> _Access:
        """Return the next access."""
        random = self._random
        choice = random.random()
        if choice < 0.3:
            self._rings += 1
            return self._access(self._channel + checker.DOORBELL, self._rings, is_read=False)
        if choice < 0.4:
            return self._access(self._channel + random.choice(_COUNTERS), 0, is_read=True)
        if choice < 0.5:
            return self._access(
                self._channel + random.choice((checker.LAST, checker.ACCEPTED)), self._rings, is_read=True
            )
        word = random.randrange(WORDS)
        if choice < 0.75:
            self._words[word] = self._number << 32 | self._sequence + 1
            return self._access(self._place(word), self._words[word], is_read=False)
        return self._access(self._place(word), self._words[word], is_read=True)

    def last(self) -> list[_Access]:
        """Return the accesses that check everything at the end."""
        reads = [(self._channel + counter, 0) for counter in _COUNTERS]
        reads += [(self._channel + checker.LAST, self._rings), (self._channel + checker.ACCEPTED, self._rings)]
        reads += [(self._place(word), value) for word, value in self._words.items()]
        return [self._access(offset, value, is_read=True) for offset, value in reads]

    def _access(self, offset: int, value: int, *, is_read: bool) -> _Access:
        self._sequence += 1
        return _Access(self._sequence, offset, value, is_read)

    def _place(self, word: int) -> int:
        return LOCAL_MEMORY_OFFSET + self._number * 1024 + word * 8


class DriverClient:
    """A driver on a host, attached to functions at virtual addresses."""

    def __init__(self, world: "World", name: str, host: str, number: int, places: dict[str, int]) -> None:
        self.is_ending = False
        self._world = world
        self._name = name
        self._host = host
        self._number = number
        self._places = places
        self._address = f"{host}:1"
        # It shares its machine with the daemon: nothing cuts them apart.
        self._stub = DriverServiceStub(Channels(world.network.connect(Life(name))).to(self._address))

    async def run(self) -> None:
        """Do accesses to all functions until the end."""
        listening = asyncio.ensure_future(self._listen())
        try:
            await asyncio.gather(*(self._drive(function, place) for function, place in self._places.items()))
        finally:
            listening.cancel()

    async def _drive(self, function: str, place: int) -> None:
        random, program = self._world.random, _Program(self._world, self._number)
        try:
            while not self.is_ending:
                burst = [program.next() for _ in range(random.choice((1, 1, 1, 3)))]
                await asyncio.gather(*(self._do(function, place, access) for access in burst))
                await asyncio.sleep(random.expovariate(ACTIONS_PER_S))
            for access in program.last():
                await self._do(function, place, access)
        except _Lost:
            self._world.trace("lost", self._name, function)
            if self._world.loses_etcd:
                self._world.history.violate(11, f"{self._name} lost {function}, and no machine was")

    async def _do(self, function: str, place: int, access: _Access) -> None:
        world = self._world
        while not world.history.violations:
            try:
                await self._ask(function, place + access.offset, access)
            except VfleetError as error:
                if error.reason is Reason.FUNCTION_LOST:
                    raise _Lost from None
                if "no longer kept" in error.message:
                    world.history.violate(4, f"{self._name}'s access {access}: {error.message}")
                await asyncio.sleep(0.005 if error.reason is Reason.SEQUENCE_GAP else world.random.uniform(0.02, 0.4))
            else:
                world.trace("done", self._name, function, access.sequence)
                return

    async def _ask(self, function: str, place: int, access: _Access) -> None:
        """Ask for an access once, and look at its answer."""
        about = {"driver": self._name, "virtual_address": place, "sequence": access.sequence}
        data = access.value.to_bytes(8, "little")
        response: ReadResponse | WriteResponse
        if access.is_read:
            read = ReadRequest(length_bytes=8, **about)
            response = await call(self._stub.Read, read, address=self._address, timeout_s=10.0)
            is_right = response.data == data
        else:
            write = WriteRequest(data=data, **about)
            response = await call(self._stub.Write, write, address=self._address, timeout_s=10.0)
            is_right = True
        if not is_right or (response.sequence, response.status) != (access.sequence, ACCESS_STATUS_OK):
            self._world.history.violate(4, f"{self._name}'s {access} on {function} got {response}")

    async def _listen(self) -> None:
        """Acknowledge holds, as a driver does that knows of them."""
        while True:
            try:
                watch = WatchNotificationsRequest(driver=self._name)
                async for told in stream(self._stub.WatchNotifications, watch, address=self._address):
                    if told.kind == NOTIFICATION_KIND_HELD:
                        answer = AcknowledgeHoldRequest(driver=self._name, function=told.function, attempt=told.attempt)
                        await call(self._stub.AcknowledgeHold, answer, address=self._address, timeout_s=1.0)
            except VfleetError:
                await asyncio.sleep(0.5)


class UnnumberedClient:
    """A driver that leaves the sequences to its host, one access after the other.

    What it got no answer to has happened or not; whichever the next read shows has to stay so.
    """

    def __init__(self, world: "World", name: str, host: str, number: int, place: int) -> None:
        self.is_ending = False
        self._world = world
        self._name = name
        self._place = place + LOCAL_MEMORY_OFFSET + number * 1024
        self._address = f"{host}:1"
        self._stub = DriverServiceStub(Channels(world.network.connect(Life(name))).to(self._address))
        self._possible = {word: {0} for word in range(4)}
        self._written = 0

    async def run(self) -> None:
        """Write and read until the end."""
        world, random = self._world, self._world.random
        while not world.history.violations:
            try:
                if self.is_ending:
                    for word in self._possible:
                        await self._read(word)
                    return
                word = random.choice(list(self._possible))
                await (self._read(word) if random.random() < 0.5 else self._write(word))
            except VfleetError as error:
                if error.reason is Reason.FUNCTION_LOST:
                    return
                # What is late still must not take the place of the next.
                await asyncio.sleep(random.uniform(0.0, HESITATION_S))
            await asyncio.sleep(random.expovariate(ACTIONS_PER_S))

    async def _read(self, word: int) -> None:
        request = ReadRequest(driver=self._name, virtual_address=self._place + 8 * word, length_bytes=8)
        response = await call(self._stub.Read, request, address=self._address, timeout_s=40.0)
        value = int.from_bytes(response.data, "little")
        if value not in self._possible[word]:
            expected = " or ".join(f"{each:#x}" for each in sorted(self._possible[word]))
            self._world.history.violate(4, f"{self._name} reads {value:#x} as word {word}; expected {expected}")
        self._possible[word] = {value}

    async def _write(self, word: int) -> None:
        self._written += 1
        value, before = self._written, self._possible[word]
        self._possible[word] = {*before, value}
        data = value.to_bytes(8, "little")
        request = WriteRequest(driver=self._name, virtual_address=self._place + 8 * word, data=data)
        try:
            await call(self._stub.Write, request, address=self._address, timeout_s=40.0)
        except VfleetError as error:
            if error.metadata.get("taken_back") == "true":
                self._possible[word] = before
            raise
        self._possible[word] = {value}
