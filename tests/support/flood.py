"""Clients that mean harm, many at once: `python -m support.flood CERTS CLIENTS SECONDS ADDRESS…`.

Each does one thing over and over until the time is over: garbage, silence, half a handshake, no certificate or another
CA's; with a viewer's certificate broken frames, calls without requests, requests without end, endless metadata, calls
that are reset at once, and calls without a pause. In plaintext (CERTS is -) those that need no handshake do the same.
HTTP/2 is written by hand: a library would not break it. In the end one line says what came of it, as JSON.
"""

import asyncio
import contextlib
import itertools
import json
import resource
import ssl
import struct
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RESET, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4
HELD_STREAMS = 200
PAUSE_EVERY, PAUSE_S = 40, 0.2  # calls, and how long after them: so that no client keeps the others from their turn
MESSAGE_BYTES = 64 << 20
CHUNK = bytes(16_384)
METHODS = (
    "/vfleet.v1.FleetService/ListHosts",
    "/vfleet.v1.TranslationService/UpdateTable",
    "/vfleet.v1.FabricService/Exchange",
    "/vfleet.v1.FunctionService/ListFunctions",
    "/grpc.health.v1.Health/Watch",
)


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def header_block(path: str) -> bytes:
    """Return the headers of a gRPC call, with HPACK's simplest means."""

    def text(value: str) -> bytes:
        return bytes([len(value)]) + value.encode()

    return (
        b"\x83\x87\x04"
        + text(path)
        + b"\x01"
        + text("a")
        + b"\x0f\x10"
        + text("application/grpc")
        + b"\x00"
        + text("te")
        + text("trailers")
    )


