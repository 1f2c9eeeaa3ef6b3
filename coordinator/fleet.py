"""Functions, drivers and attachments: made and ended as an etcd transaction, then calls to hosts.

What is recorded is only driven forward. Each operation can be repeated, by anyone, and goes on where the last try
stopped; a try that fails between the record and the host leaves a record that says so.
"""

import asyncio
from dataclasses import replace

from coordinator import transaction
from coordinator.context import Context
from coordinator.guests import check_same_guest, new_guest_driver
from coordinator.planner import (
    check_not_cordoned,
    check_unlocked,
    find_device,
    movable,
    pick_slot,
    registered_incarnation,
)
from coordinator.snapshot import Snapshot, Stored
from coordinator.virtual import check_free, first_free
from vfleet.address import Location, bar_span, table_offset, vf_routing_id
from vfleet.errors import Reason, VfleetError, invalid_field, not_found
from vfleet.etcd.keys import FLEET_GENERATION, host_key
from vfleet.etcd.store import Compare, Put, Target, Transaction, unchanged
from vfleet.limits import MAX_DRIVERS
from vfleet.names import host_of
from vfleet.v1.driver_service_pb2 import (
    AttachFunctionRequest,
    CreateDriverRequest,
    DeleteDriverRequest,
    DetachFunctionRequest,
)
from vfleet.v1.function_service_pb2 import CreateFunctionRequest, DestroyFunctionRequest
from vfleet.v1.records_pb2 import Driver, Function, FunctionStatus
from vfleet.v1.types_pb2 import Attempt, Decision, Guest, TableEntry

TRIES = 8
LOOK_AGAIN_S = 0.5


