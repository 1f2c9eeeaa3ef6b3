"""A coordinator as a whole: inventory, gRPC server, and one term after the other, each under a session of its own.

    open session -> register -> term: adopt, begin, drive ... -> session lost -> work dropped -> open session ...

It serves as long as it runs; between terms it answers what needs one with STORE_UNAVAILABLE.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from random import Random

from prometheus_client import CollectorRegistry

from coordinator.config import Config
from coordinator.context import Context
from coordinator.dispatch import Dispatcher
from coordinator.fleet import Fleet
from coordinator.hosts import Hosts
from coordinator.inventory import Inventory
from coordinator.metrics import Ended, fleet_metrics
from coordinator.recovery import adopt_orphans, finish_functions
from coordinator.retention import forget_migrations
from coordinator.service import FleetService, MigrationService
from coordinator.tasks import Tasks
from coordinator.term import Term
from vfleet.clock import Clock, backoff_delays
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import coordinator_key
from vfleet.etcd.records import encode
from vfleet.etcd.session import Session
from vfleet.etcd.store import Put, Store, Transaction, absent
from vfleet.metrics import ReadAtScrape
from vfleet.rpc import Channels, Server
from vfleet.v1.fleet_service_pb2 import DESCRIPTOR as FLEET
from vfleet.v1.fleet_service_pb2_grpc import add_FleetServiceServicer_to_server
from vfleet.v1.migration_service_pb2 import DESCRIPTOR as MIGRATION
from vfleet.v1.migration_service_pb2_grpc import add_MigrationServiceServicer_to_server
from vfleet.v1.records_pb2 import Coordinator

SERVICE_NAMES = (
    FLEET.services_by_name["FleetService"].full_name,
    MIGRATION.services_by_name["MigrationService"].full_name,
)
STOP_GRACE_S = 0.5
RETRY_FIRST_S = 0.1
RETRY_LONGEST_S = 1.0

_log = logging.getLogger(__name__)


class Daemon:
    """A coordinator. `run` does everything until it is cancelled."""

    def __init__(
        self,
        config: Config,
        store: Store,
        channels: Channels,
        clock: Clock,
        random: Random,
        new_server: Callable[[Sequence[str]], Server] = Server,
        registry: CollectorRegistry | None = None,
    ) -> None:
        """`new_server` makes the server for services of these names: a part of the network, as an argument.

        `registry` is where its metrics go.
        """
        registry = registry or CollectorRegistry()
        self._config = config
        self._new_server = new_server
        inventory = Inventory(clock)
        self._context = Context(
            config.name,
            store,
            inventory,
            Hosts(inventory, channels),
            clock,
            random,
            allowance=config.allowance,
            ended=Ended(registry),
        )
        registry.register(ReadAtScrape(lambda: fleet_metrics(inventory, clock, lambda: self._term)))
        self._term: Term | None = None
        self._tasks = Tasks()

    async def run(self, announce: Callable[[str], None]) -> None:
        """Serve until cancelled; `announce` is given HOST:PORT once the coordinator is ready.

        Raise UNREACHABLE if the address can't be bound, ALREADY_EXISTS if another coordinator has the name, or what
        ends the watch.
        """
        server = self._new_server(SERVICE_NAMES)
        add_FleetServiceServicer_to_server(FleetService(self._context, lambda: self._term), server.grpc)
        add_MigrationServiceServicer_to_server(MigrationService(self._context, lambda: self._term), server.grpc)
        address = f"{self._config.listen.rpartition(':')[0]}:{server.listen(self._config.listen)}"
        watching = self._tasks.spawn(self._context.inventory.run(self._context.store))
        serving = self._tasks.spawn(self._terms(server, address, announce, lambda: not watching.done()))
        try:
            await asyncio.wait((watching, serving), return_when=asyncio.FIRST_COMPLETED)
            for ended in (watching, serving):
                if ended.done():
                    ended.result()
        finally:
            # The term goes first, and with it the lease, so that others take over at once.
            await self._tasks.close()
            await server.stop(STOP_GRACE_S)

    async def _terms(
        self, server: Server, address: str, announce: Callable[[str], None], alive: Callable[[], bool]
    ) -> None:
        context, started = self._context, False
        delays = backoff_delays(context.random, RETRY_FIRST_S, RETRY_LONGEST_S)
        while True:
            try:
                async with await Session.open(context.store, context.clock, self._config.lease_ttl_s, alive) as session:
                    await self._register(session, address)
                    if not started:
                        await server.start()
                        announce(address)
                        started = True
                    delays = backoff_delays(context.random, RETRY_FIRST_S, RETRY_LONGEST_S)
                    await self._serve_term(session)
            except VfleetError as error:
                if error.reason not in (Reason.STORE_UNAVAILABLE, Reason.OUTCOME_UNKNOWN, Reason.CONFLICT):
                    raise
                _log.warning("no session: %s", error.message)
            await context.clock.sleep(next(delays))

    async def _serve_term(self, session: Session) -> None:
        inventory = self._context.inventory
        if inventory.is_behind:
            _log.error("etcd was restored from a backup: nothing is done until vfleet fleet bump-generation")
        await self._wait(session, lambda: not inventory.is_behind)
        restorations = inventory.restorations
        term = Term(self._context, session)
        try:
            term.spawn(self._lasting(lambda: adopt_orphans(self._context, term)))
            term.spawn(self._lasting(lambda: finish_functions(self._context, term, Fleet(self._context))))
            term.spawn(self._lasting(lambda: forget_migrations(self._context, self._config.retention)))
            term.spawn(self._lasting(Dispatcher(self._context, term).run))
            self._term = term
            await self._wait(session, lambda: inventory.restorations != restorations)
            _log.warning("the session with etcd is lost, or etcd was restored: all work is dropped")
        finally:
            self._term = None
            await term.close()

    async def _lasting(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Do work that has no end, and do it again if it has one all the same: nobody waits for it who would notice."""
        while True:
            try:
                await work()
            except VfleetError as error:
                _log.warning("begun anew: %s", error.message)
            except Exception:  # noqa: BLE001  # a defect must not keep all migrations from being adopted, or begun
                _log.exception("begun anew after what nobody foresaw")
            await self._context.clock.sleep(RETRY_LONGEST_S)

    async def _wait(self, session: Session, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the inventory holds, or the session is lost."""
        holds = self._context.inventory.until(condition)
        waits = [asyncio.create_task(session.lost.wait()), asyncio.create_task(holds)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.wait(waits)

    async def _register(self, session: Session, address: str) -> None:
        """Put the coordinator's record. Raise ALREADY_EXISTS if another's stays for longer than a lease can.

        The name's being unique makes an owner key with it that of this session.
        """
        context, key = self._context, coordinator_key(self._config.name)
        record = encode(Coordinator(name=self._config.name, address=self._config.advertise or address))
        give_up_s = context.clock.monotonic() + 2 * self._config.lease_ttl_s + 1
        while True:
            session.check()
            registration = Transaction((absent(key),), (Put(key, record, session.lease),))
            committed = await context.store.commit(registration)
            if committed.succeeded:
                break
            if context.clock.monotonic() >= give_up_s:
                message = f"a coordinator named {self._config.name!r} is running"
                raise VfleetError(Reason.ALREADY_EXISTS, message, metadata={"coordinator": self._config.name})
            await context.clock.sleep(RETRY_FIRST_S)
        await context.inventory.wait_for(committed.revision)
