"""A term: what a coordinator does under one session with etcd. Its migrations and other work end with it.

One task drives one migration. Whoever asks for one waits for BEGIN only; giving up waiting stops nothing.
"""

import asyncio
import contextlib
import logging
from collections.abc import Coroutine, Iterator, Sequence
from typing import TypeVar

from coordinator import transaction
from coordinator.context import Context
from coordinator.guests import within_longest_hold
from coordinator.journal import RETRY_FIRST_S, RETRY_LONGEST_S, UNCERTAIN
from coordinator.migration import Options, Run
from coordinator.planner import bystanders, parts_of_targets, plan
from coordinator.queueing import DEFAULT_DEADLINE_MS, MAX_QUEUED, as_migration, enqueue
from coordinator.snapshot import Stored, devices_of
from coordinator.tasks import Tasks
from vfleet import failpoint, log, tracing
from vfleet.clock import backoff_delays
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import migration_key, owner_key
from vfleet.etcd.session import Session
from vfleet.etcd.store import Committed, Transaction
from vfleet.v1.migration_service_pb2 import CreateMigrationRequest, MoveRequest, QueuedMigration
from vfleet.v1.records_pb2 import Migration

TRIES = 16
LOOK_AGAIN_S = 0.5  # at limits that plans have taken up which may yet come to nothing

# What a plan may fail at because of other plans, which may yet come to nothing.
_IN_EACH_OTHERS_WAY = frozenset({Reason.IN_MIGRATION, Reason.NO_FREE_SLOT, Reason.SLOT_TAKEN, Reason.UNSATISFIABLE})

ResultT = TypeVar("ResultT")

_log = logging.getLogger(__name__)


