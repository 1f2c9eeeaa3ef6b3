"""What a Linux guest waits for in a virtual machine: a register's read, 4 KiB reads, and a move of its function.

Ours: a guest on h1 with two NVMe functions, one at home there (local) and one on h2 (remote). It reads a register
through the mapped BAR, and blocks at random places, past its cache, one at a time or eight. The blackout is the longest
time without a completed read while the remote function moves between h2 and h3, by this machine's clock.

Floor of reads: a third controller of the same guest, of the same model, behind a bare vfio-user server of one process
(`benchmarks.bare_nvme`); the guest measures all three in turns. Its emulated processor works for all of them, most of
all for reads: `guest_access` compares without it. Floor of the blackout: that of `blackout`; and the same guest's
longest gap in the half second before.
"""

import json

from benchmarks.figures.blackout import Floor
from benchmarks.guests import TOPOLOGY, Mover, address, guest
from benchmarks.measure import Figure, Rounds, Size
from benchmarks.rig import bench
from support.guest import VirtualMachine
from support.local_cluster import eventually

WHERE = ("local", "remote")
FLOOR = 2


async def run(size: Size) -> list[Figure]:
    async with bench(bare=2, topology=TOPOLOGY) as rig:
        bare = rig.path / "bare.sock"
        await rig.run("benchmarks.bare_nvme", str(bare))

        async def is_there() -> bool:
            return bare.is_socket()

        await eventually(is_there)
        async with guest(rig, {"vf1": "h1/nvme0", "vf2": "h2/nvme0"}, [bare]) as (machine, beats):
            figures = await accesses(machine, size)
            mover, floor = Mover(rig.cluster, "vf2", "nvme0"), Floor(rig)
            moves: Rounds[float] = Rounds([], [])
            rests: Rounds[float] = Rounds(moves.ours, [])
            for _ in range(size.of(15, 1)):
                moves.floor.append(await floor.once())
                at_rest, at_move = await beats.gaps_ms(machine, mover.move, "reads", address(2))
                rests.floor.append(at_rest)
                moves.ours.append(at_move)
    return [
        *figures,
        moves.quantile("blackout p50 in a guest / floor", "ms", None, 0.5),
        rests.quantile("blackout p50 in a guest / its longest gap before", "ms", None, 0.5),
    ]


async def accesses(machine: VirtualMachine, size: Size) -> list[Figure]:
    """Let the guest measure its three controllers."""
    rounds, seconds = size.of((20, 0.25), (1, 0.05))
    addresses = (address(number) for number in (1, 2, 3))
    await machine.start("accesses", "python3", "-S", "/accesses.py", str(rounds), str(seconds), *addresses)
    while (await machine.report("accesses"))[1]:
        pass
    told = [json.loads(line) for line in (await machine.run("cat /tmp/accesses.out")).splitlines()]
    assert len(told) == rounds, told
    figures = []
    for kind in ("register", "depth 1", "depth 8"):
        for number, where in enumerate(WHERE):
            measured: Rounds[float] = Rounds(
                [line[kind][number] for line in told], [line[kind][FLOOR] for line in told]
            )
            if kind == "register":
                name = f"register read in a guest, {where} / bare server"
                figures.append(measured.slowness(name, "µs", None))
            else:
                name = f"4 KiB random reads a second in a guest, {kind}, {where} / bare server"
                figures.append(measured.speed(name, "µs a read", None))
    return figures
