"""Two Linux guests with a TCP stream between them, while either's network function goes around the fleet."""

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.guest import PATIENT, VirtualMachine, attach_guest, dmesg_of, virtual_machine
from support.local_cluster import Cluster, assert_nothing_left, running

from vfleet.v1.records_pb2 import Phase

pytestmark = pytest.mark.timeout(1800)

TOPOLOGY = Path(__file__).with_name("fleet.yaml")
MODULES = ("virtio_pci", "virtio_net")
ADDRESSES = ("10.0.0.1", "10.0.0.2")
HOMES = ("h2/net0", "h3/net0", "h1/net0")
MOVES = 20
BLOCKS_A_MOVE = 10
BLOCKS_A_SECOND = 60
TIMEOUT_S = 300
STATISTICS = "/sys/class/net/eth0/statistics"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path, topology=TOPOLOGY) as cluster:
        yield cluster


async def frames(machine: VirtualMachine) -> tuple[int, int]:
    """Return how many frames the guest's driver has sent, and how many it has received."""
    sent, received = (await machine.run(f"cat {STATISTICS}/tx_packets {STATISTICS}/rx_packets")).split()
    return int(sent), int(received)


async def blocks(machine: VirtualMachine) -> int:
    report, runs = await machine.report("network")
    assert runs, report
    return int(str(report.get("blocks", 0)))


async def until_blocks(machine: VirtualMachine, more: int) -> None:
    wanted = await blocks(machine) + more
    while await blocks(machine) < wanted:
        pass


async def longest_gap_ms(machine: VirtualMachine) -> float:
    """Return the longest gap since the last time that this was asked."""
    report, _ = await machine.report("network")
    await machine.run("touch /tmp/measure")
    return float(str(report["longest_gap_ms"]))


async def test_a_connection_lives_while_either_end_moves(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    async with AsyncExitStack() as stack:
        made = []
        for number, host in enumerate(("h1", "h2"), 1):
            await cluster.fleet.create_function(f"vf{number}", f"{host}/net0")
            socket = await attach_guest(cluster, f"vf{number}", f"g{number}", host, tmp_path, **PATIENT)
            made.append(virtual_machine(tmp_path / f"vm{number}", [socket], modules=MODULES))
        machines = await asyncio.gather(*(stack.enter_async_context(machine) for machine in made))
        for machine, address in zip(machines, ADDRESSES, strict=True):
            # Without IPv6, which would send frames of its own while they begin to be counted.
            await machine.run("echo 1 >/proc/sys/net/ipv6/conf/eth0/disable_ipv6")
            await machine.run(f"ip addr add {address}/24 dev eth0 && ip link set eth0 up")
        macs = [await machine.run("cat /sys/class/net/eth0/address") for machine in machines]
        assert [await frames(machine) for machine in machines] == [(0, 0)] * 2
        server, client = machines
        await server.start("network", "python3", "/network.py", "serve")
        while "ready" not in await server.run("netstat -ltn | grep -q :7000 && echo ready || true"):
            pass
        await client.start("network", "python3", "/network.py", "send", ADDRESSES[0], str(BLOCKS_A_SECOND))
        await until_blocks(server, BLOCKS_A_MOVE)
        await longest_gap_ms(client)
        await until_blocks(server, MOVES * BLOCKS_A_MOVE // 4)
        at_rest_ms = await longest_gap_ms(client)
        for number in range(MOVES):
            function, turn = f"vf{number % 2 + 1}", number // 2 + number % 2
            migration = await cluster.move(f"m{number}", {function: HOMES[turn % len(HOMES)]})
            assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
            await until_blocks(server, BLOCKS_A_MOVE)
        moving_ms = await longest_gap_ms(client)
        await client.run("touch /tmp/stop")
        ends = []
        for machine in machines:
            while (answer := await machine.report("network"))[1]:
                pass
            ends.append(answer[0])
        assert ends[0]["blocks"] == ends[1]["blocks"]
        assert (ends[0]["mismatches"], ends[1]["ended"]) == (0, "all was taken")
        assert [await machine.run("cat /sys/class/net/eth0/address") for machine in machines] == macs
        # What one has sent the other has received: none more, once the last are there, and none less.
        async with asyncio.timeout(TIMEOUT_S):
            sent, received = zip(*[await frames(machine) for machine in machines], strict=True)
            while sent != received[::-1]:
                sent, received = zip(*[await frames(machine) for machine in machines], strict=True)
        for machine in machines:
            assert await dmesg_of(machine, "virtio|eth0|pci|net") == []
        with capsys.disabled():
            sys.stdout.write(
                f"\n{MOVES} moves, {sum(sent):,} frames sent and received, {ends[0]['blocks']:,} blocks;"
                f" longest gap of a 100 Hz ping {at_rest_ms:.0f} ms at rest, {moving_ms:.0f} ms with moves\n"
            )
    for number in (1, 2):
        await cluster.fleet.detach_driver(f"vf{number}", f"g{number}")
    await assert_nothing_left(cluster)
