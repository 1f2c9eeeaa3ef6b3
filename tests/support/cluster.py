"""Three fake hosts and coordinators over a real etcd, for the coordinator's integration tests."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from random import Random

from support.fake_host import FakeHost, device

from coordinator.config import Config
from coordinator.daemon import Daemon
from vfleet.clock import SystemClock
from vfleet.errors import VfleetError
from vfleet.etcd import keys
from vfleet.etcd.store import Store
from vfleet.rpc import Channels, call, stream
from vfleet.v1 import fleet_service_pb2 as fleet_pb
from vfleet.v1 import migration_service_pb2 as migration_pb
from vfleet.v1.fleet_service_pb2_grpc import FleetServiceStub
from vfleet.v1.migration_service_pb2_grpc import MigrationServiceStub
from vfleet.v1.records_pb2 import Function, Migration, Phase

OVER = (Phase.PHASE_DONE, Phase.PHASE_ABORTED)


@dataclass
class FakeCluster:
    """Hosts h1, h2 and h3, each with devices nic0 (4 VFs) and nic1 (16 VFs), and any number of coordinators.

    Only a test that waits for a lease to end needs a short one: on a busy machine it may end by itself.
    """

    store: Store
    lease_ttl_s: int = 10
    hosts: dict[str, FakeHost] = field(default_factory=dict)
    addresses: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    daemons: dict[str, Daemon] = field(default_factory=dict)
    channels: Channels = field(default_factory=Channels)

    async def start(self) -> None:
        for segment, name in enumerate(("h1", "h2", "h3"), start=1):
            devices = (device(f"{name}/nic0", bus=segment), device(f"{name}/nic1", bus=segment + 16, total_vfs=16))
            self.hosts[name] = FakeHost(name, self.store, segment, devices)
            await self.hosts[name].start()
        await self.start_coordinator("c1")

    async def start_coordinator(self, name: str, store: Store | None = None) -> None:
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        config = Config(name=name, listen="127.0.0.1:0", etcd=(), lease_ttl_s=self.lease_ttl_s)
        daemon = Daemon(config, store or self.store, self.channels, SystemClock(), Random())
        task = asyncio.create_task(daemon.run(ready.set_result))
        await asyncio.wait((ready, task), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        self.daemons[name], self.tasks[name], self.addresses[name] = daemon, task, ready.result()

    async def stop_coordinator(self, name: str) -> None:
        self.tasks[name].cancel()
        await asyncio.wait((self.tasks.pop(name),))

    async def stop(self) -> None:
        for name in list(self.tasks):
            await self.stop_coordinator(name)
        await self.channels.close()
        for host in self.hosts.values():
            await host.stop()

    def fleet(self, coordinator: str = "c1") -> FleetServiceStub:
        return FleetServiceStub(self.channels.to(self.addresses[coordinator]))

    def migrations(self, coordinator: str = "c1") -> MigrationServiceStub:
        return MigrationServiceStub(self.channels.to(self.addresses[coordinator]))

    async def ask(self, method, request, timeout_s: float = 20.0):
        return await call(method, request, address="coordinator", timeout_s=timeout_s)

    async def create(self, function: str, device_name: str, vf_index: int = 0) -> Function:
        request = fleet_pb.FleetServiceCreateFunctionRequest(function=function, device=device_name, vf_index=vf_index)
        return (await self.ask(self.fleet().CreateFunction, request)).function

    async def delete(self, function: str) -> None:
        await self.ask(self.fleet().DeleteFunction, fleet_pb.DeleteFunctionRequest(function=function))

    async def attach(self, function: str, driver: str, host: str = "", **more: int):
        request = fleet_pb.AttachDriverRequest(function=function, driver=driver, host=host, **more)
        return (await self.ask(self.fleet().AttachDriver, request)).entry

    async def migrate(self, name: str, moves: dict[str, str], coordinator: str = "c1", **options: int) -> Migration:
        request = migration_pb.CreateMigrationRequest(
            request_id=name,
            moves=[migration_pb.MoveRequest(function=f, target_device=d) for f, d in moves.items()],
            options=migration_pb.MigrationOptions(**options),
        )
        return (await self.ask(self.migrations(coordinator).CreateMigration, request)).migration

    async def ended(self, name: str, coordinator: str = "c1") -> Migration:
        """Wait until the migration is over."""
        request = migration_pb.WatchMigrationRequest(name=name)
        watch = stream(self.migrations(coordinator).WatchMigration, request, address="coordinator", timeout_s=30)
        last = [response.migration async for response in watch][-1]
        assert last.phase in OVER
        return last

    async def move(self, name: str, moves: dict[str, str], **options: int) -> Migration:
        await self.migrate(name, moves, **options)
        return await self.ended(name)

    async def function(self, name: str, coordinator: str = "c1") -> Function:
        response = await self.ask(self.fleet(coordinator).ListFunctions, fleet_pb.FleetServiceListFunctionsRequest())
        return next(function for function in response.functions if function.name == name)

    async def keys(self, prefix: str) -> list[str]:
        return [item.key.removeprefix(prefix) for item in (await self.store.list(prefix)).items]

    async def assert_nothing_left(self, homes: dict[str, str]) -> None:
        """Check that each function has its home's slot and instance, and that nothing of a migration is left."""
        assert await self.keys(keys.LOCKS) == []
        assert await self.keys(keys.OWNERS) == []
        functions = {name: await self.function(name) for name in homes}
        assert {name: function.device for name, function in functions.items()} == homes
        slots = sorted(f"{function.device}/{function.vf_index}" for function in functions.values())
        assert await self.keys(keys.SLOTS) == slots
        instances = sorted((host.name, *instance) for host in self.hosts.values() for instance in host.instances)
        assert instances == sorted(
            (function.device.partition("/")[0], name, function.generation) for name, function in functions.items()
        )
        assert not any(host.holds for host in self.hosts.values())


async def eventually(condition: Callable[[], Awaitable[bool] | bool], timeout_s: float = 15.0) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(timeout_s):
        while True:
            result = condition()
            if result if isinstance(result, bool) else await result:
                return
            await asyncio.sleep(0.01)


async def refused(work: Awaitable[object]) -> VfleetError:
    """Return the error that `work` is refused with."""
    try:
        await work
    except VfleetError as error:
        return error
    raise AssertionError("nothing was refused")
