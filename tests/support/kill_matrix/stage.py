"""A cluster on which cells of the kill matrix run, one after the other.

A function goes there and back between two hosts, under the verifying workload of a third host. A driver of one of the
two knows what the rest of the function's memory has.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from support.failpoints import Failpoints, go_on
from support.kill_matrix.cells import LEASE_TTL_S, RESOLUTION_MARGIN_S, Cell, Course, Fault, Participant
from support.local_cluster import (
    FIGURES,
    Cluster,
    assert_nothing_left,
    eventually,
    over_in_etcd,
    running,
    when_possible,
)

from vfleet.address import PAGE_BYTES
from vfleet.client import PHASES_OVER, FleetClient, move_request
from vfleet.driver import DriverClient
from vfleet.errors import VfleetError
from vfleet.etcd import keys
from vfleet.etcd.client import can_lose_data
from vfleet.etcd.records import decode
from vfleet.etcd.server import find_binary
from vfleet.local import Daemon
from vfleet.v1.migration_service_pb2 import MigrationOptions
from vfleet.v1.records_pb2 import Migration, Phase
from vfleet.v1.types_pb2 import TransferMode

HOLD_TIMEOUT_MS = 1_000
PREPARE_TIMEOUT_MS = 10_000
FREEZE_S = LEASE_TTL_S + 1.5  # etcd notices an expired lease after up to half a second
CELL_TIMEOUT_S = 150.0
LOOK_S = 1.0  # between looks for a migration that is over before it has come to its cell's failpoint
DRIVER_HOST = "h3"
LOCAL_MEMORY = 1 << 20  # where it lies in the function's window
WORKLOAD_BYTES = 1 << 19
PATTERN_PAGES = 16


@dataclass
class Outcome:
    """How a cell ended. `hold_late_s` is by how much the latest hold outlived its deadline while no coordinator ran."""

    cell: Cell
    phase: str = ""
    resolution_s: float = 0.0
    hold_late_s: float | None = None
    failure: str = ""


@dataclass(frozen=True)
class Pattern:
    """Random pages in the function's memory, written once and read after each cell."""

    driver: DriverClient
    virtual_address: int
    pages: tuple[bytes, ...]

    async def write(self) -> None:
        for number, page in enumerate(self.pages):
            await self.driver.write(self.virtual_address + number * PAGE_BYTES, page)

    async def check(self) -> None:
        for number, page in enumerate(self.pages):
            assert await self.driver.read(self.virtual_address + number * PAGE_BYTES, PAGE_BYTES) == page


@dataclass
class Stage:
    """A cluster in which `device` of h1 and h2 is the function's home, by turns."""

    cluster: Cluster
    failpoints: Failpoints
    device: str = "nic0"
    new_scene: "type[Scene] | None" = None
    count: int = 0

    async def run(self, cell: Cell) -> Outcome:
        """Run a cell and check everything. Raise AssertionError, or whatever kept the migration from its end."""
        self.count += 1
        async with asyncio.timeout(CELL_TIMEOUT_S):
            function = await when_possible(lambda: self.cluster.fleet.get_function("vf1"))
            source = function.device.partition("/")[0]
            return await (self.new_scene or Scene)(
                self, cell, f"m{self.count}", source, "h2" if source == "h1" else "h1"
            ).play()

    def daemon(self, name: str) -> Daemon:
        return {**self.cluster.local.hosts, **self.cluster.local.coordinators}[name]

    async def registrations(self) -> dict[str, int]:
        """Return the revision that last wrote the registration of each daemon that is registered."""
        listing = await when_possible(lambda: self.cluster.store.list(keys.PREFIX))
        return {
            item.key.removeprefix(prefix): item.mod_revision
            for item in listing.items
            for prefix in (keys.REGISTRATIONS, keys.COORDINATORS)
            if item.key.startswith(prefix)
        }

    async def restart_dead(self) -> None:
        for daemon in self.cluster.local.daemons:
            if not is_running(daemon):
                await daemon.start()

    async def check(self) -> None:
        """Check that all are registered, the driver goes on and has seen nothing wrong, and nothing is left."""
        names = {daemon.name for daemon in self.cluster.local.daemons}

        async def all_registered() -> bool:
            return (await self.registrations()).keys() == names

        await eventually(all_registered)
        await self.until_working()
        await assert_nothing_left(self.cluster)
        await self.check_drivers()

    async def until_working(self) -> None:
        """Wait until the drivers have done something since."""
        raise NotImplementedError

    async def check_drivers(self) -> None:
        """Check that no driver has seen anything wrong."""
        raise NotImplementedError


@dataclass
class WorkloadStage(Stage):
    """One with the built-in workloads, and a pattern in the rest of the function's memory."""

    pattern: Pattern | None = None

    async def until_working(self) -> None:
        await self.cluster.until_working()

    async def check_drivers(self) -> None:
        for workload in self.cluster.workloads:
            report = await self.cluster.report(*workload)
            assert {figure: getattr(report, figure) for figure in FIGURES} == dict.fromkeys(FIGURES, 0), report
            assert not report.failure
        assert self.pattern is not None
        await self.pattern.check()


