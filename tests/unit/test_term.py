"""Migrations that begin at the same moment, while the BEGIN of the first is on its way to etcd."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import pytest
from support.drain_rig import DrainRig
from support.fleet_store import FleetStore
from support.fleet_values import FleetValues, move
from support.manual_clock import settle

from coordinator.dispatch import Dispatcher
from coordinator.migration import Options
from coordinator.queueing import Allowance, enqueue
from coordinator.snapshot import Stored
from coordinator.term import Term
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.store import Committed, Transaction
from vfleet.v1.migration_service_pb2 import CreateMigrationRequest, QueuedMigration
from vfleet.v1.placement_pb2 import Boundary, Constraints, GroupRule, Relation
from vfleet.v1.records_pb2 import Migration


class SlowStore(FleetStore):
    """A store whose transactions are under way until `arrive` is set."""

    max_operations, max_request_bytes = 128, 3 << 19

    def __init__(self, fleet: FleetValues, rig: "TermRig") -> None:
        super().__init__(fleet, rig.look)
        self.arrive = asyncio.Event()

    async def commit(self, change: Transaction) -> Committed:
        await self.arrive.wait()
        return await super().commit(change)


class DeafHosts:
    """Hosts that never answer: what begins goes no further."""

    def under(self, check: object) -> "DeafHosts":
        return self

    async def create_function(self, host: str, request: object) -> None:
        await asyncio.Event().wait()


class LiveSession:
    lease, is_lost = 5, False

    def check(self) -> None:
        pass


class TermRig(DrainRig):
    """The fleet of drains, and a coordinator's term over it."""

    def __init__(self) -> None:
        super().__init__()
        self.store = SlowStore(self.fleet, self)
        self.context = replace(self.context, store=self.store, hosts=DeafHosts(), allowance=Allowance(host=2))
        self.term = Term(self.context, LiveSession())

    def ask(
        self,
        name: str,
        function: str,
        target: str,
        vf_index: int = 0,
        apart: Sequence[str] = (),
        term: Term | None = None,
    ) -> asyncio.Task[Stored[Migration]]:
        different = Relation.RELATION_DIFFERENT
        rules = [GroupRule(functions=apart, boundary=Boundary.BOUNDARY_HOST, relation=different)] if apart else []
        request = CreateMigrationRequest(
            request_id=name, moves=[move(function, target, vf_index)], constraints=Constraints(groups=rules)
        )
        return asyncio.create_task((term or self.term).begin(request, Options(), may_wait=False))


@pytest.fixture
async def rig() -> AsyncIterator[TermRig]:
    made = TermRig()
    yield made
    await made.term.close()


async def test_a_rule_waits_for_where_a_function_goes_that_is_about_to_begin(rig: TermRig):
    """By what the inventory shows, vf1 is at home still, and h2 would do for vf2."""
    first = rig.ask("m1", "vf1", "h2/nic0", 1)
    await settle()
    second = rig.ask("m2", "vf2", "h2/nic0", 2, apart=["vf1", "vf2"])
    await settle()
    assert not first.done()
    assert not second.done()
    rig.store.arrive.set()
    assert (await first).record.name == "m1"
    with pytest.raises(VfleetError, match="'vf1' is in migration 'm1'") as caught:
        await second
    assert caught.value.reason is Reason.IN_MIGRATION
    assert set(rig.inventory.snapshot.active_migrations) == {"m1"}


async def test_two_that_begin_at_once_get_different_slots_without_a_second_try(rig: TermRig):
    asked = [rig.ask("m1", "vf1", "h2/nic0"), rig.ask("m2", "vf2", "h2/nic0")]
    await settle()
    rig.store.arrive.set()
    stored = [await each for each in asked]
    assert [each.record.moves[0].target.vf_index for each in stored] == [1, 2]
    assert rig.store.commits == 2


async def test_those_that_are_about_to_begin_count_for_the_limits(rig: TermRig):
    asked = [rig.ask(f"m{number}", f"vf{number}", f"h{1 + number}/nic0") for number in (1, 2)]
    await settle()
    third = rig.ask("m3", "vf3", "h3/nic0")
    await settle()
    assert third.done()
    with pytest.raises(VfleetError, match="2 migrations are under way from or to h1") as caught:
        await third
    assert caught.value.reason is Reason.LIMIT_EXCEEDED
    rig.store.arrive.set()
    assert {(await each).record.name for each in asked} == {"m1", "m2"}


async def test_a_queued_one_begins_if_one_that_took_its_place_comes_to_nothing(rig: TermRig):
    """Nothing changes in the fleet by that: none is under way, before and after."""
    rig.context = replace(rig.context, allowance=Allowance(fleet=1))
    rig.term = Term(rig.context, LiveSession())
    asked = rig.ask("m1", "vf1", "h2/nic0")
    await settle()
    entry = QueuedMigration(request=CreateMigrationRequest(request_id="q", moves=[move("vf2", "h2/nic0")]))
    entry.expire_time.FromSeconds(round(rig.clock.now) + 3600)
    assert rig.fleet.commit(enqueue(entry))
    rig.look()
    dispatching = asyncio.create_task(Dispatcher(rig.context, rig.term).run())
    await settle()
    del rig.fleet.items[keys.function_key("vf1")]
    rig.store.arrive.set()
    with pytest.raises(VfleetError, match="no function named 'vf1'"):
        await asked
    await rig.clock.advance(10)
    assert set(rig.inventory.snapshot.active_migrations) == {"q"}
    dispatching.cancel()
    await asyncio.gather(dispatching, return_exceptions=True)
    await rig.term.close()


async def test_two_coordinators_keep_functions_apart_that_they_move_at_the_same_moment(rig: TermRig):
    other = Term(replace(rig.context, name="c2"), LiveSession())
    apart = ["vf1", "vf2"]
    first = rig.ask("m1", "vf1", "h2/nic0", 1, apart)
    second = rig.ask("m2", "vf2", "h2/nic0", 2, apart, term=other)
    await settle()
    rig.store.arrive.set()
    assert (await first).record.name == "m1"
    with pytest.raises(VfleetError, match="'vf1' is in migration 'm1'"):
        await second
    assert set(rig.inventory.snapshot.active_migrations) == {"m1"}
    await other.close()
