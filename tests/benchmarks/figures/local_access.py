"""A driver's access to plain memory of a function on its own host, over the same access to the same bytes directly.

Ours: `Driver.direct`, with a table of one function: translation, checks, sequence; for a write also the redo record.
The function's memory is a mapped file, as in the daemon. Batches are lists of 64 (virtual address, length or data).

Floor (`Direct`): one method call that takes an offset and slices the same memory. It knows where the memory is, checks
nothing and counts nothing; but it is called like ours, and it gives bytes back like ours, not a view, because a
caller must have what was there at that moment. Goals compare one access of ours, alone or in a batch of 64, with one
such call. The last two lines compare a batch with a floor that takes the same list in one call; they have no goal.
"""

import tempfile
from pathlib import Path

from benchmarks.measure import Figure, Size, alternate, at_least
from support.bench import BARS, VIRTUAL_ADDRESS, Bench
from support.fake_fabric import FakeFabric
from support.manual_clock import ManualClock, settle

from vfleet.address import bar_layout

BATCH = 64
WORD = 8
NANOSECONDS = 1e9 / BATCH


class Direct:
    """The floor: the function's memory and nothing else."""

    __slots__ = ("_memory",)

    def __init__(self, memory: memoryview) -> None:
        self._memory = memory

    def read(self, offset: int, length: int) -> bytes:
        return self._memory[offset : offset + length].tobytes()

    def write(self, offset: int, data: bytes) -> None:
        self._memory[offset : offset + len(data)] = data

    def read_many(self, accesses: list[tuple[int, int]]) -> list[bytes]:
        memory = self._memory
        return [memory[offset : offset + length].tobytes() for offset, length in accesses]

    def write_many(self, accesses: list[tuple[int, bytes]]) -> None:
        memory = self._memory
        for offset, data in accesses:
            memory[offset : offset + len(data)] = data


async def run(size: Size) -> list[Figure]:
    with tempfile.TemporaryDirectory() as path:
        host = Bench(Path(path), "h1", ManualClock(), FakeFabric())
        instance = host.create()
        host.drivers.recorded("d1", 0)
        host.drivers.attach(host.message(instance.about.base))
        await settle()
        try:
            return _measure(size, host.drivers.require("d1").direct, Direct(instance.image.memory))
        finally:
            host.close()


def _measure(size: Size, ours, floor: Direct) -> list[Figure]:
    offsets = [bar_layout(BARS)[2] + WORD * number for number in range(BATCH)]
    addresses = [VIRTUAL_ADDRESS + offset for offset in offsets]
    data = bytes(range(WORD))
    reads, writes = [(a, WORD) for a in addresses], [(a, data) for a in addresses]
    floor_reads, floor_writes = [(o, WORD) for o in offsets], [(o, data) for o in offsets]
    assert len(ours.access_many(writes)) == BATCH
    assert [result[1] for result in ours.access_many(reads)] == floor.read_many(floor_reads) == [data] * BATCH

    def each(method, accesses):
        def work() -> None:
            for address, what in accesses:
                method(address, what)

        return work

    one_by_one = {
        "read": (each(ours.read, reads), each(floor.read, floor_reads)),
        "write": (each(ours.write, writes), each(floor.write, floor_writes)),
    }
    batches = {
        "read": (lambda: ours.access_many(reads), lambda: floor.read_many(floor_reads)),
        "write": (lambda: ours.access_many(writes), lambda: floor.write_many(floor_writes)),
    }
    pairs = [
        ("read", one_by_one["read"], at_least(0.5)),
        ("write, with sequence and redo record", one_by_one["write"], at_least(0.25)),
        ("read, batched by 64", (batches["read"][0], one_by_one["read"][1]), at_least(0.8)),
        ("write, batched by 64", (batches["write"][0], one_by_one["write"][1]), at_least(0.6)),
        ("read, batched by 64 / the list in one direct call", batches["read"], None),
        ("write, batched by 64 / the list in one direct call", batches["write"], None),
    ]
    return [
        alternate(size.of(2000, 3), *pair, times=size.of(5, 1), scale=NANOSECONDS).speed(
            f"local access / direct: {name}", "ns an access", goal
        )
        for name, pair, goal in pairs
    ]
