"""What happens to migrations and functions whose coordinator ends, or loses its session, at any step."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.cluster import FakeCluster, eventually, refused
from support.fake_host import RUNNING

from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.store import Store, Transaction
from vfleet.v1.records_pb2 import FunctionStatus, Phase


@pytest.fixture
async def cluster(store) -> AsyncIterator[FakeCluster]:
    cluster = FakeCluster(store, lease_ttl_s=1)
    await cluster.start()
    yield cluster
    await cluster.stop()


class Unreliable:
    """A store that can lose the answers of chosen transactions, before or after they are carried out."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.lose_answer_of: str | None = None
        self.never_send: str | None = None
        self.out_of_reach = False

    def __getattr__(self, name):
        return getattr(self.store, name)

    async def keep_lease_alive(self, lease):
        self.check()
        return await self.store.keep_lease_alive(lease)

    async def get(self, key):
        self.check()
        return await self.store.get(key)

    async def commit(self, transaction: Transaction):
        self.check()
        kind = kind_of(transaction)
        if kind == self.never_send:
            self.never_send = None
            raise VfleetError(Reason.OUTCOME_UNKNOWN, f"{kind} was not sent")
        result = await self.store.commit(transaction)
        if kind == self.lose_answer_of:
            self.lose_answer_of = None
            raise VfleetError(Reason.OUTCOME_UNKNOWN, f"the answer to {kind} was lost")
        return result

    def check(self) -> None:
        if self.out_of_reach:
            raise VfleetError(Reason.STORE_UNAVAILABLE, "etcd is out of reach")


def kind_of(transaction: Transaction) -> str:
    written = [write.key for write in transaction.writes]
    deleted = any(not hasattr(write, "value") for write in transaction.writes)
    if any(key.startswith(keys.MIGRATIONS) for key in written):
        if deleted:
            return "FINISH"
        if any(key.startswith(keys.LOCKS) for key in written):
            return "BEGIN"
        return "COMMIT" if any(key.startswith(keys.FUNCTIONS) for key in written) else "ABORT"
    return "other"


async def with_driver(cluster: FakeCluster) -> None:
    await cluster.create("vf1", "h1/nic0")
    await cluster.attach("vf1", "d1", "h1")


def injected() -> VfleetError:
    return VfleetError(Reason.LIMIT_EXCEEDED, "no more memory")


@pytest.mark.parametrize(
    ("host", "method"), [("h2", "CreateFunction"), ("h1", "ExportState"), ("h2", "ImportState end")]
)
async def test_an_undecided_migration_of_a_stopped_coordinator_is_aborted_by_another(cluster, host, method):
    await with_driver(cluster)
    await cluster.start_coordinator("c2")
    cluster.hosts[host].block[method] = asyncio.Event()
    await cluster.migrate("m1", {"vf1": "h2/nic0"})
    await eventually(lambda: method in cluster.hosts[host].calls)
    await cluster.stop_coordinator("c1")
    migration = await cluster.ended("m1", "c2")
    assert (migration.phase, migration.finished_by) == (Phase.PHASE_ABORTED, "c2")
    assert cluster.hosts["h1"].instances["vf1", 1] == RUNNING
    cluster.addresses["c1"] = cluster.addresses["c2"]
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


@pytest.mark.parametrize(("host", "method"), [("h1", "UpdateTable"), ("h1", "DestroyFunction")])
async def test_a_committed_migration_of_a_stopped_coordinator_is_carried_out_by_another(cluster, host, method):
    await with_driver(cluster)
    await cluster.start_coordinator("c2")
    cluster.hosts[host].fail[method] = injected()
    await cluster.migrate("m1", {"vf1": "h2/nic0"})
    await eventually(lambda: method in cluster.hosts[host].calls)
    await cluster.stop_coordinator("c1")
    cluster.hosts[host].fail.clear()
    migration = await cluster.ended("m1", "c2")
    assert (migration.phase, migration.finished_by) == (Phase.PHASE_DONE, "c2")
    cluster.addresses["c1"] = cluster.addresses["c2"]
    await cluster.assert_nothing_left({"vf1": "h2/nic0"})


async def test_an_aborting_migration_is_undone_by_a_coordinator_that_starts_later(cluster):
    await with_driver(cluster)
    cluster.hosts["h2"].fail["ImportState"] = injected()
    cluster.hosts["h2"].fail["DestroyFunction"] = injected()
    await cluster.migrate("m1", {"vf1": "h2/nic0"})
    await eventually(lambda: "DestroyFunction" in cluster.hosts["h2"].calls)
    await cluster.stop_coordinator("c1")
    cluster.hosts["h2"].fail.clear()
    await cluster.start_coordinator("c2")
    migration = await cluster.ended("m1", "c2")
    assert (migration.phase, migration.coordinator, migration.finished_by) == (Phase.PHASE_ABORTED, "c1", "c2")
    cluster.addresses["c1"] = cluster.addresses["c2"]
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