class Term:
    """The migrations that a coordinator owns under `session`, by name, and whatever else it does meanwhile."""

    def __init__(self, context: Context, session: Session) -> None:
        self.runs: dict[str, Run] = {}
        self._context = context.under(session.check)
        self._session = session
        self._tasks = Tasks()
        # The plans whose BEGIN is under way, by what is done when that is over.
        self._beginning_plans: dict[asyncio.Future[None], Migration] = {}
        self._beginning: dict[str, asyncio.Task[Stored[Migration]]] = {}

    async def close(self) -> None:
        """End all work where it stands. Nothing more is sent."""
        await self._tasks.close()

    async def do(self, work: Coroutine[None, None, ResultT]) -> ResultT:
        """Return the result of work that goes on even if the caller is cancelled, but not after the term."""
        return await _result(self.spawn(work))

    def spawn(self, work: Coroutine[None, None, ResultT]) -> asyncio.Task[ResultT]:
        """Start work that ends with the term. Raise CONFLICT if the session is lost."""
        if self._session.is_lost:
            work.close()
        self._session.check()
        return self._tasks.spawn(work)

    async def begin(
        self, request: CreateMigrationRequest, options: Options, *, may_wait: bool = True
    ) -> Stored[Migration]:
        """Begin the migration that is asked for, or return the one of that name if it has the same moves; drive it.

        If that would pass a limit it is queued instead, unless it may not wait: then raise LIMIT_EXCEEDED, saying when
        to try again. Raise what `plan` raises, ALREADY_EXISTS for a name that is that of other moves, CONFLICT if the
        fleet changes faster than it can be planned for.
        """
        return await self._one_at_a_time(request.request_id, self._begin(request, options, None, may_wait=may_wait))

    async def begin_queued(self, queued: Stored[QueuedMigration], options: Options) -> Stored[Migration]:
        """Begin a migration that is queued. Raise as `begin` does, LIMIT_EXCEEDED if it would pass a limit still."""
        request = queued.record.request
        return await self._one_at_a_time(request.request_id, self._begin(request, options, queued, may_wait=False))

    async def _one_at_a_time(self, name: str, work: Coroutine[None, None, Stored[Migration]]) -> Stored[Migration]:
        while name in self._beginning:
            await asyncio.wait((self._beginning[name],))
        task = self.spawn(work)
        self._beginning[name] = task
        task.add_done_callback(lambda _: self._beginning.pop(name))
        return await _result(task)

    def orphans(self) -> list[str]:
        """Return the migrations, not over, that nobody drives: without an owner, or this coordinator's and not run."""
        owners = self._context.snapshot.owners
        return [
            name
            for name in self._context.snapshot.active_migrations
            if name not in self.runs
            and name not in self._beginning
            and (name not in owners or owners[name].record == self._context.name)
        ]

    async def adopt(self, name: str) -> None:
        """Drive an orphan to its end from its record, unless another has it already."""
        stored = self._context.snapshot.active_migrations[name]
        owner = self._context.snapshot.owners.get(name)
        if owner is None:
            adoption = transaction.adopt(stored.record, stored.mod_revision, self._context.name, self._session.lease)
            with failpoint.around("coordinator.adopt"):
                committed = await self._context.store.commit(adoption)
            await self._context.catch_up(committed)
            if not committed.succeeded:
                return
            owner_revision = committed.revision
        else:
            owner_revision = owner.mod_revision
        _log.info("adopts migration %s", name, extra={"migration": name})
        run = Run(
            self._context,
            stored.record,
            begin_revision=stored.create_revision,
            mod_revision=stored.mod_revision,
            owner_revision=owner_revision,
            options=None,
        )
        self._drive(run)

    async def _begin(
        self,
        request: CreateMigrationRequest,
        options: Options,
        queued: Stored[QueuedMigration] | None,
        *,
        may_wait: bool,
    ) -> Stored[Migration]:
        context, name, requests = self._context, request.request_id, request.moves
        began_s = context.clock.monotonic()
        for _ in range(TRIES):
            existing = context.snapshot.migrations.get(name)
            if existing is not None:
                await context.be_current()
                return _the_same(context.snapshot.migrations.get(name, existing), requests)
            if queued is None and name in context.snapshot.queue:
                return _the_same(as_migration(context.snapshot.queue[name]), requests)
            migration = await self._plan(request)
            asked_ms = request.options.hold_timeout_ms
            options = within_longest_hold(context.snapshot, migration, options, asked_ms)
            passed = self._passed_limit(migration)
            if passed is not None and not may_wait:
                raise VfleetError(Reason.LIMIT_EXCEEDED, passed, retry_after_s=LOOK_AGAIN_S)
            if passed is not None:
                waiting = await self._enqueue(request, passed)
                if waiting is None:
                    continue
                return waiting
            migration.mode = options.mode
            asked_for = queued.record.trace_parent if queued else tracing.current()
            with tracing.span(f"begin {name}", asked_for, migration=name, coordinator=context.name) as begun_in:
                migration.trace_parent = asked_for or begun_in
                stored = await self._begin_planned(migration, request, options, queued, began_s)
            if stored is not None:
                return stored
        raise VfleetError(Reason.CONFLICT, f"the fleet changed {TRIES} times while the migration was planned")

    async def _begin_planned(
        self,
        migration: Migration,
        request: CreateMigrationRequest,
        options: Options,
        queued: Stored[QueuedMigration] | None,
        began_s: float,
    ) -> Stored[Migration] | None:
        """Carry out BEGIN and drive the migration; return None if the fleet is not as it was planned for any more."""
        context, name = self._context, migration.name
        migration.begin_time.FromNanoseconds(round(context.clock.time() * 1e9))
        begin = transaction.begin(
            migration,
            self._session.lease,
            context.snapshot.fleet_generation_is_this,
            parts_of_targets(context.snapshot, migration),
            queued.mod_revision if queued else 0,
            bystanders(context.snapshot, migration, request.constraints),
        )
        commit_began_s = context.clock.monotonic()
        with self._taking(migration):
            with failpoint.around("coordinator.begin"):
                committed = await self._commit_begin(name, begin)
            commit_s = context.clock.monotonic() - commit_began_s
            await context.catch_up(committed)
        if not committed.succeeded:
            return None
        stored = context.snapshot.migrations[name]
        run = Run(
            context,
            stored.record,
            begin_revision=committed.revision,
            mod_revision=committed.revision,
            owner_revision=committed.revision,
            options=options,
            begin_s=context.clock.monotonic() - began_s,
            commit_s=commit_s,
        )
        self._drive(run)
        return stored

    async def _plan(self, request: CreateMigrationRequest) -> Migration:
        """Return a plan that takes it that those whose BEGIN is under way will have begun."""
        context = self._context
        while True:
            try:
                return plan(
                    context.snapshot.once_begun(self._beginning_plans.values()),
                    request.moves,
                    name=request.request_id,
                    coordinator=context.name,
                    limits=context.limits,
                    constraints=request.constraints,
                )
            except VfleetError as error:
                if error.reason not in _IN_EACH_OTHERS_WAY or not self._beginning_plans:
                    raise
            await asyncio.wait(self._beginning_plans, return_when=asyncio.FIRST_COMPLETED)

    def _passed_limit(self, migration: Migration) -> str | None:
        """Return the limit that a plan would pass, if those whose BEGIN is under way will have begun."""
        context = self._context
        later = context.snapshot.once_begun(self._beginning_plans.values())
        return context.allowance.passed(later, devices_of(migration))

    @contextlib.contextmanager
    def _taking(self, migration: Migration) -> Iterator[None]:
        """Let others plan around a plan until the inventory has it, or it has come to nothing."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._beginning_plans[ended] = migration
        try:
            yield
        finally:
            del self._beginning_plans[ended]
            ended.set_result(None)

    async def _enqueue(self, request: CreateMigrationRequest, why: str) -> Stored[Migration] | None:
        """Queue a migration and return it, or None if there is one of its name by now."""
        context = self._context
        if len(context.snapshot.queue) >= MAX_QUEUED:
            raise VfleetError(Reason.LIMIT_EXCEEDED, f"{MAX_QUEUED} migrations are queued, and more can't be")
        now_ns = round(context.clock.time() * 1e9)
        entry = QueuedMigration(request=request, coordinator=context.name, trace_parent=tracing.current())
        entry.time.FromNanoseconds(now_ns)
        entry.expire_time.FromNanoseconds(now_ns + (request.deadline_ms or DEFAULT_DEADLINE_MS) * 1_000_000)
        committed = await context.store.commit(enqueue(entry))
        await context.catch_up(committed)
        if not committed.succeeded:
            return None
        _log.info("migration %s is queued: %s", request.request_id, why, extra={"migration": request.request_id})
        return as_migration(Stored(entry, committed.revision, committed.revision))

    async def _commit_begin(self, name: str, begin: Transaction) -> Committed:
        """Carry out BEGIN until it is known whether it happened. Raise STORE_UNAVAILABLE if it surely did not."""
        store, unknown = self._context.store, False
        for delay_s in backoff_delays(self._context.random, RETRY_FIRST_S, RETRY_LONGEST_S):
            try:
                if unknown:
                    record, owner = await store.get(migration_key(name)), await store.get(owner_key(name))
                    if record is not None and owner is not None and owner.lease == self._session.lease:
                        return Committed(succeeded=True, revision=record.create_revision)
                return await store.commit(begin)
            except VfleetError as error:
                if error.reason not in UNCERTAIN or (error.reason is Reason.STORE_UNAVAILABLE and not unknown):
                    raise
                unknown = True
                _log.warning("BEGIN of migration %s: %s", name, error.message, extra={"migration": name})
            await self._context.clock.sleep(delay_s)
        raise AssertionError("backoff_delays never ends")

    def _drive(self, run: Run) -> None:
        self.runs[run.record.name] = run
        self.spawn(self._run(run))

    async def _run(self, run: Run) -> None:
        name = run.record.name
        log.bind(migration=name, attempt=log.attempt_text(run.attempt))
        attributes = {"migration": name, "coordinator": self._context.name, "attempt": log.attempt_text(run.attempt)}
        try:
            with tracing.span(
                f"{'adopt' if run.is_adopted else 'drive'} {name}", run.record.trace_parent, **attributes
            ):
                await run.run()
        except VfleetError as error:
            _log.warning("migration %s is left to whoever owns it: %s", name, error.message, extra={"migration": name})
            await self._context.clock.sleep(RETRY_LONGEST_S)
        except Exception:  # noqa: BLE001  # a defect must not keep the migration from being driven again
            _log.exception("migration %s fails for a reason that nobody foresaw", name, extra={"migration": name})
            await self._context.clock.sleep(RETRY_LONGEST_S)
        finally:
            del self.runs[name]
            # Whoever looks for migrations that nobody drives waits for no particular one.
            self._context.inventory.notify("", name)


async def _result(task: asyncio.Task[ResultT]) -> ResultT:
    """Return a task's result; giving up waiting doesn't stop it. Raise OUTCOME_UNKNOWN if the term ended before it."""
    await asyncio.wait((task,))
    if task.cancelled():
        raise VfleetError(Reason.OUTCOME_UNKNOWN, "the coordinator lost its session with etcd meanwhile; ask again")
    return task.result()


def _the_same(existing: Stored[Migration], requests: Sequence[MoveRequest]) -> Stored[Migration]:
    targets = {move.function: move.target for move in existing.record.moves}
    same = {request.function for request in requests} == set(targets) and all(
        request.target_device in ("", targets[request.function].device)
        and request.target_vf_index in (0, targets[request.function].vf_index)
        for request in requests
    )
    if not same:
        name = existing.record.name
        raise VfleetError(
            Reason.ALREADY_EXISTS, f"migration {name!r} exists and has other moves", metadata={"migration": name}
        )
    return existing
