"""Where the hosts' daemons are, and what their devices are wired to, kept by a watch on the hosts' records.

A fabric address says by itself at which segment it lies; the directory is needed only to find the daemon there.
"""

import asyncio
from dataclasses import dataclass

from vfleet.etcd.keys import HOSTS, host_key
from vfleet.etcd.records import decode_if_possible
from vfleet.etcd.store import Event, KeyValue, Listing, Store
from vfleet.names import host_of
from vfleet.principal import server_name
from vfleet.roles import Role
from vfleet.v1.records_pb2 import Host


@dataclass(frozen=True, slots=True)
class Peer:
    """Where another host's daemon is (HOST:PORT), which machine it is, and the host's name."""

    address: str
    incarnation: str
    host: str

    @property
    def server(self) -> str:
        """The name in its certificate."""
        return server_name(Role.HOST, self.host)


class Directory:
    """The hosts that the fleet knows. `changed` is set, and replaced, at every change; `known` is set by the first."""

    def __init__(self) -> None:
        self._peers: dict[int, Peer] = {}
        self._segments: dict[str, int] = {}
        self._attachments: dict[str, dict[str, frozenset[str]]] = {}  # by the host's key, then by device
        self.changed = asyncio.Event()
        self.known = asyncio.Event()

    def peer(self, segment: int) -> Peer | None:
        """Return where the host that has the segment is, or None if nobody has it."""
        return self._peers.get(segment)

    def attachments(self, device: str) -> frozenset[str]:
        """Return the networks that a device, HOST/DEVICE, is wired to; none if nobody knows the device."""
        return self._attachments.get(host_key(host_of(device)), {}).get(device, frozenset())

    async def follow(self, store: Store) -> None:
        """Keep the directory true, for ever."""
        async for update in store.watch(HOSTS):
            if isinstance(update, Listing):
                self._peers.clear()
                self._segments.clear()
                self._attachments.clear()
                for item in update.items:
                    self._put(item)
            else:
                for event in update.events:
                    self._apply(event)
            self.known.set()
            self.changed.set()
            self.changed = asyncio.Event()

    def _apply(self, event: Event) -> None:
        segment = self._segments.pop(event.key, None)
        if segment is not None:
            self._peers.pop(segment, None)
        self._attachments.pop(event.key, None)
        if event.value is not None:
            self._put(KeyValue(event.key, event.value, event.create_revision, event.mod_revision))

    def _put(self, item: KeyValue) -> None:
        host = decode_if_possible(Host, item)
        if host is None:
            return
        self._peers[host.segment] = Peer(host.fabric_address or host.address, host.incarnation, host.name)
        self._segments[item.key] = host.segment
        self._attachments[item.key] = {device.name: frozenset(device.attachments) for device in host.devices}
