"""The typed asyncio client of coordinators.

Thin: plain arguments in, the messages of vfleet.v1 out, VfleetError for every failure. What can be checked without a
daemon is checked before anything is sent. `vfleet.host_client.HostClient` is for one hostd, and
`vfleet.driver.DriverClient` for a program that is a driver itself.
"""

import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TypeVar

from vfleet.address import ADDRESS_SPACE, PAGE_BYTES
from vfleet.caller import Client
from vfleet.errors import invalid_field, not_found
from vfleet.limits import MAX_MAIN_MEMORY_BYTES
from vfleet.names import check_device_name, check_name
from vfleet.parts import part_of
from vfleet.roles import Role
from vfleet.v1 import fleet_service_pb2 as fleet_pb2
from vfleet.v1 import migration_service_pb2 as migration_pb2
from vfleet.v1.fleet_service_pb2_grpc import FleetServiceStub
from vfleet.v1.migration_service_pb2_grpc import MigrationServiceStub
from vfleet.v1.placement_pb2 import Constraints
from vfleet.v1.records_pb2 import Cordon, Driver, Function, Host, Migration, Phase
from vfleet.v1.types_pb2 import Guest, TableEntry

PAGE_SIZE = 1000
MAX_VF_INDEX = 65535
PHASES_OVER = frozenset({Phase.PHASE_DONE, Phase.PHASE_ABORTED})

T = TypeVar("T")


def move_request(function: str, device: str = "", vf_index: int = 0) -> migration_pb2.MoveRequest:
    """Return where a function is to go: the device, as HOST/DEVICE, and the VF's index (0: the lowest free).

    Without a device the coordinator chooses one.
    """
    return migration_pb2.MoveRequest(
        function=check_name("function", function),
        target_device=check_device_name("device", device) if device else "",
        target_vf_index=_check_number("vf_index", vf_index, MAX_VF_INDEX),
    )


def request_id() -> str:
    """Return a new request ID, which becomes a migration's name."""
    return f"m-{uuid.uuid4().hex[:12]}"


