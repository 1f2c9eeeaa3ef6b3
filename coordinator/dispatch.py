"""What begins queued migrations as soon as the limits allow it, and ends those that can't begin or are too late."""

import logging

from coordinator.context import Context
from coordinator.queueing import give_up, in_order, known_devices
from coordinator.requests import checked_options
from coordinator.retries import Retries
from coordinator.snapshot import Stored
from coordinator.tasks import first_of
from coordinator.term import Term
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.store import Committed
from vfleet.failure import is_passing
from vfleet.v1.migration_service_pb2 import QueuedMigration

_log = logging.getLogger(__name__)


async def end_queued(context: Context, stored: Stored[QueuedMigration], reason: str, cause: Reason) -> Committed:
    """End a migration that waits, as ABORTED, unless it has begun or has been ended since."""
    ended, record = give_up(stored, reason, cause, context.name, context.clock.time())
    committed = await context.store.commit(ended)
    if committed.succeeded:
        context.ended(record)
    return committed


class Dispatcher:
    """The queue, as one coordinator works it off: its own entries, and those of coordinators that are gone."""

    def __init__(self, context: Context, term: Term) -> None:
        self._context = context
        self._term = term
        self._retries: dict[str, Retries] = {}

    async def run(self) -> None:
        """Work off the queue, for ever."""
        while True:
            # Of before: what changes, or is over, during the pass may concern those it has passed.
            seen, looked_s = self._signature(), self._context.clock.monotonic()
            await self.pass_once()
            await self._wait(seen, looked_s)

    async def pass_once(self) -> None:
        """Look once at each that is queued, in order: one that has to wait holds up none that needn't."""
        for stored in in_order(self._context.snapshot):
            name = stored.record.request.request_id
            if self._is_anothers(stored) or name not in self._context.snapshot.queue:
                continue
            try:
                await self._look_at(name, stored)
            except VfleetError as error:
                _log.warning(
                    "queued migration %s, to be looked at again: %s", name, error.message, extra={"migration": name}
                )
                self._tries(name).failed(error.reason, self._context.clock.monotonic())
        for name in self._retries.keys() - self._context.snapshot.queue.keys():
            del self._retries[name]

    async def _look_at(self, name: str, stored: Stored[QueuedMigration]) -> None:
        context, request = self._context, stored.record.request
        if self._left_s(stored) <= 0:
            why = self._tries(name).why or "no limit allowed it"
            message = f"it could not begin before its deadline: {why}"
            await self._give_up(stored, message, Reason.LIMIT_EXCEEDED)
            return
        passed = context.allowance.passed(context.snapshot, known_devices(context.snapshot, stored.record))
        if passed is not None or self._tries(name).due_s > context.clock.monotonic():
            self._tries(name).why = passed or self._tries(name).why
            return
        try:
            await self._term.begin_queued(stored, checked_options(request.options))
        except VfleetError as error:
            if not is_passing(error.reason):
                await self._give_up(stored, error.message, error.reason)
                return
            self._tries(name).why = error.message
            if error.retry_after_s is None:
                self._tries(name).failed(error.reason, context.clock.monotonic())
            else:
                self._tries(name).put_off(error.retry_after_s, context.clock.monotonic())

    async def _give_up(self, stored: Stored[QueuedMigration], message: str, cause: Reason) -> None:
        await self._context.catch_up(await end_queued(self._context, stored, message, cause))

    def _tries(self, name: str) -> Retries:
        return self._retries.setdefault(name, Retries(self._context.random))

    def _is_anothers(self, stored: Stored[QueuedMigration]) -> bool:
        owner = stored.record.coordinator
        return owner != self._context.name and owner in self._context.snapshot.coordinators

    def _left_s(self, stored: Stored[QueuedMigration]) -> float:
        return stored.record.expire_time.ToNanoseconds() / 1e9 - self._context.clock.time()

    def _signature(self) -> object:
        snapshot = self._context.snapshot
        return set(snapshot.queue), set(snapshot.active_migrations), set(snapshot.coordinators)

    async def _wait(self, seen: object, looked_s: float) -> None:
        """Wait until something has changed that may let one begin, or a pause or a deadline is over."""
        now_s = self._context.clock.monotonic()
        pauses_s = [
            max(pause_s, 0)
            for stored in self._context.snapshot.queue.values()
            if not self._is_anothers(stored)
            for pause_s in (self._left_s(stored), self._tries(stored.record.request.request_id).due_s - now_s)
            if pause_s > looked_s - now_s
        ]
        waits = [self._context.inventory.until(lambda: self._signature() != seen)]
        if pauses_s:
            waits.append(self._context.clock.sleep(min(pauses_s)))
        await first_of(waits)
