"""Where every function of the fleet is while a plan of many moves is being made, and where each could go next. Pure.

Functions are looked at by kind: those of a kind may go to the same devices. What a function may do next follows from
where it is in the arrangement, not from where it came from, so a plan that ends where nothing is left to do has nothing
left to do once it has been carried out. Cordoned devices, and those of hosts that are not registered, are left alone.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping

from coordinator.drain_plan import binding_rules
from coordinator.placement_filters import FREE_SLOT, Needs, checks, first_failure, free_slots, group_values
from coordinator.planner import find_device, movable, registered_incarnation
from coordinator.site import Site
from coordinator.snapshot import Snapshot
from vfleet.errors import VfleetError
from vfleet.names import host_of
from vfleet.v1.placement_pb2 import Constraints, GroupRule
from vfleet.v1.records_pb2 import Function

Kind = Needs
# What a device is ordered by among those of a list, or None if it has no place there.
Rank = Callable[[Kind, str], tuple[float, ...] | None]


class Arrangement:
    """Homes of functions, slots in use, and what is free. Functions of `fixed` stay where they are.

    `homes` are those of functions that can move, `stuck` says of others on the same devices why they can't.
    """

    def __init__(self, snapshot: Snapshot, constraints: Constraints, fixed: Collection[str] = ()) -> None:
        self.sites: dict[str, Site] = {
            name: site
            for name, site in sorted(snapshot.sites.items())
            if site.host in snapshot.registrations and snapshot.cordoned(name) is None
        }
        self.all_sites: Mapping[str, Site] = snapshot.sites
        self.used = {name: len(snapshot.slots_of(name)) for name in snapshot.sites}
        self.room = {name: max(free_slots(snapshot, site), 0) for name, site in self.sites.items()}
        self.homes: dict[str, str] = {}
        self.stuck: dict[str, str] = {}
        self.moved: dict[str, None] = {}  # in the order of their last moves
        self._snapshot = snapshot
        self._constraints = constraints
        self._checks = [each for each in checks(constraints.boundaries, 0) if each[0] != FREE_SLOT]
        self._rules: defaultdict[str, list[GroupRule]] = defaultdict(list)
        self._all_homes: dict[str, str] = {}
        self._kinds: dict[Hashable, Kind] = {}
        self._options: dict[Kind, dict[str, None]] = {}
        self._kinds_of_device: defaultdict[str, list[Kind]] = defaultdict(list)
        self._free: defaultdict[str, defaultdict[Kind, dict[str, None]]] = defaultdict(lambda: defaultdict(dict))
        for name in sorted(snapshot.functions):
            self._take_in(name, fixed)
        for rule in binding_rules(snapshot, self.homes, constraints):
            for name in rule.functions:
                self._all_homes[name] = snapshot.functions[name].record.device
                self._rules[name].append(rule)
        for name in [name for name in self._rules if name in self.homes]:
            self._bind(name)
        self.bound = [name for name in self.homes if name in self._rules]  # they can move, and rules name them
        for name, home in self.homes.items():
            if name not in self._rules:
                self._free[home][self.kind(name)][name] = None

    def function(self, name: str) -> Function:
        """Return a function's record."""
        return self._snapshot.functions[name].record

    def kind(self, function: str) -> Kind:
        """Return the kind of a function where it is in the arrangement."""
        return self._kind(self.function(function), self.homes[function])

    def options(self, kind: Kind) -> Collection[str]:
        """Return the devices that functions of a kind may be on, whether they have free slots or not."""
        if kind not in self._options:
            self._options[kind] = {
                name: None
                for name, site in self.sites.items()
                if first_failure(self._checks, kind, site, self._snapshot) is None
            }
            for device in self._options[kind]:
                self._kinds_of_device[device].append(kind)
        return self._options[kind]

    def kinds_on(self, device: str) -> Mapping[Kind, Collection[str]]:
        """Return the functions on a device that can move and that no rule names, by kind."""
        return {kind: names for kind, names in self._free[device].items() if names}

    def kinds_for(self, device: str) -> Iterable[Kind]:
        """Return the kinds, of those that `options` was asked for, that may be on a device."""
        return self._kinds_of_device[device]

    def may_go(self, function: str, device: str) -> bool:
        """Return whether a function can be moved to a device with everything else where it is."""
        return (
            self.room.get(device, 0) > 0
            and device != self.homes[function]
            and device in self.options(self.kind(function))
            and self.keeps_rules(function, device)
        )

    def keeps_rules(self, function: str, device: str) -> bool:
        """Return whether the rules that name a function hold if it is on a device."""
        for rule in self._rules.get(function, ()):
            homes = (self._snapshot.sites.get(self._all_homes[name]) for name in rule.functions if name != function)
            others = {home.within[rule.boundary] for home in homes if home is not None}
            if group_values(rule.relation, self.sites[device].within[rule.boundary], others) is not None:
                return False
        return True

    def share_a_rule(self, function: str, other: str) -> bool:
        """Return whether a rule names both functions."""
        return any(other in rule.functions for rule in self._rules.get(function, ()))

    def move(self, function: str, device: str) -> None:
        """Move a function."""
        home = self.homes[function]
        is_bound = function in self._rules
        if not is_bound:
            del self._free[home][self.kind(function)][function]
        for place, change in ((home, -1), (device, 1)):
            self.used[place] += change
            self.room[place] -= change
        self.homes[function] = device
        if is_bound:
            self._all_homes[function] = device
        else:
            self._free[device][self.kind(function)][function] = None
        self.moved.pop(function, None)
        self.moved[function] = None

    def local_attachments(self, function: str, device: str) -> int:
        """Return how many of a function's drivers run on the host of a device."""
        host = host_of(device)
        drivers = (self._snapshot.drivers.get(driver) for driver in self.function(function).drivers)
        return sum(driver is not None and driver.record.host == host for driver in drivers)

    def _take_in(self, name: str, fixed: Collection[str]) -> None:
        home = self.function(name).device
        if home not in self.sites:
            return
        try:
            find_device(self._snapshot, movable(self._snapshot, name).device)
            for driver in self.function(name).drivers:
                entry = self._snapshot.entries_of(driver).get(name)
                if entry is not None:
                    registered_incarnation(self._snapshot, entry.record.host)
        except VfleetError as error:
            self.stuck[name] = error.message
            return
        if name in fixed:
            self.stuck[name] = "others would have to be where it goes, or it where they go, at the same time"
        else:
            self.homes[name] = home

    def _bind(self, name: str) -> None:
        """Keep a function where it is if a rule names it with one of which nobody knows yet where it will be."""
        for rule in self._rules[name]:
            for other in rule.functions:
                lock = self._snapshot.locks.get(other)
                if lock is not None and name in self.homes:
                    self.stuck[name] = (
                        f"function {other!r}, which a rule names with it, is in migration {lock.record!r}"
                    )
                    del self.homes[name]

    def _kind(self, function: Function, device: str) -> Kind:
        """Return what a function needs, with the first device that is like its home in all that counts as its home."""
        site = self.sites[device]
        bars = tuple((bar.index, bar.size_bytes) for bar in function.bars)
        attachments = frozenset(self._constraints.attachments) or site.attachments
        boundaries = tuple(site.within[rule.boundary] for rule in self._constraints.boundaries if rule.relation)
        alike = (site.manufacturer, site.io_type, site.state_version, boundaries, function.model, bars, attachments)
        if alike not in self._kinds:
            self._kinds[alike] = Needs(device, function.model, bars, attachments, stays=True)
        return self._kinds[alike]