@dataclass
class Scene:
    """One cell: a migration from `source` to `target` and the fault in it."""

    stage: Stage
    cell: Cell
    name: str
    source: str
    target: str
    victims: list[Daemon] = field(default_factory=list)
    hold_late_s: float | None = None

    async def play(self) -> Outcome:
        cell, cluster = self.cell, self.stage.cluster
        registered = await self.stage.registrations()
        armed = self._arm()
        beginning = asyncio.create_task(self._begin())
        try:
            began_s = await self._reached(armed, beginning)
            await self._let_it_happen()
            await beginning
            record = await over_in_etcd(cluster, self.name)
        finally:
            beginning.cancel()
        await self.stage.restart_dead()
        await self._sessions_settled(registered)
        await self.stage.check()
        phase = Phase.Name(record.phase).removeprefix("PHASE_")
        assert phase in cell.expected, f"{phase}: {record.abort_reason}"
        resolution_s = max(record.finish_time.ToNanoseconds() / 1e9 - began_s, 0.0)
        assert cell.resolution_max_s is None or resolution_s <= cell.resolution_max_s, resolution_s
        assert self.hold_late_s is None or self.hold_late_s <= RESOLUTION_MARGIN_S, self.hold_late_s
        return Outcome(cell, phase, resolution_s, self.hold_late_s)

    def _arm(self) -> list[str]:
        """Arm the failpoints. Return the daemons of which one is to reach the cell's."""
        cell, failpoints = self.cell, self.stage.failpoints
        if cell.course is Course.ABORT:
            failpoints.arm("c1", "coordinator.commit.before", "error")
        elif cell.course in (Course.ADOPT_UNDECIDED, Course.RESOLVE):
            failpoints.arm("c1", "coordinator.commit.before", "kill")
        elif cell.course is Course.ADOPT_COMMITTED:
            failpoints.arm("c1", "coordinator.commit.after", "kill")
        if cell.point.startswith("hostd.resolve_abort"):
            # Whichever host is the first to find that nobody decides.
            daemons = [self.source, self.target, DRIVER_HOST]
        elif cell.point.startswith("hostd."):
            daemons = [self._host()]
        else:
            daemons = ["c2" if cell.point.startswith("coordinator.adopt") else "c1"]
        action = "kill" if cell.is_own and cell.fault is Fault.KILL else "stop"
        for daemon in daemons:
            failpoints.arm(daemon, cell.point, action)
        return daemons

    def _host(self) -> str:
        hosts = {Participant.SOURCE: self.source, Participant.TARGET: self.target, Participant.DRIVER_HOST: DRIVER_HOST}
        return hosts[self.cell.participant]

    async def _begin(self) -> None:
        """Ask for the migration, by the first coordinator if it answers."""
        is_post_copy = self.cell.course is Course.POST_COPY
        options = MigrationOptions(
            hold_timeout_ms=HOLD_TIMEOUT_MS,
            prepare_timeout_ms=PREPARE_TIMEOUT_MS,
            mode=TransferMode.TRANSFER_MODE_POST_COPY if is_post_copy else TransferMode.TRANSFER_MODE_PRE_COPY,
        )
        moves = [move_request("vf1", f"{self.target}/{self.stage.device}")]
        local = self.stage.cluster.local
        async with FleetClient(local.coordinator_addresses, tls=local.keys().tls, patience_s=CELL_TIMEOUT_S) as client:
            await when_possible(lambda: client.create_migration(moves, name=self.name, options=options))

    async def _reached(self, armed: list[str], beginning: asyncio.Task[None]) -> float:
        """Wait until the failpoint is reached. Return when, in seconds since 1970."""
        point, failpoints = self.cell.point, self.stage.failpoints
        markers = {daemon: failpoints.marker(daemon, point) for daemon in armed}
        look_s = time.monotonic() + LOOK_S
        while not any(marker.exists() for marker in markers.values()):
            if beginning.done():
                beginning.result()
                if time.monotonic() > look_s:
                    await self._assert_not_over(markers.values())
                    look_s = time.monotonic() + LOOK_S
            await asyncio.sleep(0.01)
        for daemon in armed:
            failpoints.disarm(daemon, point)
        reached = [daemon for daemon, marker in markers.items() if marker.exists()]
        if self.cell.is_own:
            self.victims = [self.stage.daemon(daemon) for daemon in reached]
        elif self.cell.participant is not Participant.ETCD:
            self.victims = [self.stage.daemon(self._host())]
        return min(markers[daemon].stat().st_ctime for daemon in reached)

    async def _assert_not_over(self, markers: Iterable[Path]) -> None:
        """Check that the migration is not over before it has come to the failpoint: it never would, then."""
        stored = await when_possible(lambda: self.stage.cluster.store.get(keys.migration_key(self.name)))
        record = decode(Migration, stored) if stored is not None else Migration()
        is_over = record.phase in PHASES_OVER
        assert not is_over or any(marker.exists() for marker in markers), f"{self.cell.point} was not reached: {record}"

    async def _let_it_happen(self) -> None:
        if self.cell.participant is Participant.ETCD:
            await self._fault_of_etcd()
        elif self.cell.fault is Fault.KILL:
            await self._death()
        else:
            await self._freeze()

    async def _death(self) -> None:
        cell = self.cell
        for victim in self.victims:
            if not cell.is_own:
                await victim.kill()
                await go_on(self.stage.daemon("c1"))
            while is_running(victim):
                await asyncio.sleep(0.01)
        if cell.participant is not Participant.COORDINATOR:
            for victim in self.victims:
                await victim.start()
        if not cell.has_second:
            late_s = await self._until_lifted()
            # Not asked of a host that dies itself.
            self.hold_late_s = late_s if cell.participant is Participant.COORDINATOR else None
        if not cell.has_second or cell.course in (Course.ADOPT_COMMITTED, Course.ADOPT_UNDECIDED):
            await self.stage.restart_dead()

    async def _freeze(self) -> None:
        for victim in self.victims:
            if not self.cell.is_own:
                victim.pause()
                await go_on(self.stage.daemon("c1"))
        if self.cell.course in (Course.ADOPT_COMMITTED, Course.ADOPT_UNDECIDED):
            await self.stage.restart_dead()
        await asyncio.sleep(FREEZE_S)
        for victim in self.victims:
            await go_on(victim)
        await self.stage.restart_dead()

    async def _fault_of_etcd(self) -> None:
        etcd = self.stage.cluster.local.etcd_server
        assert etcd is not None
        if self.cell.fault is Fault.STOP:
            os.kill(etcd.pid, signal.SIGSTOP)
            await go_on(self.stage.daemon("c1"))
            await asyncio.sleep(FREEZE_S)
            os.kill(etcd.pid, signal.SIGCONT)
            return
        await (etcd.kill() if self.cell.fault is Fault.KILL else etcd.stop())
        await go_on(self.stage.daemon("c1"))
        await etcd.start()

    async def _until_lifted(self) -> float | None:
        """Wait until there is no hold. Return by how much the latest outlived its first deadline, if there was one."""
        deadlines: dict[tuple[str, str], float] = {}
        late_s = None
        while True:
            holds = {
                (hold.driver, hold.function): hold
                for host in self.stage.cluster.hosts.values()
                for hold in await host.list_holds()
            }
            for identifier in deadlines.keys() - holds.keys():
                late_s = max(late_s or 0.0, time.time() - deadlines.pop(identifier))
            for identifier, hold in holds.items():
                deadlines.setdefault(identifier, hold.resolve_time)
            if not holds:
                return late_s
            await asyncio.sleep(0.02)

    async def _sessions_settled(self, before: dict[str, int]) -> None:
        """Wait until whoever has lost its session by the fault has another, so that the next cell is undisturbed."""
        if self.cell.fault is not Fault.STOP:
            # A session that was not renewed while etcd was away ends in this time.
            await asyncio.sleep(LEASE_TTL_S if self.cell.participant is Participant.ETCD else 0)
            return
        names = [victim.name for victim in self.victims] or list(before)

        async def all_are_new() -> bool:
            now = await self.stage.registrations()
            return all(name in now and now[name] != before.get(name) for name in names)

        await eventually(all_are_new)


