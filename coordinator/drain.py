"""A drain: everything in one part of the fleet is moved elsewhere, a few migrations at a time.

Nothing of it is stored but the part's cordon: what is left to do is what is still there. So whoever drains the same
part again, here or at another coordinator, goes on; and the end of the cordon is the end of the drain. It moves what
was there, or on its way there, when it was asked for, and nothing else.
"""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from coordinator.context import Context
from coordinator.cordon import devices_in
from coordinator.drain_plan import Batch, DrainPlan, plan_drain
from coordinator.retries import Retries
from coordinator.snapshot import Snapshot, Stored
from coordinator.tasks import first_of
from vfleet.errors import Reason, VfleetError
from vfleet.failure import abort_cause, advice, undone
from vfleet.parts import part_key, spoken
from vfleet.v1.migration_service_pb2 import DrainedFunction, DrainResponse, DrainState, MoveRequest
from vfleet.v1.placement_pb2 import Constraints
from vfleet.v1.records_pb2 import Migration, Part, Phase, Step

DEFAULT_PARALLEL = 4
MAX_PARALLEL = 64
LOOK_AGAIN_S = 1.0  # at a function of somebody else's that is in a migration

WAITING, MOVING = DrainState.DRAIN_STATE_WAITING, DrainState.DRAIN_STATE_MOVING
MOVED, STUCK = DrainState.DRAIN_STATE_MOVED, DrainState.DRAIN_STATE_STUCK

_HELD = frozenset({Step.STEP_HOLD, Step.STEP_COMMIT, Step.STEP_LIFT})

# Begins a migration of that name, and returns it.
Begin = Callable[[str, Sequence[MoveRequest]], Awaitable[Stored[Migration]]]


class _Leaving:
    """A function that is to leave: what was told of it, its tries, and the migration in which it was seen last."""

    def __init__(self, name: str, retries: Retries) -> None:
        self.shown = DrainedFunction(function=name, state=WAITING)
        self.retries = retries
        self.is_stuck = False
        self.why = ""
        self.migration = ""


