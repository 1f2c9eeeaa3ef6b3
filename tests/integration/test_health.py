"""The health command asks a real server."""

import asyncio
import sys
from collections.abc import AsyncIterator

import pytest

from vfleet.rpc import Server


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, str]]:
    server = Server([])
    address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    yield server, address
    await server.stop(0)


async def ask(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vfleet.health", *arguments, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()
    assert process.returncode is not None
    return process.returncode, said.decode()


async def test_who_serves_is_well(server: tuple[Server, str]):
    assert await ask(server[1]) == (0, "")


async def test_who_does_not_serve_yet_is_not_well(server: tuple[Server, str]):
    await server[0].set_serving(serving=False)
    assert await ask(server[1]) == (1, f"{server[1]} says NOT_SERVING\n")


async def test_who_is_not_there_is_not_well(server: tuple[Server, str]):
    await server[0].stop(0)
    code, said = await ask(server[1])
    assert code == 1
    assert server[1] in said


async def test_without_an_address_it_says_what_it_needs():
    assert await ask() == (2, "usage: python -m vfleet.health HOST:PORT\n")