async def may_kill_etcd() -> bool:
    """Return whether the etcd at hand keeps its data when it is killed."""
    process = await asyncio.create_subprocess_exec(await find_binary(), "--version", stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return not can_lose_data(output.decode().split()[2])


def is_running(daemon: Daemon) -> bool:
    try:
        return daemon.process.exit_code is None
    except VfleetError:
        return False


@asynccontextmanager
async def staged(directory: Path, *, has_second: bool) -> AsyncIterator[Stage]:
    """Bring a cluster up, with a function and its drivers."""
    failpoints = Failpoints(directory / "failpoints")
    size = 2 if has_second else 1
    async with running(
        directory, coordinators=size, lease_ttl_s=LEASE_TTL_S, failpoints=failpoints.directory
    ) as cluster:
        yield await set_stage(cluster, failpoints)


async def set_stage(cluster: Cluster, failpoints: Failpoints, new_scene: type[Scene] = Scene) -> WorkloadStage:
    """Return the stage that a cluster becomes with a function and its drivers."""
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.work("d1", "vf1", DRIVER_HOST, accesses_per_second=200, memory_bytes=WORKLOAD_BYTES)
    entry = await cluster.fleet.attach_driver("vf1", "d2", host="h1")
    pattern = Pattern(
        DriverClient(cluster.hosts["h1"], "d2"),
        entry.virtual_address + LOCAL_MEMORY + WORKLOAD_BYTES,
        tuple(Random().randbytes(PAGE_BYTES) for _ in range(PATTERN_PAGES)),
    )
    await pattern.write()
    return WorkloadStage(cluster, failpoints, new_scene=new_scene, pattern=pattern)
