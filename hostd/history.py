"""Which history of etcd this host has seen, so that it can tell an etcd that was restored from a backup. Durable.

Two things tell it. etcd's revisions only grow, so one that is behind what was seen was restored. And a restored etcd
that has passed that since lacks the *witness*: a key that only this host writes, random and new each time, again and
again after it has acted on what must not be forgotten. In a restored etcd this host's knowledge may be missing and
revisions of before and after can't be compared; so until the fleet generation is raised by hand, a host changes nothing
on its word.
"""

import asyncio
from random import Random

from hostd.fence import Fences
from hostd.ledger import Ledger
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import FLEET_GENERATION, witness_key
from vfleet.etcd.store import KeyValue, Put, Store, Transaction, unchanged
from vfleet.v1.host_records_pb2 import StoreHistory

_KIND = "history"
_KEY = "etcd"


class History:
    """The latest fleet generation that `host` has heard of, the highest revision in it, and the host's witness."""

    def __init__(self, host: str, ledger: Ledger, fences: Fences, random: Random) -> None:
        self._key = witness_key(host)
        self._ledger = ledger
        self._fences = fences
        self._random = random
        self._seen = ledger.get(_KIND, _KEY, StoreHistory) or StoreHistory()
        self._writing = asyncio.Lock()
        # For each read of the witness that is under way, the values that it may find.
        self._readings: dict[object, set[str]] = {}
        self._taken_over = 0
        self._witnessed = 0

    @property
    def generation(self) -> int:
        """The fleet generation; 0 before the first `read`."""
        return self._seen.fleet_generation

    @property
    def is_due(self) -> bool:
        """Whether this host has acted, since it last wrote its witness, on something that must not be forgotten."""
        return self.is_new or self._acts() != self._witnessed

    @property
    def is_new(self) -> bool:
        """Whether this host has not written its witness in the present fleet generation yet, as far as it knows."""
        return not self._seen.witness

    async def read(self, store: Store) -> StoreHistory | None:
        """Read where etcd is. Return that if the fleet generation was raised since: whoever asked then calls `begin`.

        Raise CONFLICT if etcd is behind what this host has seen, or lacks its witness.
        """
        raised, _ = await self._read(store)
        return raised

    async def check(self, store: Store) -> None:
        """Raise CONFLICT if etcd's word is nothing to act upon: as `read`, or until a raised generation has begun."""
        await self._check(store)

    async def write(self, store: Store, transaction: Transaction) -> bool:
        """Carry out a transaction with a new witness in it. Return whether that was done; raise CONFLICT as `check`.

        It is not done if the transaction's comparisons don't hold, or if an earlier try arrived only now.
        """
        async with self._writing:
            stored, acts, generation = await self._check(store), self._acts(), self.generation
            following = self._seen.next_witness or f"{self._random.getrandbits(64):016x}"
            self._note(self._seen.witness, following)
            for known in self._readings.values():
                known.add(following)
            same = unchanged(self._key, stored.mod_revision if stored is not None else 0)
            witnessed = Transaction(
                (*transaction.compares, same), (*transaction.writes, Put(self._key, following.encode()))
            )
            committed = await store.commit(witnessed)
            if self.generation != generation:
                # What was written is of the etcd of before: in the new generation its witness is no measure.
                raise VfleetError(Reason.CONFLICT, "the fleet generation was raised while this host wrote")
            if committed.succeeded:
                self._note(following, "")
                self._witnessed = acts
                self.saw(committed.revision)
            else:
                await self._check(store)
        return committed.succeeded

    def took_over(self) -> None:
        """Note that the host has acted on what etcd says of entries, beside what its fences know."""
        self._taken_over += 1

    def saw(self, revision: int) -> None:
        """Note a revision that etcd had, in the present fleet generation."""
        if self.generation:
            self.begin(StoreHistory(fleet_generation=self.generation, revision=revision))

    def begin(self, now: StoreHistory) -> None:
        """Note where etcd was. What is no further than what is known changes nothing.

        In a new fleet generation etcd's word is taken for everything: any witness is right until the next is written.
        """
        if _order(now) <= _order(self._seen):
            return
        begun = StoreHistory(fleet_generation=now.fleet_generation, revision=now.revision)
        if now.fleet_generation == self.generation:
            begun.witness, begun.next_witness = self._seen.witness, self._seen.next_witness
        self._save(begun)

    def _acts(self) -> int:
        return self._fences.changes + self._taken_over

    async def _check(self, store: Store) -> KeyValue | None:
        raised, stored = await self._read(store)
        if raised is not None:
            raise VfleetError(Reason.CONFLICT, "the fleet generation was raised; this host has yet to read etcd anew")
        return stored

    async def _read(self, store: Store) -> tuple[StoreHistory | None, KeyValue | None]:
        """Return the raised history, if any, and the witness as it stands."""
        # An attempt is a revision that etcd has had, too.
        before = max(_order(self._seen), self._fences.highest())
        listing = await store.list(FLEET_GENERATION)
        now = StoreHistory(
            fleet_generation=int(listing.items[0].value) if listing.items else 1, revision=listing.revision
        )
        if _order(now) < before:
            raise _restored(
                f"etcd is at revision {now.revision} of fleet generation {now.fleet_generation}, behind"
                f" {before[1]} of {before[0]}, which this host has seen"
            )
        reading, is_any_right = object(), not self._seen.witness
        known = self._readings[reading] = {self._seen.witness, self._seen.next_witness or self._seen.witness}
        try:
            stored = await store.get(self._key)
        finally:
            del self._readings[reading]
        if self.generation and now.fleet_generation > self.generation:
            return now, stored
        found = stored.value.decode() if stored is not None else ""
        if found and found == self._seen.next_witness:
            self._note(found, "")
        elif self._seen.witness and found not in known and not is_any_right:
            raise _restored(f"etcd has witness {found!r} at {self._key}; expected {self._seen.witness!r}")
        self.begin(now)
        return None, stored

    def _note(self, witness: str, next_witness: str) -> None:
        noted = StoreHistory()
        noted.CopyFrom(self._seen)
        noted.witness, noted.next_witness = witness, next_witness
        self._save(noted)

    def _save(self, seen: StoreHistory) -> None:
        self._seen = seen
        self._ledger.put(_KIND, _KEY, seen)


def _restored(why: str) -> VfleetError:
    return VfleetError(Reason.CONFLICT, f"{why}; once it is restored from a backup, run: vfleet fleet bump-generation")


def _order(history: StoreHistory) -> tuple[int, int]:
    return history.fleet_generation, history.revision
