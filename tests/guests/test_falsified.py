"""What moves with a function counts: with one field of it falsified at a move, a Linux guest notices.

Every field of the tables is falsified in tests/property/test_nvme_state.py, with a host that knows all that it is to
see. Here it is the kernel's driver that notices, or the guest's own verification.
"""

import mmap
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support.failpoints import Failpoints, go_on
from support.guest import PATIENT, VirtualMachine, attach_guest, virtual_machine
from support.local_cluster import Cluster, over_in_etcd, running

from hostd import engine_part
from hostd.image import _MEMORY_OFFSET
from hostd.models.nvme import Nvme
from hostd.models.nvme_layout import MSIX_TABLE, CompletionQueue, Core, Layout
from vfleet.address import bar_span
from vfleet.v1.records_pb2 import Phase

pytestmark = pytest.mark.timeout(1800)

TOPOLOGY = Path(__file__).with_name("fleet.yaml")
BARS = {0: 16 << 10, 2: 16 << 20}
HOMES = ("h2", "h3")
POINT = "coordinator.lift.before"
QUEUE = 1  # the guest has one of each for I/O
OPERATIONS = 200
PCI = "/sys/bus/pci/devices/0000:01:00.0"
TIMEOUT_S = 25  # of the driver: longer than a target that is killed takes to be back
TRIES = 20
LEASE_TTL_S = 60  # the coordinator stands still for as long
LAYOUT = Layout(bar_span(BARS))
ENGINE = bar_span(BARS) + Nvme.private_bytes

Falsify = Callable[[memoryview], bool]
"""Changes a field, and returns whether it is another now."""


def put(memory: memoryview, store: tuple[int, bytes]) -> bool:
    offset, data = store
    before = bytes(memory[offset : offset + len(data)])
    memory[offset : offset + len(data)] = data
    return before != data


def completion(memory: memoryview, change: Callable[[CompletionQueue], CompletionQueue]) -> bool:
    found = CompletionQueue(*LAYOUT.completion.get(memory, QUEUE))
    return put(memory, LAYOUT.completion.put(QUEUE, *change(found)))


def lose_commands(memory: memoryview) -> bool:
    return put(memory, LAYOUT.core.put(0, *Core(*LAYOUT.core.get(memory))._replace(busy=0)))


def flip_phase(memory: memoryview) -> bool:
    return completion(memory, lambda queue: queue._replace(phase=queue.phase ^ 1))


def forget_completion_tail(memory: memoryview) -> bool:
    return completion(memory, lambda queue: queue._replace(tail=0))


def move_submission_head_back(memory: memoryview) -> bool:
    entries = LAYOUT.submission.get(memory, QUEUE)[1]
    return put(memory, LAYOUT.heads.put(QUEUE, (LAYOUT.heads.get(memory, QUEUE)[0] - 8) % entries))


def mistake_completion_queue(memory: memoryview) -> bool:
    return completion(memory, lambda queue: queue._replace(base=queue.base + 4096))


def interrupt_by_another_vector(memory: memoryview) -> bool:
    return put(memory, (MSIX_TABLE + 16 * QUEUE + 8, struct.pack("<I", 7)))


def mistake_guest_memory(memory: memoryview) -> bool:
    return put(memory, (ENGINE + engine_part._FROM_ZERO, bytes(8)))


FIELDS: Mapping[str, Falsify] = {
    each.__name__: each
    for each in (
        lose_commands,
        flip_phase,
        forget_completion_tail,
        move_submission_head_back,
        mistake_completion_queue,
        interrupt_by_another_vector,
        mistake_guest_memory,
    )
}


def edit(memory: Path, falsify: Falsify) -> bool:
    """Falsify a field of the function whose image is in this folder, of a hostd that does not run."""
    (path,) = memory.glob("vf1-*")
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        view = memoryview(mapped)
        image = view[_MEMORY_OFFSET:]
        try:
            return falsify(image)
        finally:
            image.release()
            view.release()


async def end(machine: VirtualMachine) -> None:
    """Wait until the guest does no more: what it waits for fails after a time."""
    await machine.run("touch /tmp/stop")
    while (await machine.report("storage"))[1]:
        pass


async def begin_anew(machine: VirtualMachine) -> None:
    """Let a driver with short time-outs have the device, and verify blocks of it without a file system."""
    await machine.run(
        f"rmmod nvme; echo 1 >{PCI}/reset;"
        f" echo {TIMEOUT_S} >/sys/module/nvme_core/parameters/io_timeout; modprobe nvme;"
        " while [ ! -b /dev/nvme0n1 ]; do sleep 0.05; done; dmesg -c >/dev/null; rm -f /tmp/stop"
    )
    await machine.start("storage", "python3", "/storage.py", "/dev/nvme0n1", "8", "raw")
    await until_verified(machine, OPERATIONS)


async def until_verified(machine: VirtualMachine, more: int) -> str:
    """Wait until the guest has done so much more. Return what it has noticed before that; nothing if all was well."""
    wanted = None
    while True:
        report, runs = await machine.report("storage")
        done = int(str(report.get("operations", 0)))
        wanted = done + more if wanted is None else wanted
        said = await machine.run("dmesg | grep -E 'nvme|blk' || true")
        if said or report.get("mismatches") or report.get("errors") or not runs:
            return f"{said}{report}"
        if done >= wanted:
            return ""


async def move(cluster: Cluster, failpoints: Failpoints, name: str, target: str, folder: Path, change: Falsify) -> bool:
    """Move the function; its target is killed when it has all of the state, a field is changed, and it comes back."""
    failpoints.arm("c1", POINT, "stop")
    await cluster.begin(name, {"vf1": f"{target}/nvme0"})
    await failpoints.reached("c1", POINT)
    await cluster.local.hosts[target].kill()
    is_changed = edit(folder / "cluster" / target / "memory", change)
    await cluster.local.hosts[target].start()
    await go_on(cluster.local.coordinators["c1"])
    assert (await over_in_etcd(cluster, name)).phase == Phase.PHASE_DONE
    return is_changed


async def test_a_guest_notices_each_field_that_is_falsified(tmp_path: Path):
    failpoints = Failpoints(tmp_path / "failpoints")
    async with running(
        tmp_path, topology=TOPOLOGY, lease_ttl_s=LEASE_TTL_S, failpoints=failpoints.directory
    ) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nvme0")
        socket = await attach_guest(cluster, "vf1", "g1", "h1", tmp_path, **PATIENT)
        async with virtual_machine(tmp_path / "vm", [socket], modules=("nvme",)) as machine:
            await begin_anew(machine)
            number = 0
            for name, falsify in {"nothing": lambda _: True, **FIELDS}.items():
                for _ in range(TRIES):
                    number += 1
                    target = HOMES[number % 2]
                    if await move(cluster, failpoints, f"m{number}", target, tmp_path, falsify):
                        break
                    assert not await until_verified(machine, OPERATIONS), name
                noticed = await until_verified(machine, OPERATIONS)
                assert bool(noticed) == (name != "nothing"), f"{name}: {noticed or 'nobody noticed'}"
                # After the last nothing reaches the guest's memory any more.
                if noticed and name != mistake_guest_memory.__name__:
                    await end(machine)
                    await begin_anew(machine)
