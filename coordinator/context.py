"""What all work of a coordinator is given: its name, and the world as arguments."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from random import Random
from typing import TypeVar

from coordinator.hosts import Hosts
from coordinator.inventory import Inventory
from coordinator.planner import Limits
from coordinator.queueing import DEFAULT_ALLOWANCE, Allowance
from coordinator.snapshot import Snapshot
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import FLEET_GENERATION
from vfleet.etcd.store import Committed, Store
from vfleet.v1.records_pb2 import Migration

CATCH_UP_S = 1.0

# What says nothing about the fleet as the inventory has it.
_NO_REFUSAL = frozenset(
    {Reason.UNREACHABLE, Reason.STORE_UNAVAILABLE, Reason.OUTCOME_UNKNOWN, Reason.CONFLICT, Reason.INTERNAL}
)

ResultT = TypeVar("ResultT")

_log = logging.getLogger(__name__)


def _uncounted(_: Migration) -> None:
    """Stand for whoever wants to know of migrations that are over."""


def _never_lost() -> None:
    """Stand for the session of work that needs none: each of its writes compares what it read."""


@dataclass(frozen=True, slots=True)
class Context:
    """A coordinator's name, its store, inventory and hosts, its clock and its randomness.

    `check` raises CONFLICT once the session is lost under which this context is used. `allowance` is how many
    migrations may be under way. `ended` is told of each migration whose end this coordinator wrote.
    """

    name: str
    store: Store
    inventory: Inventory
    hosts: Hosts
    clock: Clock
    random: Random
    check: Callable[[], None] = _never_lost
    allowance: Allowance = DEFAULT_ALLOWANCE
    ended: Callable[[Migration], None] = _uncounted

    def under(self, check: Callable[[], None]) -> "Context":
        """Return the context of work that may act only while `check` does not raise.

        A process that was stopped for longer than its lease lives finds itself deposed at its first step, not when the
        task that keeps the lease has its turn.
        """
        return replace(self, check=check, hosts=self.hosts.under(check))

    @property
    def snapshot(self) -> Snapshot:
        """The fleet as the inventory has it now."""
        return self.inventory.snapshot

    @property
    def limits(self) -> Limits:
        """What one transaction may have."""
        return Limits(self.store.max_operations, self.store.max_request_bytes)

    async def catch_up(self, committed: Committed) -> None:
        """Wait until the inventory has what a transaction did, or, for a while, what kept it from being done."""
        if committed.succeeded:
            await self.inventory.wait_for(committed.revision)
            return
        try:
            # The revision may be that of a key that isn't vfleet's, which the inventory never sees.
            async with asyncio.timeout(CATCH_UP_S):
                await self.inventory.wait_for(committed.revision)
        except TimeoutError:
            _log.debug("revision %d is not vfleet's", committed.revision)

    async def be_current(self) -> None:
        """Wait until the inventory has what etcd has now, in whatever way it came there."""
        now = await self.store.list(FLEET_GENERATION)
        await self.catch_up(Committed(succeeded=False, revision=now.revision))

    async def upheld(self, work: Callable[[], Awaitable[ResultT]]) -> ResultT:
        """Return what `work` returns; if it is refused, make sure that the inventory is current and do it again.

        A client may know from another coordinator what this one has not heard yet. `work` can be repeated.
        """
        revision = self.snapshot.revision
        try:
            return await work()
        except VfleetError as error:
            if error.reason in _NO_REFUSAL:
                raise
            await self.be_current()
            if self.snapshot.revision == revision:
                raise
        return await work()
