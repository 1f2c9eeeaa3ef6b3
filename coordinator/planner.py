"""From what is asked for to a plan: a snapshot and moves in, a Migration out, or one error that says why not. Pure.

Moves that name no device get one from placement, together with what is asked of all of them. A move within one device
needs a VF index other than the present one: without an index, or with the present one, the target is the source. Free
slots are handed out lowest first, after the slots that moves name.
"""

from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from coordinator import transaction
from coordinator.explanation import unsatisfiable
from coordinator.placement import Mover, Question
from coordinator.placement_filters import HARDWARE, Needs, cordon_words, failures
from coordinator.snapshot import Snapshot
from vfleet.address import Location, table_offset, vf_routing_id
from vfleet.decision import MAX_ABORT_REASON_CHARACTERS
from vfleet.errors import Reason, VfleetError, invalid_field, not_found
from vfleet.etcd.keys import FLEET_GENERATION
from vfleet.etcd.store import Transaction, absent
from vfleet.names import host_of
from vfleet.parts import spoken
from vfleet.v1.migration_service_pb2 import MoveRequest
from vfleet.v1.placement_pb2 import Constraints, PlacementFilter
from vfleet.v1.records_pb2 import Device, EntryChange, Function, FunctionStatus, Migration, Move, Phase, Place
from vfleet.v1.types_pb2 import Attempt

# What a record may grow by between BEGIN and FINISH: times, durations of steps, and a reason in 4-byte characters.
RECORD_GROWTH_BYTES = 4 * MAX_ABORT_REASON_CHARACTERS + 1024


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
    constraints: Constraints | None = None,
) -> Migration:
    """Return the migration that does `requests`, with its phase not set. Names in requests are well-formed.

    Raise VfleetError: what `ask` raises, TARGET_IS_SOURCE, INCOMPATIBLE_DEVICE, NO_FREE_SLOT, SLOT_TAKEN or
    HOST_CORDONED for a device that a move names, UNSATISFIABLE or LIMIT_EXCEEDED if there is, or was found, no choice
    of devices, and what `draft` raises.
    """
    question = ask(snapshot, requests, constraints)
    check_named(snapshot, requests)
    answer = question.answer()
    if answer is None:
        raise unsatisfiable(question)
    return draft(
        snapshot, requests, answer, name=name, coordinator=coordinator, limits=limits, constraints=question.constraints
    )


def ask(
    snapshot: Snapshot,
    requests: Sequence[MoveRequest],
    constraints: Constraints | None = None,
    shunned: Collection[str] = (),
) -> Question:
    """Return the question for placement that `requests` are. Names in requests and constraints are well-formed.

    The hosts of `shunned` are taken only if no others will do.

    Raise VfleetError: INVALID_FIELD (no moves, a function twice, a rule about functions none of which moves),
    NOT_FOUND, and what `movable` raises, also for functions that only rules name.
    """
    if not requests:
        raise invalid_field("moves", [], "1 move or more")
    movers: dict[str, Mover] = {}
    for index, request in enumerate(requests):
        if request.function in movers:
            raise invalid_field(f"moves[{index}].function", request.function, "each function once")
        function = movable(snapshot, request.function)
        find_device(snapshot, function.device)
        if request.target_device:
            find_device(snapshot, request.target_device)
        is_at_home = request.target_device == function.device
        stays = is_at_home and request.target_vf_index not in (0, function.vf_index)
        movers[function.name] = Mover(function, request.target_device, stays)
    homes: dict[str, str] = {}
    for index, rule in enumerate((constraints or Constraints()).groups):
        if not any(name in movers for name in rule.functions):
            field = f"constraints.groups[{index}].functions"
            raise invalid_field(field, list(rule.functions), "at least one function that moves")
        for name in rule.functions:
            if name not in movers:
                homes[name] = find_device(snapshot, movable(snapshot, name).device).name
    return Question(snapshot, list(movers.values()), constraints or Constraints(), homes, shunned)


def check_named(snapshot: Snapshot, requests: Sequence[MoveRequest]) -> None:
    """Raise what is in the way of a device that a move names."""
    for request in requests:
        if not request.target_device:
            continue
        function, device = snapshot.functions[request.function].record, snapshot.devices[request.target_device]
        if request.target_device == function.device and request.target_vf_index in (0, function.vf_index):
            raise VfleetError(
                Reason.TARGET_IS_SOURCE,
                f"function {function.name!r} is on device {function.device} at VF {function.vf_index} already",
                metadata={"function": function.name, "device": function.device},
            )
        check_compatible(snapshot, function, device)
        registered_incarnation(snapshot, device.host)
        check_not_cordoned(snapshot, device.name)
    _target_indices(snapshot, requests)


def draft(
    snapshot: Snapshot,
    requests: Sequence[MoveRequest],
    answer: Mapping[str, str],
    *,
    name: str,
    coordinator: str,
    limits: Limits,
    constraints: Constraints,
) -> Migration:
    """Return the migration that takes each function to the device of the answer.

    Raise VfleetError: NO_FREE_SLOT, SLOT_TAKEN or INVALID_FIELD for an index that a move names, HOST_UNAVAILABLE for a
    host that takes part, GROUP_TOO_LARGE, or CONFLICT if the snapshot is not one of a sound fleet.
    """
    resolved = [
        MoveRequest(
            function=request.function,
            target_device=answer[request.function],
            target_vf_index=request.target_vf_index,
        )
        for request in requests
    ]
    moves = [
        _move(snapshot, snapshot.functions[request.function].record, request.target_device, vf_index)
        for request, vf_index in zip(resolved, _target_indices(snapshot, resolved), strict=True)
    ]
    migration = Migration(
        name=name,
        attempt=Attempt(fleet_generation=snapshot.fleet_generation),
        moves=moves,
        coordinator=coordinator,
    )
    check_size(snapshot, migration, limits, bystanders(snapshot, migration, constraints))
    return migration


