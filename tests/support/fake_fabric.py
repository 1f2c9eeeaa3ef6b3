"""The fabric between hosts of one test: links that keep order while they last, and break, delay and repeat at will."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from hostd import home
from hostd.fabric import Sender
from hostd.functions import Functions
from vfleet.errors import Reason, VfleetError
from vfleet.v1.fabric_service_pb2 import ExchangeRequest, ExchangeResponse, ForgetDriverRequest, GetSequenceRequest


@dataclass
class FakeLink:
    """A link to one host. Nothing moves on it but by `carry_*`; `is_automatic` links carry everything at once."""

    home_of: Callable[[], Functions | None]
    is_automatic: bool = False
    is_up: bool = True
    requests: deque[ExchangeRequest] = field(default_factory=deque)
    responses: deque[ExchangeResponse] = field(default_factory=deque)
    late: deque[ExchangeRequest] = field(default_factory=deque)
    """What was sent through streams that are broken, and may arrive still."""
    senders: dict[tuple[str, str], Sender] = field(default_factory=dict)
    batches: list[ExchangeRequest] = field(default_factory=list)
    """All that was ever sent."""
    forgettings: list[ForgetDriverRequest] = field(default_factory=list)
    loses_forgettings: bool = False

    def send(self, request: ExchangeRequest, sender: Sender) -> bool:
        self.senders[request.driver, request.function] = sender
        if self.is_up:
            self.batches.append(request)
            self.requests.append(request)
            if self.is_automatic:
                self.carry_all()
        return self.is_up

    def leave(self, driver: str, function: str) -> None:
        self.senders.pop((driver, function), None)

    async def get_sequence(self, request: GetSequenceRequest) -> int:
        return home.last_sequence(self._home(), request)

    def forget_driver(self, request: ForgetDriverRequest) -> None:
        self.forgettings.append(request)
        if not self.loses_forgettings:
            home.forget_driver(self._home(), request)

    def carry_request(self) -> None:
        """Let the oldest request arrive; its response is on its way then."""
        functions = self.home_of()
        if self.requests and functions is not None:
            self.responses.append(home.exchange(functions, self.requests.popleft()))

    def carry_response(self) -> None:
        """Let the oldest response arrive."""
        if self.responses:
            response = self.responses.popleft()
            sender = self.senders.get((response.driver, response.function))
            if sender is not None:
                sender.answered(response)

    def carry_late(self) -> None:
        """Let something arrive that was sent before the link broke; nobody hears the answer."""
        functions = self.home_of()
        if self.late and functions is not None:
            home.exchange(functions, self.late.popleft())

    def carry_all(self) -> None:
        """Let everything arrive; to a host that is down nothing does."""
        while self.responses or (self.requests and self.home_of() is not None):
            self.carry_request()
            self.carry_response()

    def break_off(self) -> None:
        """Lose all responses; requests may arrive later."""
        self.is_up = False
        self.late.extend(self.requests)
        self.requests.clear()
        self.responses.clear()

    def come_back(self) -> None:
        """Open the link again, as `hostd.fabric.Link` does."""
        if not self.is_up:
            self.is_up = True
            for sender in list(self.senders.values()):
                sender.connected()

    def _home(self) -> Functions:
        functions = self.home_of()
        if not self.is_up or functions is None:
            raise VfleetError(Reason.UNREACHABLE, "no answer")
        return functions


class FakeFabric:
    """Links of one host to others, by segment number. `homes` are the functions of each host that is up."""

    def __init__(self, *, is_automatic: bool = False) -> None:
        self.homes: dict[int, Functions] = {}
        self.links: dict[int, FakeLink] = {}
        self._is_automatic = is_automatic

    def to(self, segment: int) -> FakeLink:
        if segment not in self.links:
            self.links[segment] = FakeLink(lambda: self.homes.get(segment), self._is_automatic)
        return self.links[segment]
