"""Proof 4: whatever dies, freezes or is cut off, no access is lost, repeated, reordered or misrouted; nothing stays.

    make chaos DURATION=300 SEED=1

runs a fleet of four hosts, two coordinators and a three-node etcd, with drivers that log every access and askers that
migrate functions all the time, while processes are killed and paused and networks disturbed. Then all is healed, and
an independent checker says what came of it. A seed gives the same schedule of faults and of questions, but not the same
run: real processes interleave as they like.
"""

import argparse
import asyncio
import logging
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from rich.console import Console
from rich.table import Table
from support.chaos.check_accesses import check_accesses, check_devices, check_identities, check_sequences
from support.chaos.check_remains import check_remains, decoded, last_sequences, outcomes, unfinished
from support.chaos.drivers import ChaosDriver, Use
from support.chaos.findings import KINDS, Findings
from support.chaos.history import Log, read_logs
from support.chaos.load import Load
from support.chaos.remains import AUDITOR, Remains, read_host, read_records, read_words
from support.chaos.schedule import schedule
from support.chaos.stage import MissingEtcdError, Stage, check_etcd_can_be_killed

from vfleet.client import FleetClient
from vfleet.driver import DriverClient
from vfleet.errors import VfleetError
from vfleet.host_client import HostClient
from vfleet.v1.driver_service_pb2 import WorkloadOptions, WorkloadReport
from vfleet.v1.records_pb2 import Function

LEASE_TTL_S = 2
CLIENT_PATIENCE_S = 120.0
# After the last fault: for all migrations to be over, and then for every driver to get its answers.
QUIET_WITHIN_S = 60.0
ANSWERS_WITHIN_S = 90.0
POLL_S = 0.2
ASKERS = 4
MESSAGES_SHOWN = 30

FUNCTIONS = [f"vf{number}" for number in range(1, 13)]
DEVICES = ["h1/nic0", "h1/nic1", "h2/nic0", "h2/nic1", "h3/nic0", "h3/nic1", "h4/nic0"]
FIRST_DEVICES = [device for device in DEVICES if device != "h2/nic0"]  # its BARs are larger: it takes all, gives none
# Who works on what: built-in workloads, and drivers of chaos' own. Some functions have both, some two of the latter.
WORKLOADS = {
    "d1": ("h1", ["vf1", "vf5", "vf11"]),
    "d2": ("h2", ["vf2", "vf6"]),
    "d3": ("h3", ["vf3", "vf12"]),
    "d4": ("h4", ["vf4", "vf7"]),
}
CLIENTS = {
    "d5": ("h1", ["vf7", "vf8", "vf11"]),
    "d6": ("h2", ["vf8", "vf9"]),
    "d7": ("h3", ["vf9", "vf10", "vf12"]),
    "d8": ("h4", ["vf10", "vf7"]),
}
WORKLOAD_OPTIONS = {"channel": 0, "memory_bytes": 0x8000, "accesses_per_second": 200}


