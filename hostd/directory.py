"""Where the other hosts' daemons are: segment numbers to network addresses, kept by a watch on the hosts' records.

A fabric address says by itself at which segment it lies; the directory is needed only to find the daemon there.
"""

import asyncio
from dataclasses import dataclass

from vfleet.etcd.keys import HOSTS
from vfleet.etcd.records import decode
from vfleet.etcd.store import Event, KeyValue, Listing, Store
from vfleet.v1.records_pb2 import Host


@dataclass(frozen=True, slots=True)
class Peer:
    """Where another host's daemon is (HOST:PORT), and which machine it is."""

    address: str
    incarnation: str


class Directory:
    """The hosts that the fleet knows. `changed` is set, and replaced, at every change."""

    def __init__(self) -> None:
        self._peers: dict[int, Peer] = {}
        self._segments: dict[str, int] = {}
        self.changed = asyncio.Event()

    def peer(self, segment: int) -> Peer | None:
        """Return where the host that has the segment is, or None if nobody has it."""
        return self._peers.get(segment)

    async def follow(self, store: Store) -> None:
        """Keep the directory true, for ever."""
        async for update in store.watch(HOSTS):
            if isinstance(update, Listing):
                self._peers.clear()
                self._segments.clear()
                for item in update.items:
                    self._put(item)
            else:
                for event in update.events:
                    self._apply(event)
            self.changed.set()
            self.changed = asyncio.Event()

    def _apply(self, event: Event) -> None:
        segment = self._segments.pop(event.key, None)
        if segment is not None:
            self._peers.pop(segment, None)
        if event.value is not None:
            self._put(KeyValue(event.key, event.value, event.create_revision, event.mod_revision))

    def _put(self, item: KeyValue) -> None:
        host = decode(Host, item)
        self._peers[host.segment] = Peer(host.address, host.incarnation)
        self._segments[item.key] = host.segment
