"""A drain: everything in one part of the fleet is moved elsewhere.

Nothing of it is stored but the part's cordon: what is left to do is what is still there. So whoever drains the same
part again, here or at another coordinator, goes on; and the end of the cordon is the end of the drain. It moves what
was there, or on its way there, when it was asked for, and nothing else.
"""

from collections.abc import Sequence

from coordinator.context import Context
from coordinator.cordon import devices_in
from coordinator.drain_plan import Batch, DrainPlan, plan_drain
from coordinator.many_moves import WAITING, Begin, ManyMoves
from coordinator.snapshot import Snapshot
from vfleet.errors import Reason, VfleetError
from vfleet.failure import abort_cause, is_passing
from vfleet.parts import part_key, spoken
from vfleet.v1.placement_pb2 import Constraints
from vfleet.v1.records_pb2 import Migration, Part

LOOK_AGAIN_S = 1.0  # at a function of somebody else's that is in a migration


class Drain(ManyMoves):
    """Empties a part of the fleet, which is cordoned. It raises CANCELLED once that isn't cordoned any more."""

    def __init__(self, context: Context, begin: Begin, part: Part, parallel: int, constraints: Constraints) -> None:
        self._part = part_key(part)
        self._constraints = constraints
        self._devices = devices_in(context.snapshot, part)
        self._plan: DrainPlan | None = None
        self._failed_hosts: set[str] = set()
        super().__init__(context, begin, sorted(self._here(context.snapshot)), parallel)

    def _here(self, snapshot: Snapshot) -> set[str]:
        """Return the functions that have a slot in the part: their home, or one that a migration has reserved."""
        return {slot.record.function for device in self._devices for slot in snapshot.slots_of(device).values()}

    def _signature(self) -> object:
        snapshot = self._context.snapshot
        return super()._signature(), self._part in snapshot.cordons, self._here(snapshot)

    def _look(self) -> None:
        snapshot, here = self._context.snapshot, self._here(self._context.snapshot)
        if self._part not in snapshot.cordons:
            message = f"{spoken(self._part)} isn't cordoned any more: the drain ends, and what has moved stays there"
            raise VfleetError(Reason.CANCELLED, message, metadata={"part": self._part})
        for name, mover in self._movers.items():
            lock, stored = snapshot.locks.get(name), snapshot.functions.get(name)
            home = stored.record.device if stored else ""
            if name not in here:
                self._see_moved(name, home)
            elif lock is not None:
                self._see_moving(name, lock.record)
            else:
                if mover.migration:
                    self._plan = None  # it may also have come from elsewhere
                self._note_host(self._see_unmoved(name, home))

    def _note_host(self, aborted: Migration | None) -> None:
        """Let functions go elsewhere, if they can, than to a target that has failed and may fail again."""
        if aborted is not None and is_passing(abort_cause(aborted)):
            self._failed_hosts |= {aborted.abort_host} & {move.target.host for move in aborted.moves}

    def _failed(self, name: str, cause: Reason | None, why: str) -> None:
        self._plan = None
        super()._failed(name, cause, why)

    def _target(self, function: str) -> str:
        return self._plan.devices[function] if self._plan is not None else ""

    def _batches(self) -> Sequence[Batch]:
        """Return the plan of where all that wait go; make it if there is none."""
        self._look_again_s = None
        waiting = [name for name, mover in self._movers.items() if mover.shown.state == WAITING]
        if not waiting:
            return ()
        if self._plan is not None and not self._holds(self._plan):
            self._plan = None
        if self._plan is None:
            try:
                plan = plan_drain(self._context.snapshot, waiting, self._constraints, self._failed_hosts)
            except VfleetError as error:
                if error.reason is not Reason.IN_MIGRATION:
                    raise
                for name in waiting:
                    self._movers[name].shown.why = error.message
                self._look_again_s = LOOK_AGAIN_S
                return ()
            for name, why in plan.stuck.items():
                # One that is being made or ended is no failure of its own.
                cause = None if why.reason is Reason.ILLEGAL_STATE else why.reason
                self._failed(name, cause, why.message)
            self._plan = plan
        return self._plan.batches

    def _holds(self, plan: DrainPlan) -> bool:
        """Return whether a plan can be gone on with: nobody else has moved, or moves, what it counts on."""
        snapshot = self._context.snapshot
        for name, home in plan.homes.items():
            stored = snapshot.functions.get(name)
            if name in snapshot.locks or stored is None or stored.record.device != home:
                return False
        for batch in plan.batches:
            gone = [name for name in batch.functions if self._movers[name].shown.state != WAITING]
            if 0 < len(gone) < len(batch.functions):
                return False
            if any(self._movers[name].shown.device != plan.devices[name] for name in gone):
                return False
        return True