@dataclass(frozen=True, slots=True)
class Options:
    """How to run: for how many seconds faults happen, and by which seed; `kill_etcd` spares or includes etcd itself."""

    duration_s: float
    seed: int
    directory: Path
    members: int = 3
    kill_etcd: bool = True


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was done, in the order in which it is shown, and what was found. `failures` are for people."""

    done: dict[str, object]
    findings: Findings
    failures: list[str]

    @property
    def is_good(self) -> bool:
        """Whether all is zero that has to be."""
        return not any(self.findings.counts.values()) and not self.failures


class Chaos:
    """One run, on a stage that is up."""

    def __init__(
        self, options: Options, stage: Stage, clients: Sequence[FleetClient], hosts: dict[str, HostClient]
    ) -> None:
        self._options = options
        self._stage = stage
        self._clients = clients
        self._hosts = hosts
        self._load = Load(clients, FUNCTIONS, DEVICES, options.seed)
        self._drivers: list[ChaosDriver] = []
        self._logs: list[Path] = []
        self._failures: list[str] = []
        self._findings = Findings()

    async def run(self) -> Outcome:
        """Make functions and drivers, let it all happen, heal, and check."""
        await self._set_up()
        async with _background(driver.listen() for driver in self._drivers):
            working = [asyncio.create_task(driver.run()) for driver in self._drivers]
            try:
                await self._suffer()
                await self._stage.restart_ended()
                await self._until("all migrations are over", QUIET_WITHIN_S, self._is_quiet)
                await self._check_residue()
                for driver in self._drivers:
                    driver.stop()
                await self._in_time("the drivers of chaos get their answers", asyncio.gather(*working))
            finally:
                for task in working:
                    task.cancel()
        workloads = await self._stop_workloads()
        return await self._check(workloads)

    async def _set_up(self) -> None:
        fleet = self._clients[0]
        for number, function in enumerate(FUNCTIONS):
            await fleet.create_function(function, FIRST_DEVICES[number % len(FIRST_DEVICES)])
        for driver, (host, functions) in WORKLOADS.items():
            for function in functions:
                await fleet.attach_driver(function, driver, host=host)
                await self._hosts[host].start_workload(driver, function, WorkloadOptions(**WORKLOAD_OPTIONS))
        sharers = {function: [d for d in CLIENTS if function in CLIENTS[d][1]] for function in FUNCTIONS}
        for number, (driver, (host, functions)) in enumerate(CLIENTS.items(), start=1):
            uses = []
            for function in functions:
                entry = await fleet.attach_driver(function, driver, host=host)
                index, of = sharers[function].index(driver), len(sharers[function])
                uses.append(Use(function, entry.virtual_address, index, of))
            path = self._options.directory / f"{driver}.jsonl"
            client = DriverClient(self._hosts[host], driver)
            self._logs.append(path)
            self._drivers.append(ChaosDriver(number, driver, client, uses, Log(path), self._options.seed))

    async def _suffer(self) -> None:
        options, stage = self._options, self._stage
        lanes = schedule(options.seed, options.duration_s, stage.targets(with_etcd=options.kill_etcd), LEASE_TTL_S)
        async with asyncio.TaskGroup() as group:
            for number in range(ASKERS):
                group.create_task(self._load.run(number))
            start_s = time.monotonic()
            async with asyncio.TaskGroup() as faults:
                for lane in lanes:
                    faults.create_task(stage.suffer(lane, start_s))
            await asyncio.sleep(max(start_s + options.duration_s - time.monotonic(), 0))
            self._load.stop()

    async def _is_quiet(self) -> bool:
        return not unfinished(await read_records(self._stage.etcd_endpoints[0]))

    async def _stop_workloads(self) -> list[WorkloadReport]:
        """Stop all workloads, each once it has worked in peace."""
        workloads = [(d, host, function) for d, (host, functions) in WORKLOADS.items() for function in functions]
        return list(await asyncio.gather(*(self._stop_workload(*workload) for workload in workloads)))

    async def _stop_workload(self, driver: str, host: str, function: str) -> WorkloadReport:
        client = self._hosts[host]
        before = (await client.workload_report(driver, function)).operations
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                while (await client.workload_report(driver, function)).operations == before:
                    await asyncio.sleep(POLL_S)
                while (report := await client.stop_workload(driver, function)).running:
                    pass  # it waited for a while: during a hold there are no answers
                return report
        except TimeoutError:
            self._failures.append(f"the workload of {driver} on {function} does not go on, all faults being over")
            return await client.workload_report(driver, function)

    async def _read_words(self) -> dict[str, dict[int, int]]:
        """Return what the functions hold, through a driver that is attached just for this."""
        fleet, words = self._clients[0], {}
        for function in FUNCTIONS:
            try:
                words[function] = await read_words(fleet, self._hosts["h1"], "h1", function)
            except VfleetError as error:
                self._failures.append(f"{function} can't be read, all faults being over: {error.message}")
        await fleet.delete_driver(AUDITOR)
        return words

    async def _check_residue(self) -> None:
        """Check that nothing is left at once, and not only after hosts have waited for their deadlines."""
        found = Findings()
        check_remains(await self._remains({}, []), found)
        for kind, what in found.found:
            if kind == "residue":
                self._findings.add(kind, f"when all migrations are over, {what}")

    async def _remains(self, words: dict[str, dict[int, int]], workloads: Sequence[WorkloadReport]) -> Remains:
        records = await read_records(self._stage.etcd_endpoints[-1])
        hosts = {name: await read_host(client) for name, client in self._hosts.items()}
        return Remains(records, hosts, words, workloads)

    async def _check(self, workloads: Sequence[WorkloadReport]) -> Outcome:
        findings, words = self._findings, await self._read_words()
        left, accesses = await self._remains(words, workloads), read_logs(self._logs)
        check_remains(left, findings)
        check_devices(check_accesses(accesses, findings), words, workloads, findings)
        check_sequences(accesses, last_sequences(left.hosts), findings)
        identities = {f.name: f.identity for f in decoded(left.records, "functions", Function).values()}
        check_identities(accesses, identities, findings)
        await self._stage.restart_ended()
        failures = [*self._failures, *self._stage.ended, *self._load.failures]
        failures += [failure for driver in self._drivers for failure in driver.failures]
        return Outcome(self._done(outcomes(left.records), workloads), findings, failures)

    def _done(self, ended: Counter[str], workloads: Sequence[WorkloadReport]) -> dict[str, object]:
        counts, asked = self._stage.counts, self._load.counts
        gaps = [report.longest_gap.ToNanoseconds() / 1e9 for report in workloads]
        return {
            "migrations done": ended["PHASE_DONE"],
            "migrations aborted": ended["PHASE_ABORTED"],
            "of these cancelled": asked["cancelled"],
            "cancelled too late": asked["cancelled too late"],
            "ended by an adopter": ended["adopted"],
            "aborted by a host past its deadline": ended["resolved"],
            "groups moved": asked["groups"],
            "there and back": asked["there and back"],
            "asked twice at once": asked["asked twice"],
            "refused": asked["refused"],
            **{f"{what}s: {where}": number for (what, _, where), number in _sorted_faults(counts)},
            "starts that failed, tried again": counts["failed starts"],
            "slowest start": f"{self._stage.slowest_start_s:.2f} s",
            "accesses verified, own drivers": sum(driver.accesses for driver in self._drivers),
            "accesses verified, workloads": sum(report.operations for report in workloads),
            "longest gap, own drivers": f"{max(driver.longest_gap_s for driver in self._drivers):.2f} s",
            "longest gap, workloads": f"{max(gaps):.2f} s",
        }

    async def _until(self, what: str, within_s: float, condition: Callable[[], Awaitable[bool]]) -> None:
        """Wait until `condition` holds. If it doesn't in time, that is a failure, and the run goes on."""
        try:
            async with asyncio.timeout(within_s):
                while not await condition():
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            self._failures.append(f"{within_s:g} s after the last fault it is not so that {what}")

    async def _in_time(self, what: str, work: Awaitable[object]) -> None:
        try:
            async with asyncio.timeout(ANSWERS_WITHIN_S):
                await work
        except TimeoutError:
            self._failures.append(f"{ANSWERS_WITHIN_S:g} s after the last fault it is not so that {what}")


