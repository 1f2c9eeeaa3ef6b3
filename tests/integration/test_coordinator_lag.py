"""Two coordinators, one of which hears late of what the other did: a client that asks both never notices."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
from support.cluster import FakeCluster, refused
from support.interposed_store import InterposedStore

from vfleet.errors import Reason
from vfleet.etcd.store import Changes, Listing
from vfleet.v1 import fleet_service_pb2 as fleet_pb
from vfleet.v1 import migration_service_pb2 as migration_pb
from vfleet.v1.records_pb2 import Phase


class LateStore(InterposedStore):
    """A store whose watches are silent from `fall_behind` on until somebody lists something."""

    def __init__(self, store) -> None:
        super().__init__(store)
        self._heard = asyncio.Event()
        self._heard.set()

    def fall_behind(self) -> None:
        self._heard.clear()

    async def list(self, prefix: str) -> Listing:
        listing = await super().list(prefix)
        self._heard.set()
        return listing

    async def watch(self, prefix: str) -> AsyncGenerator[Listing | Changes, None]:
        async for update in self._store.watch(prefix):
            await self._heard.wait()
            yield update


@pytest.fixture
async def late(store) -> LateStore:
    return LateStore(store)


@pytest.fixture
async def cluster(store, late: LateStore) -> AsyncIterator[FakeCluster]:
    """Coordinator c1, and c2, which has the late store."""
    cluster = FakeCluster(store)
    await cluster.start()
    await cluster.start_coordinator("c2", late)
    yield cluster
    await cluster.stop()


async def test_what_one_has_made_the_other_does_not_deny(cluster: FakeCluster, late: LateStore) -> None:
    late.fall_behind()
    await cluster.create("vf1", "h1/nic0")
    attach = fleet_pb.AttachDriverRequest(function="vf1", driver="d1", host="h1")
    assert (await cluster.ask(cluster.fleet("c2").AttachDriver, attach)).entry.function == "vf1"
    late.fall_behind()
    await cluster.create("vf2", "h1/nic0")
    plan = migration_pb.PlanMigrationRequest(
        moves=[migration_pb.MoveRequest(function="vf2", target_device="h2/nic0")],
    )
    planned = (await cluster.ask(cluster.migrations("c2").PlanMigration, plan)).migration
    assert planned.moves[0].source.device == "h1/nic0"


async def test_a_function_that_one_has_moved_can_be_moved_by_the_other(cluster: FakeCluster, late: LateStore) -> None:
    await cluster.create("vf1", "h1/nic0")
    late.fall_behind()
    assert (await cluster.move("m1", {"vf1": "h2/nic0"})).phase == Phase.PHASE_DONE
    begun = await cluster.migrate("m2", {"vf1": "h1/nic0"}, "c2")
    assert begun.moves[0].source.generation == 2
    assert (await cluster.ended("m2", "c2")).phase == Phase.PHASE_DONE
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


async def test_a_request_made_again_at_the_other_shows_how_far_it_is(cluster: FakeCluster, late: LateStore) -> None:
    await cluster.create("vf1", "h1/nic0")
    gate = cluster.hosts["h1"].block["ExportState"] = asyncio.Event()
    begun = await cluster.migrate("m1", {"vf1": "h2/nic0"}, "c2")  # so that c2 knows of it, undecided
    late.fall_behind()
    await cluster.ask(cluster.migrations("c1").CancelMigration, migration_pb.CancelMigrationRequest(name="m1"))
    gate.set()
    again = await cluster.migrate("m1", {"vf1": "h2/nic0"}, "c2")
    assert again.attempt == begun.attempt
    assert again.phase in (Phase.PHASE_ABORTING, Phase.PHASE_ABORTED)


async def test_what_is_refused_rightly_stays_refused(cluster: FakeCluster) -> None:
    error = await refused(cluster.migrate("m1", {"vf1": "h2/nic0"}, "c2"))
    assert (error.reason, error.metadata["name"]) == (Reason.NOT_FOUND, "vf1")
