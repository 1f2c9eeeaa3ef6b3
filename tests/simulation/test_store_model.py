"""The simulated etcd against a real one: the same random operations, the same answers.

Keys, transactions, leases, watches and compaction. Revisions are compared by their distance from where the example
began, because all examples share one real etcd.
"""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from random import Random

import pytest
from etcd3 import etcdrpc
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from simulation.vopr.etcd import CompactedError as SimulatedCompactedError
from simulation.vopr.etcd import Etcd

from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import watch as watching
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.endpoints import CompactedError
from vfleet.etcd.server import EtcdServer
from vfleet.etcd.store import Compare, Delete, Event, KeyValue, Put, Target, Transaction

NAMES = st.sampled_from(("a", "a/1", "a/2", "b/1"))
PREFIXES = st.sampled_from(("", "a", "a/", "b/"))
VALUES = st.sampled_from((b"", b"1", b"2"))
LEASE_TTL_S = 600
PATIENCE_S = 20.0


@dataclass
class Real:
    """A real etcd, and the loop that its client lives on."""

    runner: asyncio.Runner
    store: EtcdStore
    examples: int = 0


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Iterator[Real]:
    with asyncio.Runner() as runner:
        server = EtcdServer(tmp_path_factory.mktemp("etcd"), SystemClock(), Random())
        runner.run(server.start())
        try:
            store = runner.run(EtcdStore.connect([server.endpoint], SystemClock(), Random()))
            yield Real(runner, store)
            runner.run(store.close())
        finally:
            runner.run(server.stop())


@dataclass
class Watched:
    """A real watch and what it has delivered so far."""

    prefix: str
    began: int
    listed: tuple[KeyValue, ...]
    events: list[Event]
    task: asyncio.Task[None]


