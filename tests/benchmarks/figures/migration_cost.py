"""How many etcd transactions and calls between processes a migration of one function takes. Counted, not timed.

A coordinator in this process makes them, through a store and channels that count. All of its transactions count but
those by which it registers, as it does anew when its lease ended. To the calls comes one more, of the target to the
source, for the state.
"""

import asyncio
from random import Random

import grpc
from benchmarks.measure import Figure, Samples, Size, at_most
from benchmarks.rig import bench
from support.interposed_store import InterposedStore

from coordinator.config import Config
from coordinator.daemon import Daemon
from vfleet.client import FleetClient, move_request
from vfleet.clock import SystemClock
from vfleet.etcd import keys
from vfleet.etcd.store import Committed, Store, Transaction
from vfleet.rpc import _CHANNEL_OPTIONS, Channels
from vfleet.v1.records_pb2 import Phase

PULL = 1  # ExportState: the target's call


class CountingStore(InterposedStore):
    """A store that counts the transactions of migrations."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.transactions = 0

    async def commit(self, transaction: Transaction) -> Committed:
        if not all(write.key.startswith(keys.COORDINATORS) for write in transaction.writes):
            self.transactions += 1
        return await super().commit(transaction)


class Counter:
    """Interceptors that note each call's method."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def connect(self, address: str) -> grpc.aio.Channel:
        counter = self

        class Unary(grpc.aio.UnaryUnaryClientInterceptor):
            async def intercept_unary_unary(self, continuation, details, request):
                counter.note(details)
                return await continuation(details, request)

        class Stream(grpc.aio.UnaryStreamClientInterceptor):
            async def intercept_unary_stream(self, continuation, details, request):
                counter.note(details)
                return await continuation(details, request)

        return grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS, interceptors=[Unary(), Stream()])

    def note(self, details: grpc.aio.ClientCallDetails) -> None:
        method = details.method
        self.calls.append((method.decode() if isinstance(method, bytes) else method).rpartition("/")[2])


async def run(size: Size) -> list[Figure]:
    counter = Counter()
    transactions, calls = [], []
    async with bench(bare=0) as rig:
        cluster = rig.cluster
        for daemon in cluster.local.coordinators.values():
            await daemon.stop()
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        channels = Channels(counter.connect)
        config = Config(name="counted", listen="127.0.0.1:0", etcd=(), lease_ttl_s=10)
        store = CountingStore(cluster.store)
        daemon = Daemon(config, store, channels, SystemClock(), Random())
        task = asyncio.create_task(daemon.run(ready.set_result))
        async with FleetClient([await ready]) as fleet:
            await fleet.create_function("vf1", "h2/nic0")
            await fleet.attach_driver("vf1", "d1", host="h1")
            for number in range(size.of(10, 2)):
                store.transactions = 0
                counter.calls.clear()
                moves = [move_request("vf1", ("h3/nic0", "h2/nic0")[number % 2])]
                await fleet.create_migration(moves, name=f"m{number}")
                migration = await fleet.wait_migration(f"m{number}")
                assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
                transactions.append(store.transactions)
                calls.append(len(counter.calls) + PULL)
        task.cancel()
        await asyncio.wait([task])
        await channels.close()
    return [
        Figure("etcd transactions a migration", max(transactions), at_most(3), Samples(transactions, "each"), None),
        Figure("calls a migration", max(calls), at_most(7), Samples(calls, "each"), None),
    ]
