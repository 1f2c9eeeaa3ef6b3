"""A Linux guest resets its device, in every way that it can, before, after and in the middle of a move."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
from support.failpoints import Failpoints
from support.guest import PATIENT, VirtualMachine, attach_guest, dmesg_of, virtual_machine
from support.local_cluster import Cluster, assert_nothing_left, over_in_etcd, running

from vfleet.v1.records_pb2 import Phase

pytestmark = pytest.mark.timeout(1800)

TOPOLOGY = Path(__file__).with_name("fleet.yaml")
HOMES = ("h2/nvme0", "h3/nvme0", "h1/nvme0")
PCI = "/sys/bus/pci/devices/0000:01:00.0"
DRIVER = "/sys/bus/pci/drivers/nvme"
HOLD_MS = 700
DELAYED = "coordinator.commit.before"

WAIT = "i=0; while [ ! -b /dev/nvme0n1 ] && [ $i -lt 400 ]; do sleep 0.05; i=$((i+1)); done"
MOUNT = f"{WAIT}; mount -t ext4 /dev/nvme0n1 /mnt"
# What was written before every reset is there; something more is written, and there for the next.
VERIFY = (
    f"{MOUNT} && cd /mnt && sha256sum -c -s sums && dd if=/dev/urandom of=f$(ls | wc -l) bs=4096 count=8 2>/dev/null"
    " && sha256sum f* >sums && cd / && umount /mnt"
)


async def flr(machine: VirtualMachine) -> None:
    """Reset the function under its driver, while the file system is in use."""
    await machine.run(
        f"{MOUNT}; dd if=/dev/urandom of=/mnt/f-reset bs=4096 count=64 conv=fsync 2>/dev/null & sleep 0.05;"
        f" echo 1 >{PCI}/reset; wait; cd /mnt && sha256sum f* >sums && cd / && umount /mnt"
    )


async def unbind_and_bind(machine: VirtualMachine) -> None:
    await machine.run(f"echo 0000:01:00.0 >{DRIVER}/unbind; echo 0000:01:00.0 >{DRIVER}/bind")


async def unload_and_load(machine: VirtualMachine) -> None:
    await machine.run("rmmod nvme; modprobe nvme")


async def reboot(machine: VirtualMachine) -> None:
    await machine.reboot()


RESETS: Mapping[str, Callable[[VirtualMachine], Awaitable[None]]] = {
    "FLR": flr,
    "unbind": unbind_and_bind,
    "rmmod": unload_and_load,
    "reboot": reboot,
}


async def test_a_guest_resets_its_device_around_moves(tmp_path: Path):
    failpoints = Failpoints(tmp_path / "failpoints")
    async with running(tmp_path, topology=TOPOLOGY, failpoints=failpoints.directory) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nvme0")
        socket = await attach_guest(cluster, "vf1", "g1", "h1", tmp_path, **PATIENT)
        async with virtual_machine(tmp_path / "vm", [socket], reboots=True) as machine:
            await machine.run(
                f"{WAIT}; /usr/sbin/mke2fs -q -F -t ext4 /dev/nvme0n1; {MOUNT} && echo first >/mnt/f0"
                " && cd /mnt && sha256sum f* >sums && cd / && umount /mnt"
            )
            device = await machine.run("lspci -vvnn -s 01:00.0")
            for number, (name, reset) in enumerate(RESETS.items()):
                await reset(machine)
                await machine.run(VERIFY)
                await move_with(cluster, failpoints, f"m{number}", HOMES[number % len(HOMES)], reset(machine))
                await machine.run(VERIFY)
                assert await machine.run("lspci -vvnn -s 01:00.0") == device, name
                assert await dmesg_of(machine, "ext4|jbd2|blk|aer|hotplug|nvme.*(timeout|error|I/O)") == []
        await cluster.fleet.detach_driver("vf1", "g1")
        await assert_nothing_left(cluster)


async def move_with(cluster: Cluster, failpoints: Failpoints, name: str, home: str, reset: Awaitable[None]) -> None:
    """Move the function, and let the guest reset it while it is on hold."""
    failpoints.arm("c1", DELAYED, f"delay {HOLD_MS}")
    await cluster.begin(name, {"vf1": home})
    await failpoints.reached("c1", DELAYED)
    resetting = asyncio.ensure_future(reset)
    migration = await over_in_etcd(cluster, name)
    await resetting
    assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
