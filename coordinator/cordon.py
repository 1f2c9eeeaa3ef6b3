"""Cordons: what keeps functions from being made in a part of the fleet or moved there, until it is taken away again.

A cordon is a record of its own, so that a host that registers anew leaves it as it is. What is begun compares that it
isn't there: once it is, nothing that was planned before it begins.
"""

from coordinator.context import Context
from coordinator.snapshot import Snapshot
from vfleet.errors import Reason, VfleetError, not_found
from vfleet.etcd.keys import cordon_key, host_key
from vfleet.etcd.records import encode
from vfleet.etcd.store import Compare, Delete, Put, Target, Transaction
from vfleet.names import host_of
from vfleet.parts import part_key, spoken
from vfleet.v1.records_pb2 import Cordon, Part

TRIES = 8


async def cordon(context: Context, part: Part, reason: str) -> Cordon:
    """Cordon a part of the fleet, or give its cordon another reason. Return the cordon; its time is that of the first.

    Raise NOT_FOUND, or CONFLICT if the host is forgotten and comes back all the time.
    """
    key = part_key(part)
    for _ in range(TRIES):
        stored = _is_there(context, part)
        record = Cordon(part=part, reason=reason)
        existing = context.snapshot.cordons.get(key)
        if existing is not None:
            record.time.CopyFrom(existing.record.time)
        else:
            record.time.FromNanoseconds(round(context.clock.time() * 1e9))
        if await _commit(context, Transaction((stored,), (Put(cordon_key(key), encode(record)),))):
            return record
    raise _conflict()


async def uncordon(context: Context, part: Part) -> None:
    """End the cordon of a part of the fleet, if it has one, and of nothing else. Raise as `cordon` does."""
    for _ in range(TRIES):
        stored = _is_there(context, part)
        if await _commit(context, Transaction((stored,), (Delete(cordon_key(part_key(part))),))):
            return
    raise _conflict()


def devices_in(snapshot: Snapshot, part: Part) -> list[str]:
    """Return the devices of a part of the fleet, sorted. Raise NOT_FOUND if there is no such part."""
    key, host = part_key(part), host_of(part.name)
    stored = snapshot.hosts.get(host)
    if stored is None:
        raise not_found("host", host)
    devices = sorted(each.name for each in stored.record.devices if key in snapshot.sites[each.name].parts)
    if not devices and key != host and key not in snapshot.cordons:
        raise not_found(spoken(key).partition(" ")[0], part.name)
    return devices


def _is_there(context: Context, part: Part) -> Compare:
    """Return what holds while the fleet has the record of the part's host."""
    devices_in(context.snapshot, part)
    host = host_of(part.name)
    return Compare(host_key(host), Target.CREATE_REVISION, context.snapshot.hosts[host].create_revision)


async def _commit(context: Context, change: Transaction) -> bool:
    committed = await context.store.commit(change)
    await context.catch_up(committed)
    return committed.succeeded


def _conflict() -> VfleetError:
    return VfleetError(Reason.CONFLICT, f"the fleet changed {TRIES} times meanwhile; try again")
