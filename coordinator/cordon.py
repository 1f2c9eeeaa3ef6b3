"""Cordons: what keeps functions from being made on a host or moved there, until it is taken away again.

A cordon is a record of its own, so that a host that registers anew leaves it as it is. What is begun compares that it
isn't there: once it is, nothing that was planned before it begins.
"""

from coordinator.context import Context
from vfleet.errors import Reason, VfleetError, not_found
from vfleet.etcd.keys import cordon_key, host_key
from vfleet.etcd.records import encode
from vfleet.etcd.store import Compare, Delete, Put, Target, Transaction
from vfleet.v1.records_pb2 import Cordon

TRIES = 8


async def cordon_host(context: Context, host: str, reason: str) -> Cordon:
    """Cordon a host, or give its cordon another reason. Return the cordon; its time is that of the first.

    Raise NOT_FOUND, or CONFLICT if the host is forgotten and comes back all the time.
    """
    for _ in range(TRIES):
        stored = _host_is_there(context, host)
        cordon = Cordon(host=host, reason=reason)
        existing = context.snapshot.cordons.get(host)
        if existing is not None:
            cordon.time.CopyFrom(existing.record.time)
        else:
            cordon.time.FromNanoseconds(round(context.clock.time() * 1e9))
        if await _commit(context, Transaction((stored,), (Put(cordon_key(host), encode(cordon)),))):
            return cordon
    raise _conflict()


async def uncordon_host(context: Context, host: str) -> None:
    """End a host's cordon, if it has one. Raise as `cordon_host` does."""
    for _ in range(TRIES):
        stored = _host_is_there(context, host)
        if await _commit(context, Transaction((stored,), (Delete(cordon_key(host)),))):
            return
    raise _conflict()


def _host_is_there(context: Context, host: str) -> Compare:
    """Return what holds while the fleet has the host's record."""
    stored = context.snapshot.hosts.get(host)
    if stored is None:
        raise not_found("host", host)
    return Compare(host_key(host), Target.CREATE_REVISION, stored.create_revision)


async def _commit(context: Context, change: Transaction) -> bool:
    committed = await context.store.commit(change)
    await context.catch_up(committed)
    return committed.succeeded


def _conflict() -> VfleetError:
    return VfleetError(Reason.CONFLICT, f"the fleet changed {TRIES} times meanwhile; try again")
