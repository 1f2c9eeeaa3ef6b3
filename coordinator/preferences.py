"""The order in which devices that will do are preferred, while functions are being placed. Pure.

What a device is worth changes with what has been placed so far. The best is kept on a heap for all functions that may
have the same devices; a worth that has changed is put there anew, and what is no longer true is dropped when it comes
up. A function's drivers' hosts, which are its own, are few, and looked at each time.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush

from coordinator.snapshot import Snapshot
from vfleet.v1.placement_pb2 import Merit, Preference

# Names of its own: looking one up in an enum of protobuf takes as long as all the rest of a comparison.
_SPREAD = Preference.PREFERENCE_SPREAD
_PACK = Preference.PREFERENCE_PACK
_DRIVER_HOST = Preference.PREFERENCE_DRIVER_HOST
_LEAST_LOADED = Preference.PREFERENCE_LEAST_LOADED

DEFAULT = (_DRIVER_HOST, _LEAST_LOADED)
_BY_HOST = frozenset({_SPREAD, _PACK})

Worth = tuple[float, ...]


class Preferences:
    """What is preferred, and what has been placed. `drivers` are the hosts of each function's drivers, with numbers.

    Whatever is preferred, the hosts of `shunned` come last.
    """

    def __init__(
        self,
        preferences: Sequence[Preference.ValueType],
        snapshot: Snapshot,
        drivers: Mapping[str, Mapping[str, int]],
        shunned: Collection[str] = (),
    ) -> None:
        self._preferences = tuple(preferences) or DEFAULT
        self._by_host = not _BY_HOST.isdisjoint(self._preferences)
        self._snapshot = snapshot
        self._drivers = drivers
        self._shunned = shunned
        self._placed: Counter[str] = Counter()
        self._on_host: dict[str, int] = {}

    def place(self, device: str, count: int = 1) -> None:
        """Count one function more on a device, or with -1, one less."""
        self._placed[device] += count
        host = self._snapshot.sites[device].host
        if host in self._on_host:
            self._on_host[host] += count

    def placed(self, device: str) -> int:
        """Return how many functions have been placed on a device."""
        return self._placed[device]

    def affected_by(self, device: str) -> Sequence[str]:
        """Return the devices that are worth something else once a function is placed on this one."""
        if not self._by_host:
            return (device,)
        return [each.name for each in self._snapshot.hosts[self._snapshot.sites[device].host].record.devices]

    def hosts_of_drivers(self, function: str) -> Mapping[str, int]:
        """Return the hosts that the function would be preferred on because of its drivers."""
        return self._drivers[function] if _DRIVER_HOST in self._preferences else {}

    def worth(self, device: str, drivers: Mapping[str, int]) -> Worth:
        """Return how a device does; less is better. `drivers` are the hosts of the function's drivers."""
        site = self._snapshot.sites[device]
        worth: list[float] = [site.host in self._shunned] if self._shunned else []
        for preference in self._preferences:
            if preference == _DRIVER_HOST:
                worth.append(-drivers.get(site.host, 0))
            elif preference == _LEAST_LOADED:
                worth.append(self._used(device) / site.total_vfs)
            else:
                sign = 1 if preference == _SPREAD else -1
                worth += (sign * self._used_on(site.host), sign * self._used(device))
        return tuple(worth)

    def merits(self, function: str, device: str) -> list[Merit]:
        """Return how a device does, for people."""
        site = self._snapshot.sites[device]
        merits = []
        for preference in self._preferences:
            if preference == _DRIVER_HOST:
                drivers = self._drivers[function]
                there, total = drivers.get(site.host, 0), sum(drivers.values())
                value = f"{there} of {total} drivers on {site.host}" if total else "no drivers"
            elif preference == _LEAST_LOADED:
                value = f"{self._used(device)} of {site.total_vfs} slots in use"
            else:
                value = f"{self._used_on(site.host)} functions on {site.host}, {self._used(device)} on the device"
            merits.append(Merit(preference=preference, value=value))
        return merits

    def _used(self, device: str) -> int:
        return len(self._snapshot.slots_of(device)) + self._placed[device]

    def _used_on(self, host: str) -> int:
        if host not in self._on_host:
            devices = self._snapshot.hosts[host].record.devices
            self._on_host[host] = sum(self._used(device.name) for device in devices)
        return self._on_host[host]


class Ranking:
    """The devices of each function, the best first, as functions are placed and taken back.

    `options` are the devices of each function; functions may share one sequence. `room` says how many functions each
    device takes.
    """

    def __init__(
        self,
        preferences: Preferences,
        options: Mapping[str, Sequence[str]],
        room: Mapping[str, int],
        snapshot: Snapshot,
    ) -> None:
        self._preferences = preferences
        self._options = options
        self._room = room
        self._snapshot = snapshot
        self._heaps: dict[int, tuple[frozenset[str], list[tuple[Worth, str]]]] = {}
        self._walked: set[int] = set()

    def place(self, device: str, count: int = 1) -> None:
        """Count one function more on a device, or with -1, one less."""
        self._preferences.place(device, count)
        for each in self._preferences.affected_by(device):
            worth = self._preferences.worth(each, {})
            for members, heap in self._heaps.values():
                if each in members:
                    heappush(heap, (worth, each))

    def best_first(self, function: str) -> Iterator[str]:
        """Yield a function's devices, the best first. What is placed meanwhile is to be taken back before the next."""
        first = self._best(function)
        if first is None:
            return
        yield first
        drivers = self._preferences.hosts_of_drivers(function)
        options = self._options[function]
        yield from sorted(
            (device for device in options if device != first),
            key=lambda device: (self._preferences.worth(device, drivers), device),
        )

    def _best(self, function: str) -> str | None:
        options, drivers = self._options[function], self._preferences.hosts_of_drivers(function)
        if id(options) not in self._walked:  # a heap pays from the second time on
            self._walked.add(id(options))
            free = (
                (self._preferences.worth(device, drivers), device) for device in options if not self._is_full(device)
            )
            return min(free, default=(None, None))[1]
        members, heap = self._heap(options)
        while heap and (self._is_full(heap[0][1]) or heap[0][0] != self._preferences.worth(heap[0][1], {})):
            heappop(heap)
        best = heap[:1]
        for host in drivers:
            stored = self._snapshot.hosts.get(host)
            for device in stored.record.devices if stored else ():
                if device.name in members and not self._is_full(device.name):
                    best.append((self._preferences.worth(device.name, drivers), device.name))
        return min(best)[1] if best else None

    def _is_full(self, device: str) -> bool:
        # A device without room for any is no option.
        placed = self._preferences.placed(device)
        return placed > 0 and placed >= self._room[device]

    def _heap(self, options: Sequence[str]) -> tuple[frozenset[str], list[tuple[Worth, str]]]:
        if id(options) not in self._heaps:
            heap = [(self._preferences.worth(device, {}), device) for device in options]
            heapify(heap)
            self._heaps[id(options)] = (frozenset(options), heap)
        return self._heaps[id(options)]