@dataclass
class Client:
    """One client. `open` connects it; what it does is one of KINDS."""

    address: str
    context: ssl.SSLContext | None
    random: Random
    counts: Counter[str]
    deadline_s: float

    async def open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, _, port = self.address.rpartition(":")
        return await asyncio.open_connection(host, int(port), ssl=self.context)

    @property
    def left_s(self) -> float:
        return max(0.0, self.deadline_s - asyncio.get_running_loop().time())

    async def run(self, kind: str) -> None:
        act = KINDS[kind]
        while self.left_s:
            writer = None
            try:
                async with asyncio.timeout(self.left_s):
                    reader, writer = await self.open()
                    self.counts[f"{kind}: connections"] += 1
                    await act(self, reader, writer)
            except (OSError, TimeoutError, EOFError):
                pass
            finally:
                if writer is not None:
                    writer.transport.abort()
            with contextlib.suppress(TimeoutError):
                await asyncio.sleep(min(self.left_s, self.random.uniform(0.05, 0.3)))

    async def send(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Send, and let others have their turn. Raise OSError once the connection is gone."""
        if writer.transport.is_closing():
            raise ConnectionResetError
        writer.write(data)
        await writer.drain()
        await asyncio.sleep(0)

    async def speak(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer as one must to stay connected, until the end."""
        while True:
            head = await reader.readexactly(9)
            payload = await reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags = head[3], head[4]
            if kind in (PING, SETTINGS) and not flags & ACK:
                writer.write(frame(kind, ACK, 0, payload if kind == PING else b""))
            elif kind == HEADERS and flags & END_STREAM:
                self.counts["calls that ended"] += 1


async def begin(writer: asyncio.StreamWriter) -> None:
    writer.write(PREFACE + frame(SETTINGS, 0, 0))
    await writer.drain()


async def garbage(client: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(client.random.randbytes(client.random.randint(1, 60_000)))
    await reader.read()


async def silence(client: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def half_a_handshake(client: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + client.random.randbytes(40))
    await reader.read()


async def broken_frames(client: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await begin(writer)
    for _ in range(100):
        payload = client.random.randbytes(client.random.randint(0, 200))
        writer.write(
            frame(client.random.randint(0, 12), client.random.randint(0, 255), client.random.randint(0, 9), payload)
        )
    await reader.read()


async def calls_without_requests(client: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await begin(writer)
    for stream in range(1, 2 * HELD_STREAMS, 2):
        writer.write(frame(HEADERS, END_HEADERS, stream, header_block(client.random.choice(METHODS))))
    await client.speak(reader, writer)


async def requests_without_end(client: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await begin(writer)
    answers = asyncio.create_task(client.speak(reader, writer))
    try:
        for stream in range(1, 40, 2):
            writer.write(frame(HEADERS, END_HEADERS, stream, header_block(client.random.choice(METHODS))))
            writer.write(frame(DATA, 0, stream, b"\0" + struct.pack(">I", MESSAGE_BYTES)))
            # Beyond any window that was granted: a server that keeps it all is lost.
            for _ in range(20):
                await client.send(writer, frame(DATA, 0, stream, CHUNK))
                await asyncio.sleep(PAUSE_S / 10)
        await answers
    finally:
        answers.cancel()
        await asyncio.gather(answers, return_exceptions=True)


async def endless_metadata(client: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await begin(writer)
    writer.write(frame(HEADERS, 0, 1, header_block(METHODS[0])))
    field = b"\x00\x01x\x7f" + bytes([97]) * 127
    for _ in range(200):
        await client.send(writer, frame(CONTINUATION, 0, 1, field * 100))
    await reader.read()


async def calls_that_are_reset(client: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await begin(writer)
    answers = asyncio.create_task(client.speak(reader, writer))
    try:
        for stream in itertools.count(1, 2):
            reset = frame(RESET, 0, stream, struct.pack(">I", 8))
            await client.send(writer, frame(HEADERS, END_HEADERS, stream, header_block(METHODS[0])) + reset)
            if stream % PAUSE_EVERY == 1:
                await asyncio.sleep(PAUSE_S)
    finally:
        answers.cancel()
        await asyncio.gather(answers, return_exceptions=True)


async def calls_without_a_pause(client: Client, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await begin(writer)
    answers = asyncio.create_task(client.speak(reader, writer))
    try:
        for stream in itertools.count(1, 2):
            request = frame(DATA, END_STREAM, stream, bytes(5))
            await client.send(writer, frame(HEADERS, END_HEADERS, stream, header_block(METHODS[0])) + request)
            if stream % PAUSE_EVERY == 1:
                await asyncio.sleep(PAUSE_S)
    finally:
        answers.cancel()
        await asyncio.gather(answers, return_exceptions=True)


Act = Callable[[Client, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
STRANGERS: dict[str, Act] = {"garbage": garbage, "silence": silence, "half a handshake": half_a_handshake}
REFUSED: dict[str, Act] = {"no certificate": calls_without_requests, "another CA": calls_without_requests}
INSIDERS: dict[str, Act] = {
    "broken frames": broken_frames,
    "calls without requests": calls_without_requests,
    "requests without end": requests_without_end,
    "endless metadata": endless_metadata,
    "calls that are reset": calls_that_are_reset,
    "calls without a pause": calls_without_a_pause,
}
KINDS = {**STRANGERS, **REFUSED, **INSIDERS}


def context(folder: Path | None) -> ssl.SSLContext:
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.check_hostname, made.verify_mode = False, ssl.CERT_NONE
    made.set_alpn_protocols(["h2"])
    if folder is not None:
        made.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    return made


async def flood(certs: Path | None, clients: int, seconds: float, addresses: list[str]) -> Counter[str]:
    """Let so many clients do their worst for so long."""
    counts: Counter[str] = Counter()
    deadline_s = asyncio.get_running_loop().time() + seconds
    contexts: dict[str, ssl.SSLContext | None] = dict.fromkeys(KINDS)
    kinds = list(KINDS)
    if certs is not None:
        contexts |= dict.fromkeys(INSIDERS, context(certs / "viewer-local"))
        contexts |= {"no certificate": context(None), "another CA": context(certs / "another")}
    else:
        kinds = [*STRANGERS, *INSIDERS]
    # By different steps, so that every kind meets every daemon.
    chosen = [(kinds[n % len(kinds)], addresses[n // len(kinds) % len(addresses)]) for n in range(clients)]
    await asyncio.gather(
        *(
            Client(address, contexts[kind], Random(n), counts, deadline_s).run(kind)
            for n, (kind, address) in enumerate(chosen)
        )
    )
    return counts


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    folder, number, length, *places = sys.argv[1:]
    found = asyncio.run(flood(None if folder == "-" else Path(folder), int(number), float(length), places))
    print(json.dumps(found))
