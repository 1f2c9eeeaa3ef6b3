"""A guest's longest gap when its function moves, beside what people have today with emulated devices of QEMU.

Ours: the longest time without a completed 4 KiB read of a guest on h1 while its NVMe function moves between h2 and h3,
and without a frame from one of its two network functions to the other, while the first moves.

Today's: the same guest, booted from the same image, with devices of QEMU's own, which is not vfleet's floor but the
alternative: a device is unplugged, and plugged in again at once (`device_del`, `device_add`), as one has to before and
after a migration of a machine with a VF; or QEMU migrates the machine to another QEMU on this machine (live, by a UNIX
socket, with its default limits). QEMU has no VF that can be plugged by itself, so `igb` is one whole: its driver
and its link come up as those of a VF do. The downtime is what QEMU itself says. What was plugged in again is used as
soon as the guest finds it, by a program that looks for it all the time.

All gaps are by this machine's clock, since a guest's stands still while QEMU migrates.
"""

from collections import defaultdict

from benchmarks.guests import TOPOLOGY, Mover, address, guest
from benchmarks.measure import Figure, Rounds, Size
from benchmarks.rig import bench
from support.emulated import ADDRESSES, EmulatedMachine, emulated_machine

FUNCTIONS = {"vf1": "h2/nvme0", "nic1": "h2/net0", "nic2": "h1/net0"}
DOWNTIME = "QEMU's downtime, as it says"
MIGRATION = "QEMU's live migration"


async def run(size: Size) -> list[Figure]:
    ours: dict[str, list[float]] = defaultdict(list)
    theirs: dict[tuple[str, str], list[float]] = defaultdict(list)
    async with (
        bench(bare=0, topology=TOPOLOGY) as rig,
        guest(rig, FUNCTIONS) as (machine, beats),
        emulated_machine(rig.path / "emulated") as emulated,
    ):
        storage, network = Mover(rig.cluster, "vf1", "nvme0"), Mover(rig.cluster, "nic1", "net0")
        for _ in range(size.of(6, 1)):
            _, gap = await beats.gaps_ms(machine, storage.move, "reads", address(1))
            ours["reads"].append(gap)
            _, gap = await beats.gaps_ms(machine, network.move, "frames", address(2), address(3))
            ours["frames"].append(gap)
            for name, gap in (await alternatives(emulated)).items():
                theirs[name].append(gap)
    return [
        Rounds(ours[kind], gaps).quantile(f"gap of {kind} at a move p50 / {what}", "ms", None, 0.5)
        for (kind, what), gaps in theirs.items()
    ]


async def alternatives(emulated: EmulatedMachine) -> dict[tuple[str, str], float]:
    """Do each once, and return the longest gap of the work that it meets."""
    gaps: dict[tuple[str, str], float] = {}
    downtimes: list[float] = []

    async def replug(name: str) -> None:
        await emulated.replug(name)

    async def migrate() -> None:
        downtimes.append(await emulated.migrate())

    beats, machine = emulated.beats, emulated.machine
    reads = ("reads", ADDRESSES["nvme"])
    for name, what in (("nvme", "NVMe"), ("virtio", "virtio-net"), ("igb", "igb")):
        work = reads if name == "nvme" else ("frames", ADDRESSES[name], ADDRESSES["peer"])
        _, gap = await beats.gaps_ms(machine, lambda name=name: replug(name), *work)
        gaps[work[0], f"unplugged and plugged in, {what}"] = gap
    for work in (reads, ("frames", ADDRESSES["virtio"], ADDRESSES["peer"])):
        _, gap = await beats.gaps_ms(machine, migrate, *work)
        gaps[work[0], MIGRATION] = gap
    gaps["reads", DOWNTIME] = downtimes[0]
    return gaps
