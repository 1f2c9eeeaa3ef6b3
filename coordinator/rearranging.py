"""A rearrangement being done: the moves of a plan that somebody has seen, each looked at once more before it begins.

Nothing of it is stored. A function at its target has moved, whoever moved it, one that is elsewhere by now is left
alone, and the others are what is left to do.
"""

from collections.abc import Sequence

from coordinator.context import Context
from coordinator.drain_plan import Batch
from coordinator.many_moves import STUCK, WAITING, Begin, ManyMoves
from coordinator.rearrangement import Premise
from vfleet.v1.migration_service_pb2 import Rearrangement


class Rearranging(ManyMoves):
    """Does the moves of a plan that is well-formed, each in a migration of its own."""

    def __init__(self, context: Context, begin: Begin, plan: Rearrangement, parallel: int) -> None:
        self._premise = Premise(plan)
        self._moves = {move.function: move for move in plan.moves}
        self._order = [Batch((move.function,), frozenset(move.after)) for move in plan.moves]
        super().__init__(context, begin, self._moves, parallel)

    def _look(self) -> None:
        snapshot = self._context.snapshot
        for name, mover in self._movers.items():
            move, lock, stored = self._moves[name], snapshot.locks.get(name), snapshot.functions.get(name)
            home = stored.record.device if stored else ""
            if mover.is_stuck and lock is None and home != move.target_device:
                mover.show(STUCK, home)
            elif lock is not None:
                self._see_moving(name, lock.record)
            elif home == move.target_device:
                self._see_moved(name, home)
            elif home == move.source_device:
                self._see_unmoved(name, home)
            else:
                mover.show(STUCK, home)
                mover.give_up(f"it was moved to {home} meanwhile" if home else "it is no more")

    def _batches(self) -> Sequence[Batch]:
        for move in self._moves.values():
            mover = self._movers[move.function]
            if mover.shown.state == WAITING:
                stays = next((name for name in move.after if self._movers[name].shown.state == STUCK), None)
                if stays is not None:
                    mover.give_up(f"{stays}, which was to move before, stays")
        return self._order

    def _is_to_begin(self, batch: Batch) -> bool:
        (name,) = batch.functions
        why = self._premise.fails(self._context.snapshot, self._moves[name])
        if why:
            self._movers[name].give_up(why)
        return not why

    def _target(self, function: str) -> str:
        return self._moves[function].target_device
