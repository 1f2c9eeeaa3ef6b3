"""What a coordinator does as long as its term lasts goes on after a failure that nobody foresaw, as of a bad record."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from random import Random

import pytest
from support.fleet_store import FleetStore
from support.fleet_values import LIMITS, move, three_hosts
from support.manual_clock import ManualClock, settle

from coordinator import transaction
from coordinator.config import Config
from coordinator.daemon import RETRY_LONGEST_S, Daemon
from coordinator.planner import parts_of_targets, plan
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.store import Committed, Transaction
from vfleet.rpc import Channels
from vfleet.v1.migration_service_pb2 import CreateMigrationRequest, QueuedMigration
from vfleet.v1.records_pb2 import Function, FunctionStatus, Migration, Phase

NOW_S = 1e9  # everything is long ago


class BrokenStore(FleetStore):
    """A store that fails at the next `failures` transactions, for a reason that nobody foresaw."""

    max_operations, max_request_bytes = LIMITS.operations, LIMITS.request_bytes
    failures = 1

    async def commit(self, change: Transaction) -> Committed:
        if self.failures:
            self.failures -= 1
            raise ValueError("what nobody foresaw")
        return await super().commit(change)


class DeafHosts:
    """Hosts that never answer: what begins goes no further."""

    def under(self, check: object) -> "DeafHosts":
        return self

    def __getattr__(self, name: str) -> object:
        async def never(*_: object) -> None:
            await asyncio.Event().wait()

        return never


class LiveSession:
    lease, is_lost = 5, False

    def __init__(self) -> None:
        self.lost = asyncio.Event()

    def check(self) -> None:
        pass


class DaemonRig:
    """A coordinator whose term has not begun, over a fleet of values."""

    def __init__(self) -> None:
        self.clock, self.fleet = ManualClock(NOW_S), three_hosts()
        self.store = BrokenStore(self.fleet, self.look)
        config = Config("c1", "127.0.0.1:0", ("127.0.0.1:1",))
        self.daemon = Daemon(config, self.store, Channels(), self.clock, Random(7))
        self.daemon._context = replace(self.daemon._context, hosts=DeafHosts())

    def look(self) -> None:
        """Let the inventory see what the store has."""
        inventory = self.daemon._context.inventory
        inventory.snapshot = self.fleet.snapshot()
        inventory.notify()

    @contextlib.asynccontextmanager
    async def term(self) -> AsyncIterator[None]:
        self.look()
        task = asyncio.create_task(self.daemon._serve_term(LiveSession()))
        await settle()
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
def rig() -> DaemonRig:
    return DaemonRig()


def orphan(rig: DaemonRig) -> None:
    """Let a migration be without an owner."""
    snapshot = rig.fleet.snapshot()
    migration = plan(snapshot, [move("vf1", "h2/nic0")], name="m1", coordinator="c0", limits=LIMITS)
    begin = transaction.begin(migration, 4, snapshot.fleet_generation_is_this, parts_of_targets(snapshot, migration))
    assert rig.fleet.commit(begin)
    del rig.fleet.items[keys.owner_key("m1")]


def queued(rig: DaemonRig) -> None:
    """Let a migration be queued that nothing keeps waiting."""
    request = CreateMigrationRequest(request_id="m1", moves=[move("vf1", "h2/nic0")])
    entry = QueuedMigration(request=request, coordinator="c1")
    entry.expire_time.FromSeconds(int(NOW_S) + 3600)
    rig.fleet.put(keys.queue_key("m1"), entry)


def outdated(rig: DaemonRig) -> None:
    """Let the record of a migration be kept for too long."""
    rig.fleet.put(keys.migration_key("m1"), Migration(name="m1", phase=Phase.PHASE_DONE))


@pytest.mark.parametrize(
    ("begins_with", "done"),
    [
        (orphan, lambda items: keys.owner_key("m1") in items),
        (queued, lambda items: keys.migration_key("m1") in items and keys.queue_key("m1") not in items),
        (outdated, lambda items: keys.migration_key("m1") not in items),
    ],
)
async def test_what_failed_is_done_when_its_task_has_begun_anew(
    rig: DaemonRig, caplog: pytest.LogCaptureFixture, begins_with: object, done: object
):
    begins_with(rig)
    async with rig.term():
        assert rig.store.failures == 0
        assert not done(rig.fleet.items)
        (told,) = [each for each in caplog.records if each.levelno >= logging.ERROR]
        assert (told.getMessage(), str(told.exc_info[1])) == (
            "begun anew after what nobody foresaw",
            "what nobody foresaw",
        )
        await rig.clock.advance(RETRY_LONGEST_S)
        assert done(rig.fleet.items)


async def test_a_function_in_creation_is_driven_on_by_a_task_that_has_begun_anew(rig: DaemonRig):
    class Unreadable(set):
        def __sub__(self, other: object) -> set[str]:
            raise ValueError("what nobody foresaw")

    rig.look()
    context = rig.daemon._context
    context.inventory.snapshot.unfinished_functions = Unreadable()
    task = asyncio.create_task(rig.daemon._serve_term(LiveSession()))
    await settle()
    home = Function()
    home.ParseFromString(rig.fleet.items[keys.function_key("vf2")].value)
    home.status = FunctionStatus.FUNCTION_STATUS_DELETING
    rig.fleet.put(keys.function_key("vf2"), home)
    rig.look()
    rig.store.failures = 0
    asked: list[str] = []
    context.hosts.destroy_function = lambda host, request: _note(asked, request.function)
    await rig.clock.advance(10)
    assert asked == ["vf2"]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _note(asked: list[str], name: str) -> None:
    asked.append(name)


async def test_work_that_has_an_end_is_begun_anew_in_whatever_way_it_ends(rig: DaemonRig):
    ends: list[Exception | None] = [None, VfleetError(Reason.STORE_UNAVAILABLE, "no store"), ValueError("?"), None]
    begun: list[float] = []

    def work() -> Coroutine[None, None, None]:
        begun.append(rig.clock.now - NOW_S)
        return end()

    async def end() -> None:
        if error := ends[(len(begun) - 1) % len(ends)]:
            raise error

    task = asyncio.create_task(rig.daemon._lasting(work))
    await rig.clock.advance(4 * RETRY_LONGEST_S)
    assert begun == [number * RETRY_LONGEST_S for number in range(5)]
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
