"""The gRPC edge: requests checked, work handed on, records shown. Thin."""

# ruff: noqa: N802, ARG002  # methods are named and called as the protos say

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TypeVar

from coordinator.context import Context
from coordinator.cordon import cordon, uncordon
from coordinator.dispatch import end_queued
from coordinator.doctor import Doctor
from coordinator.explanation import explain
from coordinator.fleet import Fleet, bump_generation
from coordinator.forget import forget_host
from coordinator.guests import checked_guest
from coordinator.many_moves_service import CurrentTerm, ManyMovesService, RpcContext, present
from coordinator.migration import Run
from coordinator.planner import Limits, ask, draft, plan
from coordinator.queueing import as_migration
from coordinator.requests import (
    checked_constraints,
    checked_deadline,
    checked_moves,
    checked_options,
    checked_page_size,
    checked_priority,
    checked_reason,
    checked_revision,
    page_of,
)
from coordinator.snapshot import Snapshot, Stored
from coordinator.states import is_over
from vfleet.address import PAGE_BYTES
from vfleet.decision import abort_transaction, outcome
from vfleet.errors import Reason, VfleetError, invalid_field, not_found
from vfleet.etcd.keys import migration_key, queue_key
from vfleet.etcd.records import decode
from vfleet.limits import MAX_MAIN_MEMORY_BYTES
from vfleet.names import check_device_name, check_name
from vfleet.parts import check_part
from vfleet.v1 import fleet_service_pb2 as fleet_pb
from vfleet.v1 import migration_service_pb2 as migration_pb
from vfleet.v1.fleet_service_pb2_grpc import FleetServiceServicer
from vfleet.v1.placement_pb2 import Constraints
from vfleet.v1.records_pb2 import Driver, Function, Host, Migration, Phase, Step
from vfleet.v1.types_pb2 import Decision

MAX_EXPLANATION_BYTES = 4 << 20  # what clients in any language take, unless they are told to take more
# Records of migrations of large groups make a page shorter: it is to be one message.
MAX_PAGE_BYTES = MAX_EXPLANATION_BYTES // 2

ResultT = TypeVar("ResultT")


