"""An accelerator beside the checkers, and the built-in workload that drives it: each command completes once."""

import asyncio
from typing import TYPE_CHECKING

from simulation.vopr.loop import Life

from vfleet.errors import Reason, VfleetError
from vfleet.rpc import Channels, call
from vfleet.v1.driver_service_pb2 import (
    StartWorkloadRequest,
    StopWorkloadRequest,
    WorkloadOptions,
    WorkloadReport,
)
from vfleet.v1.driver_service_pb2_grpc import DriverServiceStub
from vfleet.v1.records_pb2 import FunctionStatus

if TYPE_CHECKING:
    from simulation.vopr.world import World

ACCELERATORS = ("h1/accel0", "h2/accel0", "h3/accel0")
FUNCTION, DRIVER, HOST = "vf5", "d6", "h2"
MAIN_MEMORY_BYTES = 1 << 17
OPTIONS = WorkloadOptions(kind="accelerator", window=6, accesses_per_second=40, seed=9)
FIGURES = ("lost", "repeated", "reordered", "mismatches", "errors")


class AcceleratorClient:
    """Starts the workload, and asks in the end what it has seen."""

    def __init__(self, world: "World") -> None:
        self.is_ending = False
        self._world = world
        # It shares its machine with the daemon: nothing cuts them apart.
        self._stub = DriverServiceStub(Channels(world.network.connect(Life(DRIVER))).to(f"{HOST}:1"))

    async def run(self) -> None:
        """Wait for the end, and check the report."""
        incarnation = self._world.hosts[HOST].incarnation
        request = StartWorkloadRequest(driver=DRIVER, function=FUNCTION, options=OPTIONS)
        if not await self._started(request):
            return
        while not self.is_ending:
            await asyncio.sleep(0.5)
        while not self._world.history.violations:
            report = await self._stopped()
            if report is None and self._world.hosts[HOST].incarnation == incarnation:
                self._world.history.violate(11, f"the workload of {DRIVER} is gone")
            elif report is None or not report.running:
                self._check(report)
                return

    async def _started(self, request: StartWorkloadRequest) -> bool:
        while not self.is_ending:
            try:
                await call(self._stub.StartWorkload, request, address=f"{HOST}:1", timeout_s=10.0)
            except VfleetError as error:
                # IN_USE: it was started, and the answer got lost.
                if error.reason is Reason.IN_USE:
                    return True
                await asyncio.sleep(0.5)
            else:
                return True
        return False

    async def _stopped(self) -> WorkloadReport | None:
        """Return the report; None if the machine has forgotten the workload."""
        request = StopWorkloadRequest(driver=DRIVER, function=FUNCTION)
        while True:
            try:
                response = await call(self._stub.StopWorkload, request, address=f"{HOST}:1", timeout_s=10.0)
            except VfleetError as error:
                if error.reason is Reason.NOT_FOUND:
                    return None
                await asyncio.sleep(0.5)
            else:
                return response.report

    def _check(self, report: WorkloadReport | None) -> None:
        history = self._world.history
        if report is None:
            return
        wrong = {figure: getattr(report, figure) for figure in FIGURES if getattr(report, figure)}
        if wrong:
            history.violate(4, f"the accelerator's workload has seen {wrong}")
        is_lost = history.functions[FUNCTION].status == FunctionStatus.FUNCTION_STATUS_LOST
        if report.failure and not is_lost:
            history.violate(4, f"the accelerator's workload ended: {report.failure}")
        history.hits["commands"] += report.operations