class Fleet:
    """The operations of FleetService that change the fleet. Arguments that are names are well-formed."""

    def __init__(self, context: Context) -> None:
        self._context = context
        # One at a time, so that those that come together don't plan for the same slot or virtual address.
        self._planning = asyncio.Lock()

    async def create_function(self, name: str, device: str, vf_index: int) -> Function:
        """Make a function on a device, in slot `vf_index` or, with 0, the lowest that is free.

        Raise NOT_FOUND, HOST_CORDONED, NO_FREE_SLOT, SLOT_TAKEN, INVALID_FIELD, HOST_UNAVAILABLE, ALREADY_EXISTS for a
        function of that name elsewhere, ILLEGAL_STATE for one in deletion, FUNCTION_LOST, or what the host answers.
        """
        for _ in range(TRIES):
            async with self._planning:
                snapshot = self._context.snapshot
                stored = snapshot.functions.get(name)
                if stored is None:
                    function = self._new_function(snapshot, name, device, vf_index)
                    parts = snapshot.sites[device].parts
                    await self._commit(transaction.create_function(function, snapshot.fleet_generation_is_this, parts))
                    continue
            if stored.record.device != device or vf_index not in (0, stored.record.vf_index):
                raise VfleetError(
                    Reason.ALREADY_EXISTS,
                    f"function {name!r} exists, on device {stored.record.device} at VF {stored.record.vf_index}",
                    metadata={"function": name, "device": stored.record.device},
                )
            if stored.record.status != FunctionStatus.FUNCTION_STATUS_CREATING:
                return stored.record if name in snapshot.locks else movable(snapshot, name)
            await self._make(stored)
        raise _conflict()

    async def delete_function(self, name: str) -> None:
        """End a function. Raise NOT_FOUND, IN_MIGRATION, IN_USE if it has drivers, or what its host answers with."""
        if name not in self._context.snapshot.functions:
            raise not_found("function", name)
        for _ in range(TRIES):
            snapshot = self._context.snapshot
            stored = snapshot.functions.get(name)
            if stored is None:
                return
            # A deletion of before the fleet generation was raised is begun anew: hosts may refuse its attempt.
            is_present = stored.record.attempt.fleet_generation == snapshot.fleet_generation
            if stored.record.status == FunctionStatus.FUNCTION_STATUS_DELETING and is_present:
                await self._unmake(stored)
                continue
            check_unlocked(snapshot, name)
            if stored.record.drivers:
                raise VfleetError(
                    Reason.IN_USE,
                    f"function {name!r} has drivers: {', '.join(stored.record.drivers)}",
                    metadata={"function": name},
                )
            await self._commit(
                transaction.begin_delete_function(
                    stored.record, stored.mod_revision, snapshot.fleet_generation, snapshot.fleet_generation_is_this
                )
            )
        raise _conflict()

    async def finish(self, name: str) -> None:
        """Drive on a function found in creation or deletion. Raise what its host answers with."""
        for _ in range(TRIES):
            stored = self._context.snapshot.functions.get(name)
            status = stored.record.status if stored else FunctionStatus.FUNCTION_STATUS_UNSPECIFIED
            if stored and status == FunctionStatus.FUNCTION_STATUS_CREATING:
                await self._make(stored)
            elif stored and status == FunctionStatus.FUNCTION_STATUS_DELETING:
                await self.delete_function(name)
            else:
                return
        raise _conflict()

    async def attach_driver(
        self,
        function_name: str,
        driver_name: str,
        *,
        host: str,
        virtual_address: int,
        main_memory_bytes: int,
        guest: Guest | None = None,
    ) -> TableEntry:
        """Attach a driver, made on `host` if it isn't there, at `virtual_address` or, with 0, the first place free.

        With `guest` it is a virtual machine's.

        Raise NOT_FOUND, INVALID_FIELD, HOST_UNAVAILABLE, what `movable` raises, ALREADY_EXISTS for a driver or an
        attachment that is there and differs, LIMIT_EXCEEDED for more drivers than the device allows, or what the host
        answers with.
        """
        for _ in range(TRIES):
            async with self._planning:
                snapshot = self._context.snapshot
                if function_name not in snapshot.functions:
                    raise not_found("function", function_name)
                function = snapshot.functions[function_name].record
                driver, revision = _driver(snapshot, driver_name, host, main_memory_bytes, guest, function)
                existing = snapshot.entries_of(driver_name).get(function_name)
                if existing is None:
                    function = movable(snapshot, function_name)
                    _check_has_room(snapshot, function)
                    registered_incarnation(snapshot, driver.host)
                    entry = _entry(snapshot, function, driver, virtual_address)
                    function_revision = snapshot.functions[function_name].mod_revision
                    attachment = transaction.attach_driver(function, function_revision, driver, revision, entry)
                    # A host that is being forgotten gets no driver any more.
                    made = snapshot.hosts[driver.host].create_revision
                    present = Compare(host_key(driver.host), Target.CREATE_REVISION, made)
                    await self._commit(replace(attachment, compares=(*attachment.compares, present)))
                    continue
            _check_same_address(existing.record, virtual_address)
            await self._tell_attached(driver, existing)
            return existing.record
        raise _conflict()

    async def detach_driver(self, function_name: str, driver_name: str) -> None:
        """End an attachment; one that is not there counts as ended. Raise NOT_FOUND, IN_MIGRATION, or the host's."""
        for _ in range(TRIES):
            snapshot = self._context.snapshot
            function, driver = snapshot.functions.get(function_name), snapshot.drivers.get(driver_name)
            if function is None:
                raise not_found("function", function_name)
            if driver is None:
                raise not_found("driver", driver_name)
            stored = snapshot.entries_of(driver_name).get(function_name)
            if stored is None:
                # Whatever the host has for the pair at this revision or before is over.
                request = DetachFunctionRequest(driver=driver_name, function=function_name, revision=snapshot.revision)
                await self._context.hosts.detach_function(driver.record.host, request)
                return
            check_unlocked(snapshot, function_name)
            await self._commit(
                transaction.detach_driver(function.record, function.mod_revision, stored.record, stored.mod_revision)
            )
        raise _conflict()

    async def delete_driver(self, name: str) -> None:
        """End a driver. Raise NOT_FOUND, IN_USE if it has functions, or what its host answers with.

        The host goes first: its driver without a record would be unknown to all, and a record without it is repaired
        by the next attachment or deletion.
        """
        if name not in self._context.snapshot.drivers:
            raise not_found("driver", name)
        for _ in range(TRIES):
            snapshot = self._context.snapshot
            stored = snapshot.drivers.get(name)
            if stored is None:
                return
            functions = snapshot.entries_of(name)
            if functions:
                raise VfleetError(
                    Reason.IN_USE, f"driver {name!r} has functions: {', '.join(functions)}", metadata={"driver": name}
                )
            await self._context.hosts.delete_driver(stored.record.host, DeleteDriverRequest(driver=name))
            await self._commit(transaction.delete_driver(stored.record, stored.mod_revision))
        raise _conflict()

    def _new_function(self, snapshot: Snapshot, name: str, device_name: str, vf_index: int) -> Function:
        device = find_device(snapshot, device_name)
        check_not_cordoned(snapshot, device.name)
        index = pick_slot(snapshot, device, vf_index, field="vf_index")
        routing_id = vf_routing_id(device.routing_id, device.first_vf_offset, device.vf_stride, index)
        return Function(
            name=name,
            identity=self._context.random.randrange(1, 1 << 64),
            generation=1,
            device=device_name,
            vf_index=index,
            base=Location(snapshot.hosts[device.host].record.segment, routing_id).base,
            bars=device.bars,
            status=FunctionStatus.FUNCTION_STATUS_CREATING,
            attempt=Attempt(fleet_generation=snapshot.fleet_generation),
            model=device.model,
            incarnation=registered_incarnation(snapshot, device.host),
        )

    async def _make(self, stored: Stored[Function]) -> None:
        """Have the host make a recorded function, and record that it has."""
        function = stored.record
        host = host_of(function.device)
        incarnation = registered_incarnation(self._context.snapshot, host)
        request = CreateFunctionRequest(
            attempt=Attempt(
                fleet_generation=function.attempt.fleet_generation,
                revision=stored.create_revision,
            ),
            function=function.name,
            generation=function.generation,
            device=function.device,
            vf_index=function.vf_index,
            bars=function.bars,
            identity=function.identity,
            model=function.model,
            fresh=True,
        )
        try:
            await self._context.hosts.create_function(host, request)
        except VfleetError as error:
            is_earlier = function.attempt.fleet_generation < self._context.snapshot.fleet_generation
            if error.reason is not Reason.STALE_ATTEMPT or not is_earlier:
                raise
            # A backup has forgotten that it was made, and what came after. Where it is, `doctor` finds.
        await self._commit(
            transaction.activate_function(function, stored.create_revision, stored.mod_revision, incarnation)
        )

    async def _unmake(self, stored: Stored[Function]) -> None:
        """Have the host destroy a function in deletion, unless that machine is gone, and delete the record."""
        function = stored.record
        host = host_of(function.device)
        snapshot = self._context.snapshot
        is_known = bool(function.incarnation) or host not in snapshot.hosts
        if not (is_known and snapshot.is_gone(host, function.incarnation)):
            request = DestroyFunctionRequest(
                attempt=Attempt(
                    fleet_generation=function.attempt.fleet_generation,
                    revision=stored.mod_revision,
                ),
                function=function.name,
                generation=function.generation,
                decision=Decision.DECISION_COMMITTED,
            )
            await self._context.hosts.destroy_function(host, request)
        await self._commit(transaction.finish_delete_function(function, stored.mod_revision))

    async def _tell_attached(self, driver: Driver, stored: Stored[TableEntry]) -> None:
        # Its record was made with its first entry: at this one's revision, or before.
        request = CreateDriverRequest(
            driver=driver.name,
            main_memory_bytes=driver.main_memory_bytes,
            revision=stored.mod_revision,
            guest=driver.guest if driver.HasField("guest") else None,
        )
        await self._context.hosts.create_driver(driver.host, request)
        entry = TableEntry()
        entry.CopyFrom(stored.record)
        entry.revision = stored.mod_revision
        await self._context.hosts.attach_function(driver.host, AttachFunctionRequest(entry=entry))

    async def _commit(self, change: Transaction) -> None:
        """Carry out a transaction and bring the inventory up to it, so that the next look shows whether it happened."""
        try:
            committed = await self._context.store.commit(change)
        except VfleetError as error:
            if error.reason is not Reason.OUTCOME_UNKNOWN:
                raise
            await self._context.clock.sleep(LOOK_AGAIN_S)
        else:
            await self._context.catch_up(committed)


