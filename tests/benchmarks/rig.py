"""What benchmarks of several processes run on: a real cluster with a real etcd, and bare hosts for the floors."""

import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import yaml
from benchmarks.bare import OPTIONS
from etcd3 import etcdrpc
from support.local_cluster import DEMO, Cluster, running

from vfleet.process import ChildProcess

READY_S = 30.0
LEASE_TTL_S = 10
TESTS = Path(__file__).parents[1]


@dataclass
class Bench:
    """A cluster, and the addresses of bare processes. All end with the block that made them."""

    cluster: Cluster
    stack: AsyncExitStack
    path: Path
    bare: list[str] = field(default_factory=list)
    channels: dict[str, grpc.aio.Channel] = field(default_factory=dict)

    async def start(self, module: str, *arguments: str) -> None:
        """Start another bare process."""
        process = await self.run(module, *arguments)
        self.bare.append(json.loads(await process.first_line(READY_S))["address"])

    async def run(self, module: str, *arguments: str) -> ChildProcess:
        """Run a program."""
        command = [sys.executable, "-m", module, *arguments]
        # With the same code as the cluster's daemons, wherever that comes from.
        environment = {"PYTHONPATH": os.pathsep.join([*sys.path[1:], str(TESTS)])}
        log = self.path / f"{module}{len(self.bare)}.log"
        process = await ChildProcess.start(module, command, log=log, environment=environment)
        self.stack.push_async_callback(process.kill)
        return process

    def channel(self, number: int) -> grpc.aio.Channel:
        """Return the channel to a bare process."""
        address = self.bare[number]
        if address not in self.channels:
            self.channels[address] = grpc.aio.insecure_channel(address, options=OPTIONS)
        return self.channels[address]

    def etcd(self) -> etcdrpc.KVStub:
        """Return a bare stub of the cluster's etcd."""
        address = self.cluster.local.etcd[0]
        if address not in self.channels:
            self.channels[address] = grpc.aio.insecure_channel(address)
        return etcdrpc.KVStub(self.channels[address])


@asynccontextmanager
async def bench(bare: int = 1, bars: Mapping[int, str] | None = None, topology: Path = DEMO) -> AsyncIterator[Bench]:
    """Start a fleet, the demo's with `bars` for each host's nic0 if given, and so many bare hosts, first in `bare`."""
    async with AsyncExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cluster = await stack.enter_async_context(
            running(path, topology=_topology(path, bars) if bars else topology, lease_ttl_s=LEASE_TTL_S)
        )
        made = Bench(cluster, stack, path)
        for _ in range(bare):
            await made.start("benchmarks.bare")
        yield made
        for channel in made.channels.values():
            await channel.close()


def _topology(path: Path, bars: Mapping[int, str]) -> Path:
    """Write the demo's topology with other BARs for each nic0."""
    content = yaml.safe_load(DEMO.read_text(encoding="utf-8"))

    def change(bridge: dict) -> None:
        for device in bridge.get("devices", ()):
            if device["name"] == "nic0":
                device["bars"] = dict(bars)
        for below in bridge.get("bridges", ()):
            change(below)

    for host in content["hosts"]:
        change(host)
    changed = path / "topology.yaml"
    changed.write_text(yaml.safe_dump(content), encoding="utf-8")
    return changed
