"""Devices for several functions at once: a choice is found if there is one. Pure.

Functions that are to be together first get a boundary to be within, one group after the other. Then each function in
turn gets the best of its devices with which all that are left can still have one: that there is room for them (a
matching of functions to devices), and that those that are to be apart can be (for each group, a matching of functions
to what is within the boundary). Both only ever say no when it is so, and without rules about groups the first alone
decides, so that nothing has to be taken back; with them, what fails is taken back and the next is tried.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from coordinator.matching import Matching
from coordinator.preferences import Preferences, Ranking
from coordinator.snapshot import Snapshot
from vfleet.errors import Reason, VfleetError
from vfleet.v1.placement_pb2 import Boundary

MAX_STEPS = 50_000
BRANCH_STEPS = 20  # what it costs to try a boundary for a group, in tries of a device for a function

Options = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Group:
    """Two functions or more that are to be together within a boundary, or apart from each other."""

    members: tuple[str, ...]
    boundary: Boundary.ValueType
    together: bool


class Assignment:
    """One question: devices for functions. `options` are those that will do for each alone, `room` their free slots.

    Functions with the same devices are to share one sequence.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        options: Options,
        room: Mapping[str, int],
        groups: Sequence[Group],
        preferences: Preferences,
    ) -> None:
        self._snapshot = snapshot
        self._options = options
        self._room = room
        self._together = [group for group in groups if group.together]
        self._apart = [group for group in groups if not group.together]
        self._preferences = preferences
        self._steps = 0

    def find(self) -> dict[str, str] | None:
        """Return a device for each function, or None if there is no choice that will do.

        Raise LIMIT_EXCEEDED if neither is known after MAX_STEPS: only rules about groups that cross each other can
        take that long.
        """
        if any(_contradict(together, apart) for together in self._together for apart in self._apart):
            return None
        return self._find_within(self._options, 0)

    def _find_within(self, options: Options, number: int) -> dict[str, str] | None:
        matching = Matching(options, self._room)
        if not matching.is_complete:
            return None
        if number == len(self._together):
            return self._search(options, matching)
        group = self._together[number]
        shared: dict[tuple[int, str], list[str]] = {}
        for boundary in self._boundaries(options, group):
            self._step()
            narrowed: dict[str, Sequence[str]] = {}
            for member in group.members:
                key = (id(options[member]), boundary)
                if key not in shared:
                    shared[key] = [d for d in options[member] if self._within(group, d) == boundary]
                narrowed[member] = shared[key]
            if not Matching(narrowed, self._room).is_complete:
                continue
            self._step(BRANCH_STEPS)
            found = self._find_within({**options, **narrowed}, number + 1)
            if found is not None:
                return found
        return None

    def _boundaries(self, options: Options, group: Group) -> list[str]:
        """Return what the first member of a group can be within, the best for it first."""
        ranking = Ranking(self._preferences, options, self._room, self._snapshot)
        return list(dict.fromkeys(self._within(group, device) for device in ranking.best_first(group.members[0])))

    def _search(self, options: Options, matching: Matching) -> dict[str, str] | None:
        """Give each function a device in turn, the first in the order of names with the fewest devices."""
        apart = _Apart(self._snapshot, options, self._apart)
        if not apart.is_possible:
            return None
        ranking = Ranking(self._preferences, options, self._room, self._snapshot)
        order = sorted(options, key=lambda function: (not apart.concerns(function), len(options[function]), function))
        chosen: list[str] = []
        tries: list[Iterator[str]] = [ranking.best_first(order[0])]
        while tries:
            function = order[len(tries) - 1]
            if len(chosen) == len(tries):  # what followed it has failed
                self._take_back(function, chosen.pop(), matching, apart, ranking)
            for device in tries[-1]:
                self._step()
                if matching.fix(function, device):
                    if apart.fix(function, device):
                        chosen.append(device)
                        ranking.place(device)
                        break
                    matching.unfix(function, device)
            else:
                tries.pop()
                continue
            if len(chosen) == len(order):
                return dict(zip(order, chosen, strict=True))
            tries.append(ranking.best_first(order[len(chosen)]))
        return None

    @staticmethod
    def _take_back(function: str, device: str, matching: Matching, apart: "_Apart", ranking: Ranking) -> None:
        ranking.place(device, -1)
        apart.unfix(function, device)
        matching.unfix(function, device)

    def _within(self, group: Group, device: str) -> str:
        return self._snapshot.sites[device].within[group.boundary]

    def _step(self, steps: int = 1) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            message = (
                f"no plan was found in {MAX_STEPS} steps, nor that there is none; expected fewer rules about groups"
            )
            raise VfleetError(Reason.LIMIT_EXCEEDED, message)


def _contradict(together: Group, apart: Group) -> bool:
    """Return whether two functions can't be both: all boundaries are within a host, so apart there is apart in each."""
    within_each_other = apart.boundary in (together.boundary, Boundary.BOUNDARY_HOST)
    return within_each_other and len(set(together.members) & set(apart.members)) > 1


class _Apart:
    """Functions that are to be apart: for each group, a matching to boundaries that take one each."""

    def __init__(self, snapshot: Snapshot, options: Options, groups: Sequence[Group]) -> None:
        self._snapshot = snapshot
        self._of: dict[str, list[tuple[Matching, Boundary.ValueType]]] = defaultdict(list)
        self.is_possible = True
        for group in groups:
            shared: dict[int, list[str]] = {}
            for member in group.members:
                devices = options[member]
                if id(devices) not in shared:
                    within = (snapshot.sites[device].within[group.boundary] for device in devices)
                    shared[id(devices)] = list(dict.fromkeys(within))
            boundaries = {member: shared[id(options[member])] for member in group.members}
            matching = Matching(boundaries, dict.fromkeys((b for each in boundaries.values() for b in each), 1))
            self.is_possible = self.is_possible and matching.is_complete
            for member in group.members:
                self._of[member].append((matching, group.boundary))

    def concerns(self, function: str) -> bool:
        return function in self._of

    def fix(self, function: str, device: str) -> bool:
        """Fix a function to a device; return False, and change nothing, if then not all could be apart."""
        fixed: list[tuple[Matching, str]] = []
        for matching, boundary in self._of.get(function, ()):
            within = self._snapshot.sites[device].within[boundary]
            if not matching.fix(function, within):
                for other, elsewhere in reversed(fixed):
                    other.unfix(function, elsewhere)
                return False
            fixed.append((matching, within))
        return True

    def unfix(self, function: str, device: str) -> None:
        for matching, boundary in self._of.get(function, ()):
            matching.unfix(function, self._snapshot.sites[device].within[boundary])
