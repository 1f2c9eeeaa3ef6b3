"""Many moves, a few migrations at a time: what a drain and a rearrangement have in common.

Nothing of them is stored: how far they are is what the fleet shows. Whoever does the same again, here or at another
coordinator, goes on, and migrations of theirs that are under way are seen by their functions' locks.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass

from coordinator.context import Context
from coordinator.drain_plan import Batch
from coordinator.retries import Retries
from coordinator.snapshot import Snapshot, Stored
from coordinator.tasks import first_of
from vfleet.errors import Reason, VfleetError
from vfleet.failure import abort_cause, advice, undone
from vfleet.v1.migration_service_pb2 import MoveProgress, MoveRequest, MoveState
from vfleet.v1.records_pb2 import Migration, Phase, Step

DEFAULT_PARALLEL = 4
MAX_PARALLEL = 64

WAITING, MOVING = MoveState.MOVE_STATE_WAITING, MoveState.MOVE_STATE_MOVING
MOVED, STUCK = MoveState.MOVE_STATE_MOVED, MoveState.MOVE_STATE_STUCK

_HELD = frozenset({Step.STEP_HOLD, Step.STEP_COMMIT, Step.STEP_LIFT})

# Begins a migration of that name, and returns it.
Begin = Callable[[str, Sequence[MoveRequest]], Awaitable[Stored[Migration]]]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is: all functions if `is_first`, else those of which something changed."""

    functions: Sequence[MoveProgress]
    is_over: bool
    is_first: bool = False


class Mover:
    """A function that is to move: what was told of it, its tries, and the migration in which it was seen last."""

    def __init__(self, name: str, retries: Retries) -> None:
        self.shown = MoveProgress(function=name, state=WAITING)
        self.retries = retries
        self.is_stuck = False
        self.why = ""
        self.migration = ""

    def show(self, state: MoveState.ValueType, device: str) -> None:
        """Note how far it is, and the device that it is on or goes to."""
        self.shown.state, self.shown.device = state, device
        self.shown.why = self.why if state in (WAITING, STUCK) else ""
        if self.migration:
            self.shown.migration = self.migration

    def give_up(self, why: str) -> None:
        """Note that it stays, and why."""
        self.is_stuck, self.why = True, why
        self.show(STUCK, self.shown.device)


