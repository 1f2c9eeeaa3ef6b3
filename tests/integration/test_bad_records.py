"""Records that nobody can read, among others: who they are about may suffer, and everybody else goes on."""

from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp
from support.local_cluster import running

from vfleet.etcd import keys
from vfleet.etcd.records import encode
from vfleet.etcd.store import Put, Transaction
from vfleet.v1.migration_service_pb2 import CreateMigrationRequest, MoveRequest, QueuedMigration
from vfleet.v1.records_pb2 import Migration, Phase

NEVER = Timestamp(seconds=1 << 60)
BAD = {
    keys.migration_key("m-phase"): encode(Migration(name="m-phase", phase=999)),
    keys.migration_key("m-unset"): encode(Migration(name="m-unset")),
    keys.migration_key("m-time"): encode(Migration(name="m-time", phase=Phase.PHASE_PREPARING, begin_time=NEVER)),
    keys.queue_key("m-never"): encode(
        QueuedMigration(
            request=CreateMigrationRequest(request_id="m-never", moves=[MoveRequest(function="vf9")]), expire_time=NEVER
        )
    ),
    keys.migration_key("m-bytes"): b"\xff",
    keys.queue_key("m-bytes"): b"\xff",
    keys.function_key("vf9"): b"\xff",
    keys.driver_key("d9"): b"\xff",
    keys.host_key("h9"): b"\xff",
    keys.entry_key("h1", "d9", "vf9"): b"\xff",
    keys.coordinator_key("c9"): b"\xff",
}


async def test_everybody_else_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path) as cluster:
        await cluster.fleet.create_function("vf1", device="h1/nic0")
        await cluster.work("d1", "vf1", "h1")
        for key, value in BAD.items():
            await cluster.store.commit(Transaction((), (Put(key, value),)))
        assert (await cluster.move("m-1", {"vf1": "h2/nic0"})).phase == Phase.PHASE_DONE
        # What begins anew reads all of them at once.
        for daemon in cluster.local.daemons:
            await daemon.restart()
        assert (await cluster.move("m-2", {"vf1": "h3/nic0"})).phase == Phase.PHASE_DONE
        await cluster.until_working()
        await cluster.stop_workloads()
