"""The one driver of a migration: it reads, decides, acts and records, from BEGIN to FINISH.

Whatever fails before COMMIT leads to ABORT; after either decision each consequence is repeated until its host has
acknowledged it or that machine is gone. An adopter runs the same code from the record alone. A run is cancelled when
its coordinator's session is lost, and then sends nothing more.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass

from coordinator import transaction
from coordinator.context import Context
from coordinator.copies import Copies
from coordinator.journal import RETRY_FIRST_S, RETRY_LONGEST_S, Journal
from coordinator.states import ENTRIES, Event, next_state
from coordinator.tasks import together, within
from vfleet import failpoint, tracing
from vfleet.clock import backoff_delays
from vfleet.decision import abort_transaction
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.store import Transaction
from vfleet.v1.function_service_pb2 import ChangeStateRequest, CreateFunctionRequest, DestroyFunctionRequest
from vfleet.v1.hold_service_pb2 import EntryName, LiftHoldRequest, PlaceHoldRequest
from vfleet.v1.migration_service_pb2 import LimitPolicy
from vfleet.v1.records_pb2 import EntryChange, Migration, Move, Phase, Place, Step, StepDuration
from vfleet.v1.transfer_service_pb2 import CopyOptions, ImportStateRequest, WatchArrivalRequest
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.types_pb2 import Attempt, Decision, DeviceState, TransferMode

# How much longer than the coordinator a host waits for a decision before it resolves on its own.
RESOLVE_MARGIN_MS = 2_000

# A host's answers to a consequence that mean that there is nothing left for it to change.
_NOTHING_LEFT = frozenset({Reason.NOT_FOUND, Reason.STALE_ATTEMPT})

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """How to migrate; ranges and meaning are those of vfleet.v1.MigrationOptions."""

    max_rounds: int = 8
    prepare_timeout_ms: int = 60_000
    hold_timeout_ms: int = 5_000
    acknowledge_timeout_ms: int = 100
    mode: TransferMode.ValueType = TransferMode.TRANSFER_MODE_PRE_COPY
    downtime_limit_ms: int = 0
    limit_policy: LimitPolicy.ValueType = LimitPolicy.LIMIT_POLICY_ABORT
    bandwidth_mib_per_s: int = 0


class Run:
    """A migration that this coordinator owns: what is known of it and how far it is."""

    def __init__(
        self,
        context: Context,
        record: Migration,
        *,
        begin_revision: int,
        mod_revision: int,
        owner_revision: int,
        options: Options | None,
        begin_s: float = 0.0,
        commit_s: float = 0.0,
    ) -> None:
        """`options` are None for an adopter, who aborts what is undecided.

        `begin_s` is how long BEGIN took, of that `commit_s` its transaction.
        """
        self._journal = Journal(context, record, mod_revision, owner_revision)
        self.state = ENTRIES[record.phase]
        self.copies = Copies(record.moves, commit_s)
        self.attempt = Attempt(fleet_generation=record.attempt.fleet_generation, revision=begin_revision)
        self._context = context
        self._options = options
        self._ready: set[str] = set()
        self._complete: set[str] = set()
        self._commit_by_s = 0.0
        self._steps: list[StepDuration] = []
        self._step_began_s = context.clock.monotonic()
        if begin_s:
            self._time_step(Step.STEP_BEGIN, begin_s)

    @property
    def record(self) -> Migration:
        """The migration's record as it is known here."""
        return self._journal.record

    @property
    def is_adopted(self) -> bool:
        """Whether another coordinator began it."""
        return self._options is None

    async def run(self) -> None:
        """Take the migration to its end. Raise CONFLICT if it is found to be another's."""
        if self.record.phase == Phase.PHASE_PREPARING:
            await self._decide()
        if self.record.phase == Phase.PHASE_COMMITTED:
            await self._apply()
        elif self.record.phase == Phase.PHASE_ABORTING:
            await self._undo()
        if self.record.phase in (Phase.PHASE_COMMITTED, Phase.PHASE_ABORTING):
            with failpoint.around("coordinator.finish"):
                await self._journal.settle(self._finish)
            self._advance(Event.FINISHED)
            if self.record.finished_by == self._context.name:
                self._context.ended(self.record)
        await self._context.inventory.wait_for(self._journal.mod_revision)
        _log.info("migration %s is %s", self.record.name, Phase.Name(self.record.phase))

    # --- until the decision ---

    async def _decide(self) -> None:
        options = self._options
        if options is None:
            await self._abort("its coordinator ended before it was decided", Step.STEP_UNSPECIFIED)
        else:
            try:
                await self._unless_decided(self._prepare(options))
                if self.record.phase == Phase.PHASE_PREPARING:
                    with failpoint.around("coordinator.commit"):
                        await self._journal.settle(self._commit)
            except VfleetError as error:
                _log.warning("migration %s fails at %s: %s", self.record.name, self.state, error.message)
                await self._abort(error.message, self.state.step, error.reason, error.metadata.get("host", ""))
        committed = self.record.phase in (Phase.PHASE_COMMITTED, Phase.PHASE_DONE)
        self._advance(Event.COMMITTED if committed else Event.ABORTED)

    async def _unless_decided(self, work: Coroutine[None, None, None]) -> None:
        """Do `work`, but stop it as soon as etcd shows that another has written the record or the owner key."""
        doing = asyncio.create_task(work)
        doing.add_done_callback(lambda _: self._notify())
        try:
            await self._until(lambda: doing.done() or self._journal.is_overtaken())
            if doing.done():
                return doing.result()
        finally:
            if not doing.done():
                doing.cancel()
                await asyncio.gather(doing, return_exceptions=True)
        await self._journal.read_back()
        if self.record.phase == Phase.PHASE_PREPARING:
            raise VfleetError(Reason.CONFLICT, f"migration {self.record.name!r} is another coordinator's")
        return None

    async def _prepare(self, options: Options) -> None:
        async with within(options.prepare_timeout_ms, "the drivers could be held"):
            await together(self._create(move, options) for move in self.record.moves)
            self._advance(Event.CREATED)
            await together(
                (*(self._import(move, options) for move in self.record.moves), self._hold_when_copied(options))
            )
        self._advance(Event.HELD)

    async def _create(self, move: Move, options: Options) -> None:
        request = CreateFunctionRequest(
            attempt=self.attempt,
            migration=self.record.name,
            function=move.function,
            generation=move.target.generation,
            device=move.target.device,
            vf_index=move.target.vf_index,
            bars=move.bars,
            identity=move.identity,
            model=move.model,
            resolve_after_ms=options.prepare_timeout_ms + RESOLVE_MARGIN_MS,
        )
        began_s = self._context.clock.monotonic()
        with failpoint.around("coordinator.create"):
            self._check_machine(move.target)
            await self._context.hosts.create_function(move.target.host, request)
        self.copies.took_a_round_trip(self._context.clock.monotonic() - began_s)

    async def _import(self, move: Move, options: Options) -> None:
        request = ImportStateRequest(
            attempt=self.attempt,
            function=move.function,
            generation=move.target.generation,
            source_host=move.source.host,
            source_address=self._context.hosts.fabric_address(move.source.host),
            source_incarnation=move.source.incarnation,
            source_generation=move.source.generation,
            options=CopyOptions(
                mode=options.mode,
                max_rounds=options.max_rounds,
                bandwidth_bytes_per_s=options.bandwidth_mib_per_s << 20,
                has_limit=bool(options.downtime_limit_ms),
                last_copy_limit_us=self.copies.left_for_the_copy_us(options.downtime_limit_ms),
            ),
        )
        failpoint.reach("coordinator.import.before")
        self._check_machine(move.target)
        async with aclosing(self._context.hosts.import_state(move.target.host, request)) as responses:
            async for response in responses:
                self.copies.received(move.function, response)
                if response.ready_to_stop or response.complete:
                    self._ready.add(move.function)
                if response.complete:
                    self._complete.add(move.function)
                self._notify()
                if response.complete:
                    # How the stream ends says nothing any more, and drivers are on hold.
                    break
        if move.function not in self._complete:
            message = (
                f"host {move.target.host!r}, ImportState: ended before the state of {move.function!r} was complete"
            )
            raise VfleetError(Reason.BAD_STATE, message)
        failpoint.reach("coordinator.import.after")

    def _check_machine(self, target: Place) -> None:
        """Raise INCARNATION_CHANGED if the plan's machine is gone: what another one in its place has, nobody undoes."""
        if self._context.snapshot.is_gone(target.host, target.incarnation):
            message = f"host {target.host!r} was started anew since the plan was made"
            raise VfleetError(Reason.INCARNATION_CHANGED, message)

    async def _hold_when_copied(self, options: Options) -> None:
        moves = self.record.moves
        await self._until(lambda: len(self._ready) == len(moves))
        if options.limit_policy != LimitPolicy.LIMIT_POLICY_FORCE:
            self.copies.check_limit(options.downtime_limit_ms)
        self._advance(Event.COPIED)
        self._commit_by_s = self._context.clock.monotonic() + options.hold_timeout_ms / 1000
        async with within(options.hold_timeout_ms, "the last difference was copied"):
            await together(
                (
                    # What follows the stop takes longest.
                    *(self._stop(move, options) for move in moves),
                    *(self._place_hold(host, names, options) for host, names in self._entries_by_host().items()),
                )
            )
            await self._until(lambda: len(self._complete) == len(moves))

    async def _place_hold(self, host: str, entries: list[EntryName], options: Options) -> None:
        request = PlaceHoldRequest(
            attempt=self.attempt,
            migration=self.record.name,
            entries=entries,
            acknowledge_timeout_ms=options.acknowledge_timeout_ms,
            resolve_after_ms=options.hold_timeout_ms + RESOLVE_MARGIN_MS,
        )
        with failpoint.around("coordinator.hold"):
            silent = await self._context.hosts.place_hold(host, request)
        if silent:
            _log.info("migration %s: held without acknowledgement: %s", self.record.name, ", ".join(silent))

    async def _stop(self, move: Move, options: Options) -> None:
        request = ChangeStateRequest(
            attempt=self.attempt,
            migration=self.record.name,
            function=move.function,
            generation=move.source.generation,
            state=DeviceState.DEVICE_STATE_STOP_COPY,
            resolve_after_ms=options.hold_timeout_ms + RESOLVE_MARGIN_MS,
        )
        with failpoint.around("coordinator.stop"):
            await self._context.hosts.change_state(move.source.host, request)

    def _commit(self) -> Transaction:
        clock = self._context.clock
        if clock.monotonic() >= self._commit_by_s:
            return self._abort_transaction(
                "etcd did not take the COMMIT in time", Step.STEP_COMMIT, Reason.LIMIT_EXCEEDED
            )
        return transaction.commit(self.record, self.attempt.revision, clock.time())

    async def _abort(self, reason: str, step: Step.ValueType, cause: Reason | None = None, host: str = "") -> None:
        if self.record.phase == Phase.PHASE_PREPARING:
            with failpoint.around("coordinator.abort"):
                await self._journal.settle(lambda: self._abort_transaction(reason, step, cause, host))

    def _abort_transaction(
        self, reason: str, step: Step.ValueType, cause: Reason | None, host: str = ""
    ) -> Transaction:
        journal, now = self._journal, self._context.clock.time()
        return abort_transaction(journal.record, journal.mod_revision, reason, step, now, journal.owned, cause, host)

    # --- after COMMIT ---

    async def _apply(self) -> None:
        await together(self._lift(host) for host in self._entries_by_host())
        self._advance(Event.LIFTED)
        await together(self._scrub(move) for move in self.record.moves)
        self._advance(Event.SCRUBBED)

    async def _await_arrival(self, move: Move) -> None:
        """Wait until all of a function's state is at its home: only then its source may go."""
        target = move.target
        request = WatchArrivalRequest(attempt=self.attempt, function=move.function, generation=target.generation)

        async def watch() -> None:
            is_all_there = False
            async with aclosing(self._context.hosts.watch_arrival(target.host, request)) as responses:
                async for response in responses:
                    is_all_there = not response.missing_bytes
                    self.copies.is_missing(move.function, response.missing_bytes)
                    self._notify()
            if not is_all_there:
                message = f"host {target.host!r}, WatchArrival: ended before all of {move.function!r} was there"
                raise VfleetError(Reason.BAD_STATE, message)

        with failpoint.around("coordinator.arrive"):
            await self._insist(target.host, target.incarnation, watch)

    async def _lift(self, host: str) -> None:
        entries = [e for move in self.record.moves for e in transaction.entries_after(move) if e.host == host]
        for entry in entries:
            # COMMIT wrote the record and the entries at one revision.
            entry.revision = self._journal.mod_revision
        request = UpdateTableRequest(attempt=self.attempt, entries=entries, lift=True)
        # A machine started anew has read its drivers' entries in etcd, but perhaps before COMMIT: it is told as well.
        with failpoint.around("coordinator.lift"):
            await self._insist(host, None, lambda: self._context.hosts.update_table(host, request))

    async def _scrub(self, move: Move) -> None:
        if self.record.mode == TransferMode.TRANSFER_MODE_POST_COPY:
            await self._await_arrival(move)
        await self._destroy(move.function, move.source.host, move.source.incarnation, move.source.generation)

    # --- after ABORT ---

    async def _undo(self) -> None:
        await together(self._undo_move(move) for move in self.record.moves)
        self._advance(Event.UNDONE)

    async def _undo_move(self, move: Move) -> None:
        target = move.target
        has_source = await self._resume(move)
        consequences = [self._lift_unchanged(move, entry) for entry in move.entries]
        if has_source:
            consequences.append(self._destroy(move.function, target.host, target.incarnation, target.generation))
        else:
            # Only the scrub after a COMMIT takes a source away, so this target is all that is left of the function.
            _log.error(
                "function %s is on host %s by a commit that etcd has forgotten",
                move.function,
                target.host,
                extra={"function": move.function, "host": target.host},
            )
        await together(consequences)

    async def _resume(self, move: Move) -> bool:
        """Let the source run again. Return False if its machine lives and has it no more."""
        source, has_source = move.source, True
        request = ChangeStateRequest(
            attempt=self.attempt,
            migration=self.record.name,
            function=move.function,
            generation=source.generation,
            state=DeviceState.DEVICE_STATE_RUNNING,
        )

        async def resume() -> None:
            nonlocal has_source
            has_source = await self._context.hosts.change_state(source.host, request)

        with failpoint.around("coordinator.resume"):
            await self._insist(source.host, source.incarnation, resume)
        return has_source

    async def _lift_unchanged(self, move: Move, entry: EntryChange) -> None:
        name = EntryName(driver=entry.driver, function=move.function, generation=move.source.generation)
        request = LiftHoldRequest(attempt=self.attempt, entries=[name])
        with failpoint.around("coordinator.restore"):
            await self._insist(
                entry.host, entry.incarnation, lambda: self._context.hosts.lift_hold(entry.host, request)
            )

    # --- what both need ---

    async def _destroy(self, function: str, host: str, incarnation: str, generation: int) -> None:
        committed = self.record.phase == Phase.PHASE_COMMITTED
        request = DestroyFunctionRequest(
            attempt=self.attempt,
            function=function,
            generation=generation,
            decision=Decision.DECISION_COMMITTED if committed else Decision.DECISION_ABORTED,
        )
        with failpoint.around("coordinator.scrub" if committed else "coordinator.discard"):
            await self._insist(host, incarnation, lambda: self._context.hosts.destroy_function(host, request))

    async def _insist(self, host: str, incarnation: str | None, send: Callable[[], Awaitable[None]]) -> None:
        """Send a consequence until the host has acknowledged it, or, given `incarnation`, that machine is gone."""
        for delay_s in backoff_delays(self._context.random, RETRY_FIRST_S, RETRY_LONGEST_S):
            if incarnation is not None and self._context.snapshot.is_gone(host, incarnation):
                _log.info(
                    "migration %s: host %s was started anew, nothing is left there",
                    self.record.name,
                    host,
                    extra={"host": host},
                )
                return
            try:
                await send()
            except VfleetError as error:
                if error.reason in _NOTHING_LEFT:
                    return
                _log.warning(
                    "migration %s in %s, to be tried again: %s",
                    self.record.name,
                    self.state,
                    error.message,
                    extra={"host": host},
                )
            else:
                return
            await self._context.clock.sleep(delay_s)

    def _finish(self) -> Transaction:
        return transaction.finish(
            self.record,
            self._journal.mod_revision,
            finished_by=self._context.name,
            now=self._context.clock.time(),
            steps=self._steps,
        )

    def _entries_by_host(self) -> dict[str, list[EntryName]]:
        entries: dict[str, list[EntryName]] = {}
        for move in self.record.moves:
            for entry in move.entries:
                name = EntryName(driver=entry.driver, function=move.function, generation=move.source.generation)
                entries.setdefault(entry.host, []).append(name)
        return entries

    def _notify(self) -> None:
        self._context.inventory.notify(self.record.name)

    async def _until(self, condition: Callable[[], bool]) -> None:
        await self._context.inventory.until(condition, self.record.name)

    def _advance(self, event: Event) -> None:
        now_s = self._context.clock.monotonic()
        self._time_step(self.state.step, now_s - self._step_began_s)
        self._step_began_s = now_s
        self.state = next_state(self.state, event)
        self._notify()

    def _time_step(self, step: Step.ValueType, seconds: float) -> None:
        duration = StepDuration(step=step)
        duration.duration.FromNanoseconds(round(seconds * 1e9))
        tracing.past(f"step {Step.Name(step).removeprefix('STEP_')}", seconds)
        self._steps.append(duration)