class MigrationService(ManyMovesService):
    """Migrations. `term` returns the term of the moment, if there is one."""

    async def PlanMigration(
        self, request: migration_pb.PlanMigrationRequest, context: RpcContext
    ) -> migration_pb.PlanMigrationResponse:
        """Show what CreateMigration would do, and why."""
        moves, constraints = checked_moves(request.moves), checked_constraints(request.constraints)
        if request.explain:
            await self._context.be_current()
        return await self._context.upheld(lambda: self._planned(moves, constraints, explained=request.explain))

    async def CreateMigration(
        self, request: migration_pb.CreateMigrationRequest, context: RpcContext
    ) -> migration_pb.CreateMigrationResponse:
        """Begin a migration."""
        if request.request_id:
            name = check_name("request_id", request.request_id)
        else:
            name = f"m-{self._context.random.getrandbits(64):016x}"
        options = checked_options(request.options)
        wanted = migration_pb.CreateMigrationRequest(
            request_id=name,
            moves=checked_moves(request.moves),
            options=request.options,
            constraints=checked_constraints(request.constraints),
            priority=checked_priority(request.priority),
            deadline_ms=checked_deadline(request.deadline_ms),
        )
        term = present(self._term(), self._context)
        stored = await self._context.upheld(lambda: term.begin(wanted, options))
        return migration_pb.CreateMigrationResponse(migration=_shown(stored))

    async def GetMigration(
        self, request: migration_pb.GetMigrationRequest, context: RpcContext
    ) -> migration_pb.GetMigrationResponse:
        """Show a migration as etcd has it."""
        stored = await self._read(check_name("name", request.name))
        return migration_pb.GetMigrationResponse(migration=_shown(stored))

    async def ListMigrations(
        self, request: migration_pb.ListMigrationsRequest, context: RpcContext
    ) -> migration_pb.ListMigrationsResponse:
        """Show migrations, the newest first; a page's token is the revision of BEGIN of its last."""
        size = checked_page_size(request.page_size)
        before = checked_revision(request.page_token) if request.page_token else None
        function = check_name("function", request.function) if request.function else ""
        snapshot = self._context.snapshot
        table = snapshot.active_migrations if request.active_only else snapshot.migrations
        every = [*map(as_migration, snapshot.queue.values()), *table.values()]
        stored = sorted(
            (
                each
                for each in every
                if (before is None or each.create_revision < before)
                and (not function or any(move.function == function for move in each.record.moves))
            ),
            key=lambda each: each.create_revision,
            reverse=True,
        )
        response, size_bytes, last = migration_pb.ListMigrationsResponse(), 0, 0
        for each in stored[:size]:
            size_bytes += each.record.ByteSize()
            if response.migrations and size_bytes > MAX_PAGE_BYTES:
                break
            response.migrations.append(_shown(each))
            last = each.create_revision
        if len(response.migrations) < len(stored):
            response.next_page_token = str(last)
        return response

    async def WatchMigration(
        self, request: migration_pb.WatchMigrationRequest, context: RpcContext
    ) -> AsyncIterator[migration_pb.WatchMigrationResponse]:
        """Send the migration now and whenever it gets further, until it is over; or only when it is over."""
        name = check_name("name", request.name)
        inventory = self._context.inventory
        if self._run(name) is None:
            await inventory.wait_for((await self._read(name)).mod_revision)
        if request.until_over:
            await inventory.until(lambda: is_over(self._stored(name).record.phase), name)
        sent: migration_pb.WatchMigrationResponse | None = None
        while sent is None or not is_over(sent.migration.phase):
            await inventory.until(lambda: self._progress(name) != sent, name)  # noqa: B023
            sent = self._progress(name)
            yield sent

    async def CancelMigration(
        self, request: migration_pb.CancelMigrationRequest, context: RpcContext
    ) -> migration_pb.CancelMigrationResponse:
        """Abort a migration that is queued or isn't decided, whoever owns it."""
        name = check_name("name", request.name)
        while (queued := await self._read_queued(name)) is not None:
            reason = f"cancelled by a request to coordinator {self._context.name!r} before it began"
            await end_queued(self._context, queued, reason, Reason.CANCELLED)
        stored = await self._read(name)
        run = self._run(name)
        while outcome(stored.record) == Decision.DECISION_UNSPECIFIED:
            abort = abort_transaction(
                stored.record,
                stored.mod_revision,
                f"cancelled by a request to coordinator {self._context.name!r}",
                run.state.step if run else Step.STEP_UNSPECIFIED,
                self._context.clock.time(),
                owner=None,
                cause=Reason.CANCELLED,
            )
            await self._context.store.commit(abort)
            stored = await self._read(name)
        if outcome(stored.record) == Decision.DECISION_COMMITTED:
            message = f"migration {name!r} is committed: too late to cancel"
            raise VfleetError(Reason.TOO_LATE, message, metadata={"migration": name})
        return migration_pb.CancelMigrationResponse(migration=_shown(stored))

    async def _planned(
        self, moves: Sequence[migration_pb.MoveRequest], constraints: Constraints, *, explained: bool
    ) -> migration_pb.PlanMigrationResponse:
        snapshot, name, limits = self._context.snapshot, self._context.name, self._context.limits
        if explained:
            # A large fleet takes seconds, in which drivers may be on hold.
            return await asyncio.to_thread(_explained, snapshot.still(), moves, constraints, name, limits)
        migration = plan(snapshot, moves, name="", coordinator=name, limits=limits, constraints=constraints)
        return migration_pb.PlanMigrationResponse(migration=migration)

    async def _read(self, name: str) -> Stored[Migration]:
        # In this order: it leaves the queue as its record comes.
        queued = await self._read_queued(name)
        kv = await self._context.store.get(migration_key(name))
        if kv is not None:
            return Stored(decode(Migration, kv), kv.create_revision, kv.mod_revision)
        if queued is None:
            raise not_found("migration", name)
        return as_migration(queued)

    async def _read_queued(self, name: str) -> Stored[migration_pb.QueuedMigration] | None:
        kv = await self._context.store.get(queue_key(name))
        if kv is None:
            return None
        return Stored(decode(migration_pb.QueuedMigration, kv), kv.create_revision, kv.mod_revision)

    def _run(self, name: str) -> Run | None:
        term = self._term()
        return term.runs.get(name) if term else None

    def _stored(self, name: str) -> Stored[Migration]:
        snapshot = self._context.snapshot
        stored = snapshot.migrations.get(name)
        if stored is None and name in snapshot.queue:
            stored = as_migration(snapshot.queue[name])
        if stored is None:
            raise not_found("migration", name)
        return stored

    def _progress(self, name: str) -> migration_pb.WatchMigrationResponse:
        response = migration_pb.WatchMigrationResponse(migration=_shown(self._stored(name)))
        run = self._run(name)
        if run is not None:
            response.step = run.state.step
            response.copies.extend(run.copies.progress())
        return response


