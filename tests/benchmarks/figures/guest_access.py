"""What a guest waits for: a register's read, a 4 KiB read, and a move, each over a bare program that does the same.

Ours: a VMM in this process, as a guest's driver on h1 (holder, hostd, and h2's hostd if the function is at home there),
and an NVMe function. A read is of a register of the controller; a 4 KiB read is one command at a time: queue entry,
doorbell, DMA, completion, interrupt. The blackout is the longest such command while the function moves between hosts.

Floor of reads: the same VMM and a bare vfio-user server, one process in plain Python (`benchmarks.bare_guest`) that has
the medium in memory and checks nothing. Floor of the blackout: that of `blackout`, two unary calls and a transaction.
No virtual machine runs: its emulation would be most of either time, and make the ratios look better than they are.
"""

import asyncio
import struct
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Self

from benchmarks.bare_guest import COMMAND, ENTRIES, READ, READ_COMPLETIONS, READ_SUBMISSIONS
from benchmarks.figures.blackout import Floor
from benchmarks.measure import Figure, Rounds, Size, alternate_async, seconds_of
from benchmarks.rig import bench
from support.guest import attach_guest
from support.local_cluster import Cluster
from support.nvme_guest import BUFFER, COMPLETIONS, CSTS, SUBMISSIONS, NvmeGuest

from vfleet.v1.records_pb2 import Phase

TOPOLOGY = Path(__file__).parents[2] / "guests" / "fleet.yaml"
PAGE = 4096
BLOCKS = (16 << 20) // 512
CREATE_SUBMISSIONS, CREATE_COMPLETIONS = 1, 5
CONTIGUOUS, INTERRUPTS = 1, 2


class Reader:
    """A guest that reads 4 KiB at random places, one command at a time."""

    def __init__(self, guest: NvmeGuest) -> None:
        self.guest = guest
        self._random = Random(1)
        self._done = 0

    @classmethod
    def of_controller(cls, socket: Path) -> Self:
        """Begin with a controller that has to be asked for its queues."""
        guest = NvmeGuest(socket)
        guest.begin()
        for number, (opcode, address, last) in enumerate(
            (
                (CREATE_COMPLETIONS, READ_COMPLETIONS, INTERRUPTS | CONTIGUOUS),
                (CREATE_SUBMISSIONS, READ_SUBMISSIONS, 1 << 16 | CONTIGUOUS),
            )
        ):
            queue = last << 32 | (ENTRIES - 1) << 16 | 1
            command = COMMAND.pack(opcode, 0, number, 0, address, 0, queue, 0, 0).ljust(64, b"\0")
            guest.memory.content[SUBMISSIONS + 64 * number : SUBMISSIONS + 64 * (number + 1)] = command
            guest.vmm.write(0, 0x1000, (number + 1).to_bytes(4, "little"), posted=True)
            status = 0
            while not status & 1:
                guest.interrupted()
                at = COMPLETIONS + 16 * number
                status = struct.unpack_from("<H", guest.memory.content, at + 14)[0]
            assert status == 1, f"status {status:#x}"
        return cls(guest)

    @classmethod
    def of_bare(cls, socket: Path) -> Self:
        """Begin with the bare server, whose queues are there."""
        guest = NvmeGuest(socket)
        guest.vmm.begin()
        guest.vmm.map(guest.memory, 0)
        guest.vmm.set_eventfds(0, (guest.eventfd,))
        return cls(guest)

    def register(self) -> None:
        """Read a register."""
        assert len(self.guest.vmm.read(0, CSTS, 4)) == 4

    def block(self) -> None:
        """Read 4 KiB, and wait for the interrupt."""
        guest, slot = self.guest, self._done % ENTRIES
        phase = 1 - self._done // ENTRIES % 2
        place = self._random.randrange(BLOCKS // 8) * 8
        command = COMMAND.pack(READ, 0, slot, 1, BUFFER, 0, place, 7, 0).ljust(64, b"\0")
        guest.memory.content[READ_SUBMISSIONS + 64 * slot : READ_SUBMISSIONS + 64 * (slot + 1)] = command
        guest.vmm.write(0, 0x1008, ((slot + 1) % ENTRIES).to_bytes(4, "little"), posted=True)
        status = 1 - phase
        while status & 1 != phase:
            guest.interrupted()
            status = struct.unpack_from("<H", guest.memory.content, READ_COMPLETIONS + 16 * slot + 14)[0]
        assert status >> 1 == 0, f"status {status:#x}"
        self._done += 1
        guest.vmm.write(0, 0x100C, ((slot + 1) % ENTRIES).to_bytes(4, "little"), posted=True)


async def run(size: Size) -> list[Figure]:
    async with bench(bare=2, topology=TOPOLOGY) as rig:
        readers: dict[str, Reader] = {}
        for number, home in enumerate(("h1", "h2"), 1):
            await rig.cluster.fleet.create_function(f"vf{number}", f"{home}/nvme0")
            socket = await attach_guest(rig.cluster, f"vf{number}", f"g{number}", "h1", rig.path)
            readers[("local", "remote")[number - 1]] = await asyncio.to_thread(Reader.of_controller, socket)
        await rig.run("benchmarks.bare_guest", str(rig.path / "bare.sock"))
        bare = await asyncio.to_thread(Reader.of_bare, rig.path / "bare.sock")
        try:
            figures: list[Figure] = []
            for where, reader in readers.items():
                registers = await in_turns(reader.register, bare.register, size)
                figures.append(registers.slowness(f"register read, {where} / bare server", "µs", None))
            for where, reader in readers.items():
                blocks = await in_turns(reader.block, bare.block, size)
                figures.append(blocks.speed(f"4 KiB random reads, {where} / bare server", "µs a read", None))
            moves = Moves(rig.cluster, readers["remote"])
            measured = await alternate_async(size.of(20, 2), moves.longest_read_ms, Floor(rig).once)
            figures.append(measured.quantile("guest's blackout p50 / floor", "ms", None, 0.5))
        finally:
            for reader in (*readers.values(), bare):
                reader.guest.close()
    return figures


async def in_turns(ours: Callable[[], None], floor: Callable[[], None], size: Size) -> Rounds[float]:
    """Measure both in turns, in microseconds."""
    times = size.of(50, 5)

    async def timed(work: Callable[[], None]) -> float:
        return await asyncio.to_thread(seconds_of, work, times) / times * 1e6

    return await alternate_async(size.of(20, 2), lambda: timed(ours), lambda: timed(floor))


class Moves:
    """The function of a reader, which goes to and fro between h2 and h3."""

    def __init__(self, cluster: Cluster, reader: Reader) -> None:
        self._cluster = cluster
        self._reader = reader
        self._moves = 0

    async def longest_read_ms(self) -> float:
        """Move it, and return the longest command meanwhile."""
        self._moves += 1
        is_over: list[bool] = []

        def read() -> float:
            longest = 0.0
            while not is_over:
                began = time.perf_counter()
                self._reader.block()
                longest = max(longest, time.perf_counter() - began)
            return longest * 1e3

        reading = asyncio.create_task(asyncio.to_thread(read))
        try:
            home = f"{('h2', 'h3')[self._moves % 2]}/nvme0"
            migration = await self._cluster.move(f"m{self._moves}", {"vf2": home})
            assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
        finally:
            is_over.append(True)
        return await reading
