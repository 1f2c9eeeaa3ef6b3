"""What logic may know of etcd: keys and values, transactions as values, leases, watches.

`Store` is a protocol, so that the simulation tests can put another in the place of the real client
(`vfleet.etcd.client`). Keys are text; values are bytes. Reads are linearizable.
"""

import enum
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as it stands, with the revisions that made it and last wrote it, and its lease (0 for none)."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease: int = 0


class Target(enum.Enum):
    """What a comparison looks at. A key that is absent has revisions 0, and no value: comparing its value fails."""

    VALUE = "value"
    CREATE_REVISION = "create revision"
    MOD_REVISION = "mod revision"


@dataclass(frozen=True, slots=True)
class Compare:
    """One comparison of a transaction: `target` of `key` equals `expected`."""

    key: str
    target: Target
    expected: int | bytes


def absent(key: str) -> Compare:
    """Hold if there is no such key."""
    return Compare(key, Target.CREATE_REVISION, 0)


def unchanged(key: str, mod_revision: int) -> Compare:
    """Hold if the key was last written at `mod_revision`."""
    return Compare(key, Target.MOD_REVISION, mod_revision)


def value_is(key: str, value: bytes) -> Compare:
    """Hold if the key is there with this value."""
    return Compare(key, Target.VALUE, value)


@dataclass(frozen=True, slots=True)
class Put:
    """Write a key; with a lease, it goes when the lease does."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Delete a key; deleting one that is absent does nothing."""

    key: str


@dataclass(frozen=True, slots=True)
class Transaction:
    """All `writes` if all `compares` hold, else none."""

    compares: tuple[Compare, ...]
    writes: tuple[Put | Delete, ...]

    @property
    def size(self) -> int:
        """Operations as etcd counts them against its limit (--max-txn-ops): the larger of the two lists."""
        return max(len(self.compares), len(self.writes))


@dataclass(frozen=True, slots=True)
class Committed:
    """The answer to a transaction: whether its comparisons held, and the store's revision after it."""

    succeeded: bool
    revision: int


@dataclass(frozen=True, slots=True)
class Listing:
    """All keys with a prefix, sorted, as they stood at one revision.

    From a watch, `restored` says that etcd lacks what the watch delivered before: it was restored from a backup.
    """

    revision: int
    items: tuple[KeyValue, ...]
    restored: bool = False


@dataclass(frozen=True, slots=True)
class Event:
    """One change: the key as it was written, or, with `value` None, deleted."""

    key: str
    value: bytes | None
    create_revision: int
    mod_revision: int


@dataclass(frozen=True, slots=True)
class Changes:
    """The changes of one or more revisions, in order, complete up to `revision`."""

    revision: int
    events: tuple[Event, ...]


class Store(Protocol):
    """etcd, or what stands for it in a simulation.

    Every method raises VfleetError: STORE_UNAVAILABLE if nothing was done, OUTCOME_UNKNOWN if a write may or may not
    have happened.
    """

    @property
    def max_operations(self) -> int:
        """Operations that one transaction may have (etcd's --max-txn-ops; 128 by default)."""

    @property
    def max_request_bytes(self) -> int:
        """Size that one request may have (etcd's --max-request-bytes; 1.5 MiB by default)."""

    async def get(self, key: str) -> KeyValue | None:
        """Return the key, or None if it is absent. Linearizable."""

    async def list(self, prefix: str) -> Listing:
        """Return all keys with the prefix, as of one revision. Linearizable."""

    async def commit(self, transaction: Transaction) -> Committed:
        """Carry out a transaction.

        A transaction that etcd refuses as malformed or too large raises VfleetError LIMIT_EXCEEDED or INTERNAL; nothing
        was done then. A put under a lease that is gone raises CONFLICT with the lease in the metadata (in hexadecimal;
        all leases of the transaction, if there are several); nothing was done then either. When the comparisons don't
        hold, the leases are not looked at.
        """

    async def grant_lease(self, ttl_s: int) -> int:
        """Return a new lease that lives `ttl_s` seconds (at least 1) unless it is kept alive."""

    async def keep_lease_alive(self, lease: int) -> bool:
        """Renew the lease once; return False if it is gone."""

    async def revoke_lease(self, lease: int) -> None:
        """End the lease and delete its keys. Revoking one that is gone succeeds."""

    def watch(self, prefix: str) -> AsyncGenerator[Listing | Changes, None]:
        """Yield a Listing of the prefix, then its Changes, for ever, none left out and none twice.

        Survives reconnects, by resuming after the last revision delivered, and compaction, by yielding a new Listing
        that stands for everything missed. So does an etcd that was restored from a backup; that Listing says so if
        anything was delivered that etcd lacks now, whatever revision it is at.
        """
