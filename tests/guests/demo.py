"""Two Linux guests on one fleet whose functions go from host to host, and what the guests saw of it: `make demo-guest`.

The first guest has a file system on a storage function, with verified I/O; both have a network function, with a TCP
stream between them. Every figure in the table is checked; if one is wrong this exits with 1.
"""

import asyncio
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from support.guest import (
    PATIENT,
    VirtualMachine,
    attach_guest,
    dmesg_of,
    finish_storage,
    image,
    storage_operations,
    virtual_machine,
)
from support.local_cluster import Cluster, running

from vfleet.cli.output import print_fields, print_table
from vfleet.v1.records_pb2 import Phase

TOPOLOGY = Path(__file__).with_name("fleet.yaml")
ADDRESSES = ("10.0.0.1", "10.0.0.2")
MODULES = ("nvme", "crc32c_generic", "ext4", "virtio_pci", "virtio_net")
MOVES = (
    *(("disk1", "h2/nvme0"), ("nic1", "h3/net0"), ("nic2", "h1/net0"), ("disk1", "h3/nvme0"), ("nic1", "h2/net0")),
    *(("disk1", "h1/nvme0"), ("nic2", "h3/net0"), ("nic1", "h1/net0"), ("disk1", "h2/nvme0"), ("nic2", "h2/net0")),
)
BLOCKS_A_SECOND = 30
REST_S = 5.0
OPERATIONS_A_MOVE = 100

_began = time.monotonic()


def say(line: str) -> None:
    sys.stdout.write(f"{time.monotonic() - _began:6.1f} s  {line}\n")
    sys.stdout.flush()


async def longest_ms(machine: VirtualMachine) -> tuple[float, float]:
    """Return the longest I/O, and the longest gap of the ping, since this was asked last."""
    storage, _ = await machine.report("storage")
    network, _ = await machine.report("network")
    await machine.run("touch /tmp/measure")
    return float(str(storage["longest_ms"])), float(str(network["longest_gap_ms"]))


async def start(stack: AsyncExitStack, cluster: Cluster, folder: Path) -> tuple[VirtualMachine, VirtualMachine]:
    """Make functions, attach the guests, and boot them with traffic and a file system."""
    for function, device in (("disk1", "h1/nvme0"), ("nic1", "h1/net0"), ("nic2", "h2/net0")):
        await cluster.fleet.create_function(function, device)
    sockets = {
        function: await attach_guest(cluster, function, f"guest-{function}", host, folder, **PATIENT)
        for function, host in (("disk1", "h1"), ("nic1", "h1"), ("nic2", "h2"))
    }
    say("disk1 and nic1 are offered to a guest on h1, nic2 to one on h2")
    first, second = await asyncio.gather(
        *(
            stack.enter_async_context(virtual_machine(folder / name, own, modules=MODULES))
            for name, own in (("guest1", [sockets["disk1"], sockets["nic1"]]), ("guest2", [sockets["nic2"]]))
        )
    )
    say("two guests are up, with Debian's kernel and its nvme and virtio_net drivers")
    for machine, address in zip((first, second), ADDRESSES, strict=True):
        await machine.run(f"ip addr add {address}/24 dev eth0 && ip link set eth0 up")
    await second.start("network", "python3", "/network.py", "serve")
    await first.start("storage", "python3", "/storage.py", "/dev/nvme0n1", "4")
    await second.run("until netstat -ltn | grep -q :7000; do sleep 0.1; done")
    await first.start("network", "python3", "/network.py", "send", ADDRESSES[1], str(BLOCKS_A_SECOND))
    while not (await first.report("storage"))[0] or not (await first.report("network"))[0]:
        pass
    say("the first has ext4 on disk1 and verifies every block; a TCP stream goes from it to the second")
    return first, second


async def demo(folder: Path) -> bool:
    """Run it. Return whether every figure is right."""
    async with running(folder, topology=TOPOLOGY) as cluster, AsyncExitStack() as stack:
        say("etcd, a coordinator and 3 hosts are up, each its own process")
        first, second = await start(stack, cluster, folder)
        before = await first.run("lspci -vvnn")
        await longest_ms(first)
        await asyncio.sleep(REST_S)
        at_rest = await longest_ms(first)
        done = await storage_operations(first)
        for number, (function, device) in enumerate(MOVES):
            migration = await cluster.move(f"m{number}", {function: device})
            if migration.phase != Phase.PHASE_DONE:
                say(f"{function} was not moved: {migration.abort_reason}")
                return False
            say(f"{function} lives on {device}")
            wanted = await storage_operations(first) + OPERATIONS_A_MOVE
            while await storage_operations(first) < wanted:
                pass
        moving = await longest_ms(first)
        done = await storage_operations(first) - done
        storage = await finish_storage(first)
        streams = []
        for machine in (first, second):
            while (answer := await machine.report("network"))[1]:
                pass
            streams.append(answer[0])
        told = [
            *await dmesg_of(first, "nvme|ext4|jbd2|blk|virtio|eth0|pci"),
            *await dmesg_of(second, "virtio|eth0|pci"),
        ]
        after = await first.run("lspci -vvnn")
        sys.stdout.write("\n")
        print_fields(
            [
                ("moves", len(MOVES)),
                ("I/O operations, each verified", f"{storage['operations']:,}"),
                ("of these during the moves", f"{done:,}"),
                ("mismatches", int(str(storage["mismatches"])) + int(str(streams[1]["mismatches"]))),
                ("errors", storage["errors"]),
                ("TCP blocks sent, received", f"{streams[0]['blocks']:,}, {streams[1]['blocks']:,}"),
                ("resets, time-outs, errors in dmesg", len(told)),
                ("lspci -vvnn before and after", "equal" if before == after else "different"),
            ]
        )
        sys.stdout.write("\n")
        print_table(
            ("LONGEST, IN THE GUEST", "WITHOUT MOVES", "WITH MOVES"),
            [
                ("read or write of a block", f"{at_rest[0]:.0f} ms", f"{moving[0]:.0f} ms"),
                ("gap of a 100 Hz ping", f"{at_rest[1]:.0f} ms", f"{moving[1]:.0f} ms"),
            ],
        )
        is_right = (
            (storage["mismatches"], storage["errors"], storage["is_over"], streams[1]["mismatches"]) == (0, 0, True, 0)
            and streams[0]["blocks"] == streams[1]["blocks"]
            and not told
            and before == after
        )
        for line in told:
            sys.stdout.write(f"the kernel said: {line}\n")
        return is_right


def main() -> None:
    """Run the demo in a folder that goes afterwards."""
    say(f"guests are run with {image()}")
    with tempfile.TemporaryDirectory(prefix="vfleet-") as folder:
        if not asyncio.run(demo(Path(folder))):
            sys.exit("wrong: see above")


if __name__ == "__main__":
    main()
