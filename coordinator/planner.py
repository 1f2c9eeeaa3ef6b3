"""From what is asked for to a plan: a snapshot and moves in, a Migration out, or one error that says why not. Pure.

A move within one device needs a VF index other than the present one: without an index, or with the present one, the
target is the source. Free slots are handed out lowest first, after the slots that moves name.
"""

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from coordinator import transaction
from coordinator.snapshot import Snapshot
from vfleet.address import Location, table_offset, vf_routing_id
from vfleet.decision import MAX_ABORT_REASON_CHARACTERS
from vfleet.errors import Reason, VfleetError, invalid_field, not_found
from vfleet.etcd.keys import FLEET_GENERATION
from vfleet.etcd.store import Transaction, absent
from vfleet.names import host_of
from vfleet.v1.migration_service_pb2 import MoveRequest
from vfleet.v1.records_pb2 import Device, EntryChange, Function, FunctionStatus, Migration, Move, Phase, Place
from vfleet.v1.types_pb2 import Attempt

# What a record may grow by between BEGIN and FINISH: times, durations of steps, and a reason in 4-byte characters.
RECORD_GROWTH_BYTES = 4 * MAX_ABORT_REASON_CHARACTERS + 1024

Slot = tuple[str, int]
"""A device, as HOST/DEVICE, and the index of a VF."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one etcd transaction may have."""

    operations: int
    request_bytes: int


def plan(
    snapshot: Snapshot,
    requests: Sequence[MoveRequest],
    *,
    name: str,
    coordinator: str,
    limits: Limits,
    spoken_for: Collection[Slot] = (),
) -> Migration:
    """Return the migration that does `requests`, with its phase not set. Names in requests are well-formed.

    Slots `spoken_for` are not handed out, though they are free still.

    Raise VfleetError: INVALID_FIELD (no moves, a function or a slot twice, an index that the device hasn't),
    NOT_FOUND, FUNCTION_LOST, ILLEGAL_STATE, IN_MIGRATION, TARGET_IS_SOURCE, INCOMPATIBLE_DEVICE, NO_FREE_SLOT,
    SLOT_TAKEN, HOST_UNAVAILABLE, GROUP_TOO_LARGE, or CONFLICT if the snapshot is not one of a sound fleet.
    """
    if not requests:
        raise invalid_field("moves", [], "1 move or more")
    functions: list[Function] = []
    for index, request in enumerate(requests):
        if request.function in (function.name for function in functions):
            raise invalid_field(f"moves[{index}].function", request.function, "each function once")
        function = movable(snapshot, request.function)
        device = find_device(snapshot, request.target_device)
        if request.target_device == function.device and request.target_vf_index in (0, function.vf_index):
            raise VfleetError(
                Reason.TARGET_IS_SOURCE,
                f"function {function.name!r} is on device {function.device} at VF {function.vf_index} already",
                metadata={"function": function.name, "device": function.device},
            )
        check_compatible(function, find_device(snapshot, function.device), device)
        functions.append(function)
    indices = _target_indices(snapshot, requests, spoken_for)
    moves = [
        _move(snapshot, function, request.target_device, vf_index)
        for function, request, vf_index in zip(functions, requests, indices, strict=True)
    ]
    migration = Migration(
        name=name,
        attempt=Attempt(fleet_generation=snapshot.fleet_generation),
        moves=moves,
        coordinator=coordinator,
    )
    check_size(migration, limits)
    return migration


def movable(snapshot: Snapshot, name: str) -> Function:
    """Return a function that has a home and is in no migration. Raise VfleetError otherwise."""
    stored = snapshot.functions.get(name)
    if stored is None:
        raise not_found("function", name)
    function = stored.record
    check_unlocked(snapshot, name)
    host = host_of(function.device)
    if function.status == FunctionStatus.FUNCTION_STATUS_LOST or (
        function.status == FunctionStatus.FUNCTION_STATUS_ACTIVE and snapshot.is_gone(host, function.incarnation)
    ):
        raise VfleetError(
            Reason.FUNCTION_LOST,
            f"function {name!r} was lost when host {host!r} was started anew",
            metadata={"function": name, "host": host},
        )
    if function.status != FunctionStatus.FUNCTION_STATUS_ACTIVE:
        status = FunctionStatus.Name(function.status).removeprefix("FUNCTION_STATUS_")
        raise VfleetError(
            Reason.ILLEGAL_STATE,
            f"function {name!r} is {status}; expected ACTIVE",
            metadata={"function": name, "status": status},
        )
    return function


