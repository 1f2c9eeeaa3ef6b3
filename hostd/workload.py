"""Built-in workloads: drivers that verify every answer, and measure what a driver notices of a migration.

This one drives the checker; those of other devices are made of it (hostd/workloads). A workload goes on after its
daemon was killed: the function tells how far it got, and the script says what comes next. While it runs, the driver's
accesses to the function are its alone, since their sequences number its steps.
"""

import asyncio
import logging
from array import array
from collections.abc import Callable, Sequence

from hostd.access_queue import AccessQueue
from hostd.checker_script import WORD_BYTES, CheckerScript, Step
from hostd.direct import Access
from hostd.drivers import Drivers
from hostd.ledger import Ledger
from hostd.models import checker
from hostd.sequencer import Result
from hostd.translation import Entry
from hostd.waiting import Waiting
from vfleet import log
from vfleet.background import in_background
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError, invalid_field, not_found
from vfleet.limits import WINDOW
from vfleet.names import check_name
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_STATUS_OK
from vfleet.v1.driver_service_pb2 import (
    NOTIFICATION_KIND_HELD,
    NOTIFICATION_KIND_LIFTED,
    StartWorkloadRequest,
    WatchNotificationsResponse,
    WorkloadReport,
)
from vfleet.v1.host_records_pb2 import WorkloadRecord

DEFAULT_WINDOW = 16
LATENCIES_KEPT = 8192
START_TIMEOUT_S = 5.0
STOP_TIMEOUT_S = 5.0
STOP_LATENCY_S = 0.1

_KIND = "workload"
_log = logging.getLogger(__name__)

Identifier = tuple[str, str]


class Measurement:
    """What the driver notices: the longest wait without any answer, blackouts, and how long accesses took. Seconds."""

    def __init__(self, now: float) -> None:
        self.longest_gap_s = 0.0
        self.blackout_s = 0.0
        self._held: float | None = None
        self._lifted: float | None = None
        self._latencies = array("d")
        self._next = 0
        self._last_answer = now

    def answered(self, submitted: float, now: float) -> None:
        """Note an answer at `now` to an access submitted at `submitted`."""
        began = max(submitted, self._last_answer)
        self.longest_gap_s = max(self.longest_gap_s, now - began)
        if self._held is not None and self._lifted is not None:
            held_s = self._lifted - min(self._held, began)
            self.blackout_s = max(self.blackout_s, held_s + now - max(began, self._lifted))
            self._held = self._lifted = None
        self._last_answer = now
        if len(self._latencies) < LATENCIES_KEPT:
            self._latencies.append(now - submitted)
        else:
            self._latencies[self._next] = now - submitted
            self._next = (self._next + 1) % LATENCIES_KEPT

    def held(self, now: float) -> None:
        """Note that a hold was placed at `now`."""
        self._held, self._lifted = now, None

    def lifted(self, now: float) -> None:
        """Note that it was lifted at `now`."""
        self._lifted = now

    def latency_s(self, quantile: float) -> float:
        """Return a quantile, 0 to 1, of the latest latencies; 0 if there are none."""
        ordered = sorted(self._latencies)
        return ordered[min(int(quantile * len(ordered)), len(ordered) - 1)] if ordered else 0.0


