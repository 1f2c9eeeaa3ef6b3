"""DMA between hosts of one test: links that keep order while they last, and break, delay and repeat at will."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hostd.dma_link import Sender
from hostd.dma_receiver import exchange_dma
from hostd.drivers import Drivers
from vfleet.v1.fabric_service_pb2 import ExchangeDmaRequest, ExchangeDmaResponse


@dataclass
class FakeDmaLink:
    """A link to one host. Nothing moves on it but by `carry_*`; `is_automatic` links carry everything at once."""

    drivers_of: Callable[[], Drivers | None]
    is_automatic: bool = False
    is_up: bool = True
    requests: deque[ExchangeDmaRequest] = field(default_factory=deque)
    responses: deque[ExchangeDmaResponse] = field(default_factory=deque)
    late: deque[ExchangeDmaRequest] = field(default_factory=deque)
    """What was sent through streams that are broken, and may arrive still."""
    senders: dict[tuple[str, int], Sender] = field(default_factory=dict)
    batches: list[ExchangeDmaRequest] = field(default_factory=list)
    """All that was ever sent."""

    def send(self, request: ExchangeDmaRequest, sender: Sender) -> bool:
        self.senders[request.function, request.generation] = sender
        if self.is_up:
            copy = ExchangeDmaRequest.FromString(request.SerializeToString())
            self.batches.append(copy)
            self.requests.append(copy)
            if self.is_automatic:
                self.carry_all()
        return self.is_up

    def leave(self, function: str, generation: int) -> None:
        self.senders.pop((function, generation), None)

    def carry_request(self) -> None:
        """Let the oldest request arrive; its response is on its way then."""
        drivers = self.drivers_of()
        if self.requests and drivers is not None:
            self.responses.append(exchange_dma(drivers, self.requests.popleft()))

    def carry_response(self) -> None:
        """Let the oldest response arrive."""
        if self.responses:
            response = self.responses.popleft()
            sender = self.senders.get((response.function, response.generation))
            if sender is not None:
                sender.answered(response)

    def carry_late(self) -> None:
        """Let something arrive that was sent before the link broke; nobody hears the answer."""
        drivers = self.drivers_of()
        if self.late and drivers is not None:
            exchange_dma(drivers, self.late.popleft())

    def carry_all(self) -> None:
        """Let everything arrive; to a host that is down nothing does."""
        while self.responses or (self.requests and self.drivers_of() is not None):
            self.carry_request()
            self.carry_response()

    def break_off(self) -> None:
        """Lose all responses; requests may arrive later."""
        self.is_up = False
        self.late.extend(self.requests)
        self.requests.clear()
        self.responses.clear()

    def come_back(self) -> None:
        """Open the link again, as `hostd.dma_link.DmaLink` does."""
        if not self.is_up:
            self.is_up = True
            for sender in list(self.senders.values()):
                sender.connected()


class FakeDmaLinks:
    """Links of one host, or of all, to others, by segment number. `hosts` are the drivers of each host that is up."""

    def __init__(self, *, is_automatic: bool = False) -> None:
        self.hosts: dict[int, Drivers] = {}
        self.links: dict[int, FakeDmaLink] = {}
        self._is_automatic = is_automatic

    def to(self, segment: int) -> FakeDmaLink:
        if segment not in self.links:
            self.links[segment] = FakeDmaLink(lambda: self.hosts.get(segment), self._is_automatic)
        return self.links[segment]
