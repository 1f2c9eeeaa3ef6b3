"""The coordinator as a process: what it announces, how it stops, and its exit codes."""

import asyncio
import json
import signal
import sys
from random import Random

import pytest

from vfleet.etcd import keys
from vfleet.process import free_port
from vfleet.v1.records_pb2 import Coordinator


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "coordinator",
        "--insecure",
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_announces_its_address_and_gives_its_lease_back_when_told_to_stop(etcd, store, number):
    process = await start("--name", "c1", "--etcd", etcd.endpoint, "--lease-ttl-s", "60")
    announced = json.loads(await process.stdout.readline())
    host, _, port = announced["address"].rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.close()
    assert await store.get(keys.coordinator_key("c1")) is not None
    process.send_signal(number)
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    assert b"Traceback" not in errors
    assert await store.get(keys.coordinator_key("c1")) is None


async def test_the_fleet_is_told_the_advertised_address(etcd, store):
    process = await start("--name", "c1", "--etcd", etcd.endpoint, "--insecure", "--advertise", "127.0.0.9:7000")
    await process.stdout.readline()
    stored = await store.get(keys.coordinator_key("c1"))
    assert Coordinator.FromString(stored.value).address == "127.0.0.9:7000"
    process.terminate()
    await process.communicate()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--etcd", "127.0.0.1:1"], "--name"),
        (["--name", "C1", "--etcd", "127.0.0.1:1"], "--name is 'C1'"),
        (["--name", "c1", "--etcd", "nowhere"], "--etcd is 'nowhere'"),
        (["--name", "c1", "--etcd", "127.0.0.1:1", "--listen", "x:99999"], "--listen is 'x:99999'"),
        (["--name", "c1", "--etcd", "127.0.0.1:1", "--advertise", "x:0"], "--advertise is 'x:0'"),
        (["--name", "c1", "--etcd", "127.0.0.1:1", "--lease-ttl-s", "0"], "--lease-ttl-s is 0"),
        (["--name", "c1", "--etcd", "127.0.0.1:1", "--keep-migrations", "0"], "--keep-migrations is 0"),
        (["--name", "c1", "--etcd", "127.0.0.1:1", "--keep-migrations-days", "9999"], "--keep-migrations-days is 9999"),
    ],
)
async def test_bad_arguments_end_with_2_and_one_line(arguments, words):
    process = await start(*arguments)
    output, errors = await process.communicate()
    assert (process.returncode, output) == (2, b"")
    assert errors.count(b"\n") == 1
    assert words in errors.decode()


async def test_without_etcd_it_ends_with_1_and_says_where_and_how_long_it_tried():
    endpoint = f"127.0.0.1:{free_port(Random())}"
    process = await start("--name", "c1", "--etcd", endpoint, "--log-level", "error")
    _, errors = await process.communicate()
    assert process.returncode == 1
    last = errors.decode().splitlines()[-1]
    assert endpoint in last
    assert " s" in last