def check_unlocked(snapshot: Snapshot, function: str) -> None:
    """Raise IN_MIGRATION, naming the migration, if the function is in one."""
    lock = snapshot.locks.get(function)
    if lock is not None:
        raise VfleetError(
            Reason.IN_MIGRATION,
            f"function {function!r} is in migration {lock.record!r}",
            metadata={"function": function, "migration": lock.record},
        )


def find_device(snapshot: Snapshot, name: str) -> Device:
    """Return a device by its name, HOST/DEVICE. Raise NOT_FOUND, for the host if that is what isn't there."""
    device = snapshot.devices.get(name)
    if device is None:
        host = host_of(name)
        raise not_found("device", name) if host in snapshot.hosts else not_found("host", host)
    return device


def check_compatible(function: Function, source: Device, target: Device) -> None:
    """Raise INCOMPATIBLE_DEVICE unless `target` can be the function's home, as its device `source` is."""
    bars = {bar.index: bar.size_bytes for bar in target.bars}
    differences = []
    if target.model != function.model:
        differences.append(f"its model is {target.model!r}; expected {function.model!r}")
    if target.manufacturer != source.manufacturer:
        differences.append(f"its manufacturer is {_ids(target)}; expected {_ids(source)}")
    for bar in function.bars:
        size = bars.get(bar.index, 0)
        if size < bar.size_bytes:
            differences.append(f"its BAR {bar.index} has {size} bytes; expected at least {bar.size_bytes}")
    if differences:
        raise VfleetError(
            Reason.INCOMPATIBLE_DEVICE,
            f"device {target.name} can't be the home of function {function.name!r}: {'; '.join(differences)}",
            metadata={"function": function.name, "device": target.name},
        )


def registered_incarnation(snapshot: Snapshot, host: str) -> str:
    """Return the incarnation under which the host is registered. Raise HOST_UNAVAILABLE if it isn't."""
    incarnation = snapshot.incarnation(host)
    if incarnation is None:
        raise VfleetError(Reason.HOST_UNAVAILABLE, f"host {host!r} is not registered", metadata={"host": host})
    return incarnation


def pick_slot(snapshot: Snapshot, device: Device, wanted: int, *, field: str, reserved: Collection[int] = ()) -> int:
    """Return VF index `wanted` of the device, or with 0 the lowest that is neither taken nor `reserved`.

    Raise SLOT_TAKEN, NO_FREE_SLOT, or INVALID_FIELD naming `field` for an index that the device hasn't.
    """
    taken = snapshot.slots_of(device.name)
    if wanted > device.total_vfs:
        raise invalid_field(field, wanted, f"1 to {device.total_vfs}, the VFs of device {device.name}")
    if wanted in taken:
        function = taken[wanted].record.function
        raise VfleetError(
            Reason.SLOT_TAKEN,
            f"VF {wanted} of device {device.name} is taken by function {function!r}",
            metadata={"device": device.name, "vf_index": str(wanted), "function": function},
        )
    if wanted:
        return wanted
    for index in range(1, device.total_vfs + 1):
        if index not in taken and index not in reserved:
            return index
    raise VfleetError(
        Reason.NO_FREE_SLOT,
        f"device {device.name} has no free slot: all of its {device.total_vfs} VFs are taken",
        metadata={"device": device.name},
    )


def place(snapshot: Snapshot, device: Device, vf_index: int, generation: int) -> Place:
    """Return a place as the snapshot has it. Raise HOST_UNAVAILABLE if its host isn't registered."""
    routing_id = vf_routing_id(device.routing_id, device.first_vf_offset, device.vf_stride, vf_index)
    segment = snapshot.hosts[device.host].record.segment
    return Place(
        host=device.host,
        incarnation=registered_incarnation(snapshot, device.host),
        device=device.name,
        vf_index=vf_index,
        base=Location(segment, routing_id).base,
        generation=generation,
        routing_id=routing_id,
        segment=segment,
    )


