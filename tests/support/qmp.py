"""QEMU's monitor: commands, and the events that come meanwhile (QEMU Machine Protocol)."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_S = 120.0


class Qmp:
    """A connection to the monitor at a socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._events: list[dict] = []

    @classmethod
    async def connect(cls, path: Path) -> "Qmp":
        """Connect, as soon as somebody listens."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                try:
                    monitor = cls(*await asyncio.open_unix_connection(path))
                    break
                except OSError:
                    await asyncio.sleep(0.02)
            await monitor._line()
            await monitor.do("qmp_capabilities")
        return monitor

    async def do(self, command: str, **arguments: object) -> Mapping[str, object]:
        """Carry out a command, which is to succeed, and return what it returns."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._writer.write(json.dumps({"execute": command, "arguments": named}).encode() + b"\n")
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                line = await self._line()
                if "event" in line:
                    self._events.append(line)
                else:
                    assert "return" in line, (command, arguments, line)
                    return line["return"]

    async def event(self, name: str, **data: object) -> None:
        """Wait until an event has come that has this data; it and what came before are forgotten."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                while self._events:
                    event = self._events.pop(0)
                    if event["event"] == name and data.items() <= event["data"].items():
                        return
                self._events.append(await self._line())

    async def close(self) -> None:
        self._writer.close()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    async def _line(self) -> dict:
        line = await self._reader.readline()
        assert line, "QEMU has ended"
        return json.loads(line)
