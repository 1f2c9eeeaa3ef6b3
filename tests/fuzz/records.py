"""What is stored: records in etcd that nobody of this version wrote, read by all that read them."""

import asyncio

from atheris import FuzzedDataProvider
from fuzz.fleet import FoundError, in_a_fleet
from fuzz.messages import fill
from simulation.vopr.world import World

from vfleet.etcd import keys
from vfleet.etcd.store import Put, Transaction
from vfleet.v1.migration_service_pb2 import QueuedMigration
from vfleet.v1.records_pb2 import Coordinator, Cordon, Driver, Function, Host, Migration, Slot
from vfleet.v1.types_pb2 import TableEntry

KINDS = {
    keys.HOSTS: Host,
    keys.CORDONS: Cordon,
    keys.COORDINATORS: Coordinator,
    keys.FUNCTIONS: Function,
    keys.SLOTS: Slot,
    keys.DRIVERS: Driver,
    keys.ENTRIES: TableEntry,
    keys.MIGRATIONS: Migration,
    keys.QUEUE: QueuedMigration,
    keys.REGISTRATIONS: None,
    keys.LOCKS: None,
    keys.OWNERS: None,
}
NAMES = (
    "vf1",
    "vf9",
    "h1",
    "h9",
    "d1",
    "h1/nic0/1",
    "h1/nic0/x",
    "h1/d1/vf1",
    "h3/d2/vf2",
    "h1/d9/vf9",
    "m-1",
    "",
    "/",
    "a/b/c/d",
)
MAX_RECORDS = 6


def target(given: bytes) -> None:
    """Write a few records, and let everybody read them."""
    data = FuzzedDataProvider(given)
    writes: dict[str, bytes] = {}
    while data.remaining_bytes() and len(writes) < MAX_RECORDS:
        prefix = data.PickValueInList(list(KINDS))
        kind = KINDS[prefix]
        if kind is None or data.ConsumeIntInRange(0, 4) == 0:
            content = data.ConsumeBytes(data.ConsumeIntInRange(0, 200))
        else:
            message = kind()
            fill(message, data)
            if hasattr(message, "schema_version"):
                # One of a newer vfleet ends a daemon, and has to.
                message.schema_version = data.PickValueInList([1, 1, 1, 1, 0])
            content = message.SerializeToString()
        writes[prefix + data.PickValueInList(list(NAMES))] = content

    async def play(world: World) -> None:
        for key, content in writes.items():
            world.etcd.commit("somebody", Transaction((), (Put(key, content),)))
            await asyncio.sleep(0.2)
        await asyncio.sleep(5.0)
        # A daemon that is started anew reads all of it at once.
        for process in (world.coordinators["c1"], world.hosts["h2"]):
            world.kill(process, 0.1)
        await asyncio.sleep(10.0)
        # None of the records is about these: what is wrong with others is no reason not to be there.
        there = {item.key for item in world.etcd.state.list(keys.PREFIX).items}
        missing = {*map(keys.registration_key, ("h2", "h3")), *map(keys.coordinator_key, ("c1", "c2"))} - there
        if missing:
            raise FoundError(f"does not come back: {sorted(missing)}")

    if writes:
        in_a_fleet(play)
