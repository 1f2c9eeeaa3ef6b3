"""One host, put together: what the services serve, and the tasks that keep it true to etcd.

Everything that it takes from the world (store, network, clock, randomness, disk) is an argument.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from random import Random

from hostd.directory import Directory
from hostd.dma_link import DmaLink, DmaLinks
from hostd.dma_receiver import Receivers
from hostd.dma_sender import DmaReach
from hostd.drivers import Drivers
from hostd.engine import Engines
from hostd.fabric import Fabric, Link
from hostd.fence import Fences
from hostd.functions import Functions
from hostd.guest.guests import Guests
from hostd.history import History
from hostd.ledger import Ledger
from hostd.neighbours import Neighbours
from hostd.reach import Reach
from hostd.registration import Registration
from hostd.resolution import Resolver
from hostd.rest import Rest
from hostd.segment import Segment
from hostd.stations import Stations
from hostd.switch import Switch, SwitchReach, deliver_through
from hostd.topology import HostTopology
from hostd.traffic import Traffic
from hostd.workload import Workloads
from hostd.workloads.kinds import new_workload
from vfleet.clock import Clock, backoff_delays
from vfleet.errors import VfleetError
from vfleet.etcd.store import Store
from vfleet.rpc import Channels
from vfleet.v1.host_records_pb2 import HostIdentity
from vfleet.v1.records_pb2 import Host as HostRecord

RETRY_FIRST_S = 0.1
RETRY_LONGEST_S = 2.0

_log = logging.getLogger(__name__)


class Host:
    """A host's functions, drivers and workloads, reloaded from its ledger; `run` keeps them true to etcd."""

    def __init__(
        self,
        topology: HostTopology,
        identity: HostIdentity,
        address: str,
        ledger: Ledger,
        store: Store,
        channels: Channels,
        clock: Clock,
        random: Random,
        lease_ttl_s: int,
        *,
        fabric_address: str = "",
        allows_faults: bool = False,
        is_secured: bool = False,
    ) -> None:
        segment = Segment(topology)
        fences = Fences(ledger)
        self.ledger = ledger
        self.clock = clock
        self.channels = channels
        self.directory = Directory()
        self.traffic = Traffic()
        self.fabric = Fabric(lambda number: Link(number, self.directory, channels, clock, random))
        self.functions = Functions(segment, ledger, fences, clock)
        history = self.history = History(topology.name, ledger, fences, random)

        def generation() -> int:
            return history.generation

        reach = Reach(segment.number, identity.session, generation, self.functions, self.fabric, clock, random)
        receivers = Receivers(segment.main_memory, ledger, identity.session, generation)
        self.drivers = Drivers(topology.name, segment.main_memory, ledger, fences, clock, reach, receivers)
        self.dma_links = DmaLinks(lambda number: DmaLink(number, self.directory, channels, clock, random))
        dma_reach = DmaReach(segment.number, self.drivers, self.dma_links, clock, random)
        self.engines = Engines(self.functions, dma_reach, allows_faults=allows_faults)
        self.stations = Stations(self.directory)
        self.switch = Switch(
            SwitchReach(
                segment.number,
                self.functions,
                self.engines,
                self.stations,
                self.directory,
                deliver_through(channels),
                clock,
                random,
            )
        )
        self.guests = Guests(topology.name, self.drivers, ledger, store, clock, ledger.directory / "guests")
        self.neighbours = Neighbours(self.directory, self.stations, self.drivers, store)
        self.workloads = Workloads(self.drivers, ledger, clock, new_workload)
        self._store = store
        self._is_secured = is_secured
        self._random = random
        self._resolver = Resolver(topology.name, self.functions, self.drivers, fences, history, store, clock)
        self._rest = Rest(
            topology.name, identity.incarnation, self.functions, history, channels, store, clock, random, self.traffic
        )
        record = HostRecord(
            name=topology.name,
            segment=topology.segment,
            address=address,
            fabric_address=fabric_address,
            incarnation=identity.incarnation,
            devices=topology.devices(),
        )
        self.registration = Registration(
            record, self.functions, self.drivers, self._resolver, history, store, clock, random, lease_ttl_s
        )
        used = self.functions.files() | self.drivers.files()
        for name in ledger.files():
            if name not in used:
                # Left by a daemon that was killed before it had written, or after it had deleted, the record.
                ledger.delete_file(name)

    async def run(self, registered: Callable[[], None]) -> None:
        """Keep the host registered and true to etcd, for ever. `registered` is told whenever it is (again).

        Raise ALREADY_EXISTS as `Registration.run` does.
        """
        self.workloads.resume()
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._always(lambda: self.directory.follow(self._store)))
                group.create_task(self._always(lambda: self.stations.follow(self._store)))
                if self._is_secured:
                    group.create_task(self._always(self.neighbours.follow))
                group.create_task(self._always(self.registration.follow_entries))
                group.create_task(self._always(self.registration.follow_generation))
                group.create_task(self._always(self.registration.follow_witness))
                group.create_task(self._always(self.registration.keep_witness))
                group.create_task(self._always(self._resolver.run))
                group.create_task(self._rest.run())
                group.create_task(self.guests.run())
                group.create_task(self.functions.remains.run())
                group.create_task(self.registration.run(registered))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None

    async def close(self) -> None:
        """End all work and unmap all memory; what is durable stays."""
        await self.workloads.close()
        await self.switch.close()
        await self.engines.close()
        self.drivers.close()
        await self.fabric.close()
        await self.dma_links.close()
        self.functions.close()
        self.ledger.close()

    async def _always(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        delays = backoff_delays(self._random, RETRY_FIRST_S, RETRY_LONGEST_S)
        while True:
            try:
                await work()
            except VfleetError as error:
                _log.warning("begun anew: %s", error)
                await self.clock.sleep(next(delays))
