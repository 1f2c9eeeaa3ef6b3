"""A TCP proxy on the loopback interface through which a daemon is reached, and which can be disturbed as a network is.

Cut: connections are reset, and new ones too. Frozen: nothing passes, in one direction or both, and nobody is told; what
was sent meanwhile arrives late. Delayed: everything passes later.
"""

import asyncio
import contextlib
import enum
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Self

from vfleet.process import LOOPBACK, free_port

CHUNK_BYTES = 1 << 16


class Way(enum.Enum):
    """The directions that a disturbance concerns, as seen by whoever opened the connection."""

    BOTH = "both ways"
    THERE = "one way, there"
    BACK = "one way, back"


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What is done to the connections; `kind` is "cut", "freeze" or "delay", and only the last has a `delay_s`.

    With `half`, only every second of the connections that are open suffers it: some peers are cut off and others not.
    """

    kind: str
    way: Way = Way.BOTH
    half: bool = False
    delay_s: float = 0.0


class Proxy:
    """Listens at `address` and passes everything on to wherever `upstream()` says (HOST:PORT; empty: refuse)."""

    def __init__(self, upstream: Callable[[], str], random: Random) -> None:
        self.address = f"{LOOPBACK}:{free_port(random)}"
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0
        self._disturbance: Disturbance | None = None

    async def __aenter__(self) -> Self:
        host, _, port = self.address.rpartition(":")
        self._server = await asyncio.start_server(self._start, host, int(port))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
            for connection in self._connections:
                connection.abort()
            await asyncio.gather(*self._tasks)
            await self._server.wait_closed()

    def disturb(self, disturbance: Disturbance) -> None:
        """Disturb the connections, until `heal`."""
        self._disturbance = disturbance
        for connection in list(self._connections):
            if not disturbance.half or connection.number % 2:
                connection.disturb(disturbance)

    def heal(self) -> None:
        """Let everything pass again, at once."""
        self._disturbance = None
        for connection in self._connections:
            connection.heal()

    def _start(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._accept(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self._upstream().rpartition(":")
        try:
            upstream = await asyncio.open_connection(host, int(port)) if port else None
        except OSError:
            upstream = None
        if upstream is None:
            writer.transport.abort()
            return
        self._count += 1
        connection = _Connection(self._count, (reader, writer), upstream)
        self._connections.add(connection)
        if self._disturbance is not None and not self._disturbance.half:
            connection.disturb(self._disturbance)
        try:
            await connection.carry()
        finally:
            self._connections.discard(connection)


_Side = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Connection:
    def __init__(self, number: int, downstream: _Side, upstream: _Side) -> None:
        self.number = number
        self._there = _Pipe(downstream[0], upstream[1])
        self._back = _Pipe(upstream[0], downstream[1])

    def disturb(self, disturbance: Disturbance) -> None:
        if disturbance.kind == "cut":
            self.abort()
            return
        for pipe, other in ((self._there, Way.BACK), (self._back, Way.THERE)):
            if disturbance.way is not other:
                pipe.delay_s = disturbance.delay_s
                if disturbance.kind == "freeze":
                    pipe.flows.clear()

    def heal(self) -> None:
        for pipe in (self._there, self._back):
            pipe.delay_s = 0.0
            pipe.flows.set()

    def abort(self) -> None:
        for pipe in (self._there, self._back):
            pipe.writer.transport.abort()
            pipe.flows.set()

    async def carry(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._there.carry())
                group.create_task(self._back.carry())
        except* (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.abort()


class _Pipe:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.flows = asyncio.Event()
        self.flows.set()
        self.delay_s = 0.0
        self._reader = reader

    async def carry(self) -> None:
        """Carry bytes until one side ends; then the other side is told, and the rest of the connection goes on."""
        while data := await self._reader.read(CHUNK_BYTES):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self.flows.wait()
            self.writer.write(data)
            await self.writer.drain()
        await self.flows.wait()
        with contextlib.suppress(OSError):
            self.writer.write_eof()