@pytest.mark.parametrize("kind", ["BEGIN", "COMMIT", "FINISH"])
@pytest.mark.parametrize("how", ["lose_answer_of", "never_send"])
async def test_a_transaction_without_an_answer_is_read_back(cluster, store, kind, how):
    unreliable = Unreliable(store)
    await with_driver(cluster)
    await cluster.start_coordinator("c2", unreliable)
    setattr(unreliable, how, kind)
    await cluster.migrate("m1", {"vf1": "h2/nic0"}, "c2")
    assert (await cluster.ended("m1")).phase == Phase.PHASE_DONE
    await cluster.assert_nothing_left({"vf1": "h2/nic0"})
    assert cluster.hosts["h2"].count()["CreateFunction"] == 1


@pytest.mark.parametrize("how", ["lose_answer_of", "never_send"])
async def test_an_abort_without_an_answer_is_read_back(cluster, store, how):
    unreliable = Unreliable(store)
    await with_driver(cluster)
    await cluster.start_coordinator("c2", unreliable)
    setattr(unreliable, how, "ABORT")
    cluster.hosts["h2"].fail["ImportState"] = injected()
    await cluster.migrate("m1", {"vf1": "h2/nic0"}, "c2")
    assert (await cluster.ended("m1")).phase == Phase.PHASE_ABORTED
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


async def test_a_coordinator_that_loses_its_session_drops_its_work_and_starts_anew(cluster, store):
    unreliable = Unreliable(store)
    await with_driver(cluster)
    await cluster.start_coordinator("c2", unreliable)
    gate = cluster.hosts["h1"].block["ExportState"] = asyncio.Event()
    await cluster.migrate("m1", {"vf1": "h2/nic0"}, "c2")
    await eventually(lambda: "ExportState" in cluster.hosts["h1"].calls)
    unreliable.out_of_reach = True
    migration = await cluster.ended("m1", "c1")
    assert (migration.phase, migration.finished_by) == (Phase.PHASE_ABORTED, "c1")
    unreliable.out_of_reach = False
    gate.set()

    async def registered() -> bool:
        return await cluster.keys(keys.COORDINATORS) == ["c1", "c2"]

    await eventually(registered)
    await cluster.migrate("m2", {"vf1": "h2/nic0"}, "c2")
    assert (await cluster.ended("m2")).phase == Phase.PHASE_DONE
    await cluster.assert_nothing_left({"vf1": "h2/nic0"})


async def test_a_function_in_creation_is_made_by_a_coordinator_that_starts_later(cluster):
    cluster.hosts["h1"].fail["CreateFunction"] = injected()
    assert (await refused(cluster.create("vf1", "h1/nic0"))).reason is Reason.LIMIT_EXCEEDED
    assert (await cluster.function("vf1")).status == FunctionStatus.FUNCTION_STATUS_CREATING
    await cluster.stop_coordinator("c1")
    cluster.hosts["h1"].fail.clear()
    await cluster.start_coordinator("c2")

    async def active() -> bool:
        return (await cluster.function("vf1", "c2")).status == FunctionStatus.FUNCTION_STATUS_ACTIVE

    await eventually(active)


async def test_a_function_left_in_creation_by_a_call_that_failed_is_made_by_the_same_coordinator(cluster):
    cluster.hosts["h1"].fail["CreateFunction"] = injected()
    assert (await refused(cluster.create("vf1", "h1/nic0"))).reason is Reason.LIMIT_EXCEEDED
    assert (await cluster.function("vf1")).status == FunctionStatus.FUNCTION_STATUS_CREATING
    cluster.hosts["h1"].fail.clear()

    async def active() -> bool:
        return (await cluster.function("vf1")).status == FunctionStatus.FUNCTION_STATUS_ACTIVE

    await eventually(active)
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


async def test_a_function_left_in_deletion_is_deleted_once_its_host_lets_it(cluster):
    await cluster.create("vf1", "h1/nic0")
    cluster.hosts["h1"].fail["DestroyFunction"] = injected()
    assert (await refused(cluster.delete("vf1"))).reason is Reason.LIMIT_EXCEEDED
    before = cluster.hosts["h1"].count()["DestroyFunction"]
    await eventually(lambda: cluster.hosts["h1"].count()["DestroyFunction"] > before)
    cluster.hosts["h1"].fail.clear()

    async def gone() -> bool:
        return await cluster.keys(keys.FUNCTIONS) == []

    await eventually(gone)
    await cluster.assert_nothing_left({})


async def test_two_coordinators_of_one_name_exclude_each_other(cluster):
    error = await refused(cluster.start_coordinator("c1"))
    assert error.reason is Reason.ALREADY_EXISTS
