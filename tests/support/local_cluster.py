"""A real cluster for a test: processes, clients of all of them, and the check of invariant 8."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar

from vfleet.address import Location, table_offset, vf_routing_id
from vfleet.client import PHASES_OVER, FleetClient, move_request
from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.records import decode
from vfleet.etcd.store import KeyValue
from vfleet.host_client import HostClient
from vfleet.local import LocalCluster
from vfleet.v1.driver_service_pb2 import WorkloadOptions, WorkloadReport
from vfleet.v1.function_service_pb2 import FunctionInstance
from vfleet.v1.migration_service_pb2 import MigrationOptions
from vfleet.v1.records_pb2 import Driver, Function, FunctionStatus, Host, Migration, Slot, Step
from vfleet.v1.types_pb2 import DeviceState, TableEntry

DEMO = Path(__file__).parents[2] / "vfleet" / "topologies" / "demo.yaml"
PATIENCE_S = 60.0
ASK_AGAIN = frozenset(
    {
        Reason.UNREACHABLE,
        Reason.STORE_UNAVAILABLE,
        Reason.OUTCOME_UNKNOWN,
        Reason.CONFLICT,
        Reason.HOST_UNAVAILABLE,
        Reason.IN_MIGRATION,  # also by a coordinator that has not heard yet that the migration is over
    }
)
FIGURES = ("lost", "repeated", "reordered", "misrouted", "mismatches", "errors")

T = TypeVar("T")


@dataclass
class Cluster:
    """A `LocalCluster` and what a test needs beside it. `workloads` are those that were started, with their hosts."""

    local: LocalCluster
    fleet: FleetClient
    hosts: dict[str, HostClient]
    store: EtcdStore
    workloads: dict[tuple[str, str], str] = field(default_factory=dict)

    async def work(
        self, driver: str, function: str, host: str, *, accesses_per_second: int = 200, **options: int
    ) -> TableEntry:
        """Attach a driver and start its workload, which then has done something.

        One that is as fast as it can be (0 accesses per second) takes a core from all other tests as long as it runs.
        """
        entry = await self.fleet.attach_driver(function, driver, host=host)
        await self.start(driver, function, host, accesses_per_second=accesses_per_second, **options)
        await self.until_working([(driver, function)])
        return entry

    async def start(self, driver: str, function: str, host: str, **options: int) -> None:
        """Start the workload of a driver that is attached."""
        await self.hosts[host].start_workload(driver, function, WorkloadOptions(**options))
        self.workloads[driver, function] = host

    async def report(self, driver: str, function: str) -> WorkloadReport:
        return await self.hosts[self.workloads[driver, function]].workload_report(driver, function)

    async def until_working(self, workloads: Sequence[tuple[str, str]] = (), operations: int = 20) -> None:
        """Wait until each workload (by default all) has done as many operations more, and runs still."""
        before = [await self.report(*workload) for workload in workloads or list(self.workloads)]
        for first in before:

            async def grown(first: WorkloadReport = first) -> bool:
                report = await self.report(first.driver, first.function)
                assert report.running, report.failure
                return report.operations >= first.operations + operations

            await eventually(grown)

    async def stop_workloads(self) -> dict[tuple[str, str], WorkloadReport]:
        """Stop all workloads and check that none has seen anything wrong."""
        reports = {}
        for (driver, function), host in self.workloads.items():
            while (report := await self.hosts[host].stop_workload(driver, function)).running:
                pass  # it waited for a while: during a hold there are no answers
            reports[driver, function] = report
            assert {figure: getattr(report, figure) for figure in FIGURES} == dict.fromkeys(FIGURES, 0), report
            assert not report.failure
        self.workloads.clear()
        return reports

    async def plan(self, moves: Mapping[str, str]) -> Migration:
        return await self.fleet.plan_migration([move_request(function, device) for function, device in moves.items()])

    async def begin(self, name: str, moves: Mapping[str, str], **options: int) -> Migration:
        requests = [move_request(function, device) for function, device in moves.items()]
        return await self.fleet.create_migration(requests, name=name, options=MigrationOptions(**options))

    async def move(self, name: str, moves: Mapping[str, str], **options: int) -> Migration:
        await self.begin(name, moves, **options)
        return await self.over(name)

    async def over(self, name: str) -> Migration:
        """Wait until a migration is over, however often whoever tells of it has to be found again."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    migration = await self.fleet.wait_migration(name)
                except VfleetError as error:
                    if error.reason not in (Reason.UNREACHABLE, Reason.STORE_UNAVAILABLE):
                        raise
                else:
                    assert migration.phase in PHASES_OVER
                    return migration
                await asyncio.sleep(0.05)

    async def until_step(self, name: str, step: Step.ValueType) -> None:
        """Wait until a migration has reached a step, or is past it."""
        async for update in self.fleet.watch_migration(name):
            if update.step >= step or update.migration.phase in PHASES_OVER:
                return

    async def until_registered(self, host: str) -> None:
        async def registered() -> bool:
            return (await self.fleet.get_host(host)).registered

        await eventually(registered)

    async def homes(self) -> dict[str, str]:
        return {function.name: function.device for function in await self.fleet.list_functions()}