class Drain:
    """Empties a part of the fleet, which is cordoned, while `run` is iterated."""

    def __init__(self, context: Context, begin: Begin, part: Part, parallel: int, constraints: Constraints) -> None:
        self._context = context
        self._begin_migration = begin
        self._part = part_key(part)
        self._parallel = parallel
        self._constraints = constraints
        self._devices = devices_in(context.snapshot, part)
        self._plan: DrainPlan | None = None
        self._look_again_s: float | None = None
        self._functions = {name: _Leaving(name, Retries(context.random)) for name in sorted(self._here())}

    async def run(self) -> AsyncGenerator[DrainResponse, None]:
        """Yield how far it is until it is over. Raise CANCELLED once the part isn't cordoned any more."""
        self._look()
        yield DrainResponse(functions=self._all(), is_over=self._is_over(), is_first=True)
        while not self._is_over():
            told = {each.function: each for each in self._all()}
            await self._begin()
            if (changed := [each for each in self._all() if told[each.function] != each]) or self._is_over():
                yield DrainResponse(functions=changed, is_over=self._is_over())
                continue
            seen = self._signature()
            await self._wait(seen)
            self._look()
            if changed := [each for each in self._all() if told[each.function] != each]:
                yield DrainResponse(functions=changed, is_over=self._is_over())

    def _all(self) -> list[DrainedFunction]:
        copies = []
        for function in self._functions.values():
            copy = DrainedFunction()
            copy.CopyFrom(function.shown)
            copies.append(copy)
        return copies

    def _is_over(self) -> bool:
        return all(function.shown.state in (MOVED, STUCK) for function in self._functions.values())

    # --- what is there ---

    def _here(self) -> set[str]:
        """Return the functions that have a slot in the part: their home, or one that a migration has reserved."""
        snapshot = self._context.snapshot
        return {slot.record.function for device in self._devices for slot in snapshot.slots_of(device).values()}

    def _signature(self) -> object:
        """Return all of the fleet that the drain depends on, to see when it changes."""
        snapshot = self._context.snapshot
        locks = [snapshot.locks.get(name) for name in self._functions]
        is_locked = [lock.record if lock else "" for lock in locks]
        return self._part in snapshot.cordons, self._here(), is_locked, len(snapshot.active_migrations)

    def _look(self) -> None:
        """Take over what the snapshot says."""
        snapshot, here = self._context.snapshot, self._here()
        if self._part not in snapshot.cordons:
            message = f"{spoken(self._part)} isn't cordoned any more: the drain ends, and what has moved stays there"
            raise VfleetError(Reason.CANCELLED, message, metadata={"part": self._part})
        for name, function in self._functions.items():
            lock = snapshot.locks.get(name)
            if name not in here:
                self._left(snapshot, name, function)
            elif lock is not None:
                function.migration = lock.record
                _show(function, MOVING, device=_target(snapshot, lock.record, name))
            else:
                self._stayed(snapshot, name, function)

    def _left(self, snapshot: Snapshot, name: str, function: _Leaving) -> None:
        stored = snapshot.functions.get(name)
        _show(function, MOVED, device=stored.record.device if stored else "")
        migration = snapshot.migrations.get(function.migration)
        if migration is not None and {step.step for step in migration.record.steps} >= _HELD:
            held_ns = sum(s.duration.ToNanoseconds() for s in migration.record.steps if s.step in _HELD)
            function.shown.held.FromNanoseconds(held_ns)

    def _stayed(self, snapshot: Snapshot, name: str, function: _Leaving) -> None:
        migration = snapshot.migrations.get(function.migration)
        if function.migration:
            if migration is not None and migration.record.phase == Phase.PHASE_ABORTED:
                self._failed(function, abort_cause(migration.record), _told(migration.record))
            self._plan = None  # it may also have come from elsewhere
        stored = snapshot.functions.get(name)
        _show(function, STUCK if function.is_stuck else WAITING, device=stored.record.device if stored else "")
        function.migration = ""

    def _failed(self, function: _Leaving, cause: Reason | None, why: str) -> None:
        self._plan = None
        function.is_stuck = not function.retries.failed(cause, self._context.clock.monotonic())
        tries = function.retries.failures
        function.why = f"{tries} tries failed, the last so: {why}" if function.is_stuck and tries > 1 else why
        function.shown.why = function.why
        function.shown.state = STUCK if function.is_stuck else WAITING

    # --- what is done ---

    async def _begin(self) -> None:
        """Begin as many migrations as may be under way."""
        while (batch := self._next_batch()) is not None:
            moves = [MoveRequest(function=name, target_device=self._device(name)) for name in batch.functions]
            try:
                migration = await self._begin_migration(f"m-{self._context.random.getrandbits(64):016x}", moves)
            except VfleetError as error:
                for name in batch.functions:
                    self._failed(self._functions[name], error.reason, error.message)
            else:
                for name in batch.functions:
                    self._functions[name].migration = migration.record.name
            self._look()

    def _device(self, name: str) -> str:
        return self._plan.devices[name] if self._plan is not None else ""

    def _next_batch(self) -> Batch | None:
        """Return what is to move next, if something may."""
        states = {name: function.shown.state for name, function in self._functions.items()}
        under_way = {function.migration for function in self._functions.values() if function.shown.state == MOVING}
        if len(under_way) >= self._parallel or not self._has_plan():
            return None
        assert self._plan is not None  # noqa: S101  # what has_plan says
        now_s = self._context.clock.monotonic()
        for batch in self._plan.batches:
            is_due = all(
                states[name] == WAITING and self._functions[name].retries.due_s <= now_s for name in batch.functions
            )
            if is_due and all(states[name] == MOVED for name in batch.after) and self._has_room(batch):
                return batch
        return None

    def _has_room(self, batch: Batch) -> bool:
        """Return whether the limits allow it; it waits for that without being queued."""
        homes = (self._functions[name].shown.device for name in batch.functions)
        devices = {*homes, *(self._device(name) for name in batch.functions)}
        passed = self._context.allowance.passed(self._context.snapshot, devices)
        if passed is not None:
            for name in batch.functions:
                self._functions[name].shown.why = passed
        return passed is None

    def _has_plan(self) -> bool:
        """Return whether there is a plan of where all that wait go; make it if there is none."""
        self._look_again_s = None
        waiting = [name for name, function in self._functions.items() if function.shown.state == WAITING]
        if not waiting:
            return False
        if self._plan is None:
            try:
                plan = plan_drain(self._context.snapshot, waiting, self._constraints)
            except VfleetError as error:
                if error.reason is not Reason.IN_MIGRATION:
                    raise
                for name in waiting:
                    self._functions[name].shown.why = error.message
                self._look_again_s = LOOK_AGAIN_S
                return False
            for name, why in plan.stuck.items():
                # One that is being made or ended is no failure of its own.
                cause = None if why.reason is Reason.ILLEGAL_STATE else why.reason
                self._failed(self._functions[name], cause, why.message)
            self._plan = plan
        return True

    async def _wait(self, seen: object) -> None:
        """Wait until something has changed, or a pause is over."""
        now_s = self._context.clock.monotonic()
        pauses_s = [
            max(function.retries.due_s - now_s, 0.0)
            for function in self._functions.values()
            if function.shown.state == WAITING and function.retries.due_s > now_s
        ]
        if self._look_again_s is not None:
            pauses_s.append(self._look_again_s)
        waits = [self._context.inventory.until(lambda: self._signature() != seen)]
        if pauses_s:
            waits.append(self._context.clock.sleep(min(pauses_s)))
        await first_of(waits)


def _show(function: _Leaving, state: DrainState.ValueType, *, device: str) -> None:
    shown = function.shown
    shown.state, shown.device = state, device
    shown.why = function.why if state in (WAITING, STUCK) else ""
    if function.migration:
        shown.migration = function.migration


def _target(snapshot: Snapshot, migration: str, function: str) -> str:
    stored = snapshot.migrations.get(migration)
    moves = stored.record.moves if stored else ()
    return next((move.target.device for move in moves if move.function == function), "")


def _told(migration: Migration) -> str:
    step = Step.Name(migration.abort_step).removeprefix("STEP_").lower()
    at = f" at {step}" if migration.abort_step else ""
    return f"{migration.name} failed{at}: {migration.abort_reason} ({undone(migration)}); {advice(migration)}"
