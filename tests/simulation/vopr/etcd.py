"""A simulated etcd: its state machine, and clients whose requests are late, lost, or done without an answer.

The state machine is etcd's (linearizable keys, transactions, leases, watches, compaction), and is checked against a
real one by test_store_model.py. Time, and everything that goes wrong, is added around it.
"""

import asyncio
import contextvars
from bisect import bisect_right
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random

from simulation.vopr.faults import Profile
from simulation.vopr.loop import Life, SimulatedLoop

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.store import (
    Changes,
    Committed,
    Compare,
    Delete,
    Event,
    KeyValue,
    Listing,
    Put,
    Target,
    Transaction,
)

MAX_OPERATIONS = 128
MAX_REQUEST_BYTES = 3 << 19
TIMEOUT_S = 5.0
LOOK_AGAIN_S = 0.25

_NO_LIFE = contextvars.Context()


class CompactedError(Exception):
    """The revision asked for has been compacted."""


class Etcd:
    """etcd's state, changed by one request after the other."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted = 0
        self.keys: dict[str, KeyValue] = {}
        self.leases: dict[int, dict[str, None]] = {}
        self._log: Sequence[Changes] = []

    def get(self, key: str) -> KeyValue | None:
        """Return a key."""
        return self.keys.get(key)

    def list(self, prefix: str) -> Listing:
        """Return the keys with a prefix."""
        items = (self.keys[key] for key in sorted(self.keys) if key.startswith(prefix))
        return Listing(self.revision, tuple(items))

    def commit(self, transaction: Transaction) -> Committed:
        """Carry out a transaction. Raise as `Store.commit` does."""
        size, written = transaction.size, [write.key for write in transaction.writes]
        if size > MAX_OPERATIONS:
            raise VfleetError(Reason.LIMIT_EXCEEDED, f"the transaction has {size} operations")
        puts = [write.key for write in transaction.writes if isinstance(write, Put)]
        if len(set(puts)) < len(puts) or any(written.count(key) > 1 for key in puts):
            raise VfleetError(Reason.INTERNAL, "duplicate key given in txn request")
        if not all(map(self._holds, transaction.compares)):
            return Committed(succeeded=False, revision=self.revision)
        leases = {write.lease for write in transaction.writes if isinstance(write, Put) and write.lease}
        if leases - self.leases.keys():
            named = ",".join(f"{lease:x}" for lease in sorted(leases))
            raise VfleetError(Reason.CONFLICT, f"lease {named} is gone", metadata={"lease": named})
        self._write(transaction.writes)
        return Committed(succeeded=True, revision=self.revision)

    def grant(self, lease: int) -> None:
        """Make a lease."""
        self.leases[lease] = {}

    def revoke(self, lease: int) -> None:
        """End a lease, and its keys with it, all at one revision."""
        keys = self.leases.pop(lease, {})
        self._write([Delete(key) for key in sorted(keys)])

    def compact(self, revision: int) -> None:
        """Forget what was before a revision."""
        self.compacted = max(self.compacted, min(revision, self.revision))

    def changes(self, prefix: str, after: int) -> Sequence[Changes]:
        """Return what changed, a revision each. Raise CompactedError."""
        if after < self.compacted:
            raise CompactedError
        found = []
        for changes in self._log[bisect_right(self._log, after, key=lambda changes: changes.revision) :]:
            events = tuple(event for event in changes.events if event.key.startswith(prefix))
            if events:
                found.append(Changes(changes.revision, events))
        return found

    @property
    def last(self) -> Changes:
        """The last change."""
        return self._log[-1]

    def copy(self) -> "Etcd":
        """Return a backup, which has the history as well."""
        backup = Etcd()
        backup.revision, backup.compacted = self.revision, self.compacted
        backup.keys, backup._log = dict(self.keys), list(self._log)
        backup.leases = {lease: dict(keys) for lease, keys in self.leases.items()}
        return backup

    def has(self, put: KeyValue | Event, revision: int) -> bool:
        """Whether a put is in the history that was told of at a revision. Raise CompactedError."""
        if revision < self.compacted:
            raise CompactedError
        index = bisect_right(self._log, put.mod_revision - 1, key=lambda changes: changes.revision)
        told = Event(put.key, put.value, put.create_revision, put.mod_revision)
        return revision <= self.revision and index < len(self._log) and told in self._log[index].events

    def _holds(self, compare: Compare) -> bool:
        kv = self.keys.get(compare.key)
        match compare.target:
            case Target.VALUE:
                return kv is not None and kv.value == compare.expected
            case Target.CREATE_REVISION:
                return (kv.create_revision if kv else 0) == compare.expected
            case Target.MOD_REVISION:
                return (kv.mod_revision if kv else 0) == compare.expected

    def _write(self, writes: Sequence[Put | Delete]) -> None:
        revision, events = self.revision + 1, []
        for write in writes:
            before = self.keys.get(write.key)
            if before is not None and before.lease:
                self.leases.get(before.lease, {}).pop(write.key, None)
            if isinstance(write, Put):
                created = before.create_revision if before else revision
                self.keys[write.key] = KeyValue(write.key, write.value, created, revision, write.lease)
                if write.lease:
                    self.leases[write.lease][write.key] = None
                events.append(Event(write.key, write.value, created, revision))
            elif before is not None:
                del self.keys[write.key]
                events.append(Event(write.key, None, 0, revision))
        if events:
            self.revision = revision
            self._log.append(Changes(revision, tuple(events)))


@dataclass(eq=False)
class _Watcher:
    prefix: str
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class EtcdServer:
    """The simulated cluster: the state, the leases' time, and who can reach it. `observe` sees every change."""

    def __init__(self, loop: SimulatedLoop, random: Random, profile: Profile, trace: Callable[..., None]) -> None:
        self.state = Etcd()
        self.observers: list[Callable[[Changes], None]] = []
        self.unavailable_until = 0.0
        self.cut: dict[str, None] = {}
        self.loop = loop
        self.random = random
        self.profile = profile
        self.trace = trace
        self._expiries: dict[int, asyncio.TimerHandle] = {}
        self._ttls: dict[int, int] = {}
        self._watchers: dict[_Watcher, None] = {}
        self._last_lease = 0

    def can_reach(self, name: str) -> bool:
        """Whether a process's requests get to a leader."""
        return name not in self.cut and self.loop.time() >= self.unavailable_until

    def client(self, life: Life) -> "SimulatedStore":
        """Return the store of a process."""
        return SimulatedStore(self, life)

    def commit(self, who: str, transaction: Transaction) -> Committed:
        """Carry out a transaction, now."""
        committed = self._changing(lambda: self.state.commit(transaction))
        self.trace("txn", who, committed.succeeded, committed.revision, *(write.key for write in transaction.writes))
        return committed

    def grant(self, ttl_s: int) -> int:
        """Make a lease."""
        self._last_lease += 1
        self.state.grant(self._last_lease)
        self._ttls[self._last_lease] = ttl_s
        self._expire_later(self._last_lease)
        return self._last_lease

    def keep_alive(self, lease: int) -> bool:
        """Renew a lease."""
        if lease not in self.state.leases:
            return False
        self._expire_later(lease)
        return True

    def revoke(self, lease: int) -> None:
        """End a lease."""
        timer = self._expiries.pop(lease, None)
        if timer is not None:
            timer.cancel()
            self.trace("lease ends", lease)
        self._changing(lambda: self.state.revoke(lease))

    def change_leader(self, away_s: float) -> None:
        """Elect another leader: nobody answers for a while, and all leases live on for their whole TTL."""
        self.unavailable_until = self.loop.time() + away_s
        for lease in self.state.leases:
            self._expire_later(lease, away_s)

    def compact(self) -> None:
        """Compact up to now."""
        self.state.compact(self.state.revision)

    def restore(self, backup: Etcd, away_s: float) -> None:
        """Be gone for a while, and then what a backup has; all its leases live on for their whole TTL."""
        for timer in self._expiries.values():
            timer.cancel()
        self._expiries.clear()
        self.state = backup
        self.change_leader(away_s)
        for watcher in self._watchers:
            watcher.changed.set()

    def write_foreign(self) -> None:
        """Write what is nobody's here, and so only takes a revision."""
        self.state.commit(Transaction((), (Put("/elsewhere", b""),)))

    def watcher(self, prefix: str) -> _Watcher:
        """Return what is told of changes."""
        watcher = _Watcher(prefix)
        self._watchers[watcher] = None
        return watcher

    def leave(self, watcher: _Watcher) -> None:
        """Tell it no more."""
        self._watchers.pop(watcher, None)

    def _changing(self, change):
        before = self.state.revision
        result = change()
        if self.state.revision > before:
            last = self.state.last
            for observe in self.observers:
                observe(last)
            for watcher in self._watchers:
                if any(event.key.startswith(watcher.prefix) for event in last.events):
                    watcher.changed.set()
        return result

    def _expire_later(self, lease: int, extra_s: float = 0.0) -> None:
        if lease in self._expiries:
            self._expiries[lease].cancel()
        late_s = self.random.uniform(0.0, 0.6) + extra_s
        self._expiries[lease] = self.loop.call_later(self._ttls[lease] + late_s, self._expire, lease)

    def _expire(self, lease: int) -> None:
        if self.loop.time() < self.unavailable_until:
            self._expire_later(lease)
        else:
            self.revoke(lease)