def _sorted_faults(counts: Counter[str]) -> list[tuple[tuple[str, str, str], int]]:
    return [(key.partition(" "), counts[key]) for key in sorted(counts) if key != "failed starts"]


@asynccontextmanager
async def _background(works: Iterable[Awaitable[None]]) -> AsyncIterator[None]:
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def run(options: Options) -> Outcome:
    """Run chaos once. Raise MissingEtcdError if etcd is to be killed and there is none that survives it."""
    if options.kill_etcd:
        await check_etcd_can_be_killed()
    async with AsyncExitStack() as stack:
        stage = Stage(options.directory, Random(), members=options.members, coordinators=2, lease_ttl_s=LEASE_TTL_S)
        await stack.enter_async_context(stage)
        addresses = [daemon.address for daemon in stage.coordinators.values()]
        clients = [FleetClient(order, patience_s=CLIENT_PATIENCE_S) for order in (addresses, addresses[::-1])]
        hosts = {n: HostClient(d.address, patience_s=CLIENT_PATIENCE_S) for n, d in stage.hosts.items()}
        for client in (*clients, *hosts.values()):
            await stack.enter_async_context(client)
        return await Chaos(options, stage, clients, hosts).run()


def show(outcome: Outcome, console: Console) -> None:
    """Print the table, and the first of what is wrong."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for what, number in outcome.done.items():
        table.add_row(what, f"{number:,}" if isinstance(number, int) else str(number))
    table.add_section()
    for kind in KINDS:
        table.add_row(kind, str(outcome.findings.counts[kind]))
    console.print(table)
    for message in (*outcome.failures, *outcome.findings.messages)[:MESSAGES_SHOWN]:
        console.print(message, markup=False, highlight=False, soft_wrap=True)


def main() -> None:
    """Run chaos by the command line. Exit with 1 if anything is not zero that has to be, 2 if it can't begin."""
    parser = argparse.ArgumentParser(prog="chaos", description="Proof 4: see tests/fault/chaos.py")
    parser.add_argument("--duration", metavar="SECONDS", type=float, default=300.0, help="of the faults (%(default)s)")
    parser.add_argument("--seed", metavar="N", type=int, default=None, help="of their schedule (one is made and shown)")
    parser.add_argument("--keep", metavar="DIR", type=Path, help="keep data and logs there, whatever the outcome")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    seed = Random().randrange(1_000_000) if arguments.seed is None else arguments.seed
    directory = arguments.keep or Path(tempfile.mkdtemp(prefix="vfleet-chaos-"))
    directory.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(f"chaos for {arguments.duration:g} s by seed {seed}; data and logs are in {directory}")
    try:
        outcome = asyncio.run(run(Options(arguments.duration, seed, directory)))
    except MissingEtcdError as error:
        console.print(str(error))
        sys.exit(2)
    show(outcome, console)
    if outcome.is_good and not arguments.keep:
        shutil.rmtree(directory)
    sys.exit(not outcome.is_good)


if __name__ == "__main__":
    main()
