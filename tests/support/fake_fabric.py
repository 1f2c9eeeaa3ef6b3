"""The fabric between hosts of one test."""

from dataclasses import dataclass, field

from support.unreliable_link import UnreliableLink, UnreliableLinks

from hostd import home
from hostd.functions import Functions
from vfleet.errors import Reason, VfleetError
from vfleet.v1.fabric_service_pb2 import ExchangeRequest, ExchangeResponse, ForgetDriverRequest, GetSequenceRequest


@dataclass
class FakeLink(UnreliableLink[Functions]):
    """Drivers' way to the functions of one host."""

    forgettings: list[ForgetDriverRequest] = field(default_factory=list)
    loses_forgettings: bool = False

    def sender_of(self, message: ExchangeRequest | ExchangeResponse) -> tuple[str, str]:
        return message.driver, message.function

    def exchange(self, peer: Functions, request: ExchangeRequest) -> ExchangeResponse:
        return home.exchange(peer, request)

    async def get_sequence(self, request: GetSequenceRequest) -> int:
        return home.last_sequence(self._home(), request)

    def forget_driver(self, request: ForgetDriverRequest) -> None:
        self.forgettings.append(request)
        if not self.loses_forgettings:
            home.forget_driver(self._home(), request)

    def _home(self) -> Functions:
        functions = self.peer()
        if not self.is_up or functions is None:
            raise VfleetError(Reason.UNREACHABLE, "no answer")
        return functions


class FakeFabric(UnreliableLinks[Functions, FakeLink]):
    """Links of one host to others."""

    def __init__(self, *, is_automatic: bool = False) -> None:
        super().__init__(FakeLink, is_automatic=is_automatic)