@asynccontextmanager
async def running(
    tmp_path: Path,
    *,
    topology: Path = DEMO,
    coordinators: int = 1,
    lease_ttl_s: int = 5,
    failpoints: Path | None = None,
    certs: Path | None = None,
) -> AsyncIterator[Cluster]:
    """Bring a cluster up for a test, and end it.

    In the end the daemons are killed: to end in order takes a fifth of what they take in all, and has tests of its own.
    """
    async with AsyncExitStack() as stack:
        local = LocalCluster(
            topology,
            tmp_path / "cluster",
            coordinators=coordinators,
            lease_ttl_s=lease_ttl_s,
            failpoints=failpoints,
            certs=certs,
        )
        await stack.enter_async_context(local)
        stack.push_async_callback(_kill, local)
        yield await stack.enter_async_context(connected(local))


@asynccontextmanager
async def connected(local: LocalCluster) -> AsyncIterator[Cluster]:
    """Connect to a cluster that is up: to its coordinators, to each host, and to etcd."""
    async with AsyncExitStack() as stack:
        keys = local.keys()
        fleet = FleetClient(local.coordinator_addresses, tls=keys.tls, patience_s=PATIENCE_S)
        hosts = {
            name: HostClient(daemon.address, name=name, tls=keys.tls, patience_s=PATIENCE_S)
            for name, daemon in local.hosts.items()
        }
        for client in (fleet, *hosts.values()):
            await stack.enter_async_context(client)
        store = await stack.enter_async_context(
            await EtcdStore.connect(local.etcd, SystemClock(), Random(), tls=keys.etcd)
        )
        yield Cluster(local, fleet, hosts, store)


async def _kill(local: LocalCluster) -> None:
    await asyncio.gather(*(daemon.kill() for daemon in local.daemons))


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not await condition():
            await asyncio.sleep(0.02)


async def when_possible(work: Callable[[], Awaitable[T]]) -> T:
    """Return what `work` returns, and do it again as long as nobody can be asked or something else is in the way."""
    while True:
        try:
            return await work()
        except VfleetError as error:
            if error.reason not in ASK_AGAIN:
                raise
        await asyncio.sleep(0.05)


async def over_in_etcd(cluster: Cluster, name: str) -> Migration:
    """Wait until a migration is over, as etcd says, whoever else may be asked."""
    async with asyncio.timeout(PATIENCE_S):
        while True:
            stored = await when_possible(lambda: cluster.store.get(keys.migration_key(name)))
            record = decode(Migration, stored) if stored is not None else Migration()
            if stored is not None and record.phase in PHASES_OVER:
                record.attempt.revision = stored.create_revision  # as coordinators show it
                return record
            await asyncio.sleep(0.02)


async def refusal(work: Awaitable[object]) -> VfleetError:
    """Return what `work` is refused with."""
    try:
        await work
    except VfleetError as error:
        return error
    raise AssertionError("nothing was refused")


