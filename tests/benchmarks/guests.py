"""A Linux guest on h1 for benchmarks, with functions of the fleet, and what it notices when they move."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from benchmarks.rig import Bench
from support.beats import Beats, port
from support.guest import PATIENT, VirtualMachine, attach_guest, virtual_machine
from support.local_cluster import Cluster

from vfleet.v1.records_pb2 import Phase

TOPOLOGY = Path(__file__).parents[1] / "guests" / "fleet.yaml"
MODULES = ("nvme", "virtio_pci", "virtio_net")


@asynccontextmanager
async def guest(
    rig: Bench, functions: Mapping[str, str], sockets: Sequence[Path] = ()
) -> AsyncIterator[tuple[VirtualMachine, Beats]]:
    """Make functions on these devices and run a machine with them, and with what is behind further sockets.

    The first is at the PCI address `address(1)`, and so on. Registers can be read past the guest's drivers.
    """
    attached = []
    for function, device in functions.items():
        await rig.cluster.fleet.create_function(function, device)
        attached.append(await attach_guest(rig.cluster, function, f"of-{function}", "h1", rig.path, **PATIENT))
    beats, place = Beats(), rig.path / "beats"
    machine = virtual_machine(
        rig.path / "vm", [*attached, *sockets], modules=MODULES, kernel="iomem=relaxed", more=port(place)
    )
    async with machine as running:
        beats.listen(place)
        yield running, beats


def address(number: int) -> str:
    """Return the PCI address of the guest's device behind its port of this number."""
    return f"0000:0{number}:00.0"


class Mover:
    """A function that goes to and fro between h2, where it is, and h3."""

    def __init__(self, cluster: Cluster, function: str, device: str) -> None:
        self._cluster = cluster
        self._function = function
        self._device = device
        self._moves = 0

    async def move(self) -> None:
        self._moves += 1
        home = f"{('h2', 'h3')[self._moves % 2]}/{self._device}"
        migration = await self._cluster.move(f"{self._function}-{self._moves}", {self._function: home})
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
