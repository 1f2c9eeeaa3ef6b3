"""Chaos' proxy does to connections what it says: cuts, freezes one way or both, delays, and heals."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from random import Random

import pytest
from support.chaos.proxy import Disturbance, Proxy, Way

from vfleet.process import LOOPBACK

SOON_S = 0.1
PATIENCE_S = 10.0


class Wire:
    """A connection through the proxy to a server that returns each line and notes that it came."""

    def __init__(self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, come: list[bytes]):
        self.proxy, self.reader, self.writer, self.come = proxy, reader, writer, come

    async def ask(self, line: bytes) -> bytes:
        self.writer.write(line)
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.readline()

    async def is_silent(self, line: bytes) -> bool:
        self.writer.write(line)
        with suppress(TimeoutError):
            async with asyncio.timeout(SOON_S):
                await self.reader.readline()
                return False
        return True


@asynccontextmanager
async def wire() -> AsyncIterator[Wire]:
    come: list[bytes] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(asyncio.current_task())
        with suppress(OSError):
            while line := await reader.readline():
                come.append(line)
                writer.write(line)
        writer.close()

    served: list[asyncio.Task[None]] = []
    server = await asyncio.start_server(echo, LOOPBACK, 0)
    port = server.sockets[0].getsockname()[1]
    async with Proxy(lambda: f"{LOOPBACK}:{port}", Random()) as proxy:
        reader, writer = await connect(proxy)
        try:
            yield Wire(proxy, reader, writer, come)
        finally:
            writer.close()
            server.close()
    await asyncio.gather(*served)


async def connect(proxy: Proxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = proxy.address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def test_everything_passes_in_peace():
    async with wire() as w:
        assert await w.ask(b"one\n") == b"one\n"


async def test_a_cut_resets_connections_and_refuses_new_ones_until_it_is_healed():
    async with wire() as w:
        await w.ask(b"one\n")
        w.proxy.disturb(Disturbance("cut"))
        with pytest.raises(ConnectionResetError):
            await w.ask(b"two\n")
        reader, writer = await connect(w.proxy)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        w.proxy.heal()
        reader, writer = await connect(w.proxy)
        assert await Wire(w.proxy, reader, writer, w.come).ask(b"three\n") == b"three\n"
        writer.close()


@pytest.mark.parametrize(("way", "comes"), [(Way.BOTH, 1), (Way.THERE, 1), (Way.BACK, 2)])
async def test_what_is_frozen_arrives_late(way: Way, comes: int):
    async with wire() as w:
        await w.ask(b"one\n")
        w.proxy.disturb(Disturbance("freeze", way))
        assert await w.is_silent(b"two\n")
        assert len(w.come) == comes
        w.proxy.heal()
        async with asyncio.timeout(PATIENCE_S):
            assert await w.reader.readline() == b"two\n"


async def test_half_spares_every_second_connection():
    async with wire() as w:
        await w.ask(b"one\n")
        reader, writer = await connect(w.proxy)
        other = Wire(w.proxy, reader, writer, w.come)
        await other.ask(b"one\n")
        w.proxy.disturb(Disturbance("freeze", half=True))
        assert await w.is_silent(b"two\n")
        assert await other.ask(b"two\n") == b"two\n"
        writer.close()


async def test_a_delay_lets_everything_pass_later():
    async with wire() as w:
        w.proxy.disturb(Disturbance("delay", delay_s=SOON_S))
        start_s = asyncio.get_running_loop().time()
        assert await w.ask(b"one\n") == b"one\n"
        assert asyncio.get_running_loop().time() - start_s >= 2 * SOON_S * 0.9


async def test_without_an_upstream_connections_are_refused():
    async with Proxy(lambda: "", Random()) as proxy:
        reader, writer = await connect(proxy)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
