"""The command `demo`: a real cluster, and functions that move twice under a driver that never stops.

A small one shows what a move changes; one with 64 MiB of state moves by pre-copy, then by post-copy.

Every figure that it prints is checked; if one is wrong it says which and exits 1.
"""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from random import Random
from typing import Annotated

import typer
from google.protobuf.duration_pb2 import Duration

from vfleet.address import PAGE_BYTES, Location, location_of, table_offset, translate
from vfleet.caller import parse_addresses
from vfleet.cli.cluster import cancelled_by_signals
from vfleet.cli.describe import base_arithmetic, mode_word, offset_arithmetic, step_word
from vfleet.cli.output import console, hex64, milliseconds, print_fields, print_table, size
from vfleet.cli.session import FAILED, OwnEtcdOption, refuse_certificates, run
from vfleet.client import FleetClient, move_request, request_id
from vfleet.clock import Clock, SystemClock
from vfleet.driver import DriverClient, Read, Write
from vfleet.errors import Reason, VfleetError
from vfleet.host_client import HostClient
from vfleet.local import LocalCluster
from vfleet.v1.driver_service_pb2 import WorkloadOptions, WorkloadReport
from vfleet.v1.migration_service_pb2 import MigrationOptions
from vfleet.v1.records_pb2 import Function, Migration, Phase, Step
from vfleet.v1.types_pb2 import TableEntry, TransferMode

DRIVER_HOST = "h1"
DEVICES = ("h1/nic0", "h2/nic0", "h3/nic0")
LARGE_DEVICES = ("h1/mem0", "h2/mem0", "h3/mem0")
LARGE_BYTES = 64 << 20
LARGE_WORKLOAD_BYTES = 1 << 20  # of that the driver reads and writes; the rest is filled once, and read at the end
PAGES_READ = 256
MODES = (TransferMode.TRANSFER_MODE_PRE_COPY, TransferMode.TRANSFER_MODE_POST_COPY)
FIGURES = ("lost", "repeated", "reordered", "misrouted", "mismatches", "errors")
OPERATIONS_BETWEEN = 2000
OPERATIONS_TIMEOUT_S = 20.0
POLL_S = 0.02


@dataclass(frozen=True)
class Leg:
    """One move, as the driver saw it."""

    migration: Migration
    before: TableEntry
    after: TableEntry
    operations: int
    report: WorkloadReport


def demo(
    keep: Annotated[
        Path | None, typer.Option("--keep", metavar="DIR", help="Keep the data and logs of all daemons in DIR.")
    ] = None,
    etcd: OwnEtcdOption = None,
) -> None:
    """Show functions move twice under a driver at work.

    Runs a cluster of three hosts for a few seconds, checks every figure, and exits 1 if one is wrong.

    Example: vfleet demo
    """
    refuse_certificates()
    endpoints = parse_addresses("--etcd", etcd) if etcd is not None else ()
    topology = files("vfleet") / "topologies" / "show.yaml"
    with ExitStack() as stack:
        path = stack.enter_context(as_file(topology))
        directory = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vfleet-")))
        problems = run(_demo(LocalCluster(path, directory, etcd=endpoints)))
    if keep is not None:
        typer.echo(f"The data and logs of all daemons are in {keep}.")
    for problem in problems:
        typer.echo(f"vfleet: wrong: {problem}", err=True)
    if problems:
        raise typer.Exit(FAILED)


async def _demo(cluster: LocalCluster) -> list[str]:
    """Run the demo, print what it shows, and return what was wrong."""
    narrator = _Narrator(SystemClock())
    with cancelled_by_signals():
        async with cluster, cluster.fleet() as fleet, cluster.host(DRIVER_HOST) as host:
            narrator.say(f"etcd, a coordinator and {len(cluster.hosts)} hosts are up, each its own process")
            for daemon in cluster.daemons:
                narrator.say(f"metrics of {daemon.name}, as long as it runs: {daemon.metrics}")
            # An etcd that is not the demo's own may remember an earlier one that was interrupted.
            suffix = "" if cluster.etcd_server is not None else f"-{request_id()}"
            stage = _Stage(fleet, host, narrator, f"vf1{suffix}", f"d1{suffix}")
            await stage.set_up(DEVICES[0])
            legs = [await stage.move(device) for device in DEVICES[1:]]
            final = await stage.tear_down()
            large = _Stage(fleet, host, narrator, f"vf2{suffix}", f"d2{suffix}")
            await large.set_up(LARGE_DEVICES[0], WorkloadOptions(memory_bytes=LARGE_WORKLOAD_BYTES), LARGE_BYTES)
            copied = [await large.move(device, mode) for device, mode in zip(LARGE_DEVICES[1:], MODES, strict=True)]
            large_final = await large.tear_down()
            narrator.say("the cluster ends")
    _print_result(legs, final)
    _print_copies(copied, large_final)
    return [*_problems(legs, final), *_problems(copied, large_final), *large.problems]


