"""A host in the middle of a migration, with everything on it that can wait for the decision."""

import asyncio
from pathlib import Path
from random import Random

from support.bench import RESOLVE_MS, Bench
from support.interposed_store import InterposedStore

from hostd.history import History
from hostd.resolution import Resolver
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.keys import FLEET_GENERATION, entry_key, function_key, migration_key, owner_key
from vfleet.etcd.records import decode, encode
from vfleet.etcd.store import Delete, Put, Transaction
from vfleet.v1.records_pb2 import (
    PHASE_COMMITTED,
    PHASE_PREPARING,
    Function,
    Migration,
    Phase,
)
from vfleet.v1.types_pb2 import (
    DEVICE_STATE_RUNNING,
    DEVICE_STATE_STOP,
    DEVICE_STATE_STOP_COPY,
)

RUNNING = DEVICE_STATE_RUNNING
STOP_COPY = DEVICE_STATE_STOP_COPY
PREPARED = DEVICE_STATE_STOP
DEADLINE_S = RESOLVE_MS / 1000
GONE = None

# A source on device nic0, generation 1; a target on nic1, generation 2; both on this host, so that one test sees all.
SOURCE, TARGET = 1, 2


class Rig:
    """A host in the middle of migration m1: the source is stopped, the target is prepared, driver d1 is held."""

    def __init__(self, path: Path, store: EtcdStore) -> None:
        self.bench = Bench(path)
        self.store = InterposedStore(store)
        self.source = self.bench.create()
        self.attempt = 0
        self.bench.drivers.recorded("d1", 0)
        bench = self.bench
        self.history = History("h1", bench.ledger, bench.fences, Random(7))
        self.resolver = Resolver(
            "h1", bench.functions, bench.drivers, bench.fences, self.history, self.store, bench.clock
        )
        self.task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Do what a coordinator does up to the end of the copy."""
        bench = self.bench
        await self.put_function(self.source)
        revision = await self.put_entry(self.source)
        bench.drivers.attach(bench.message(self.source.about.base, revision=revision))
        self.attempt = await self.put_migration(PHASE_PREPARING)
        self.target = bench.create(generation=2, revision=self.attempt, fresh=False, device="nic1")
        bench.stop(1, self.attempt)
        await bench.hold(self.attempt, ("d1", "vf1", 1))
        bench.functions.complete_import(self.target)

    async def put(self, key: str, value: bytes) -> int:
        return (await self.store.commit(Transaction((), (Put(key, value),)))).revision

    async def delete(self, key: str) -> None:
        await self.store.commit(Transaction((), (Delete(key),)))

    async def put_function(self, home) -> None:
        about = home.about
        record = Function(
            name="vf1",
            identity=about.identity,
            generation=about.generation,
            device=about.device,
            vf_index=about.vf_index,
            base=about.base,
        )
        await self.put(function_key("vf1"), encode(record))

    async def put_migration(self, phase: Phase.ValueType, name: str = "m1") -> int:
        return await self.put(migration_key(name), encode(Migration(name=name, phase=phase)))

    async def put_entry(self, home) -> int:
        entry = self.bench.message(home.about.base, generation=home.about.generation)
        entry.ClearField("revision")
        return await self.put(entry_key("h1", "d1", "vf1"), encode(entry))

    async def raise_generation(self) -> None:
        """Let somebody raise the fleet generation, and the host see it."""
        await self.history.read(self.store)
        await self.put(FLEET_GENERATION, b"2")
        raised = await self.history.read(self.store)
        assert raised is not None
        self.history.begin(raised)

    async def own(self) -> None:
        """Let a coordinator run the migration."""
        await self.put(owner_key("m1"), b"c1")

    async def commit(self, phase: Phase.ValueType = PHASE_COMMITTED) -> None:
        await self.put_function(self.target)
        await self.put_entry(self.target)
        await self.put_migration(phase)

    async def phase(self) -> Phase.ValueType:
        stored = await self.store.get(migration_key("m1"))
        assert stored is not None
        return decode(Migration, stored).phase

    async def pass_deadlines(self, seconds: float = DEADLINE_S) -> None:
        """Let time pass, and everything be resolved that is due."""
        self.bench.clock.now += seconds
        await self.resolver.resolve_due()

    def state(self, generation: int) -> int | None:
        instance = self.bench.functions.find("vf1", generation)
        return instance.state if instance is not None else GONE

    def entry(self) -> tuple[int, bool]:
        """Return the generation of d1's entry, and whether it is held."""
        entry = self.bench.entry()
        return entry.generation, entry.held

    def seen(self) -> tuple[int | None, int | None, tuple[int, bool]]:
        """Return the source's state, the target's, and the entry."""
        return self.state(SOURCE), self.state(TARGET), self.entry()

    async def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.gather(self.task, return_exceptions=True)
        self.bench.close()


WAITING = (STOP_COPY, PREPARED, (1, True))
UNDONE = (RUNNING, PREPARED, (1, False))
BACK = (RUNNING, GONE, (1, False))
THERE = (GONE, RUNNING, (2, False))