class FleetService(FleetServiceServicer):
    """Hosts, devices, functions and drivers. Lists show the inventory; changes go on if the caller goes away."""

    def __init__(self, context: Context, term: CurrentTerm) -> None:
        self._context = context
        self._fleet = Fleet(context)
        self._doctor = Doctor(context)
        self._term = term

    async def ListHosts(self, request: fleet_pb.ListHostsRequest, context: RpcContext) -> fleet_pb.ListHostsResponse:
        """Show hosts."""
        snapshot = self._context.snapshot
        names, token = page_of(snapshot.hosts, request)
        return fleet_pb.ListHostsResponse(
            hosts=[_host(snapshot, name) for name in names],
            next_page_token=token,
        )

    async def ListDevices(
        self, request: fleet_pb.ListDevicesRequest, context: RpcContext
    ) -> fleet_pb.ListDevicesResponse:
        """Show devices and the use of their slots."""
        snapshot = self._context.snapshot
        names, token = page_of(snapshot.devices, request)
        response = fleet_pb.ListDevicesResponse(next_page_token=token)
        for name in names:
            device, slots = snapshot.devices[name], snapshot.slots_of(name).values()
            reserved = sum(bool(slot.record.migration) for slot in slots)
            response.devices.add(
                device=device,
                segment=snapshot.hosts[device.host].record.segment,
                used_slots=len(slots) - reserved,
                reserved_slots=reserved,
            )
        return response

    async def ListFunctions(
        self, request: fleet_pb.FleetServiceListFunctionsRequest, context: RpcContext
    ) -> fleet_pb.FleetServiceListFunctionsResponse:
        """Show functions, with the migration that each is in."""
        names, token = page_of(self._context.snapshot.functions, request)
        return fleet_pb.FleetServiceListFunctionsResponse(functions=map(self._function, names), next_page_token=token)

    async def ListDrivers(
        self, request: fleet_pb.FleetServiceListDriversRequest, context: RpcContext
    ) -> fleet_pb.FleetServiceListDriversResponse:
        """Show drivers with their entries, sorted by virtual address."""
        snapshot = self._context.snapshot
        names, token = page_of(snapshot.drivers, request)
        response = fleet_pb.FleetServiceListDriversResponse(next_page_token=token)
        for name in names:
            driver = Driver()
            driver.CopyFrom(snapshot.drivers[name].record)
            entries = (stored.record for stored in snapshot.entries_of(name).values())
            driver.entries.extend(sorted(entries, key=lambda entry: entry.virtual_address))
            driver.guest_state = snapshot.guest_state(driver)
            response.drivers.append(driver)
        return response

    async def CreateFunction(
        self, request: fleet_pb.FleetServiceCreateFunctionRequest, context: RpcContext
    ) -> fleet_pb.FleetServiceCreateFunctionResponse:
        """Make a function."""
        name = check_name("function", request.function)
        device = check_device_name("device", request.device)
        await self._do(lambda: self._fleet.create_function(name, device, request.vf_index))
        return fleet_pb.FleetServiceCreateFunctionResponse(function=self._function(name))

    async def DeleteFunction(
        self, request: fleet_pb.DeleteFunctionRequest, context: RpcContext
    ) -> fleet_pb.DeleteFunctionResponse:
        """End a function."""
        name = check_name("function", request.function)
        await self._do(lambda: self._fleet.delete_function(name))
        return fleet_pb.DeleteFunctionResponse()

    async def AttachDriver(
        self, request: fleet_pb.AttachDriverRequest, context: RpcContext
    ) -> fleet_pb.AttachDriverResponse:
        """Attach a driver."""
        function, driver = check_name("function", request.function), check_name("driver", request.driver)
        host = check_name("host", request.host) if request.host else ""
        memory = request.main_memory_bytes
        if memory % PAGE_BYTES or memory > MAX_MAIN_MEMORY_BYTES:
            expected = f"a multiple of {PAGE_BYTES}, at most {MAX_MAIN_MEMORY_BYTES}"
            raise invalid_field("main_memory_bytes", memory, expected)
        guest = checked_guest(request.guest) if request.HasField("guest") else None
        entry = await self._do(
            lambda: self._fleet.attach_driver(
                function,
                driver,
                host=host,
                virtual_address=request.virtual_address,
                main_memory_bytes=memory,
                guest=guest,
            )
        )
        return fleet_pb.AttachDriverResponse(entry=entry)

    async def DetachDriver(
        self, request: fleet_pb.DetachDriverRequest, context: RpcContext
    ) -> fleet_pb.DetachDriverResponse:
        """End an attachment."""
        function, driver = check_name("function", request.function), check_name("driver", request.driver)
        await self._do(lambda: self._fleet.detach_driver(function, driver))
        return fleet_pb.DetachDriverResponse()

    async def DeleteDriver(
        self, request: fleet_pb.FleetServiceDeleteDriverRequest, context: RpcContext
    ) -> fleet_pb.FleetServiceDeleteDriverResponse:
        """End a driver."""
        name = check_name("driver", request.driver)
        await self._do(lambda: self._fleet.delete_driver(name))
        return fleet_pb.FleetServiceDeleteDriverResponse()

    async def CheckFleet(self, request: fleet_pb.CheckFleetRequest, context: RpcContext) -> fleet_pb.CheckFleetResponse:
        """Compare etcd with every host, and repair if asked to."""
        if not request.repair:
            return fleet_pb.CheckFleetResponse(differences=await self._doctor.check())
        left, repaired = await present(self._term(), self._context).do(self._doctor.repair())
        return fleet_pb.CheckFleetResponse(differences=left, repaired=repaired)

    async def BumpGeneration(
        self, request: fleet_pb.BumpGenerationRequest, context: RpcContext
    ) -> fleet_pb.BumpGenerationResponse:
        """Raise the fleet generation. This alone is done also while etcd is behind."""
        return fleet_pb.BumpGenerationResponse(generation=await bump_generation(self._context))

    async def ForgetHost(self, request: fleet_pb.ForgetHostRequest, context: RpcContext) -> fleet_pb.ForgetHostResponse:
        """Take a host out of the fleet."""
        host = check_name("host", request.host)
        return await present(self._term(), self._context).do(forget_host(self._context, host, force=request.force))

    async def Cordon(self, request: fleet_pb.CordonRequest, context: RpcContext) -> fleet_pb.CordonResponse:
        """Keep functions from being made in a part of the fleet or moved there."""
        part, reason = check_part("part", request.part), checked_reason(request.reason)
        return fleet_pb.CordonResponse(cordon=await self._do(lambda: cordon(self._context, part, reason)))

    async def Uncordon(self, request: fleet_pb.UncordonRequest, context: RpcContext) -> fleet_pb.UncordonResponse:
        """End that."""
        part = check_part("part", request.part)
        await self._do(lambda: uncordon(self._context, part))
        return fleet_pb.UncordonResponse()

    async def WatchEvents(
        self, request: fleet_pb.WatchEventsRequest, context: RpcContext
    ) -> AsyncIterator[fleet_pb.WatchEventsResponse]:
        """Send what has changed, and go on if asked to."""
        if request.after_revision < 0:
            raise invalid_field("after_revision", request.after_revision, "a revision of etcd, or 0")
        log = self._context.inventory.log
        position = log.start(request.after_revision)
        while True:
            events, position = log.read(position), log.end
            if events:
                yield fleet_pb.WatchEventsResponse(events=events)
            if not request.follow:
                return
            await self._context.inventory.until(lambda: log.end > position)  # noqa: B023

    async def _do(self, work: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Do a change of the fleet under the present term."""
        return await present(self._term(), self._context).do(self._context.upheld(work))

    def _function(self, name: str) -> Function:
        snapshot = self._context.snapshot
        stored = snapshot.functions.get(name)
        if stored is None:
            raise not_found("function", name)
        function = Function()
        function.CopyFrom(stored.record)
        if name in snapshot.locks:
            function.migration = snapshot.locks[name].record
        return function


def _explained(
    snapshot: Snapshot, moves: Sequence[migration_pb.MoveRequest], constraints: Constraints, name: str, limits: Limits
) -> migration_pb.PlanMigrationResponse:
    """Return the plan of the coordinator of that name, if there is one, and why it is this or none."""
    question = ask(snapshot, moves, constraints)
    answer = question.answer()
    response = migration_pb.PlanMigrationResponse(explanation=explain(question, answer))
    if answer is not None:
        drafted = draft(snapshot, moves, answer, name="", coordinator=name, limits=limits, constraints=constraints)
        response.migration.CopyFrom(drafted)
    if response.ByteSize() > MAX_EXPLANATION_BYTES:
        message = f"the explanation has {response.ByteSize()} bytes; expected at most {MAX_EXPLANATION_BYTES}"
        raise VfleetError(Reason.LIMIT_EXCEEDED, message)
    return response


def _shown(stored: Stored[Migration]) -> Migration:
    """Return the record with the attempt whole: its revision is the key's, and not stored."""
    migration = Migration()
    migration.CopyFrom(stored.record)
    if migration.phase != Phase.PHASE_QUEUED:
        migration.attempt.revision = stored.create_revision
    return migration


def _host(snapshot: Snapshot, name: str) -> Host:
    host = Host()
    host.CopyFrom(snapshot.hosts[name].record)
    host.ClearField("devices")
    host.registered = name in snapshot.registrations
    host.cordons.extend(snapshot.cordons[part].record for part in snapshot.cordons_of(name))
    return host