class FleetClient(Client):
    """The fleet, through any of its coordinators: the first that answers of those at `addresses`.

    With `tls` the client shows its certificate, and theirs must be those of coordinators; without it connections are
    plaintext, to this machine alone.

    Goes on for `patience_s` seconds when none answers, then raises UNREACHABLE. With several addresses, a call that can
    be repeated leaves a coordinator that is frozen after 5 s, and at once one that can't reach etcd.
    """

    _kind = "coordinator"
    _role = Role.COORDINATOR

    async def list_hosts(self) -> list[Host]:
        """Return all hosts, without their devices, by name."""

        async def page(token: str) -> tuple[Iterable[Host], str]:
            request = fleet_pb2.ListHostsRequest(page_size=PAGE_SIZE, page_token=token)
            response = await self.caller.call(lambda channel: FleetServiceStub(channel).ListHosts, request)
            return response.hosts, response.next_page_token

        return await _all_pages(page)

    async def list_devices(self) -> list[fleet_pb2.DeviceUse]:
        """Return all devices and the use of their slots, by name."""

        async def page(token: str) -> tuple[Iterable[fleet_pb2.DeviceUse], str]:
            request = fleet_pb2.ListDevicesRequest(page_size=PAGE_SIZE, page_token=token)
            response = await self.caller.call(lambda channel: FleetServiceStub(channel).ListDevices, request)
            return response.devices, response.next_page_token

        return await _all_pages(page)

    async def list_functions(self) -> list[Function]:
        """Return all functions, by name."""

        async def page(token: str) -> tuple[Iterable[Function], str]:
            request = fleet_pb2.FleetServiceListFunctionsRequest(page_size=PAGE_SIZE, page_token=token)
            response = await self.caller.call(lambda channel: FleetServiceStub(channel).ListFunctions, request)
            return response.functions, response.next_page_token

        return await _all_pages(page)

    async def list_drivers(self) -> list[Driver]:
        """Return all drivers with their entries, by name."""

        async def page(token: str) -> tuple[Iterable[Driver], str]:
            request = fleet_pb2.FleetServiceListDriversRequest(page_size=PAGE_SIZE, page_token=token)
            response = await self.caller.call(lambda channel: FleetServiceStub(channel).ListDrivers, request)
            return response.drivers, response.next_page_token

        return await _all_pages(page)

    async def list_migrations(
        self, *, active_only: bool = False, function: str = "", latest: int = 0
    ) -> list[Migration]:
        """Return all migrations, or those that are not over, or that move a function; the newest first.

        Of those the `latest` only, 1 to 1000, if that isn't 0.
        """
        if function:
            check_name("function", function)

        async def page(token: str) -> tuple[Iterable[Migration], str]:
            request = migration_pb2.ListMigrationsRequest(
                page_size=latest or PAGE_SIZE, page_token=token, active_only=active_only, function=function
            )
            response = await self.caller.call(lambda channel: MigrationServiceStub(channel).ListMigrations, request)
            return response.migrations, "" if latest else response.next_page_token

        return await _all_pages(page)

    async def get_host(self, name: str) -> Host:
        """Return a host. Raise NOT_FOUND."""
        check_name("host", name)
        return _named("host", name, ((host.name, host) for host in await self.list_hosts()))

    async def get_device(self, name: str) -> fleet_pb2.DeviceUse:
        """Return a device, named as HOST/DEVICE. Raise NOT_FOUND."""
        check_device_name("device", name)
        return _named("device", name, ((use.device.name, use) for use in await self.list_devices()))

    async def get_function(self, name: str) -> Function:
        """Return a function. Raise NOT_FOUND."""
        check_name("function", name)
        return _named("function", name, ((function.name, function) for function in await self.list_functions()))

    async def get_driver(self, name: str) -> Driver:
        """Return a driver. Raise NOT_FOUND."""
        check_name("driver", name)
        return _named("driver", name, ((driver.name, driver) for driver in await self.list_drivers()))

    async def create_function(self, function: str, device: str, *, vf_index: int = 0) -> Function:
        """Make a function on a device (HOST/DEVICE), in the VF of that index (0: the lowest free)."""
        request = fleet_pb2.FleetServiceCreateFunctionRequest(
            function=check_name("function", function),
            device=check_device_name("device", device),
            vf_index=_check_number("vf_index", vf_index, MAX_VF_INDEX),
        )
        response = await self.caller.call(lambda channel: FleetServiceStub(channel).CreateFunction, request)
        return response.function

    async def delete_function(self, function: str) -> None:
        """End a function without drivers. Sent once: a name may mean another function the next time."""
        request = fleet_pb2.DeleteFunctionRequest(function=check_name("function", function))
        await self.caller.call(lambda channel: FleetServiceStub(channel).DeleteFunction, request, repeatable=False)

    async def attach_driver(
        self,
        function: str,
        driver: str,
        *,
        host: str = "",
        virtual_address: int = 0,
        main_memory_bytes: int = 0,
        guest: Guest | None = None,
    ) -> TableEntry:
        """Attach a driver to a function and return its table entry; make the driver, on `host`, if it isn't there.

        `virtual_address` is a multiple of 4096, 0 for the first place that is free; `main_memory_bytes` a multiple of
        4096 up to 1 GiB. With `guest` the driver is a virtual machine's.
        """
        for field, value in (("virtual_address", virtual_address), ("main_memory_bytes", main_memory_bytes)):
            if value % PAGE_BYTES:
                raise invalid_field(field, value, f"a multiple of {PAGE_BYTES}")
        request = fleet_pb2.AttachDriverRequest(
            function=check_name("function", function),
            driver=check_name("driver", driver),
            host=check_name("host", host) if host else "",
            virtual_address=_check_number("virtual_address", virtual_address, ADDRESS_SPACE - 1),
            main_memory_bytes=_check_number("main_memory_bytes", main_memory_bytes, MAX_MAIN_MEMORY_BYTES),
            guest=guest,
        )
        response = await self.caller.call(lambda channel: FleetServiceStub(channel).AttachDriver, request)
        return response.entry

    async def detach_driver(self, function: str, driver: str) -> None:
        """End an attachment. Sent once, as `delete_function`."""
        request = fleet_pb2.DetachDriverRequest(
            function=check_name("function", function), driver=check_name("driver", driver)
        )
        await self.caller.call(lambda channel: FleetServiceStub(channel).DetachDriver, request, repeatable=False)

    async def delete_driver(self, driver: str) -> None:
        """End a driver without functions. Sent once, as `delete_function`."""
        request = fleet_pb2.FleetServiceDeleteDriverRequest(driver=check_name("driver", driver))
        await self.caller.call(lambda channel: FleetServiceStub(channel).DeleteDriver, request, repeatable=False)

    async def check_fleet(self, *, repair: bool = False) -> fleet_pb2.CheckFleetResponse:
        """Compare etcd with every host, and repair what can be repaired if asked to."""
        request = fleet_pb2.CheckFleetRequest(repair=repair)
        return await self.caller.call(lambda channel: FleetServiceStub(channel).CheckFleet, request)

    async def bump_generation(self) -> int:
        """Raise the fleet generation by one and return it. Sent once."""
        request = fleet_pb2.BumpGenerationRequest()
        response = await self.caller.call(
            lambda channel: FleetServiceStub(channel).BumpGeneration, request, repeatable=False
        )
        return response.generation

    async def forget_host(self, host: str, *, force: bool = False) -> fleet_pb2.ForgetHostResponse:
        """Take a host that never comes back out of the fleet. Sent once, as `delete_function`."""
        request = fleet_pb2.ForgetHostRequest(host=check_name("host", host), force=force)
        return await self.caller.call(lambda channel: FleetServiceStub(channel).ForgetHost, request, repeatable=False)

    async def cordon(self, kind: str, name: str, *, reason: str = "") -> Cordon:
        """Keep functions from being made in a part of the fleet or moved there, and return its cordon.

        `kind` is host, device, adapter, bridge or power-domain; `name` is HOST, or HOST/NAME.
        """
        request = fleet_pb2.CordonRequest(part=part_of(kind, name), reason=reason)
        response = await self.caller.call(lambda channel: FleetServiceStub(channel).Cordon, request)
        return response.cordon

    async def uncordon(self, kind: str, name: str) -> None:
        """End the cordon of a part of the fleet, if it has one. Sent once: it may be cordoned anew by the next time."""
        request = fleet_pb2.UncordonRequest(part=part_of(kind, name))
        await self.caller.call(lambda channel: FleetServiceStub(channel).Uncordon, request, repeatable=False)

    async def watch_events(self, *, follow: bool = True) -> AsyncGenerator[fleet_pb2.FleetEvent, None]:
        """Yield what has changed in the fleet, as far back as the coordinator remembers, and then what changes.

        After a break it goes on, at whichever coordinator answers, with what came after the last event; what that one
        does not remember is told by an event of its own.
        """
        request = fleet_pb2.WatchEventsRequest(follow=follow)
        method = self.caller.stream(lambda channel: FleetServiceStub(channel).WatchEvents, request)
        async with aclosing(method) as responses:
            async for response in responses:
                for event in response.events:
                    yield event
                    request.after_revision = max(request.after_revision, event.revision)

    async def plan_migration(
        self, moves: Sequence[migration_pb2.MoveRequest], constraints: Constraints | None = None
    ) -> Migration:
        """Return the migration that `create_migration` would begin, and do nothing."""
        request = migration_pb2.PlanMigrationRequest(moves=moves, constraints=constraints)
        response = await self.caller.call(lambda channel: MigrationServiceStub(channel).PlanMigration, request)
        return response.migration

    async def explain_migration(
        self, moves: Sequence[migration_pb2.MoveRequest], constraints: Constraints | None = None
    ) -> migration_pb2.PlanMigrationResponse:
        """Return the migration that `create_migration` would begin, if there is one, and why it is this or none."""
        request = migration_pb2.PlanMigrationRequest(moves=moves, constraints=constraints, explain=True)
        return await self.caller.call(lambda channel: MigrationServiceStub(channel).PlanMigration, request)

    async def create_migration(
        self,
        moves: Sequence[migration_pb2.MoveRequest],
        *,
        name: str = "",
        options: migration_pb2.MigrationOptions | None = None,
        constraints: Constraints | None = None,
        priority: int = 0,
        deadline_ms: int = 0,
    ) -> Migration:
        """Begin a migration of one or more functions, all or none, and return it.

        `name` is the request ID: asking again with the same one gets the same migration. One is made if it is empty.
        If limits don't allow it now, it is queued: the highest `priority` goes first, and it is aborted if it hasn't
        begun after `deadline_ms`, 0 for an hour.
        """
        request = migration_pb2.CreateMigrationRequest(
            request_id=check_name("request_id", name or request_id()),
            moves=moves,
            options=options,
            constraints=constraints,
            priority=priority,
            deadline_ms=deadline_ms,
        )
        response = await self.caller.call(lambda channel: MigrationServiceStub(channel).CreateMigration, request)
        return response.migration

    async def get_migration(self, name: str) -> Migration:
        """Return a migration, running or over. Raise NOT_FOUND."""
        request = migration_pb2.GetMigrationRequest(name=check_name("migration", name))
        response = await self.caller.call(lambda channel: MigrationServiceStub(channel).GetMigration, request)
        return response.migration

    def watch_migration(self, name: str) -> AsyncGenerator[migration_pb2.WatchMigrationResponse, None]:
        """Yield how far the migration is, now and whenever it gets further, until it is over."""
        request = migration_pb2.WatchMigrationRequest(name=check_name("migration", name))
        return self.caller.stream(lambda channel: MigrationServiceStub(channel).WatchMigration, request)

    async def wait_migration(self, name: str) -> Migration:
        """Wait until the migration is over and return it, DONE or ABORTED."""
        request = migration_pb2.WatchMigrationRequest(name=check_name("migration", name), until_over=True)
        method = self.caller.stream(lambda channel: MigrationServiceStub(channel).WatchMigration, request)
        async with aclosing(method) as updates:
            async for update in updates:
                if update.migration.phase in PHASES_OVER:
                    return update.migration
        return await self.get_migration(name)

    async def cancel_migration(self, name: str) -> Migration:
        """Abort a migration that isn't decided and return it. Raise TOO_LATE once it is committed."""
        request = migration_pb2.CancelMigrationRequest(name=check_name("migration", name))
        response = await self.caller.call(lambda channel: MigrationServiceStub(channel).CancelMigration, request)
        return response.migration

    async def drain(
        self,
        kind: str,
        name: str,
        *,
        reason: str = "",
        parallel: int = 0,
        constraints: Constraints | None = None,
        options: migration_pb2.MigrationOptions | None = None,
    ) -> AsyncGenerator[Mapping[str, migration_pb2.MoveProgress], None]:
        """Cordon a part of the fleet and move everything there elsewhere; yield all that was there, as it changes.

        `parallel` migrations go on at once, 0 for 4. It ends when nothing more will move, or goes on at another
        coordinator when one is gone. Who stops to listen stops the drain; the cordon stays.
        """
        request = migration_pb2.DrainRequest(
            part=part_of(kind, name), reason=reason, parallel=parallel, constraints=constraints, options=options
        )
        functions: dict[str, migration_pb2.MoveProgress] = {}
        stream = self.caller.stream(lambda channel: MigrationServiceStub(channel).Drain, request)
        async with aclosing(stream) as responses:
            async for response in responses:
                if response.is_first:
                    for gone in functions.keys() - {each.function for each in response.functions}:
                        functions[gone].state = migration_pb2.MOVE_STATE_MOVED
                functions.update({each.function: each for each in response.functions})
                yield functions
                if response.is_over:
                    return

    async def plan_rearrangement(
        self,
        goal: migration_pb2.RearrangementGoal.ValueType,
        *,
        tolerance_percent: int = 0,
        constraints: Constraints | None = None,
    ) -> migration_pb2.PlanRearrangementResponse:
        """Return what would move to make loads even, or devices or hosts free, and what would come of it."""
        request = migration_pb2.PlanRearrangementRequest(
            goal=goal, tolerance_percent=tolerance_percent, constraints=constraints
        )
        return await self.caller.call(lambda channel: MigrationServiceStub(channel).PlanRearrangement, request)

    async def rearrange(
        self,
        plan: migration_pb2.Rearrangement,
        *,
        parallel: int = 0,
        constraints: Constraints | None = None,
        options: migration_pb2.MigrationOptions | None = None,
    ) -> AsyncGenerator[Mapping[str, migration_pb2.MoveProgress], None]:
        """Do the moves of a plan that was made with the same constraints; yield all of its functions, as they change.

        `parallel` migrations go on at once, 0 for 4. It ends when nothing more will move, or goes on at another
        coordinator when one is gone. Who stops to listen stops it.
        """
        request = migration_pb2.RearrangeRequest(plan=plan, parallel=parallel, constraints=constraints, options=options)
        functions: dict[str, migration_pb2.MoveProgress] = {}
        stream = self.caller.stream(lambda channel: MigrationServiceStub(channel).Rearrange, request)
        async with aclosing(stream) as responses:
            async for response in responses:
                functions.update({each.function: each for each in response.functions})
                yield functions
                if response.is_over:
                    return


async def _all_pages(page: Callable[[str], Awaitable[tuple[Iterable[T], str]]]) -> list[T]:
    items, token = await page("")
    everything = list(items)
    while token:
        items, token = await page(token)
        everything.extend(items)
    return everything


def _named(kind: str, name: str, items: Iterable[tuple[str, T]]) -> T:
    for item_name, item in items:
        if item_name == name:
            return item
    raise not_found(kind, name)


def _check_number(field: str, value: int, largest: int) -> int:
    if not 0 <= value <= largest:
        raise invalid_field(field, value, f"0 to {largest}")
    return value
