"""What a check of the fleet may find: the fleet as etcd and as its hosts have it, differences, and what would end each.

A repair is either one transaction that compares what was read, or one consequence sent to a host. Pure.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from coordinator.snapshot import UNFINISHED, Snapshot, Stored
from coordinator.states import is_over
from vfleet.address import table_offset
from vfleet.etcd.keys import entry_key, function_key, lock_key, migration_key
from vfleet.etcd.store import Compare, Transaction, unchanged
from vfleet.names import host_of
from vfleet.v1.access_pb2 import Session
from vfleet.v1.driver_service_pb2 import (
    CreateDriverRequest,
    DeleteDriverRequest,
    DetachFunctionRequest,
    DriverState,
)
from vfleet.v1.fabric_service_pb2 import ForgetDriverRequest
from vfleet.v1.fleet_service_pb2 import Difference, DifferenceKind
from vfleet.v1.function_service_pb2 import ChangeStateRequest, DestroyFunctionRequest, FunctionInstance
from vfleet.v1.hold_service_pb2 import Hold, LiftHoldRequest
from vfleet.v1.records_pb2 import Function, FunctionStatus, Migration
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.types_pb2 import Attempt, DeviceState, TableEntry

Request = (
    DestroyFunctionRequest
    | ChangeStateRequest
    | CreateDriverRequest
    | DeleteDriverRequest
    | DetachFunctionRequest
    | UpdateTableRequest
    | LiftHoldRequest
    | ForgetDriverRequest
)

SERVING_STATES = frozenset({DeviceState.DEVICE_STATE_RUNNING, DeviceState.DEVICE_STATE_PRE_COPY})
# States in which an instance is, or was, its function's home.
HOME_STATES = SERVING_STATES | {DeviceState.DEVICE_STATE_STOP_COPY, DeviceState.DEVICE_STATE_ERROR}

ASK_AGAIN = "none while a host can't be asked: it may have the function"
"""What ends a difference about which a silent host may know better."""


@dataclass(frozen=True, slots=True)
class HostState:
    """What a host says that it has."""

    instances: tuple[FunctionInstance, ...]
    holds: tuple[Hold, ...]
    drivers: tuple[DriverState, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A request to a host."""

    host: str
    request: Request


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference and what ends it; None if a person must decide."""

    difference: Difference
    repair: Transaction | Call | None


@dataclass(frozen=True, slots=True)
class View:
    """The fleet at one moment: etcd's snapshot, what each host answered, and why the others didn't."""

    snapshot: Snapshot
    hosts: Mapping[str, HostState]
    silent: Mapping[str, str]

    @property
    def attempt(self) -> Attempt:
        """The fence of consequences of what the snapshot says: no earlier attempt is higher, no later one lower."""
        return Attempt(fleet_generation=self.snapshot.fleet_generation, revision=self.snapshot.revision)

    def is_busy(self, function: str) -> bool:
        """Return whether something is under way with the function, so that what it looks like says nothing."""
        lock, stored = self.snapshot.locks.get(function), self.snapshot.functions.get(function)
        return (lock is not None and lock.record in self.snapshot.active_migrations) or (
            stored is not None and stored.record.status in UNFINISHED
        )

    def instances_of(self, function: str) -> Iterator[tuple[str, FunctionInstance]]:
        """Yield the function's instances, each with its host."""
        for host in sorted(self.hosts):
            for instance in self.hosts[host].instances:
                if instance.function == function:
                    yield host, instance

    def entries_of(self, function: str) -> list[Stored[TableEntry]]:
        """Return the entries that etcd has for the function, by driver."""
        entries = self.snapshot.entries
        return [entries[name] for name in sorted(entries) if entries[name].record.function == function]

    def is_over(self, migration: str) -> bool:
        """Return whether a migration is over, or was never begun as far as etcd knows."""
        stored = self.snapshot.migrations.get(migration)
        return stored is None or is_over(stored.record.phase)

    def unchanged_migration(self, migration: str) -> Compare:
        """What holds while the migration's record is the snapshot's, or absent if it is there."""
        return unchanged(migration_key(migration), revision_of(self.snapshot.migrations.get(migration)))

    def unchanged_function(self, function: str) -> tuple[Compare, ...]:
        """What holds while the function's record and lock are the snapshot's, or absent if they are there."""
        stored, lock = self.snapshot.functions.get(function), self.snapshot.locks.get(function)
        return unchanged(function_key(function), revision_of(stored)), unchanged(lock_key(function), revision_of(lock))


def finding(
    kind: DifferenceKind.ValueType,
    *,
    etcd: str,
    remedy: str,
    repair: Transaction | Call | None = None,
    host: str = "",
    says: str = "",
    function: str = "",
    driver: str = "",
    migration: str = "",
) -> Finding:
    """Return a finding; arguments are the fields of `Difference`."""
    difference = Difference(
        kind=kind,
        host=host,
        function=function,
        driver=driver,
        migration=migration,
        etcd_says=etcd,
        host_says=says,
        remedy=remedy,
        repairable=repair is not None,
    )
    return Finding(difference, repair)


def revision_of(stored: Stored[Migration] | Stored[Function] | Stored[TableEntry] | Stored[str] | None) -> int:
    """Return the revision that last wrote a record; 0 for one that is absent, as etcd has it."""
    return stored.mod_revision if stored is not None else 0


def key_of(entry: TableEntry) -> str:
    """Return an entry's key."""
    return entry_key(entry.host, entry.driver, entry.function)


def led_to(entry: TableEntry, function: Function) -> TableEntry:
    """Return an entry as it has to be for the function's record."""
    led = TableEntry()
    led.CopyFrom(entry)
    led.generation = function.generation
    led.offset = table_offset(function.base, entry.virtual_address)
    led.lost = function.status == FunctionStatus.FUNCTION_STATUS_LOST
    led.held = False
    led.revision = 0
    return led


def is_home(function: Function, host: str, instance: FunctionInstance) -> bool:
    """Return whether the instance is the function's, where, and of the generation that, its record says."""
    return host_of(function.device) == host and (
        function.identity,
        function.device,
        function.vf_index,
        function.generation,
    ) == (instance.identity, instance.device, instance.vf_index, instance.generation)


def forgetting(driver: str, function: str, generation: int, as_of: Attempt) -> ForgetDriverRequest:
    """Return what lets a function's home forget a driver that was detached as of then; nothing of what came later."""
    session = Session(fleet_generation=as_of.fleet_generation, revision=as_of.revision, start=(1 << 64) - 1)
    return ForgetDriverRequest(driver=driver, function=function, generation=generation, session=session)


def describe_home(function: Function | None) -> str:
    """Return where a function is, by its record."""
    if function is None:
        return "no such function"
    status = FunctionStatus.Name(function.status).removeprefix("FUNCTION_STATUS_")
    return f"{status}, generation {function.generation} at {function.device} VF {function.vf_index}"


def describe_instance(instance: FunctionInstance) -> str:
    """Return what an instance is."""
    state = DeviceState.Name(instance.state).removeprefix("DEVICE_STATE_")
    whole = "" if instance.complete and not instance.arriving else ", without all of its state"
    return f"{state}, generation {instance.generation} at {instance.device} VF {instance.vf_index}{whole}"


def describe_entry(entry: TableEntry) -> str:
    """Return what an entry maps."""
    lost = ", lost" if entry.lost else ""
    return f"{entry.virtual_address:#x}, offset {entry.offset:#018x}, generation {entry.generation}{lost}"
