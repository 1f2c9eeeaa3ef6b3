"""DMA between hosts of one test."""

from support.unreliable_link import UnreliableLink, UnreliableLinks

from hostd.dma_exchange import exchange_dma
from hostd.dma_link import Sender
from hostd.drivers import Drivers
from vfleet.v1.fabric_service_pb2 import ExchangeDmaRequest, ExchangeDmaResponse


class FakeDmaLink(UnreliableLink[Drivers]):
    """Functions' way to the drivers of one host."""

    def sender_of(self, message: ExchangeDmaRequest | ExchangeDmaResponse) -> tuple[str, int]:
        return message.function, message.generation

    def exchange(self, peer: Drivers, request: ExchangeDmaRequest) -> ExchangeDmaResponse:
        return exchange_dma(peer, request)

    def send(self, request: ExchangeDmaRequest, sender: Sender) -> bool:
        return super().send(ExchangeDmaRequest.FromString(request.SerializeToString()), sender)


class FakeDmaLinks(UnreliableLinks[Drivers, FakeDmaLink]):
    """Links of one host, or of all, to others."""

    def __init__(self, *, is_automatic: bool = False) -> None:
        super().__init__(FakeDmaLink, is_automatic=is_automatic)