class Workload:
    """One workload of one driver on one function. `record` is what the ledger knows of it."""

    def __init__(
        self, record: WorkloadRecord, drivers: Drivers, clock: Clock, save: Callable[[WorkloadRecord], None]
    ) -> None:
        self.record = record
        self.measurement = Measurement(clock.monotonic())
        self._drivers = drivers
        self._driver = drivers.require(record.driver)
        self._clock = clock
        self._save = save

    async def start(self) -> None:
        """Ask the device what it is and clear its counters. The last of these accesses is where the workload begins.

        Raise INVALID_FIELD if the options don't fit the device, ILLEGAL_STATE if it is no checker, HOLD_TIMEOUT.
        """
        entry = self._entry()
        identification, _ = await self._read(entry, checker.IDENTIFICATION)
        if identification & 0xFFFFFFFF != checker.MAGIC:
            raise VfleetError(
                Reason.ILLEGAL_STATE,
                f"function {entry.function!r} identifies itself as {identification:#x}; expected a checker, for which"
                " this workload is made",
                metadata={"function": entry.function},
            )
        self.record.identity, _ = await self._read(entry, checker.IDENTITY)
        self.record.local_memory_bytes, _ = await self._read(entry, checker.LOCAL_MEMORY_BYTES)
        first = self._script().first()
        (status, _), self.record.base_sequence = await self._access_once(entry, first)
        if status != ACCESS_STATUS_OK:
            raise VfleetError(Reason.ILLEGAL_STATE, f"function {entry.function!r} has no control register")
        self.record.running = True
        self._save(self.record)

    def stop(self) -> None:
        """Submit nothing more, even after a restart; `run` returns when all has its answer."""
        self.record.stopping = True
        self._save(self.record)

    async def run(self) -> None:
        """Do accesses until stopped; what goes wrong otherwise is told by the report."""
        log.bind(driver=self.record.driver, function=self.record.function)
        self._driver.listeners.append(self._notice)
        try:
            await self._run()
        except VfleetError as error:
            self.record.report.failure = error.message
            _log.error("workload of driver %s on %s: %s", self.record.driver, self.record.function, error)
        except Exception as error:  # noqa: BLE001  # a defect of its driver ends it, as it would after each restart
            self.record.report.failure = f"{type(error).__name__}: {error}"
            _log.exception("workload of driver %s on %s", self.record.driver, self.record.function)
        finally:
            self._driver.listeners.remove(self._notice)
        self.record.running = False
        self.record.report.CopyFrom(self.report())
        self._save(self.record)

    def report(self) -> WorkloadReport:
        """Return what it did and saw so far."""
        report = WorkloadReport()
        report.CopyFrom(self.record.report)
        report.driver, report.function = self.record.driver, self.record.function
        report.running = self.record.running
        entry = self._driver.table.by_function.get(self.record.function)
        if entry is not None:
            report.virtual_address = entry.virtual_address
        measured = self.measurement
        for duration, seconds in (
            (report.longest_gap, measured.longest_gap_s),
            (report.blackout, measured.blackout_s),
            (report.latency_p50, measured.latency_s(0.5)),
            (report.latency_p99, measured.latency_s(0.99)),
            (report.latency_max, measured.latency_s(1.0)),
        ):
            duration.FromNanoseconds(round(seconds * 1e9))
        return report

    async def _run(self) -> None:
        script = self._script()
        queue = self._driver.queue(self.record.function)
        await queue.synchronized()
        began, began_at = self._clock.monotonic(), queue.last_sequence - self.record.base_sequence
        if began_at < 0:
            raise VfleetError(Reason.ILLEGAL_STATE, "the driver was detached meanwhile: its sequences began anew")
        number = self.record.report.operations = began_at
        window = self.record.options.window or DEFAULT_WINDOW
        while not self.record.stopping:
            steps = [script.step(number + index) for index in range(window)]
            left = steps[self._do_at_once(steps, queue) :]
            accesses = [_waiting(self._entry(), step) for step in left]
            submitted = self._clock.monotonic()
            queue.submit_many(accesses)
            for step, access in zip(left, accesses, strict=True):
                result = await access.answer
                self.measurement.answered(submitted, self._clock.monotonic())
                self._verify(step, result)
            number += window
            await self._pause(number - began_at, began)

    def _do_at_once(self, steps: Sequence[Step], queue: AccessQueue) -> int:
        """Do what needs no waiting, from the first step on, and return how many that were.

        `queue` is that of the attachment for which the workload was started.
        """
        if self._driver.queue(self.record.function) is not queue:
            return 0
        start, submitted = self._entry().virtual_address, self._clock.monotonic()
        accesses: list[Access] = [
            (start + step.offset, WORD_BYTES if step.kind == ACCESS_KIND_READ else step.data) for step in steps
        ]
        results = self._driver.direct.access_many(accesses)
        now = self._clock.monotonic()
        for step, result in zip(steps, results, strict=False):
            self.measurement.answered(submitted, now)
            self._verify(step, result)
        return len(results)

    def _entry(self) -> Entry:
        entry = self._driver.table.by_function.get(self.record.function)
        if entry is None:
            raise VfleetError(
                Reason.TRANSLATION_FAULT,
                f"driver {self.record.driver!r} is not attached to function {self.record.function!r}",
                metadata={"driver": self.record.driver, "function": self.record.function},
            )
        return entry

    def _script(self) -> CheckerScript:
        record = self.record
        return CheckerScript(record.identity, self._entry().length_bytes, record.local_memory_bytes, record.options)

    async def _read(self, entry: Entry, register: int) -> tuple[int, int]:
        (_, data), sequence = await self._access_once(entry, Step(ACCESS_KIND_READ, register, 0))
        return int.from_bytes(data, "little"), sequence

    async def _access_once(self, entry: Entry, step: Step) -> tuple[Result, int]:
        queue = self._driver.queue(entry.function)
        await queue.synchronized()
        access = _waiting(entry, step)
        queue.submit(access)
        return await access.answer, access.sequence

    def _verify(self, step: Step, result: Result) -> None:
        status, data = result
        report = self.record.report
        report.operations += 1
        value = int.from_bytes(data, "little")
        if status == ACCESS_STATUS_OK and (step.kind != ACCESS_KIND_READ or value == step.value):
            return
        if status != ACCESS_STATUS_OK:
            report.errors += 1
        elif step.counter in ("lost", "repeated", "reordered"):
            setattr(report, step.counter, value)
        elif step.counter == "misrouted":
            report.misrouted += 1
        else:
            report.mismatches += 1
        _log.error("driver %s read %#x at %#x; expected %#x", self._driver.name, value, step.offset, step.value)
        self._save(self.record)

    async def _pause(self, done: int, began: float) -> None:
        """Wait until there is time for more, or the workload is stopped."""
        rate = self.record.options.accesses_per_second
        until = began + done / rate if rate else began
        await self._clock.sleep(0)
        while (ahead_s := until - self._clock.monotonic()) > 0 and not self.record.stopping:
            await self._clock.sleep(min(ahead_s, STOP_LATENCY_S))

    def _notice(self, notification: WatchNotificationsResponse) -> None:
        if notification.function != self.record.function:
            return
        if notification.kind == NOTIFICATION_KIND_HELD:
            self.measurement.held(self._clock.monotonic())
            self._drivers.acknowledge(self._driver.name, self.record.function, notification.attempt)
        elif notification.kind == NOTIFICATION_KIND_LIFTED:
            self.measurement.lifted(self._clock.monotonic())


