r"""Whatever waits for a decision here has a deadline; past it, the host reads etcd and resolves by itself.

    past its deadline --> undecided, somebody's: wait on
                     \-> undecided, nobody's: this host writes ABORT, then as decided
                     \-> decided: be what the function's record says (home, generation)

So a driver's wait is bounded even when every coordinator is dead. With etcd out of reach it goes on: safe before live.
"""

import asyncio
import logging
from collections.abc import Awaitable

from hostd.drivers import Drivers
from hostd.fence import Fences
from hostd.function_checks import is_of_before
from hostd.functions import Functions
from hostd.history import History
from hostd.instance import Instance
from vfleet import failpoint, log, tracing
from vfleet.clock import Clock
from vfleet.decision import abort_transaction, outcome
from vfleet.errors import VfleetError
from vfleet.etcd.keys import entries_prefix, function_key, migration_key, owner_key
from vfleet.etcd.records import decode
from vfleet.etcd.store import KeyValue, Store, absent
from vfleet.v1.records_pb2 import PHASE_ABORTED, PHASE_DONE, Function, Migration, Step
from vfleet.v1.types_pb2 import (
    DECISION_COMMITTED,
    DECISION_UNSPECIFIED,
    Attempt,
    TableEntry,
)

LOOK_AGAIN_S = 1.0

_log = logging.getLogger(__name__)


class Resolver:
    """The task that keeps the deadlines of instances and holds."""

    def __init__(
        self,
        host: str,
        functions: Functions,
        drivers: Drivers,
        fences: Fences,
        history: History,
        store: Store,
        clock: Clock,
    ) -> None:
        self._host = host
        self._functions = functions
        self._drivers = drivers
        self._fences = fences
        self._history = history
        self._store = store
        self._clock = clock

    async def run(self) -> None:
        """Resolve whatever is past its deadline, for ever."""
        while True:
            await self.resolve_due()
            deadline = self._next_deadline()
            for deadlines in (self._functions.deadlines, self._drivers.deadlines):
                deadlines.wait_for(deadline)
            await self._wait(deadline)

    async def resolve_all(self) -> None:
        """Resolve everything that waits, whatever its deadline: after a restart, decisions may be long known."""
        for instance in list(self._functions.with_deadline()):
            await self._resolve_instance(instance)
        for migration in sorted({hold.migration for hold in self._drivers.holds()}):
            await self._resolve_holds(migration)

    async def resolve_due(self) -> None:
        """Resolve what is past its deadline. What etcd can't be asked about waits on."""
        now = self._clock.time()
        for instance in list(self._functions.with_deadline()):
            if instance.record.resolve_time <= now:
                about = instance.about
                with log.about(migration=about.migration, function=about.function):
                    await self._attempt(self._resolve_instance(instance), f"function {about.function}")
        for migration in sorted({hold.migration for hold in self._drivers.holds() if hold.resolve_time <= now}):
            with log.about(migration=migration):
                await self._attempt(self._resolve_holds(migration), f"what migration {migration} holds")

    async def _attempt(self, resolving: Awaitable[None], what: str) -> None:
        try:
            await resolving
        except VfleetError as error:
            # Nothing was changed and the deadline stands, so it is tried again after LOOK_AGAIN_S.
            _log.warning("%s waits past its deadline: %s", what, error)

    async def _wait(self, deadline: float | None) -> None:
        waits: list[asyncio.Future[object]] = [
            asyncio.ensure_future(self._functions.deadlines.sooner.wait()),
            asyncio.ensure_future(self._drivers.deadlines.sooner.wait()),
        ]
        if deadline is not None:
            # A deadline that has just been tried in vain is tried again, but not at once.
            pause = max(deadline - self._clock.time(), LOOK_AGAIN_S if deadline <= self._clock.time() else 0)
            waits.append(asyncio.ensure_future(self._clock.sleep(pause)))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _next_deadline(self) -> float | None:
        times = [instance.record.resolve_time for instance in self._functions.with_deadline()]
        times += [hold.resolve_time for hold in self._drivers.holds()]
        return min(times, default=None)

    async def _resolve_instance(self, instance: Instance) -> None:
        about, migration = instance.about, instance.about.migration
        await self._history.check(self._store)
        record = await self._read_migration(migration)
        function = await self._read_function(about.function)
        if instance.is_closed or about.migration != migration:
            # It has been resolved by another way meanwhile, and may wait for another decision by now.
            return
        is_home = function is not None and _is_home(function, instance)
        # By a commit that etcd has forgotten a target is the home after all, and a source is no more.
        may_be_forgotten = is_home == about.HasField("stopped_by")
        # A record is kept until who was stopped by it has run again or is gone: without one, that it ran is forgotten.
        is_forgotten = is_home and about.HasField("stopped_by") and record is None
        if (
            _is_undecided(record)
            or is_forgotten
            or (may_be_forgotten and is_of_before(instance, self._history.generation))
        ):
            self._functions.postpone(instance, self._clock.time() + LOOK_AGAIN_S)
        elif is_home:
            with failpoint.around("hostd.resolve_instance"):
                self._fences.end(about.function, _attempt_of(instance))
                self._functions.run(instance)
        elif _is_over(instance, record, function):
            with failpoint.around("hostd.resolve_instance"):
                self._fences.end(about.function, _attempt_of(instance))
                self._functions.remove(instance)
        else:
            self._functions.postpone(instance, self._clock.time() + LOOK_AGAIN_S)

    async def _resolve_holds(self, migration: str) -> None:
        """Resolve all holds of a migration together: no driver sees a group half moved (invariant 6)."""
        await self._history.check(self._store)
        if _is_undecided(await self._read_migration(migration)):
            self._drivers.postpone(migration, self._clock.time() + LOOK_AGAIN_S)
            return
        entries = []
        for item in (await self._store.list(entries_prefix(self._host))).items:
            entry = decode(TableEntry, item)
            entry.revision = item.mod_revision
            entries.append(entry)
        with failpoint.around("hostd.resolve_hold"):
            for hold in self._drivers.holds(migration):
                self._fences.end(hold.function, hold.attempt)
            self._drivers.resolve_holds(migration, entries)

    async def _read_migration(self, migration: str) -> Migration | None:
        """Return a migration's record as it stands, after writing ABORT if it is undecided and nobody's."""
        stored = await self._store.get(migration_key(migration))
        if stored is None:
            return None
        record = decode(Migration, stored)
        if _is_undecided(record) and await self._abort_if_nobodys(record, stored):
            stored = await self._store.get(migration_key(migration))
            return decode(Migration, stored) if stored is not None else None
        return record

    async def _abort_if_nobodys(self, record: Migration, stored: KeyValue) -> bool:
        """Return whether there was nobody, so that the record is written now: by this host, or by who was faster."""
        if await self._store.get(owner_key(record.name)) is not None:
            return False
        reason = f"host {self._host} waited past its deadline, and no coordinator ran the migration"
        abort = abort_transaction(
            record,
            stored.mod_revision,
            reason,
            Step.STEP_UNSPECIFIED,
            self._clock.time(),
            absent(owner_key(record.name)),
        )
        _log.warning("migration %s: %s", record.name, reason, extra={"migration": record.name})
        about = {"migration": record.name, "host": self._host}
        span = tracing.span(f"resolve {record.name}", record.trace_parent, **about)
        with failpoint.around("hostd.resolve_abort"), span:
            await self._store.commit(abort)
        return True

    async def _read_function(self, name: str) -> Function | None:
        stored = await self._store.get(function_key(name))
        return decode(Function, stored) if stored is not None else None


