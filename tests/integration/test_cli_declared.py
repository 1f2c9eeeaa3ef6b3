"""A topology that declares functions and a virtual machine's driver: `vfleet up`, again and again."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.nvme_guest import NvmeGuest

from vfleet.client import FleetClient, move_request
from vfleet.v1.records_pb2 import Phase
from vfleet.v1.types_pb2 import GUEST_STATE_CONNECTED

HOSTS = (Path(__file__).parents[1] / "guests" / "fleet.yaml").read_text()
DECLARED = """
functions:
  - name: disk1
    device: h1/nvme0
    drivers: [{guest: SOCKET}]
  - {name: disk2, device: h2/nvme0, vf_index: 2, drivers: [{name: d1, host: h3}]}
"""


class Up:
    """A cluster that `vfleet up` runs, and what it has said before it was up."""

    def __init__(self, process: asyncio.subprocess.Process, said: list[str], fleet: FleetClient) -> None:
        self.process = process
        self.said = said
        self.fleet = fleet

    async def end(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        await self.process.wait()

    async def has(self) -> tuple[dict[str, tuple[str, int]], dict[str, list[str]]]:
        """Return where the functions are, and which functions the drivers have."""
        functions = {each.name: (each.device, each.vf_index) for each in await self.fleet.list_functions()}
        drivers = {each.name: [entry.function for entry in each.entries] for each in await self.fleet.list_drivers()}
        return functions, drivers


@asynccontextmanager
async def up(tmp_path: Path) -> AsyncIterator[Up]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vfleet.cli.main", "up", tmp_path / "fleet.yaml", "--data-dir", tmp_path / "data"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    assert process.stdout is not None
    try:
        said: list[str] = []
        async with asyncio.timeout(90):
            while "Ctrl-C ends it." not in said:
                line = await process.stdout.readline()
                assert line, said
                said.append(line.decode().rstrip("\n"))
        [address] = [line.split()[2] for line in said if line.startswith("coordinator")]
        async with FleetClient([address]) as fleet:
            yield Up(process, said, fleet)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGINT)
            await process.wait()


def write(tmp_path: Path, declared: str = DECLARED) -> Path:
    socket = tmp_path / "disk1.sock"
    (tmp_path / "fleet.yaml").write_text(HOSTS + declared.replace("SOCKET", str(socket)))
    return socket


def identify(socket: Path) -> NvmeGuest:
    """Return a guest, once its device has told what it is."""
    guest = NvmeGuest(socket)
    guest.begin()
    guest.identify()
    return guest


BOTH = {"guest-disk1": ["disk1"], "d1": ["disk2"]}


@pytest.mark.timeout(300)
async def test_what_is_declared_is_there_whenever_the_cluster_comes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    socket = write(tmp_path)
    async with up(tmp_path) as first:
        assert first.said[:4] == [
            "function disk1 is made: h1/nvme0, VF 1",
            f"  driver guest-disk1 on h1 offers it at {socket}",
            "function disk2 is made: h2/nvme0, VF 2",
            "  driver d1 on h3 has it",
        ]
        assert await first.has() == ({"disk1": ("h1/nvme0", 1), "disk2": ("h2/nvme0", 2)}, BOTH)
        guest = await asyncio.to_thread(identify, socket)
        # What an operator does is left alone, until the cluster comes up anew: a move for good.
        migration = await first.fleet.create_migration([move_request("disk1", "h3/nvme0")])
        assert (await first.fleet.wait_migration(migration.name)).phase == Phase.PHASE_DONE
        await first.fleet.detach_driver("disk2", "d1")
        await first.fleet.delete_function("disk2")
        await first.end(signal.SIGINT)
        guest.close()  # its device was dead
    async with up(tmp_path) as second:
        assert second.said[0] == "function disk1 is there: h3/nvme0"
        assert second.said[2] == "function disk2 is made: h2/nvme0, VF 2"
        assert await second.has() == ({"disk1": ("h3/nvme0", 1), "disk2": ("h2/nvme0", 2)}, BOTH)
        guest = await asyncio.to_thread(identify, socket)
        await second.end(signal.SIGKILL)
    write(tmp_path, DECLARED.replace("name: d1, host: h3", "name: d1, host: h1"))
    async with up(tmp_path) as third:
        # The holder has outlived it all, and the guest doesn't know.
        assert (await third.fleet.get_driver("guest-disk1")).guest_state == GUEST_STATE_CONNECTED
        await asyncio.to_thread(guest.identify)
        guest.close()
        # What can't be is told in a line, and keeps nothing else back.
        (told,) = [line for line in third.said if line.startswith("vfleet: ")]
        assert told.startswith("vfleet: function disk2 of the topology, driver d1: driver 'd1' exists, on host 'h3'")
        assert await third.has() == ({"disk1": ("h3/nvme0", 1), "disk2": ("h2/nvme0", 2)}, BOTH)


async def test_what_can_not_be_declared_is_bad_input(tmp_path: Path):
    write(tmp_path, DECLARED.replace("h2/nvme0", "h2/nvme9"))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "vfleet.cli.main", "up", tmp_path / "fleet.yaml"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
    )
    out, err = await process.communicate()
    assert (process.returncode, out, len(err.splitlines())) == (2, b"", 1)
    assert b"functions[1].device is 'h2/nvme9'; expected a device of a host here, for example h1/nvme0" in err