class _Narrator:
    """Says what happens, with seconds since the start."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._start = clock.monotonic()
        self._console = console()

    def say(self, line: str) -> None:
        self._console.print(f"{self.clock.monotonic() - self._start:5.1f} s  {line}")


class _Stage:
    """A function and its driver, and what happens to them."""

    def __init__(self, fleet: FleetClient, host: HostClient, narrator: _Narrator, function: str, driver: str) -> None:
        self._function, self._driver = function, driver
        self._fleet = fleet
        self._host = host
        self._narrator = narrator
        self._pages: dict[int, bytes] = {}
        self.problems: list[str] = []

    async def set_up(self, device: str, options: WorkloadOptions | None = None, fill_bytes: int = 0) -> None:
        """Make both and start the workload; before that fill local memory, beyond what the workload uses."""
        say = self._narrator.say
        function = await self._fleet.create_function(self._function, device)
        say(f"function {function.name} is made: {_home(function)}")
        entry = await self._fleet.attach_driver(self._function, self._driver, host=DRIVER_HOST)
        say(f"driver {self._driver} on {DRIVER_HOST} has it at virtual address {hex64(entry.virtual_address)}")
        if options is not None and fill_bytes:
            # Local memory begins at its own alignment, which is its size.
            first = entry.virtual_address + fill_bytes
            self._pages = {
                first + offset: random.randbytes(PAGE_BYTES)
                for random in (Random(self._function),)  # noqa: S311  # any bytes will do
                for offset in range(options.memory_bytes, fill_bytes, PAGE_BYTES)
            }
            await self._client.access_many([Write(address, page) for address, page in self._pages.items()])
            say(f"its local memory, {size(fill_bytes)}, is filled")
        await self._host.start_workload(self._driver, self._function, options)
        await self._operations_after(0)
        say("the driver reads and writes, and verifies every answer")

    async def move(self, device: str, mode: TransferMode.ValueType = MODES[0]) -> Leg:
        """Move the function while the driver works, and return what the driver saw of it."""
        before = await self._entry()
        first = await self._host.workload_report(self._driver, self._function, restart_measurement=True)
        begun = await self._fleet.create_migration(
            [move_request(self._function, device)], options=MigrationOptions(mode=mode)
        )
        migration = await self._fleet.wait_migration(begun.name)
        if migration.phase != Phase.PHASE_DONE:
            raise VfleetError(Reason.INTERNAL, f"the migration to {device} was aborted: {migration.abort_reason}")
        last = await self._host.workload_report(self._driver, self._function)
        await self._operations_after(last.operations)
        report = await self._host.workload_report(self._driver, self._function)
        function = await self._fleet.get_function(self._function)
        gap = milliseconds(report.longest_gap)
        self._narrator.say(f"it has moved: {_home(function)}; the driver waited {gap} at most")
        return Leg(migration, before, await self._entry(), last.operations - first.operations, report)

    async def tear_down(self) -> WorkloadReport:
        """Stop the driver, end what the demo made, and return the driver's last report."""
        final = await self._host.stop_workload(self._driver, self._function)
        self._narrator.say(f"the driver stops after {final.operations:,} operations")
        places = sorted(self._pages)
        some = Random(self._driver).sample(places, min(PAGES_READ, len(places)))  # noqa: S311
        for address, page in zip(
            some, await self._client.access_many([Read(a, PAGE_BYTES) for a in some]), strict=True
        ):
            if page != self._pages[address]:
                self.problems.append(f"the page at {hex64(address)} is not as it was written")
        await self._fleet.detach_driver(self._function, self._driver)
        await self._fleet.delete_function(self._function)
        await self._fleet.delete_driver(self._driver)
        return final

    @property
    def _client(self) -> DriverClient:
        return DriverClient(self._host, self._driver)

    async def _entry(self) -> TableEntry:
        """Return the function's entry in the driver's own table, which is what its accesses go by."""
        table = await self._host.get_table(self._driver)
        return next(entry for entry in table if entry.function == self._function)

    async def _operations_after(self, operations: int) -> None:
        """Wait until the driver has done enough operations more than `operations`."""
        clock = self._narrator.clock
        deadline_s = clock.monotonic() + OPERATIONS_TIMEOUT_S
        while True:
            report = await self._host.workload_report(self._driver, self._function)
            if report.operations >= operations + OPERATIONS_BETWEEN:
                return
            if not report.running:
                raise VfleetError(Reason.INTERNAL, f"the workload ended by itself: {report.failure}")
            if clock.monotonic() > deadline_s:
                message = f"the driver did {report.operations - operations} operations in {OPERATIONS_TIMEOUT_S:g} s"
                raise VfleetError(Reason.INTERNAL, message)
            await clock.sleep(POLL_S)


def _home(function: Function) -> str:
    return f"{function.device}, VF {function.vf_index}, at {location_of(function.base)}"


