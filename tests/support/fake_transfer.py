"""The way of a function's state from its source to its target, within one process."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from support.bench import Bench

from hostd import transfer
from vfleet.v1.transfer_service_pb2 import ExportStateResponse, FetchStateRequest, FetchStateResponse


@dataclass
class Network:
    """What stands between target and source: it calls the source's export, and may change what comes."""

    source: Bench
    tamper: Callable[[AsyncIterator[ExportStateResponse]], AsyncIterator[ExportStateResponse]] = lambda parts: parts
    tamper_rest: Callable[[AsyncIterator[FetchStateResponse]], AsyncIterator[FetchStateResponse]] = lambda pages: pages
    fetched: list[FetchStateRequest] = field(default_factory=list)

    def to(self, address: str, server: str = "", *, bulk: bool = False) -> "Network":
        assert address == "source:1"
        return self

    def stub(self, kind: Callable, address: str, server: str = "", *, bulk: bool = False) -> object:
        return kind(self.to(address, bulk=bulk))

    def unary_stream(self, path: str, **_):
        if path.endswith("/FetchState"):
            return self._fetch
        assert path.endswith(("/ExportState", "/ImportState", "/WatchArrival"))
        return lambda request, **_: Call(
            self.tamper(transfer.export_state(self.source.functions, self.source.clock, request))
        )

    def _fetch(self, request: FetchStateRequest, **_) -> "Call":
        self.fetched.append(request)
        return Call(self.tamper_rest(transfer.fetch_state(self.source.functions, self.source.clock, request)))


class Call:
    """One call under way."""

    def __init__(self, parts: AsyncIterator) -> None:
        self._parts = parts

    def __aiter__(self) -> AsyncIterator:
        return self._parts

    def cancel(self) -> None:
        """The source notices when its generator is dropped."""