class SimulatedStore:
    """`vfleet.etcd.store.Store` for one process."""

    max_operations = MAX_OPERATIONS
    max_request_bytes = MAX_REQUEST_BYTES

    def __init__(self, server: EtcdServer, life: Life) -> None:
        self._server = server
        self._life = life
        self._random = server.random

    async def get(self, key: str) -> KeyValue | None:
        return await self._repeat(lambda: self._server.state.get(key))

    async def list(self, prefix: str) -> Listing:
        return await self._repeat(lambda: self._server.state.list(prefix))

    async def grant_lease(self, ttl_s: int) -> int:
        return await self._repeat(lambda: self._server.grant(ttl_s))

    async def keep_lease_alive(self, lease: int) -> bool:
        return await self._repeat(lambda: self._server.keep_alive(lease))

    async def revoke_lease(self, lease: int) -> None:
        await self._repeat(lambda: self._server.revoke(lease))

    async def commit(self, transaction: Transaction) -> Committed:
        server, profile, random = self._server, self._server.profile, self._random
        await self._life.running()
        await self._reachable(server.loop.time() + TIMEOUT_S)
        answer, state = server.loop.create_future(), server.state

        def carry_out() -> Committed | VfleetError:
            if server.state is not state:
                return VfleetError(Reason.OUTCOME_UNKNOWN, "simulated: that etcd is no more")
            try:
                return server.commit(self._life.name, transaction)
            except VfleetError as error:
                return error

        if random.random() < profile.store_loss:
            # Lost before, lost after, or still on its way when its client has given up.
            fate = random.choice(("before", "after", "late", "late"))
            if fate != "before":
                self._later(self._delay() if fate == "after" else random.uniform(0.0, 12.0), carry_out)
            give_up_s = random.uniform(0.0, TIMEOUT_S)
        else:
            self._later(self._delay(), lambda: self._answer(answer, carry_out()))
            give_up_s = TIMEOUT_S
        try:
            async with asyncio.timeout(give_up_s):
                result = await answer
        except TimeoutError:
            raise VfleetError(Reason.OUTCOME_UNKNOWN, "simulated: etcd did not say whether it was done") from None
        if isinstance(result, VfleetError):
            raise result
        return result

    async def watch(self, prefix: str) -> AsyncGenerator[Listing | Changes, None]:
        server, random = self._server, self._random
        watcher, state, restored = server.watcher(prefix), server.state, False
        delivered: int | None = None
        last: tuple[KeyValue | Event, int] | None = None
        try:
            while True:
                try:
                    if server.state is not state and delivered is not None:
                        restored = last is not None and not server.state.has(*last)
                        delivered = None if restored else delivered
                    state = server.state
                    if delivered is None:
                        listing = await self.list(prefix)
                        put = max(listing.items, key=lambda item: item.mod_revision, default=None)
                        delivered, last = listing.revision, (put, listing.revision) if put is not None else None
                        yield replace(listing, restored=restored)
                        restored = False
                    if server.state is state and not state.changes(prefix, delivered):
                        watcher.changed.clear()
                        await watcher.changed.wait()
                    await asyncio.sleep(server.profile.watch_delay(random))
                    while not server.can_reach(self._life.name):
                        await asyncio.sleep(LOOK_AGAIN_S)
                    news = state.changes(prefix, delivered)
                except CompactedError:
                    delivered = None
                    continue
                except VfleetError:
                    continue
                if news and server.state is state:
                    # A member may lag, and some revisions may come in one answer.
                    part = news[: random.randint(1, len(news))]
                    delivered = part[-1].revision
                    puts = [event for changes in part for event in changes.events if event.value is not None]
                    last = (puts[-1], puts[-1].mod_revision) if puts else last
                    yield Changes(delivered, tuple(event for changes in part for event in changes.events))
        finally:
            server.leave(watcher)

    async def _repeat(self, act):
        """Do what can be repeated until it is answered."""
        server, random = self._server, self._random
        await self._life.running()
        give_up_s = server.loop.time() + TIMEOUT_S
        while True:
            await self._reachable(give_up_s)
            answer = server.loop.create_future()

            def carry_out(answer=answer) -> None:
                self._answer(answer, act())

            if random.random() >= server.profile.store_loss:
                self._later(self._delay(), carry_out)
                return await answer
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _reachable(self, give_up_s: float) -> None:
        while not self._server.can_reach(self._life.name):
            if self._server.loop.time() >= give_up_s:
                raise VfleetError(Reason.STORE_UNAVAILABLE, "simulated: etcd did not answer")
            await asyncio.sleep(LOOK_AGAIN_S)

    def _delay(self) -> float:
        return self._server.profile.delay(self._random)

    def _later(self, delay_s: float, act, *args) -> None:
        self._server.loop.call_later(delay_s, act, *args, context=_NO_LIFE)

    def _answer(self, answer: asyncio.Future, result: object) -> None:
        def arrive() -> None:
            if not answer.done():
                answer.set_result(result)

        self._later(self._delay(), arrive)