async def bump_generation(context: Context) -> int:
    """Raise the fleet generation by one and return it. Raise CONFLICT if another raises it at the same moment."""
    stored = await context.store.get(FLEET_GENERATION)
    raised = int(stored.value) + 1 if stored is not None else 2
    compare = unchanged(FLEET_GENERATION, stored.mod_revision if stored is not None else 0)
    committed = await context.store.commit(Transaction((compare,), (Put(FLEET_GENERATION, str(raised).encode()),)))
    if not committed.succeeded:
        raise VfleetError(Reason.CONFLICT, f"another raised the fleet generation to {raised}")
    await context.inventory.until(lambda: context.snapshot.fleet_generation >= raised)
    return raised


def _driver(
    snapshot: Snapshot, name: str, host: str, main_memory_bytes: int, guest: Guest | None, function: Function
) -> tuple[Driver, int]:
    """Return the driver, or the one to be made, and the revision that last wrote its record (0 if none has)."""
    stored = snapshot.drivers.get(name)
    if stored is None:
        if not host:
            raise invalid_field("host", host, f"the host of driver {name!r}, which doesn't exist yet")
        if host not in snapshot.hosts:
            raise not_found("host", host)
        if guest is not None:
            device = find_device(snapshot, function.device)
            return new_guest_driver(name, host, main_memory_bytes, guest, function, device), 0
        return Driver(name=name, host=host, main_memory_bytes=main_memory_bytes), 0
    driver = stored.record
    check_same_guest(driver, guest, function, snapshot.entries_of(name))
    if host not in ("", driver.host) or main_memory_bytes not in (0, driver.main_memory_bytes):
        raise VfleetError(
            Reason.ALREADY_EXISTS,
            f"driver {name!r} exists, on host {driver.host!r} with {driver.main_memory_bytes} bytes of main memory",
            metadata={"driver": name, "host": driver.host},
        )
    return driver, stored.mod_revision