def _attempt_of(instance: Instance) -> Attempt:
    return instance.about.stopped_by if instance.about.HasField("stopped_by") else instance.about.attempt


def _is_undecided(record: Migration | None) -> bool:
    """Return whether a migration may still be committed: one without a record is nobody's to commit."""
    return record is not None and outcome(record) == DECISION_UNSPECIFIED


def _is_over(instance: Instance, record: Migration | None, function: Function | None) -> bool:
    """Return whether something says that an instance, which isn't the home, will not be: no record of it is no word.

    A stopped source is kept until its migration's record is final: the target may still fetch from it. One that keeps
    a rest goes only when that says DONE; an abort that leaves another home is that of a restored etcd. A target with
    all of its state does not go by an abort alone, since etcd may have forgotten a COMMIT: the coordinator that undoes
    the migration ends it, after a look at the source.
    """
    about = instance.about
    has_other_home = (
        function is not None and function.identity == about.identity and function.generation >= about.generation
    )
    if about.HasField("stopped_by"):
        is_final = record is None or record.phase in (PHASE_DONE, PHASE_ABORTED)
        if instance.record.keeps_rest:
            # What a restored etcd says, or doesn't, says nothing of what the target has fetched.
            is_final = record is not None and record.phase == PHASE_DONE
        return is_final and (has_other_home or (record is not None and outcome(record) == DECISION_COMMITTED))
    return has_other_home or not about.complete


def _is_home(function: Function, instance: Instance) -> bool:
    about = instance.about
    return (function.generation, function.device, function.vf_index) == (
        about.generation,
        about.device,
        about.vf_index,
    )
