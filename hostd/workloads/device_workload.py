"""A workload that is a small driver of its own: it runs over its main memory, and goes on there after a kill."""

import logging
from collections.abc import Callable

from hostd.drivers import Drivers
from hostd.workload import Workload
from hostd.workloads.host_port import HostPort
from hostd.workloads.port import DeviceDriver, NewDriver
from vfleet.clock import Clock
from vfleet.v1.host_records_pb2 import WorkloadRecord

_log = logging.getLogger(__name__)


class DeviceWorkload(Workload):
    """One workload of one driver on one function."""

    def __init__(
        self,
        record: WorkloadRecord,
        drivers: Drivers,
        clock: Clock,
        save: Callable[[WorkloadRecord], None],
        new_driver: NewDriver,
    ) -> None:
        super().__init__(record, drivers, clock, save)
        self._new_driver = new_driver

    async def start(self) -> None:
        """Let the driver set up its device and its main memory.

        Raise INVALID_FIELD if the options or the main memory don't do, ILLEGAL_STATE for another kind of device.
        """
        port, driver = self._open()
        try:
            await driver.start()
        finally:
            port.close()
        self.record.running = True
        self._save(self.record)

    async def _run(self) -> None:
        port, driver = self._open()
        try:
            await driver.run()
        finally:
            port.close()

    def _open(self) -> tuple[HostPort, DeviceDriver]:
        # Raises if the function isn't attached any more.
        self._entry()
        port = HostPort(self._driver, self.record.function, self._clock, lambda: self.record.stopping)
        return port, self._new_driver(port, _Tally(self, port), self.record.options)

    def note(self, field: str, what: str) -> None:
        """Count something that went wrong, in a field of the report. Durable."""
        report = self.record.report
        setattr(report, field, getattr(report, field) + 1)
        _log.error("driver %s on %s: %s: %s", self.record.driver, self.record.function, field, what)
        self._save(self.record)


class _Tally:
    """A tally (hostd.workloads.port.Tally) that counts into the workload's report."""

    def __init__(self, workload: DeviceWorkload, port: HostPort) -> None:
        self._workload = workload
        self._port = port

    def completed(self, submitted: float) -> None:
        self._workload.record.report.operations += 1
        self._workload.measurement.answered(submitted, self._port.now())

    def resumed(self, operations: int) -> None:
        self._workload.record.report.operations = operations

    def lost(self, what: str) -> None:
        self._workload.note("lost", what)

    def repeated(self, what: str) -> None:
        self._workload.note("repeated", what)

    def reordered(self, what: str) -> None:
        self._workload.note("reordered", what)

    def mismatch(self, what: str) -> None:
        self._workload.note("mismatches", what)

    def error(self, what: str) -> None:
        self._workload.note("errors", what)
