"""The journal of a migration that this coordinator owns: its record in etcd, and the transactions that change it.

Its one promise: after `settle` it is known, not guessed, what the record is.
"""

import logging
from collections.abc import Callable

from coordinator.context import Context
from vfleet.clock import backoff_delays
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import migration_key, owner_key
from vfleet.etcd.records import decode
from vfleet.etcd.store import Compare, Put, Target, Transaction, unchanged
from vfleet.v1.records_pb2 import Migration

RETRY_FIRST_S = 0.05
RETRY_LONGEST_S = 2.0

# The store's answers after which a transaction is tried again, once it is known not to have happened.
UNCERTAIN = frozenset({Reason.STORE_UNAVAILABLE, Reason.OUTCOME_UNKNOWN})

_log = logging.getLogger(__name__)


class Journal:
    """A migration's record as it was last known, the revision that last wrote it, and that of this owner's key."""

    def __init__(self, context: Context, record: Migration, mod_revision: int, owner_revision: int) -> None:
        self.record = record
        self.mod_revision = mod_revision
        self.owner_revision = owner_revision
        self._context = context

    @property
    def owned(self) -> Compare:
        """What holds while the owner key is this owner's."""
        return unchanged(owner_key(self.record.name), self.owner_revision)

    def is_overtaken(self) -> bool:
        """Return whether the inventory shows that another has written the record or the owner key."""
        snapshot, name = self._context.snapshot, self.record.name
        record, owner = snapshot.migrations.get(name), snapshot.owners.get(name)
        mine = owner is not None and owner.mod_revision == self.owner_revision
        return not mine or record is None or record.mod_revision != self.mod_revision

    async def settle(self, make: Callable[[], Transaction]) -> None:
        """Carry out a transaction that changes the record until the record is known to have changed, by whomever.

        Raise CONFLICT, naming the keys, if its comparisons fail and the record is still as it was, or if the session is
        lost.
        """
        before = self.mod_revision
        for delay_s in backoff_delays(self._context.random, RETRY_FIRST_S, RETRY_LONGEST_S):
            attempted = make()
            self._context.check()
            try:
                committed = await self._context.store.commit(attempted)
                if committed.succeeded:
                    self._wrote(attempted, committed.revision)
                    return
                await self.read_back()
                if self.mod_revision == before:
                    raise await self._comparisons_failed(attempted)
            except VfleetError as error:
                if error.reason not in UNCERTAIN:
                    raise
                _log.warning("migration %s: %s", self.record.name, error.message)
                await self._context.clock.sleep(delay_s)
                # A write without an answer may have happened, or may still: one look, then the same again.
                await self._read_back_if_possible()
            if self.mod_revision != before:
                return

    async def read_back(self) -> None:
        """Read the record, linearizably. Raise INTERNAL if it is gone."""
        kv = await self._context.store.get(migration_key(self.record.name))
        if kv is None:
            raise VfleetError(Reason.INTERNAL, f"the record of migration {self.record.name!r} is gone")
        self.record, self.mod_revision = decode(Migration, kv), kv.mod_revision

    async def _read_back_if_possible(self) -> None:
        try:
            await self.read_back()
        except VfleetError as error:
            if error.reason not in UNCERTAIN:
                raise

    def _wrote(self, attempted: Transaction, revision: int) -> None:
        key = migration_key(self.record.name)
        value = next(write.value for write in attempted.writes if isinstance(write, Put) and write.key == key)
        self.record, self.mod_revision = Migration.FromString(value), revision

    async def _comparisons_failed(self, attempted: Transaction) -> VfleetError:
        changed = []
        for compare in attempted.compares:
            kv = await self._context.store.get(compare.key)
            found = {
                Target.VALUE: kv.value if kv else None,
                Target.CREATE_REVISION: kv.create_revision if kv else 0,
                Target.MOD_REVISION: kv.mod_revision if kv else 0,
            }
            if found[compare.target] != compare.expected:
                changed.append(compare.key)
        what = ", ".join(changed) or "something that is as it was again"
        return VfleetError(Reason.CONFLICT, f"changed since the plan was made: {what}", metadata={"keys": what})
