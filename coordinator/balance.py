"""Even loads: which functions leave the most loaded devices for the least loaded, one after the other. Pure.

A device's load is the part of its slots that is in use, as in placement. Of all moves that would leave the target less
loaded than the source was, by more than the tolerance, and the source no less loaded than the target was, the one with
the largest difference is next: so the highest load never rises, and the lowest never falls. Where devices are of a size
and all functions may be on each, that takes as few moves as can be: one from the highest to the lowest, each time.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from coordinator.arrangement import Arrangement, Kind, Ranking


@dataclass(frozen=True, slots=True)
class _Step:
    function: str
    target: str
    difference: float


def balance(arrangement: Arrangement, tolerance_percent: int, max_moves: int) -> bool:
    """Move functions until loads are even; return whether they are, or it stopped after `max_moves`."""
    balancer = _Balancer(arrangement, tolerance_percent)
    while (step := balancer.next_step()) is not None:
        if len(arrangement.moved) >= max_moves:
            return False
        balancer.move(step)
    return True


class _Balancer:
    def __init__(self, arrangement: Arrangement, tolerance_percent: int) -> None:
        self._arrangement = arrangement
        self._tolerance_percent = tolerance_percent
        self._total = {name: site.total_vfs for name, site in arrangement.sites.items()}
        self._sources = Ranking(self._source_rank)
        self._targets = Ranking(self._target_rank)
        for name in arrangement.homes:
            self._learn(name)

    def next_step(self) -> _Step | None:
        """Return the next move. Those that no rule names come first, which costs the others nothing but their turn."""
        steps = (self._step_of_kind(kind) for kind in self._sources.kinds)
        best = min((step for step in steps if step), key=lambda step: -step.difference, default=None)
        if best is not None:
            return best
        bound = (self._step_of(name) for name in self._arrangement.bound)
        return min((step for step in bound if step), key=lambda step: -step.difference, default=None)

    def move(self, step: _Step) -> None:
        """Make a move."""
        arrangement = self._arrangement
        source, kind = arrangement.homes[step.function], arrangement.kind(step.function)
        arrangement.move(step.function, step.target)
        self._learn(step.function)
        self._sources.update(kind, source)
        for device in (source, step.target):
            for each in arrangement.kinds_on(device):
                self._sources.update(each, device)
            for each in arrangement.kinds_for(device):
                self._targets.update(each, device)

    def _learn(self, function: str) -> None:
        """Take in the kind of a function, which may be new once it has moved."""
        kind = self._arrangement.kind(function)
        self._sources.add(kind, self._arrangement.sites)
        self._targets.add(kind, self._arrangement.options(kind))

    def _source_rank(self, kind: Kind, device: str) -> tuple[float, ...] | None:
        is_source = kind in self._arrangement.kinds_on(device)
        return (-self._arrangement.used[device] / self._total[device],) if is_source else None

    def _target_rank(self, kind: Kind, device: str) -> tuple[float, ...] | None:  # noqa: ARG002  # as rankings call it
        has_room = self._arrangement.room[device] > 0
        return ((self._arrangement.used[device] + 1) / self._total[device],) if has_room else None

    def _step_of_kind(self, kind: Kind) -> _Step | None:
        for source in self._sources.best_first(kind):
            target = next(self._good_targets(kind, source), None)
            if target is not None:
                function = self._least_missed(self._arrangement.kinds_on(source)[kind], source, target)
                return _Step(function, target, self._difference(source, target))
            if self._is_near(source, next(self._targets.best_first(kind), source)):
                return None
        return None

    def _step_of(self, function: str) -> _Step | None:
        source = self._arrangement.homes[function]
        for target in self._good_targets(self._arrangement.kind(function), source):
            if self._arrangement.keeps_rules(function, target):
                return _Step(function, target, self._difference(source, target))
        return None

    def _good_targets(self, kind: Kind, source: str) -> Iterator[str]:
        for target in self._targets.best_first(kind):
            if self._is_near(source, target):
                return
            if self._is_no_worse(source, target):
                yield target

    def _least_missed(self, functions: Collection[str], source: str, target: str) -> str:
        """Return the function to move: one that moves anyhow, or the one with the fewest drivers to leave behind."""
        arrangement = self._arrangement

        def missed(name: str) -> tuple[bool, int, str]:
            left = arrangement.local_attachments(name, source) - arrangement.local_attachments(name, target)
            return name not in arrangement.moved, left, name

        return min(functions, key=missed)

    def _is_near(self, source: str, target: str) -> bool:
        """Return whether the target would be as loaded as the source is, or less by no more than the tolerance."""
        # In whole numbers: a difference of just the tolerance is none.
        used, total = self._arrangement.used, self._total
        difference = used[source] * total[target] - (used[target] + 1) * total[source]
        return 100 * difference <= self._tolerance_percent * total[source] * total[target]

    def _is_no_worse(self, source: str, target: str) -> bool:
        """Return whether the source would be as loaded as the target is, or more, as it is where they are of a size."""
        used, total = self._arrangement.used, self._total
        return (used[source] - 1) * total[target] >= used[target] * total[source]

    def _difference(self, source: str, target: str) -> float:
        used, total = self._arrangement.used, self._total
        return used[source] / total[source] - (used[target] + 1) / total[target]