def check_size(migration: Migration, limits: Limits) -> None:
    """Raise GROUP_TOO_LARGE, saying how many of the moves would fit, unless each transaction of the migration fits."""
    if _fits_by_far(migration, limits):
        return

    def is_too_large(moves: int) -> bool:
        part = Migration()
        part.CopyFrom(migration)
        del part.moves[moves:]
        return any(
            each.size > limits.operations
            or transaction.request_bytes(each) + RECORD_GROWTH_BYTES > limits.request_bytes
            for each in _transactions(part)
        )

    total = len(migration.moves)
    if not is_too_large(total):
        return
    fitting = bisect_left(range(1, total + 1), 1, key=is_too_large)
    raise VfleetError(
        Reason.GROUP_TOO_LARGE,
        f"{total} moves don't fit into one etcd transaction; the first {fitting} would "
        f"(it may have {limits.operations} operations and {limits.request_bytes} bytes)",
        metadata={"moves": str(total), "fitting": str(fitting)},
    )


def _fits_by_far(migration: Migration, limits: Limits) -> bool:
    """Return whether the transactions need not be made to see that each fits, as is so with nearly all of them.

    A key and what encloses it are less than 1 KiB; the record is in a transaction once, and what it says of functions
    and entries once more.
    """
    operations = 8 + sum(8 + 2 * len(move.entries) for move in migration.moves)
    request_bytes = RECORD_GROWTH_BYTES + 4 * migration.ByteSize() + 1024 * operations
    return operations <= limits.operations and request_bytes <= limits.request_bytes


def _transactions(migration: Migration) -> list[Transaction]:
    parts = {phase: Migration() for phase in (Phase.PHASE_PREPARING, Phase.PHASE_COMMITTED, Phase.PHASE_ABORTING)}
    for phase, part in parts.items():
        part.CopyFrom(migration)
        part.phase = phase
    return [
        transaction.begin(migration, 0, absent(FLEET_GENERATION)),
        transaction.commit(parts[Phase.PHASE_PREPARING], 1, 0),
        transaction.finish(parts[Phase.PHASE_COMMITTED], 1, finished_by=migration.coordinator, now=0),
        transaction.finish(parts[Phase.PHASE_ABORTING], 1, finished_by=migration.coordinator, now=0),
    ]


def _target_indices(snapshot: Snapshot, requests: Sequence[MoveRequest], spoken_for: Collection[Slot]) -> list[int]:
    reserved: dict[str, dict[int, str]] = {}
    indices = [request.target_vf_index for request in requests]
    for explicit in (True, False):
        for position, request in enumerate(requests):
            if bool(request.target_vf_index) is not explicit:
                continue
            field = f"moves[{position}].target_vf_index"
            device = snapshot.devices[request.target_device]
            others = reserved.setdefault(device.name, {})
            reserved_here = {*others, *(index for name, index in spoken_for if name == device.name)}
            index = pick_slot(snapshot, device, request.target_vf_index, field=field, reserved=reserved_here)
            if index in others:
                raise invalid_field(field, index, f"a slot that the move of function {others[index]!r} doesn't take")
            others[index] = request.function
            indices[position] = index
    return indices


def _move(snapshot: Snapshot, function: Function, device: str, vf_index: int) -> Move:
    source = place(snapshot, snapshot.devices[function.device], function.vf_index, function.generation)
    target = place(snapshot, snapshot.devices[device], vf_index, function.generation + 1)
    return Move(
        function=function.name,
        source=source,
        target=target,
        entries=[_entry_change(snapshot, function, driver, target.base) for driver in function.drivers],
        bars=function.bars,
        identity=function.identity,
        model=function.model,
        function_revision=snapshot.functions[function.name].mod_revision,
    )


def _entry_change(snapshot: Snapshot, function: Function, driver: str, base: int) -> EntryChange:
    stored = snapshot.entries_of(driver).get(function.name)
    if stored is None or stored.record.generation != function.generation:
        raise VfleetError(
            Reason.CONFLICT,
            f"the entry of driver {driver!r} for function {function.name!r} doesn't agree with the function's record",
            metadata={"function": function.name, "driver": driver},
        )
    entry = stored.record
    return EntryChange(
        host=entry.host,
        driver=driver,
        virtual_address=entry.virtual_address,
        length_bytes=entry.length_bytes,
        offset_before=entry.offset,
        offset_after=table_offset(base, entry.virtual_address),
        incarnation=registered_incarnation(snapshot, entry.host),
    )


def _ids(device: Device) -> str:
    return f"{device.manufacturer.vendor_id:04x}:{device.manufacturer.device_id:04x}"