NewWorkload = Callable[[WorkloadRecord, Drivers, Clock, Callable[[WorkloadRecord], None]], Workload]


class Workloads:
    """All workloads of the host, running and stopped."""

    def __init__(self, drivers: Drivers, ledger: Ledger, clock: Clock, new_workload: NewWorkload) -> None:
        """Take how a workload is made of its record: by the kind that its options name."""
        self._drivers = drivers
        self._ledger = ledger
        self._new_workload = new_workload
        self._clock = clock
        self._workloads: dict[Identifier, Workload] = {}
        self._tasks: dict[Identifier, asyncio.Task[None]] = {}
        self._starting: set[Identifier] = set()

    def resume(self) -> None:
        """Go on with those that a killed daemon was running."""
        for record in self._ledger.all(_KIND, WorkloadRecord):
            identifier = (record.driver, record.function)
            try:
                self._workloads[identifier] = self._new_workload(record, self._drivers, self._clock, self._save)
            except VfleetError as error:
                _log.warning(
                    "the workload of driver %s is gone: %s", record.driver, error, extra={"driver": record.driver}
                )
                self._ledger.delete(_KIND, _key(identifier))
                continue
            if record.running:
                self._run(identifier)

    def is_running(self, driver: str, function: str) -> bool:
        """Whether the driver's accesses to the function are a workload's."""
        return (driver, function) in self._tasks or (driver, function) in self._starting

    async def start(self, request: StartWorkloadRequest) -> None:
        """Start a workload. Raise IN_USE if one runs there, and what `Workload.start` raises."""
        identifier = (request.driver, request.function)
        driver = self._drivers.require(request.driver)
        driver.queue(check_name("function", request.function))
        if request.options.window > WINDOW:
            raise invalid_field("options.window", request.options.window, f"at most {WINDOW}")
        if self.is_running(*identifier):
            raise VfleetError(
                Reason.IN_USE,
                f"a workload of driver {request.driver!r} runs on function {request.function!r} already",
                metadata={"driver": request.driver, "function": request.function},
            )
        record = WorkloadRecord(driver=request.driver, function=request.function, options=request.options)
        workload = self._new_workload(record, self._drivers, self._clock, self._save)
        self._starting.add(identifier)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await workload.start()
        except TimeoutError:
            raise VfleetError(
                Reason.HOLD_TIMEOUT,
                f"function {request.function!r} did not answer for {START_TIMEOUT_S:g} s; the workload was not started",
                metadata={"function": request.function},
            ) from None
        finally:
            self._starting.discard(identifier)
        self._workloads[identifier] = workload
        self._run(identifier)

    async def stop(self, driver: str, function: str) -> WorkloadReport:
        """Stop a workload and return its final report. Raise NOT_FOUND if there never was one.

        If what is on its way has no answer for STOP_TIMEOUT_S, the report says that it is running still.
        """
        workload = self._require(driver, function)
        task = self._tasks.get((driver, function))
        if task is not None:
            workload.stop()
            await asyncio.wait([task], timeout=STOP_TIMEOUT_S)
        return workload.report()

    def report(self, driver: str, function: str, *, restart_measurement: bool) -> WorkloadReport:
        """Return a workload's report so far. Raise NOT_FOUND if there never was one."""
        workload = self._require(driver, function)
        report = workload.report()
        if restart_measurement:
            workload.measurement = Measurement(self._clock.monotonic())
        return report

    async def close(self) -> None:
        """End the tasks, as a kill would; a restart goes on with them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _require(self, driver: str, function: str) -> Workload:
        self._drivers.require(driver)
        found = self._workloads.get((driver, check_name("function", function)))
        if found is None:
            raise not_found("workload", _key((driver, function)))
        return found

    def _run(self, identifier: Identifier) -> None:
        task = in_background(self._workloads[identifier].run(), name=f"workload {_key(identifier)}")
        self._tasks[identifier] = task
        task.add_done_callback(lambda _: self._tasks.pop(identifier))

    def _save(self, record: WorkloadRecord) -> None:
        self._ledger.put(_KIND, _key((record.driver, record.function)), record)


def _waiting(entry: Entry, step: Step) -> Waiting:
    return Waiting(step.kind, entry.virtual_address + step.offset, WORD_BYTES, step.data)


def _key(identifier: Identifier) -> str:
    return f"{identifier[0]}/{identifier[1]}"