class Ranking:
    """For each kind, devices in the order of their ranks, as these change."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._order: dict[Kind, list[tuple[tuple[float, ...], str]]] = {}
        self._ranks: dict[Kind, dict[str, tuple[float, ...]]] = {}

    def add(self, kind: Kind, devices: Iterable[str]) -> None:
        """Take in a kind with the devices that it may have, unless it is there."""
        if kind in self._order:
            return
        ranks = ((device, self._rank(kind, device)) for device in devices)
        self._ranks[kind] = {device: rank for device, rank in ranks if rank is not None}
        self._order[kind] = sorted((rank, device) for device, rank in self._ranks[kind].items())

    def update(self, kind: Kind, device: str) -> None:
        """Look at a device's rank among those of a kind anew, if the kind is there."""
        if kind not in self._order:
            return
        ranks, order = self._ranks[kind], self._order[kind]
        before, now = ranks.pop(device, None), self._rank(kind, device)
        if before is not None:
            del order[bisect_left(order, (before, device))]
        if now is not None:
            ranks[device] = now
            insort(order, (now, device))

    def best_first(self, kind: Kind) -> Iterator[str]:
        """Yield the devices of a kind, the lowest rank first. Nothing may change meanwhile."""
        return (device for _, device in self._order[kind])

    @property
    def kinds(self) -> list[Kind]:
        """The kinds, in the order in which they came."""
        return list(self._order)
