"""A guest's longest gap when its function moves, beside what people have today with emulated devices of QEMU.

Ours: the longest time without a completed 4 KiB read of a guest on h1 while its NVMe function moves between h2 and h3,
and without a frame from one of its two network functions to the other, while the first moves.

Today's: the same guest, booted from the same image, with devices of QEMU's own, which is not vfleet's floor but the
alternative: a device is unplugged, and plugged in again at once (`device_del`, `device_add`), as one has to before and
after a migration of a machine with a VF; or QEMU migrates the machine to another QEMU on this machine (live, by a UNIX
socket, with its default limits). QEMU has no VF that can be plugged by itself: `igb` is one whole, which is a PF, and
waits for its link. Of its VF the guest's driver is taken and comes back, which is the guest's part of a hot plug, and
the least that it can take. The downtime is what QEMU itself says. What was plugged in again is used as soon as the
guest finds it, by a program that looks for it all the time.

All gaps are by this machine's clock, since a guest's stands still while QEMU migrates.
"""

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack

from benchmarks.guests import TOPOLOGY, Mover, address, guest
from benchmarks.measure import Figure, Rounds, Size
from benchmarks.rig import bench
from support.emulated import ADDRESSES, VF, EmulatedMachine, emulated_machine

FUNCTIONS = {"vf1": "h2/nvme0", "nic1": "h2/net0", "nic2": "h1/net0"}
DOWNTIME = "QEMU's downtime, as it says"
MIGRATION = "QEMU's live migration"


async def run(size: Size) -> list[Figure]:
    ours: dict[str, list[float]] = defaultdict(list)
    theirs: dict[tuple[str, str], list[float]] = defaultdict(list)
    async with bench(bare=0, topology=TOPOLOGY) as rig, AsyncExitStack() as stack:
        (machine, beats), emulated = await asyncio.gather(
            stack.enter_async_context(guest(rig, FUNCTIONS)),
            stack.enter_async_context(emulated_machine(rig.path / "emulated")),
        )
        storage, network = Mover(rig.cluster, "vf1", "nvme0"), Mover(rig.cluster, "nic1", "net0")
        for _ in range(size.of(6, 1)):
            _, gap = await beats.gaps_ms(machine, storage.move, "reads", address(1))
            ours["reads"].append(gap)
            _, gap = await beats.gaps_ms(machine, network.move, "frames", address(2), address(3))
            ours["frames"].append(gap)
            for name, gap in (await alternatives(emulated, size)).items():
                theirs[name].append(gap)
    return [
        Rounds(ours[kind], gaps).quantile(f"gap of {kind} at a move p50 / {what}", "ms", None, 0.5)
        for (kind, what), gaps in theirs.items()
    ]


async def alternatives(emulated: EmulatedMachine, size: Size) -> dict[tuple[str, str], float]:
    """Do each once, at the smallest size some, and return the longest gap of the work that it meets."""
    gaps: dict[tuple[str, str], float] = {}
    downtimes: list[float] = []

    async def replug(name: str) -> None:
        await emulated.replug(name)

    async def migrate() -> None:
        downtimes.append(await emulated.migrate())

    beats, machine = emulated.beats, emulated.machine
    reads = ("reads", ADDRESSES["nvme"])
    replugs = (("nvme", "NVMe"), ("virtio", "virtio-net"), ("igb", "igb"))
    # Those that are left out are done as the others are.
    for name, what in size.of(replugs, replugs[:2]):
        work = reads if name == "nvme" else ("frames", ADDRESSES[name], ADDRESSES["peer"])
        _, gap = await beats.gaps_ms(machine, lambda name=name: replug(name), *work)
        gaps[work[0], f"unplugged and plugged in, {what}"] = gap
    await emulated.make_vf()
    _, gap = await beats.gaps_ms(machine, emulated.replug_vf, "frames", VF, ADDRESSES["peer"])
    gaps["frames", "taken and given back, a VF of igb"] = gap
    await emulated.end_vf()
    works = (reads, ("frames", ADDRESSES["virtio"], ADDRESSES["peer"]))
    for work in size.of(works, works[:1]):
        _, gap = await beats.gaps_ms(machine, migrate, *work)
        gaps[work[0], MIGRATION] = gap
    gaps["reads", DOWNTIME] = downtimes[0]
    return gaps
