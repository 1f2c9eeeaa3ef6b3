"""Free devices or hosts: those that can be emptied into free slots of others that are in use anyhow. Pure.

The smallest come first, of those of a size the one with the fewest functions; what leaves goes to the fullest. What is
empty stays so. Where all functions may be on the same devices no choice would free more; if these are of a size as
well, none that frees as many takes fewer moves.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping

from coordinator.arrangement import Arrangement, Kind, Ranking
from coordinator.matching import Matching
from coordinator.site import Site


def by_device(site: Site) -> str:
    """Return what becomes free if devices are to."""
    return site.name


def by_host(site: Site) -> str:
    """Return what becomes free if hosts are to."""
    return site.host


def defragment(arrangement: Arrangement, unit_of: Callable[[Site], str], max_moves: int) -> bool:
    """Empty units while one can be; return whether that was all, or some would have taken it beyond `max_moves`."""
    packer = _Packer(arrangement, unit_of)
    while True:
        looks, is_all = [], True
        for unit in packer.candidates():
            if len(arrangement.moved) + packer.functions_in(unit) > max_moves:
                is_all = False
            else:
                looks.append(packer.empty(unit))
        # Without rules about functions a second look finds nothing: there is ever less room.
        if not any(looks):
            return is_all


class _Packer:
    def __init__(self, arrangement: Arrangement, unit_of: Callable[[Site], str]) -> None:
        self._arrangement = arrangement
        self._unit = {name: unit_of(site) for name, site in arrangement.all_sites.items()}
        self._devices: defaultdict[str, list[str]] = defaultdict(list)
        for name, unit in self._unit.items():
            self._devices[unit].append(name)
        self._used = {unit: sum(arrangement.used[each] for each in names) for unit, names in self._devices.items()}
        self._functions: defaultdict[str, dict[str, None]] = defaultdict(dict)
        for name, home in arrangement.homes.items():
            self._functions[self._unit[home]][name] = None
        self._bound = frozenset(arrangement.bound)
        self._targets = Ranking(self._rank)

    def candidates(self) -> list[str]:
        """Return the units whose slots in use are all of functions that can move, in the order of their turns."""
        sites = self._arrangement.all_sites
        ranked = [
            (sum(sites[name].total_vfs for name in self._devices[unit]), used, unit)
            for unit, used in self._used.items()
            if used and used == len(self._functions[unit])
        ]
        return [unit for _, _, unit in sorted(ranked)]

    def functions_in(self, unit: str) -> int:
        """Return how many functions a unit has that can move."""
        return len(self._functions[unit])

    def empty(self, unit: str) -> bool:
        """Move all functions of a unit away, or none if not all can."""
        homes, moved = self._arrangement.homes, dict(self._arrangement.moved)
        before = {name: homes[name] for name in sorted(self._functions[unit])}
        if before and all(self._place(name, unit) for name in before if name in self._bound):
            seats = self._seats(unit, [name for name in before if name not in self._bound])
            if seats is not None:
                for name, device in seats.items():
                    self._move(name, device)
                return True
        for name, home in before.items():
            if homes[name] != home:
                self._move(name, home)
        self._arrangement.moved = moved
        return False

    def _place(self, function: str, unit: str) -> bool:
        """Move a function that a rule names to the first device outside the unit where the rule holds."""
        for device in self._open(self._arrangement.kind(function)):
            if self._unit[device] != unit and self._arrangement.keeps_rules(function, device):
                self._move(function, device)
                return True
        return False

    def _seats(self, unit: str, functions: list[str]) -> Mapping[str, str] | None:
        """Return devices for functions that no rule names, or None if not all can have one."""
        kinds = {name: self._arrangement.kind(name) for name in functions}
        options = {kind: self._enough(kind, unit, len(functions)) for kind in dict.fromkeys(kinds.values())}
        matching = Matching({name: options[kind] for name, kind in kinds.items()}, self._arrangement.room)
        return dict(matching.seats) if matching.is_complete else None

    def _enough(self, kind: Kind, unit: str, functions: int) -> list[str]:
        """Return the first devices of a kind with room for all functions: if any choice seats all, these do."""
        found, room = [], 0
        for device in self._open(kind):
            if self._unit[device] != unit:
                found.append(device)
                room += self._arrangement.room[device]
                if room >= functions:
                    break
        return found

    def _open(self, kind: Kind) -> Iterator[str]:
        self._targets.add(kind, self._arrangement.options(kind))
        return self._targets.best_first(kind)

    def _rank(self, kind: Kind, device: str) -> tuple[float, ...] | None:  # noqa: ARG002  # as rankings call it
        used, room = self._used[self._unit[device]], self._arrangement.room[device]
        return (-used, -self._arrangement.used[device]) if used and room else None

    def _move(self, function: str, device: str) -> None:
        source, target = self._unit[self._arrangement.homes[function]], self._unit[device]
        self._arrangement.move(function, device)
        self._used[source] -= 1
        self._used[target] += 1
        del self._functions[source][function]
        self._functions[target][function] = None
        for each in (*self._devices[source], *self._devices[target]):
            for kind in self._arrangement.kinds_for(each):
                self._targets.update(kind, each)