def parts_of_targets(snapshot: Snapshot, migration: Migration) -> list[str]:
    """Return the keys of all parts of the fleet that a plan's targets are in."""
    devices = [snapshot.sites[move.target.device] for move in migration.moves]
    return list(dict.fromkeys(part for device in devices for part in device.parts))


def bystanders(snapshot: Snapshot, migration: Migration, constraints: Constraints) -> dict[str, int]:
    """Return the functions that only rules name, on whose homes a plan counts, and what last wrote their records."""
    moving = {move.function for move in migration.moves}
    named = dict.fromkeys(name for rule in constraints.groups for name in rule.functions if name not in moving)
    return {name: snapshot.functions[name].mod_revision for name in named}


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


def check_compatible(snapshot: Snapshot, function: Function, target: Device) -> None:
    """Raise INCOMPATIBLE_DEVICE unless `target` can be the function's home, as its present device is."""
    needs = Needs(
        source=function.device,
        model=function.model,
        bars=tuple((bar.index, bar.size_bytes) for bar in function.bars),
        attachments=frozenset(),
    )
    differences = [
        f"{PlacementFilter.Name(rule.filter).removeprefix('PLACEMENT_FILTER_').lower().replace('_', ' ')}:"
        f" {found}; expected {expected}"
        for rule, (found, expected) in failures(HARDWARE, needs, snapshot.sites[target.name], snapshot)
    ]
    if differences:
        raise VfleetError(
            Reason.INCOMPATIBLE_DEVICE,
            f"device {target.name} can't be the home of function {function.name!r}: {'; '.join(differences)}",
            metadata={"function": function.name, "device": target.name},
        )


def check_not_cordoned(snapshot: Snapshot, device: str) -> None:
    """Raise HOST_CORDONED, with the reason that was given, if the device is in a part that is cordoned."""
    part = snapshot.cordoned(device)
    if part is not None:
        message = f"{spoken(part)} is {cordon_words(snapshot, part)}"
        raise VfleetError(Reason.HOST_CORDONED, message, metadata={"host": host_of(device), "part": part})


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


def check_size(snapshot: Snapshot, migration: Migration, limits: Limits, beside: Mapping[str, int]) -> None:
    """Raise GROUP_TOO_LARGE, saying how many of the moves would fit, unless each transaction of the migration fits.

    `beside` are its bystanders.
    """
    if _fits_by_far(migration, limits, beside):
        return

    def is_too_large(moves: int) -> bool:
        part = Migration()
        part.CopyFrom(migration)
        del part.moves[moves:]
        return any(
            each.size > limits.operations
            or transaction.request_bytes(each) + RECORD_GROWTH_BYTES > limits.request_bytes
            for each in _transactions(snapshot, part, beside)
        )

    total = len(migration.moves)
    if not is_too_large(total):
        return
    fitting = bisect_left(range(1, total + 1), 1, key=is_too_large)
    others = f", with {len(beside)} more functions that rules name," if beside else ""
    raise VfleetError(
        Reason.GROUP_TOO_LARGE,
        f"{total} moves{others} don't fit into one etcd transaction; the first {fitting} would "
        f"(it may have {limits.operations} operations and {limits.request_bytes} bytes)",
        metadata={"moves": str(total), "fitting": str(fitting)},
    )


def _fits_by_far(migration: Migration, limits: Limits, beside: Mapping[str, int]) -> bool:
    """Return whether the transactions need not be made to see that each fits, as is so with nearly all of them.

    A move has at most 14 comparisons and two for each entry, a bystander two. A key and what encloses it are less than
    1 KiB; the record is in a transaction once, and what it says of functions and entries once more.
    """
    operations = 8 + sum(14 + 2 * len(move.entries) for move in migration.moves) + 2 * len(beside)
    request_bytes = RECORD_GROWTH_BYTES + 4 * migration.ByteSize() + 1024 * operations
    return operations <= limits.operations and request_bytes <= limits.request_bytes


def _transactions(snapshot: Snapshot, migration: Migration, beside: Mapping[str, int]) -> list[Transaction]:
    parts = {phase: Migration() for phase in (Phase.PHASE_PREPARING, Phase.PHASE_COMMITTED, Phase.PHASE_ABORTING)}
    for phase, part in parts.items():
        part.CopyFrom(migration)
        part.phase = phase
    return [
        transaction.begin(migration, 0, absent(FLEET_GENERATION), parts_of_targets(snapshot, migration), 1, beside),
        transaction.commit(parts[Phase.PHASE_PREPARING], 1, 0),
        transaction.finish(parts[Phase.PHASE_COMMITTED], 1, finished_by=migration.coordinator, now=0),
        transaction.finish(parts[Phase.PHASE_ABORTING], 1, finished_by=migration.coordinator, now=0),
    ]


def _target_indices(snapshot: Snapshot, requests: Sequence[MoveRequest]) -> list[int]:
    reserved: dict[str, dict[int, str]] = {}
    indices = [request.target_vf_index for request in requests]
    for explicit in (True, False):
        for position, request in enumerate(requests):
            if not request.target_device or bool(request.target_vf_index) is not explicit:
                continue
            field = f"moves[{position}].target_vf_index"
            device = snapshot.devices[request.target_device]
            others = reserved.setdefault(device.name, {})
            index = pick_slot(snapshot, device, request.target_vf_index, field=field, reserved=others)
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
