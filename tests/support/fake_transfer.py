"""The way of a function's state from its source to its target, within one process."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from support.bench import Bench

from hostd import transfer
from vfleet.v1.transfer_service_pb2 import ExportStateResponse


@dataclass
class Network:
    """What stands between target and source: it calls the source's export, and may change what comes."""

    source: Bench
    tamper: Callable[[AsyncIterator[ExportStateResponse]], AsyncIterator[ExportStateResponse]] = lambda parts: parts

    def to(self, address: str) -> "Network":
        assert address == "source:1"
        return self

    def unary_stream(self, path: str, **_):
        assert path.endswith(("/ExportState", "/ImportState"))
        return lambda request, **_: Call(
            self.tamper(transfer.export_state(self.source.functions, self.source.clock, request))
        )


class Call:
    """One call under way."""

    def __init__(self, parts: AsyncIterator[ExportStateResponse]) -> None:
        self._parts = parts

    def __aiter__(self) -> AsyncIterator[ExportStateResponse]:
        return self._parts

    def cancel(self) -> None:
        """The source notices when its generator is dropped."""