class StoreMachine(RuleBasedStateMachine):
    """Does each operation at both, and compares."""

    real: Real

    def __init__(self) -> None:
        super().__init__()
        self.model = Etcd()
        self.real.examples += 1
        self.place = f"/{self.real.examples}/"
        self.leases: list[tuple[int, int]] = []
        self.watches: list[Watched] = []
        self.revisions = [self.model.revision]

    @initialize()
    def begin(self) -> None:
        self.offset = self.run(self.real.store.status()).revision - self.model.revision

    def run(self, work):
        return self.real.runner.run(work)

    def shifted(self, revision: int) -> int:
        """Return the real revision that a simulated one stands for; 0 stays."""
        return revision + self.offset if revision else 0

    def shown(self, kv: KeyValue | None) -> KeyValue | None:
        """Return a simulated key as the real etcd is expected to show it."""
        if kv is None:
            return None
        return replace(
            kv,
            create_revision=self.shifted(kv.create_revision),
            mod_revision=self.shifted(kv.mod_revision),
            lease=dict(self.leases).get(kv.lease, 0),
        )

    @rule(data=st.data())
    def transact(self, data: st.DataObject) -> None:
        key = NAMES.map(lambda name: self.place + name)
        revision = st.sampled_from((0, *self.revisions[-4:]))
        compares = data.draw(
            st.lists(
                st.builds(lambda k, v: Compare(k, Target.VALUE, v), key, VALUES)
                | st.builds(lambda k, r: Compare(k, Target.MOD_REVISION, r), key, revision)
                | st.builds(lambda k, r: Compare(k, Target.CREATE_REVISION, r), key, revision),
                max_size=2,
            )
        )
        lease = st.sampled_from((0, *(simulated for simulated, _ in self.leases)))
        writes = data.draw(
            st.lists(st.builds(Put, key, VALUES, lease) | st.builds(Delete, key), max_size=4)
            | st.just([Put(f"{self.place}many{number}", b"") for number in range(129)])
        )
        simulated, really = self.both(Transaction(tuple(compares), tuple(writes)))
        assert really == simulated
        self.revisions.append(self.model.revision)

    def both(self, transaction: Transaction):
        """Return both answers, comparably."""
        try:
            committed = self.model.commit(transaction)
            simulated = (committed.succeeded, self.shifted(committed.revision))
        except VfleetError as error:
            simulated = error.reason
        leases = dict(self.leases)
        twin = Transaction(
            tuple(
                compare if compare.target is Target.VALUE else replace(compare, expected=self.shifted(compare.expected))
                for compare in transaction.compares
            ),
            tuple(
                replace(write, lease=leases.get(write.lease, 0)) if isinstance(write, Put) else write
                for write in transaction.writes
            ),
        )
        try:
            answer = self.run(self.real.store.commit(twin))
            really = (answer.succeeded, answer.revision)
        except VfleetError as error:
            really = error.reason
        return simulated, really

    @rule()
    def grant(self) -> None:
        simulated = len(self.leases) + 1
        self.model.grant(simulated)
        self.leases.append((simulated, self.run(self.real.store.grant_lease(LEASE_TTL_S))))

    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        if self.leases:
            simulated, really = data.draw(st.sampled_from(self.leases))
            self.model.revoke(simulated)
            self.run(self.real.store.revoke_lease(really))
            self.revisions.append(self.model.revision)

    @rule(data=st.data())
    def keep_alive(self, data: st.DataObject) -> None:
        if self.leases:
            simulated, really = data.draw(st.sampled_from(self.leases))
            assert self.run(self.real.store.keep_lease_alive(really)) == (simulated in self.model.leases)

    @rule(prefix=PREFIXES)
    def watch(self, prefix: str) -> None:
        if len(self.watches) < 3:
            self.watches.append(self.run(self.open_watch(self.place + prefix)))

    async def open_watch(self, prefix: str) -> Watched:
        updates = self.real.store.watch(prefix)
        listing = await anext(updates)
        events: list[Event] = []

        async def collect() -> None:
            async with aclosing(updates):
                async for changes in updates:
                    events.extend(changes.events)

        return Watched(prefix, self.model.revision, listing.items, events, asyncio.ensure_future(collect()))

    @rule(data=st.data())
    def compact(self, data: st.DataObject) -> None:
        revision = data.draw(st.sampled_from(self.revisions))
        if revision > max(self.model.compacted, 1):
            self.model.compact(revision)
            endpoint = self.real.store._endpoints.current
            self.run(self.compact_really(endpoint, self.shifted(revision)))

    async def compact_really(self, endpoint, revision: int) -> None:
        await endpoint.kv.Compact(etcdrpc.CompactionRequest(revision=revision, physical=True), timeout=PATIENCE_S)

    @rule(data=st.data(), prefix=PREFIXES)
    def resume(self, data: st.DataObject, prefix: str) -> None:
        """A watch goes on from a revision of before: with all since, or with word of compaction."""
        after, prefix = data.draw(st.sampled_from(self.revisions)), self.place + prefix
        try:
            expected = [self.seen(event) for changes in self.model.changes(prefix, after) for event in changes.events]
        except SimulatedCompactedError:
            with pytest.raises(CompactedError):
                self.run(self.followed(prefix, self.shifted(after), 1))
        else:
            assert self.run(self.followed(prefix, self.shifted(after), len(expected))) == expected

    async def followed(self, prefix: str, after: int, count: int) -> list[Event]:
        store, events = self.real.store, []
        endpoint = store._endpoints.current
        delivered = watching._Delivered(after)
        follow = watching._follow(prefix, delivered, endpoint, store._endpoints.timeout_s, SystemClock())
        async with asyncio.timeout(PATIENCE_S), aclosing(follow) as stream:
            while len(events) < count:
                events.extend((await anext(stream)).events)
        return events

    @invariant()
    def same_keys(self) -> None:
        if hasattr(self, "offset"):
            listing = self.run(self.real.store.list(self.place))
            assert listing.items == tuple(self.shown(item) for item in self.model.list(self.place).items)
            assert listing.revision == self.shifted(self.model.revision)

    def teardown(self) -> None:
        try:
            for watch in self.watches:
                expected = self.history(watch)
                self.run(self.caught_up(watch, len(expected)))
                assert watch.events == expected
        finally:
            self.run(self.clean_up())

    def history(self, watch: Watched) -> list[Event]:
        self.model.compacted = 0  # the log is whole; a watch that was open then has seen all
        changes = self.model.changes(watch.prefix, watch.began)
        return [self.seen(event) for each in changes for event in each.events]

    def seen(self, event: Event) -> Event:
        """Return a simulated event as the real etcd is expected to tell it."""
        return replace(
            event,
            create_revision=self.shifted(event.create_revision),
            mod_revision=self.shifted(event.mod_revision),
        )

    async def caught_up(self, watch: Watched, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(watch.events) < count:
                await asyncio.sleep(0.001)

    async def clean_up(self) -> None:
        for watch in self.watches:
            watch.task.cancel()
        await asyncio.gather(*(watch.task for watch in self.watches), return_exceptions=True)
        for _, really in self.leases:
            await self.real.store.revoke_lease(really)


def test_the_same_operations_get_the_same_answers(real):
    StoreMachine.real = real
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


def test_a_lease_that_is_not_renewed_ends_with_its_keys_at_one_revision(real):
    async def lapse() -> list[int]:
        store = real.store
        lease = await store.grant_lease(1)
        async with asyncio.timeout(PATIENCE_S), aclosing(store.watch("/lapse/")) as updates:
            await anext(updates)
            await store.commit(Transaction((), (Put("/lapse/1", b"", lease), Put("/lapse/2", b"", lease))))
            await anext(updates)
            gone = await anext(updates)
        assert not await store.keep_lease_alive(lease)
        return [event.mod_revision - gone.revision for event in gone.events if event.value is None]

    model = Etcd()
    model.grant(1)
    model.commit(Transaction((), (Put("/lapse/1", b"", 1), Put("/lapse/2", b"", 1))))
    model.revoke(1)
    ends = [event.mod_revision - model.revision for event in model.last.events]
    assert real.runner.run(lapse()) == ends == [0, 0]


def test_a_put_under_a_lease_that_is_gone_names_it():
    model = Etcd()
    with pytest.raises(VfleetError) as refused:
        model.commit(Transaction((), (Put("/a", b"", 7),)))
    assert (refused.value.reason, refused.value.metadata["lease"]) == (Reason.CONFLICT, "7")