def _check_has_room(snapshot: Snapshot, function: Function) -> None:
    """Raise LIMIT_EXCEEDED if the function has as many drivers as its device lets it have."""
    limit = find_device(snapshot, function.device).max_drivers or MAX_DRIVERS
    if len(function.drivers) >= limit:
        raise VfleetError(
            Reason.LIMIT_EXCEEDED,
            f"function {function.name!r} is attached to {', '.join(function.drivers)}; expected no more than {limit},"
            f" the most drivers that a function of model {function.model!r} can have",
            metadata={"function": function.name},
        )


def _entry(snapshot: Snapshot, function: Function, driver: Driver, virtual_address: int) -> TableEntry:
    length = bar_span({bar.index: bar.size_bytes for bar in function.bars})
    entries = [stored.record for stored in snapshot.entries_of(driver.name).values()]
    if virtual_address:
        check_free(virtual_address, length, entries, driver.main_memory_bytes)
    else:
        virtual_address = first_free(length, entries, driver.main_memory_bytes)
    return TableEntry(
        driver=driver.name,
        function=function.name,
        virtual_address=virtual_address,
        length_bytes=length,
        offset=table_offset(function.base, virtual_address),
        generation=function.generation,
        host=driver.host,
    )


def _check_same_address(entry: TableEntry, virtual_address: int) -> None:
    if virtual_address not in (0, entry.virtual_address):
        raise VfleetError(
            Reason.ALREADY_EXISTS,
            f"driver {entry.driver!r} has function {entry.function!r} at {entry.virtual_address:#x}",
            metadata={"driver": entry.driver, "function": entry.function},
        )


def _conflict() -> VfleetError:
    return VfleetError(Reason.CONFLICT, f"the fleet changed {TRIES} times meanwhile; try again")
