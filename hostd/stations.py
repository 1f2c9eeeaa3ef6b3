"""Who is on which network: the functions that frames can be switched to, kept by a watch on the functions' records.

Two functions are on one network if the devices that are their homes are wired to a common attachment. A station's home
may have changed since: whoever lives there says so, and then the next look is better.
"""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from hostd.directory import Directory
from hostd.models import NETWORK_MODELS
from hostd.models.ethernet import MAC_BYTES, is_group, mac_address
from vfleet.etcd.keys import FUNCTIONS
from vfleet.etcd.records import decode_if_possible
from vfleet.etcd.store import KeyValue, Listing, Store
from vfleet.v1.records_pb2 import FUNCTION_STATUS_ACTIVE, Function


@dataclass(frozen=True, slots=True)
class Station:
    """A function on a network, and its home: a device (HOST/DEVICE) and the fabric address of its window."""

    function: str
    identity: int
    generation: int
    device: str
    base: int


class Stations:
    """All stations of the fleet. `changed` is set, and replaced, at every change; `known` is set by the first.

    They are followed once `wanted` is set: a host without functions that have frames to send is not told of every move.
    """

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._by_key: dict[str, Station] = {}
        self._by_identity: dict[int, Station] = {}
        self._by_mac: dict[bytes, list[Station]] = {}
        self.wanted = asyncio.Event()
        self.changed = asyncio.Event()
        self.known = asyncio.Event()

    def find(self, identity: int) -> Station | None:
        """Return a station by its function's identity; None if it is no more, was lost, or is not known yet."""
        return self._by_identity.get(identity)

    def receivers(self, sender: int, device: str, frame: bytes) -> list[Station]:
        """Return who is to get a frame that a sender at a device sends: whom it names, or all others on the network."""
        destination = frame[:MAC_BYTES]
        named = self._by_key.values() if is_group(destination) else self._by_mac.get(destination, ())
        network = self._directory.attachments(device)
        return [
            station
            for station in named
            if station.identity != sender and network & self._directory.attachments(station.device)
        ]

    async def follow(self, store: Store) -> None:
        """Keep them true, for ever, once they are wanted."""
        await self.wanted.wait()
        async for update in store.watch(FUNCTIONS):
            if isinstance(update, Listing):
                self._by_key = {item.key: station for item in update.items if (station := _station(item))}
            else:
                for event in update.events:
                    self._by_key.pop(event.key, None)
                    if event.value is None:
                        continue
                    station = _station(KeyValue(event.key, event.value, event.create_revision, event.mod_revision))
                    if station is not None:
                        self._by_key[event.key] = station
            self._index(self._by_key.values())
            self.known.set()
            self.changed.set()
            self.changed = asyncio.Event()

    def _index(self, stations: Iterable[Station]) -> None:
        self._by_identity = {station.identity: station for station in stations}
        self._by_mac = {}
        for station in stations:
            self._by_mac.setdefault(mac_address(station.identity), []).append(station)


def _station(item: KeyValue) -> Station | None:
    function = decode_if_possible(Function, item)
    if function is None or function.model not in NETWORK_MODELS or function.status != FUNCTION_STATUS_ACTIVE:
        return None
    return Station(function.name, function.identity, function.generation, function.device, function.base)