@dataclass(frozen=True)
class Records:
    """All that etcd has, by what follows the prefix of each kind of key."""

    items: dict[str, KeyValue]

    def of(self, prefix: str) -> dict[str, KeyValue]:
        return {key.removeprefix(prefix): item for key, item in self.items.items() if key.startswith(prefix)}

    def decoded(self, prefix: str, kind: type[T]) -> dict[str, T]:
        return {name: decode(kind, item) for name, item in self.of(prefix).items()}


async def assert_nothing_left(cluster: Cluster) -> None:
    """Check invariant 8: all migrations are over, and etcd and every host have the functions at their homes, no more.

    All hosts are up and registered.
    """
    records = Records({item.key: item for item in (await cluster.store.list(keys.PREFIX)).items})
    assert records.of(keys.LOCKS) == {}
    assert records.of(keys.OWNERS) == {}
    assert {m.phase for m in records.decoded(keys.MIGRATIONS, Migration).values()} <= PHASES_OVER
    functions = records.decoded(keys.FUNCTIONS, Function)
    slots = {f"{f.device}/{f.vf_index}": Slot(function=f.name) for f in functions.values()}
    assert records.decoded(keys.SLOTS, Slot) == slots
    _check_bases(functions.values(), records.decoded(keys.HOSTS, Host))
    assert {name: list(client_holds) for name, client_holds in (await _each(cluster, "list_holds")).items()} == {
        name: [] for name in cluster.hosts
    }
    _check_instances(functions, await _each(cluster, "list_functions"))
    _check_tables(functions, records, await _each(cluster, "list_drivers"))


async def _each(cluster: Cluster, method: str) -> dict[str, list[object]]:
    return {name: await getattr(host, method)() for name, host in cluster.hosts.items()}


def _check_bases(functions: Sequence[Function], hosts: Mapping[str, Host]) -> None:
    """Check that each base is the arithmetic of its place."""
    devices = {device.name: (host.segment, device) for host in hosts.values() for device in host.devices}
    for function in functions:
        segment, device = devices[function.device]
        rid = vf_routing_id(device.routing_id, device.first_vf_offset, device.vf_stride, function.vf_index)
        assert function.base == Location(segment, rid).base


def _check_instances(functions: Mapping[str, Function], instances: Mapping[str, list[FunctionInstance]]) -> None:
    alive = [f for f in functions.values() if f.status != FunctionStatus.FUNCTION_STATUS_LOST]
    assert sorted(
        (host, i.function, i.generation, i.device, i.vf_index, i.base) for host in instances for i in instances[host]
    ) == sorted((f.device.partition("/")[0], f.name, f.generation, f.device, f.vf_index, f.base) for f in alive)
    for instance in (instance for host in instances.values() for instance in host):
        assert instance.complete
        assert not instance.HasField("stopped_by")
        assert instance.attempt == functions[instance.function].attempt
        # One that nobody has accessed since it became the home may wait for that.
        assert instance.state in (DeviceState.DEVICE_STATE_RUNNING, DeviceState.DEVICE_STATE_STOP), instance


def _check_tables(functions: Mapping[str, Function], records: Records, drivers: Mapping[str, list[object]]) -> None:
    recorded = records.decoded(keys.DRIVERS, Driver)
    assert sorted((host, d.driver) for host, own in drivers.items() for d in own) == sorted(
        (driver.host, driver.name) for driver in recorded.values()
    )
    stored = []
    for key, item in records.of(keys.ENTRIES).items():
        entry = decode(TableEntry, item)
        assert key == f"{entry.host}/{entry.driver}/{entry.function}"
        function = functions[entry.function]
        assert (entry.generation, entry.offset) == (
            function.generation,
            table_offset(function.base, entry.virtual_address),
        )
        entry.revision = item.mod_revision
        stored.append(entry)
    assert sorted((e.driver, e.function) for e in stored) == sorted(
        (d, f.name) for f in functions.values() for d in f.drivers
    )
    there = [entry for own in drivers.values() for driver in own for entry in driver.entries if entry.function]

    def by_name(entry: TableEntry) -> tuple[str, str]:
        return entry.driver, entry.function

    assert sorted(there, key=by_name) == sorted(stored, key=by_name)  # and so none is held