def _duration_s(migration: Migration) -> float:
    return (migration.finish_time.ToDatetime() - migration.begin_time.ToDatetime()).total_seconds()


def _print_result(legs: list[Leg], final: WorkloadReport) -> None:
    typer.echo("\nWhat the driver saw\n")
    print_fields(
        [
            ("operations done during the two migrations", f"{sum(leg.operations for leg in legs):,}"),
            ("operations in all, each verified", f"{final.operations:,}"),
            *((name, getattr(final, name)) for name in FIGURES),
        ]
    )
    typer.echo("\nThe two migrations\n")
    rows: list[tuple[str, list[object]]] = [
        ("from", [leg.migration.moves[0].source.device for leg in legs]),
        ("to", [leg.migration.moves[0].target.device for leg in legs]),
        ("virtual address before", [hex64(leg.before.virtual_address) for leg in legs]),
        ("virtual address after", [hex64(leg.after.virtual_address) for leg in legs]),
        ("offset before", [hex64(leg.before.offset) for leg in legs]),
        ("offset after", [hex64(leg.after.offset) for leg in legs]),
        ("generation before, after", [f"{leg.before.generation}, {leg.after.generation}" for leg in legs]),
        ("operations meanwhile", [f"{leg.operations:,}" for leg in legs]),
        ("blackout, as the driver measured it", [milliseconds(leg.report.longest_gap) for leg in legs]),
    ]
    steps = [{step_word(step.step): milliseconds(step.duration) for step in leg.migration.steps} for leg in legs]
    rows.append(("from BEGIN to FINISH", [f"{_duration_s(leg.migration) * 1000:.1f} ms" for leg in legs]))
    rows += [
        (f"phase {name}", [each.get(name, "") for each in steps]) for name in dict.fromkeys(n for s in steps for n in s)
    ]
    print_table(("", *(f"MIGRATION {n}" for n in range(1, len(legs) + 1))), ((name, *cells) for name, cells in rows))
    typer.echo("\nEach offset, from the place it leads to\n")
    for entry in (legs[0].before, *(leg.after for leg in legs)):
        base = translate(entry.virtual_address, entry.offset)
        typer.echo(f"  {location_of(base)}  base   {base_arithmetic(base)}")
        typer.echo(f"{'':14}  offset {offset_arithmetic(base, entry.virtual_address, entry.offset)}")


def _print_copies(legs: list[Leg], final: WorkloadReport) -> None:
    typer.echo(f"\nA function with {size(LARGE_BYTES)} of state, under load\n")
    rows: list[tuple[str, list[object]]] = [
        ("from", [leg.migration.moves[0].source.device for leg in legs]),
        ("to", [leg.migration.moves[0].target.device for leg in legs]),
        ("blackout, as the driver measured it", [milliseconds(leg.report.longest_gap) for leg in legs]),
        ("copied before the hold", [milliseconds(_step(leg, Step.STEP_COPY)) for leg in legs]),
        ("arrived after the lift", ["nothing", milliseconds(_step(legs[1], Step.STEP_SCRUB))]),
        ("from BEGIN to FINISH", [f"{_duration_s(leg.migration) * 1000:.1f} ms" for leg in legs]),
        ("operations meanwhile", [f"{leg.operations:,}" for leg in legs]),
    ]
    print_table(("", *(mode_word(leg.migration).upper() for leg in legs)), ((name, *cells) for name, cells in rows))
    wrong = sum(int(getattr(final, name)) for name in FIGURES)
    typer.echo(f"\n{final.operations:,} operations, each verified; {wrong} wrong")


def _step(leg: Leg, step: Step.ValueType) -> Duration:
    return next((each.duration for each in leg.migration.steps if each.step == step), Duration())


def _problems(legs: list[Leg], final: WorkloadReport) -> Iterator[str]:
    """Yield what isn't as it must be."""
    for figure in FIGURES:
        if getattr(final, figure):
            yield f"{figure}: {getattr(final, figure)}; expected 0"
    if final.failure:
        yield f"the workload ended by itself: {final.failure}"
    if not any(leg.operations for leg in legs):
        yield "the driver did nothing during the migrations"
    for number, leg in enumerate(legs, 1):
        move = leg.migration.moves[0]
        if leg.before.virtual_address != leg.after.virtual_address:
            yield f"the virtual address changed in migration {number}"
        if leg.before.offset == leg.after.offset:
            yield f"the offset did not change in migration {number}"
        if leg.after.generation != leg.before.generation + 1:
            yield f"the generation went from {leg.before.generation} to {leg.after.generation} in migration {number}"
        for place, entry in ((move.source, leg.before), (move.target, leg.after)):
            base = Location(place.segment, place.routing_id).base
            if (place.base, entry.offset) != (base, table_offset(base, entry.virtual_address)):
                yield f"the offset {hex64(entry.offset)} does not lead to {place.device}, VF {place.vf_index}"
