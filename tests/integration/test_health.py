"""The health command asks a real server."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from support.local_cluster import eventually

from hostd.identity import kernel_boot_id, open_identity
from hostd.ledger import Ledger
from vfleet.clock import SystemClock
from vfleet.errors import VfleetError
from vfleet.health import TIMEOUT_S as HEALTH_TIMEOUT_S
from vfleet.process import free_port
from vfleet.rpc import Channels, Server, call

DEMO = Path(__file__).parents[2] / "vfleet" / "topologies" / "demo.yaml"


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


async def test_a_host_is_well_while_etcd_is_out_of_reach(tmp_path: Path):
    # Not its first start: a new host that can't reach etcd ends.
    ledger = Ledger(tmp_path / "h1")
    open_identity(ledger, "h1", kernel_boot_id(), Random(), SystemClock(), power_cycle=False)
    ledger.close()
    address = f"127.0.0.1:{free_port(Random())}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "hostd", "--topology", str(DEMO), "--host", "h1", "--data-dir", str(tmp_path / "h1")),
        *("--insecure", "--listen", address, "--etcd", "127.0.0.1:1"),
        stderr=asyncio.subprocess.DEVNULL,
    )
    channels = Channels()

    async def is_well() -> bool:
        request = HealthCheckRequest(service="vfleet.v1.FabricService")
        try:
            response = await call(
                HealthStub(channels.to(address)).Check, request, address=address, timeout_s=HEALTH_TIMEOUT_S
            )
        except VfleetError:
            return False
        return response.status == response.SERVING

    await eventually(is_well)
    assert await ask(address) == (0, "")
    await channels.close()
    process.terminate()
    await process.wait()


async def test_who_is_not_there_is_not_well(server: tuple[Server, str]):
    await server[0].stop(0)
    code, said = await ask(server[1])
    assert code == 1
    assert server[1] in said


async def test_without_an_address_it_says_what_it_needs():
    assert await ask() == (2, "usage: python -m vfleet.health HOST:PORT\n")
