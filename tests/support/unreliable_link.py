"""A link between hosts of one test: it keeps order while it lasts, and breaks, delays and repeats at will."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

PeerT = TypeVar("PeerT")
LinkT = TypeVar("LinkT", bound="UnreliableLink")


@dataclass
class UnreliableLink(ABC, Generic[PeerT]):
    """A link to one host. Nothing moves on it but by `carry_*`; `is_automatic` links carry everything at once.

    `peer` is who answers at the other end, None while that host is down.
    """

    peer: Callable[[], PeerT | None]
    is_automatic: bool = False
    is_up: bool = True
    requests: deque = field(default_factory=deque)
    responses: deque = field(default_factory=deque)
    late: deque = field(default_factory=deque)
    """What was sent through streams that are broken, and may arrive still."""
    senders: dict = field(default_factory=dict)
    batches: list = field(default_factory=list)
    """All that was ever sent."""

    @abstractmethod
    def sender_of(self, message) -> Hashable:
        """Return whose request or response it is."""

    @abstractmethod
    def exchange(self, peer: PeerT, request):
        """Let the other end take a request, and return its response."""

    def send(self, request, sender) -> bool:
        self.senders[self.sender_of(request)] = sender
        if self.is_up:
            self.batches.append(request)
            self.requests.append(request)
            if self.is_automatic:
                self.carry_all()
        return self.is_up

    def leave(self, *sender) -> None:
        self.senders.pop(sender, None)

    def carry_request(self) -> None:
        """Let the oldest request arrive; its response is on its way then."""
        peer = self.peer()
        if self.requests and peer is not None:
            self.responses.append(self.exchange(peer, self.requests.popleft()))

    def carry_response(self) -> None:
        """Let the oldest response arrive."""
        if self.responses:
            response = self.responses.popleft()
            sender = self.senders.get(self.sender_of(response))
            if sender is not None:
                sender.answered(response)

    def carry_late(self) -> None:
        """Let something arrive that was sent before the link broke; nobody hears the answer."""
        peer = self.peer()
        if self.late and peer is not None:
            self.exchange(peer, self.late.popleft())

    def carry_all(self) -> None:
        """Let everything arrive; to a host that is down nothing does."""
        while self.responses or (self.requests and self.peer() is not None):
            self.carry_request()
            self.carry_response()

    def break_off(self) -> None:
        """Lose all responses; requests may arrive later."""
        self.is_up = False
        self.late.extend(self.requests)
        self.requests.clear()
        self.responses.clear()

    def come_back(self) -> None:
        """Open the link again, as `hostd.fabric_stream.FabricStream` does."""
        if not self.is_up:
            self.is_up = True
            for sender in list(self.senders.values()):
                sender.connected()


class UnreliableLinks(Generic[PeerT, LinkT]):
    """Links to other hosts, by segment number. `peers` are those who answer on each host that is up."""

    def __init__(self, new_link: Callable[[Callable[[], PeerT | None], bool], LinkT], *, is_automatic: bool) -> None:
        self.peers: dict[int, PeerT] = {}
        self.links: dict[int, LinkT] = {}
        self._new_link = new_link
        self._is_automatic = is_automatic

    def to(self, segment: int) -> LinkT:
        if segment not in self.links:
            self.links[segment] = self._new_link(lambda: self.peers.get(segment), self._is_automatic)
        return self.links[segment]
