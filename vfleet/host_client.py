"""The typed asyncio client of one hostd: what lives on a host, and what drivers do there.

Thin, as `vfleet.client.FleetClient` is for the fleet.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from random import Random
from typing import TYPE_CHECKING

from vfleet.caller import PATIENCE_S, Client
from vfleet.clock import Clock
from vfleet.names import check_name
from vfleet.roles import Role
from vfleet.rpc import Channels
from vfleet.v1 import driver_service_pb2 as driver_pb2
from vfleet.v1 import function_service_pb2 as function_pb2
from vfleet.v1 import hold_service_pb2 as hold_pb2
from vfleet.v1 import translation_service_pb2 as translation_pb2
from vfleet.v1.driver_service_pb2_grpc import DriverServiceStub
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.hold_service_pb2_grpc import HoldServiceStub
from vfleet.v1.translation_service_pb2_grpc import TranslationServiceStub
from vfleet.v1.types_pb2 import TableEntry

if TYPE_CHECKING:
    from vfleet.tls import Tls


class HostClient(Client):
    """One host, through its hostd at HOST:PORT: what lives there, and what drivers do there.

    With `tls` its certificate must be that of a host, and of the one called `name` if that is given.
    """

    _kind = "hostd"
    _role = Role.HOST

    def __init__(
        self,
        address: str,
        *,
        name: str = "",
        channels: Channels | None = None,
        tls: "Tls | None" = None,
        clock: Clock | None = None,
        random: Random | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        super().__init__(
            [address], name=name, channels=channels, tls=tls, clock=clock, random=random, patience_s=patience_s
        )

    async def list_functions(self) -> list[function_pb2.FunctionInstance]:
        """Return all instances on the host, by device and VF index."""
        request = function_pb2.ListFunctionsRequest()
        response = await self.caller.call(lambda channel: FunctionServiceStub(channel).ListFunctions, request)
        return list(response.instances)

    async def get_function(self, function: str, *, generation: int = 0) -> function_pb2.FunctionInstance:
        """Return an instance, of a generation or (0) the newest. Raise NOT_FOUND if the host has none."""
        request = function_pb2.GetFunctionRequest(function=check_name("function", function), generation=generation)
        response = await self.caller.call(lambda channel: FunctionServiceStub(channel).GetFunction, request)
        return response.instance

    async def reset_function(self, function: str, *, generation: int) -> None:
        """Reset an instance (FLR): initial registers, zero memory. Sent once: another would undo what came between."""
        request = function_pb2.ResetFunctionRequest(function=check_name("function", function), generation=generation)
        await self.caller.call(lambda channel: FunctionServiceStub(channel).ResetFunction, request, repeatable=False)

    async def list_holds(self) -> list[hold_pb2.Hold]:
        """Return all holds on the host, by driver and function."""
        request = hold_pb2.ListHoldsRequest()
        response = await self.caller.call(lambda channel: HoldServiceStub(channel).ListHolds, request)
        return list(response.holds)

    async def get_table(self, driver: str) -> list[TableEntry]:
        """Return a driver's translation table, by virtual address."""
        request = translation_pb2.GetTableRequest(driver=check_name("driver", driver))
        response = await self.caller.call(lambda channel: TranslationServiceStub(channel).GetTable, request)
        return list(response.entries)

    async def watch_table(self, driver: str) -> AsyncGenerator[list[TableEntry], None]:
        """Yield a driver's translation table, now and after every change."""
        request = translation_pb2.WatchTableRequest(driver=check_name("driver", driver))
        method = self.caller.stream(lambda channel: TranslationServiceStub(channel).WatchTable, request)
        async with aclosing(method) as responses:
            async for response in responses:
                yield list(response.entries)

    async def list_drivers(self) -> list[driver_pb2.DriverState]:
        """Return all drivers on the host, by name."""
        request = driver_pb2.ListDriversRequest()
        response = await self.caller.call(lambda channel: DriverServiceStub(channel).ListDrivers, request)
        return list(response.drivers)

    async def get_driver(self, driver: str) -> driver_pb2.DriverState:
        """Return a driver. Raise NOT_FOUND."""
        request = driver_pb2.GetDriverRequest(driver=check_name("driver", driver))
        response = await self.caller.call(lambda channel: DriverServiceStub(channel).GetDriver, request)
        return response.state

    async def start_workload(
        self, driver: str, function: str, options: driver_pb2.WorkloadOptions | None = None
    ) -> None:
        """Start the built-in workload of a driver on one of its functions. Sent once."""
        request = driver_pb2.StartWorkloadRequest(
            driver=check_name("driver", driver), function=check_name("function", function), options=options
        )
        await self.caller.call(lambda channel: DriverServiceStub(channel).StartWorkload, request, repeatable=False)

    async def stop_workload(self, driver: str, function: str) -> driver_pb2.WorkloadReport:
        """Stop the workload and return its final report.

        If its accesses on their way have no answers for 5 s, the report has `running` set, and it ends later.
        """
        request = driver_pb2.StopWorkloadRequest(
            driver=check_name("driver", driver), function=check_name("function", function)
        )
        response = await self.caller.call(lambda channel: DriverServiceStub(channel).StopWorkload, request)
        return response.report

    async def workload_report(
        self, driver: str, function: str, *, restart_measurement: bool = False
    ) -> driver_pb2.WorkloadReport:
        """Return what the workload did and saw; `restart_measurement` lets gap and latencies start anew after it."""
        request = driver_pb2.GetWorkloadReportRequest(
            driver=check_name("driver", driver),
            function=check_name("function", function),
            restart_measurement=restart_measurement,
        )
        response = await self.caller.call(
            lambda channel: DriverServiceStub(channel).GetWorkloadReport, request, repeatable=not restart_measurement
        )
        return response.report