class ManyMoves(ABC):
    """Moves functions while `run` is iterated, `parallel` migrations at once at most."""

    def __init__(self, context: Context, begin: Begin, functions: Iterable[str], parallel: int) -> None:
        self._context = context
        self._begin_migration = begin
        self._parallel = parallel
        self._movers = {name: Mover(name, Retries(context.random)) for name in functions}
        self._look_again_s: float | None = None

    async def run(self) -> AsyncGenerator[Progress, None]:
        """Yield how far it is until it is over."""
        self._look()
        yield Progress(self._all(), self._is_over(), is_first=True)
        while not self._is_over():
            told = {each.function: each for each in self._all()}
            # As old as the look at the least: what changes while somebody takes what is yielded is seen, too.
            seen, looked_s = self._signature(), self._context.clock.monotonic()
            self._look()
            await self._begin()
            if changed := [each for each in self._all() if told[each.function] != each]:
                yield Progress(changed, self._is_over())
            else:
                await self._wait(seen, looked_s)

    # --- what the two are different in ---

    @abstractmethod
    def _look(self) -> None:
        """Take over what the snapshot says."""

    @abstractmethod
    def _batches(self) -> Sequence[Batch]:
        """Return what is to move, in its order; nothing if that isn't known now."""

    @abstractmethod
    def _target(self, function: str) -> str:
        """Return the device that a function of a batch is to go to."""

    def _is_to_begin(self, batch: Batch) -> bool:  # noqa: ARG002  # for those who look at it
        """Return whether a batch whose turn it is should begin; if not, what keeps it is noted."""
        return True

    def _signature(self) -> object:
        """Return all of the fleet that matters, to see when it changes."""
        snapshot = self._context.snapshot
        locks = [snapshot.locks.get(name) for name in self._movers]
        homes = [stored.record.device if (stored := snapshot.functions.get(name)) else "" for name in self._movers]
        return homes, [lock.record if lock else "" for lock in locks], set(snapshot.active_migrations)

    def _failed(self, name: str, cause: Reason | None, why: str) -> None:
        """Note that a function could not be moved; it is tried again if that is worth it."""
        mover = self._movers[name]
        is_stuck = not mover.retries.failed(cause, self._context.clock.monotonic())
        tries = mover.retries.failures
        if is_stuck:
            mover.give_up(f"{tries} tries failed, the last so: {why}" if tries > 1 else why)
        else:
            mover.why = why
            mover.show(WAITING, mover.shown.device)

    # --- what they do alike ---

    def _put_off(self, name: str, pause_s: float, why: str) -> None:
        """Note that a function has to wait for others, which is no failure of its own."""
        mover = self._movers[name]
        mover.retries.put_off(pause_s, self._context.clock.monotonic())
        mover.why = why
        mover.show(WAITING, mover.shown.device)

    def _all(self) -> list[MoveProgress]:
        copies = []
        for mover in self._movers.values():
            copy = MoveProgress()
            copy.CopyFrom(mover.shown)
            copies.append(copy)
        return copies

    def _is_over(self) -> bool:
        return all(mover.shown.state in (MOVED, STUCK) for mover in self._movers.values())

    def _see_moving(self, name: str, migration: str) -> None:
        """Take over that a function is in a migration."""
        self._movers[name].migration = migration
        self._movers[name].show(MOVING, _target_in(self._context.snapshot, migration, name))

    def _see_moved(self, name: str, device: str) -> None:
        """Take over that a function has moved."""
        mover = self._movers[name]
        mover.show(MOVED, device)
        stored = self._context.snapshot.migrations.get(mover.migration)
        has_drivers = stored is not None and any(m.entries for m in stored.record.moves if m.function == name)
        if stored is not None and has_drivers and {step.step for step in stored.record.steps} >= _HELD:
            held_ns = sum(each.duration.ToNanoseconds() for each in stored.record.steps if each.step in _HELD)
            mover.shown.held.FromNanoseconds(held_ns)

    def _see_unmoved(self, name: str, device: str) -> Migration | None:
        """Take over that a function is in no migration and has to move still; return the one of its that aborted."""
        mover = self._movers[name]
        stored = self._context.snapshot.migrations.get(mover.migration)
        mover.shown.device = device
        aborted = stored.record if stored and stored.record.phase == Phase.PHASE_ABORTED else None
        if aborted is not None:
            self._failed(name, abort_cause(aborted), _told(aborted))
        mover.show(STUCK if mover.is_stuck else WAITING, device)
        mover.migration = ""
        return aborted

    async def _begin(self) -> None:
        """Begin as many migrations as may be under way."""
        while (batch := self._next_batch()) is not None:
            moves = [MoveRequest(function=name, target_device=self._target(name)) for name in batch.functions]
            try:
                migration = await self._begin_migration(f"m-{self._context.random.getrandbits(64):016x}", moves)
            except VfleetError as error:
                for name in batch.functions:
                    if error.retry_after_s is None:
                        self._failed(name, error.reason, error.message)
                    else:
                        self._put_off(name, error.retry_after_s, error.message)
            else:
                for name in batch.functions:
                    self._movers[name].migration = migration.record.name
            self._look()

    def _next_batch(self) -> Batch | None:
        """Return what is to move next, if something may."""
        movers = self._movers.values()
        under_way = {mover.migration for mover in movers if mover.shown.state == MOVING}
        if len(under_way) >= self._parallel:
            return None
        now_s = self._context.clock.monotonic()
        for batch in self._batches():
            waiting = [self._movers[name] for name in batch.functions]
            is_due = all(each.shown.state == WAITING and each.retries.due_s <= now_s for each in waiting)
            is_its_turn = all(self._movers[name].shown.state == MOVED for name in batch.after)
            if is_due and is_its_turn and self._is_to_begin(batch) and self._has_room(batch):
                return batch
        return None

    def _has_room(self, batch: Batch) -> bool:
        """Return whether the limits allow it; it waits for that without being queued."""
        homes = (self._movers[name].shown.device for name in batch.functions)
        devices = {*homes, *(self._target(name) for name in batch.functions)}
        passed = self._context.allowance.passed(self._context.snapshot, devices)
        if passed is not None:
            for name in batch.functions:
                self._movers[name].shown.why = passed
        return passed is None

    async def _wait(self, seen: object, looked_s: float) -> None:
        """Wait until something has changed, or a pause is over that wasn't when it was looked at."""
        now_s = self._context.clock.monotonic()
        pauses_s = [
            max(mover.retries.due_s - now_s, 0)
            for mover in self._movers.values()
            if mover.shown.state == WAITING and mover.retries.due_s > looked_s
        ]
        if self._look_again_s is not None:
            pauses_s.append(self._look_again_s)
        waits = [self._context.inventory.until(lambda: self._signature() != seen)]
        if pauses_s:
            waits.append(self._context.clock.sleep(min(pauses_s)))
        await first_of(waits)


def _target_in(snapshot: Snapshot, migration: str, function: str) -> str:
    stored = snapshot.migrations.get(migration)
    moves = stored.record.moves if stored else ()
    return next((move.target.device for move in moves if move.function == function), "")


def _told(migration: Migration) -> str:
    step = Step.Name(migration.abort_step).removeprefix("STEP_").lower()
    at = f" at {step}" if migration.abort_step else ""
    return f"{migration.name} failed{at}: {migration.abort_reason} ({undone(migration)}); {advice(migration)}"
