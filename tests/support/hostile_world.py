"""A fleet with a hostile virtual machine and a neighbour on the same host, whose VMMs are the test itself."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from support.guest import GUESTS, attach_guest
from support.local_cluster import Cluster, eventually, running
from support.nvme_guest import NvmeGuest
from support.vmm import Vmm

from vfleet.v1.types_pb2 import GUEST_STATE_WAITING


class World:
    """A fleet with two guests on one host: one is hostile, the other its neighbour."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster = cluster
        self.folder = folder
        self.hostile = NvmeGuest(folder / "hostile.sock")
        self.neighbour = NvmeGuest(folder / "neighbour.sock")
        self.others: list[Vmm] = []

    async def neighbour_goes_on(self) -> None:
        for _ in range(3):
            await do(self.neighbour.identify)

    async def hostile_begins_anew(self) -> None:
        """Power the hostile machine off, and find its device as it was at the beginning."""
        self.hostile.close()
        await until_free(self)
        self.hostile = NvmeGuest(self.folder / "hostile.sock")
        await do(self.hostile.begin)
        await do(self.hostile.identify)

    def memory_bytes(self) -> list[int]:
        """Return what hostd, and the hostile machine's holder, have in memory."""
        process = self.cluster.local.hosts["h1"].process
        holder = int((self.folder / "cluster" / "h1" / "guests" / "hostile.pid").read_text())
        return [resident_bytes(process.pid), resident_bytes(holder)]


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) << 10


async def until_free(world: World) -> None:
    """Wait until the hostile machine's socket takes another."""

    async def is_free() -> bool:
        return (await world.cluster.fleet.get_driver("hostile")).guest_state == GUEST_STATE_WAITING

    await eventually(is_free)


async def do(work: Callable[[], object]) -> None:
    """Let a guest work while the cluster does."""
    async with asyncio.timeout(60):
        await asyncio.to_thread(work)


@asynccontextmanager
async def hostile_world(folder: Path) -> AsyncIterator[World]:
    """Run the fleet; both machines have begun."""
    async with running(folder, topology=GUESTS / "fleet.yaml") as cluster:
        for function, driver in (("vf1", "hostile"), ("vf2", "neighbour")):
            await cluster.fleet.create_function(function, "h1/nvme0")
            await attach_guest(cluster, function, driver, "h1", folder)
        found = World(cluster, folder)
        await do(found.hostile.begin)
        await do(found.neighbour.begin)
        yield found
        for each in (found.hostile, found.neighbour, *found.others):
            each.close()
