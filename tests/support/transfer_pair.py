"""A source and a target, one host each, in the middle of a move."""

from contextlib import aclosing
from pathlib import Path

from support.bench import Bench, attempt
from support.fake_transfer import Network

from hostd import transfer
from hostd.image import FunctionImage
from hostd.instance import Instance
from hostd.state_stream import Receiver
from vfleet.address import PAGE_BYTES
from vfleet.v1.access_pb2 import ACCESS_STATUS_OK
from vfleet.v1.transfer_service_pb2 import (
    CopyOptions,
    ExportStateRequest,
    ExportStateResponse,
    ImportStateRequest,
    ImportStateResponse,
)
from vfleet.v1.types_pb2 import (
    DEVICE_STATE_STOP,
    TRANSFER_MODE_PRE_COPY,
    TransferMode,
)

BARS = {0: 4096, 2: 1 << 20}
PAGES = 2 * (1 << 20) // PAGE_BYTES
LOCAL = (
    PAGES // 2
)  # BAR 2, local memory, begins at its natural alignment; what is before that and not BAR 0 is nothing's
Parts = list[ExportStateResponse]


class Pair:
    """vf1 runs on h1 with some state in it, and attempt 10 has made the target's instance on h2."""

    def __init__(self, path: Path, bars: dict[int, int] | None = None, model: str = "checker") -> None:
        self.h1 = Bench(path / "h1", "h1", has_engines=False)
        self.h2 = Bench(path / "h2", "h2", self.h1.clock, has_engines=False)
        self.source = self.h1.create(bars=bars or BARS, model=model)
        self.target = self.h2.create(generation=2, revision=10, fresh=False, bars=bars or BARS, model=model)
        for page in (0, LOCAL + 3, LOCAL + 4, LOCAL + 5, 300, PAGES - 1) if bars is None else ():
            self.write(page, b"page %d" % page)
        self.access("d1", b"one")
        self.access("d1", b"two")
        self.access("d2", b"three")
        self.source.image.sequencer("d2").set_session((1, 2, 4))

    def write(self, page: int, data: bytes) -> None:
        self.source.image.store([(page * PAGE_BYTES + 8, data)])

    def access(self, driver: str, answer: bytes) -> None:
        sequencer = self.source.image.sequencer(driver)
        self.source.image.apply(sequencer, sequencer.last + 1, ACCESS_STATUS_OK, answer, ())

    def export(self, revision: int = 10, max_rounds: int = 5, **options):
        request = ExportStateRequest(
            attempt=attempt(revision),
            function="vf1",
            generation=1,
            options=CopyOptions(max_rounds=max_rounds, **options),
        )
        return transfer.export_state(self.h1.functions, self.h1.clock, request)

    def pull(self, network: Network | None = None, revision: int = 10, max_rounds: int = 5, **options):
        request = ImportStateRequest(
            attempt=attempt(revision),
            function="vf1",
            generation=2,
            source_host="h1",
            source_address="source:1",
            source_incarnation="i1",
            source_generation=1,
            options=CopyOptions(max_rounds=max_rounds, **options),
        )
        return transfer.import_state(self.h2.functions, network or Network(self.h1), request)

    async def pull_all(self, network: Network | None = None, **options) -> list[ImportStateResponse]:
        """Import, and stop the source when it waits for that."""
        found = []
        async with aclosing(self.pull(network, **options)) as progress:
            async for step in progress:
                found.append(ImportStateResponse.FromString(step.SerializeToString()))
                if step.ready_to_stop:
                    self.h1.stop(1, 10)
        return found

    async def parts(self) -> Parts:
        """Return the stream of a stopped source."""
        self.h1.stop(1, 10)
        return [part async for part in self.export()]

    def close(self) -> None:
        self.h1.close()
        self.h2.close()

    def assert_moved(self, target: Instance | None = None) -> None:
        target = target or self.target
        assert target.image.memory == self.source.image.memory
        assert exported(target.image) == exported(self.source.image)
        assert (target.state, target.about.complete) == (DEVICE_STATE_STOP, True)


def exported(image: FunctionImage) -> list:
    return [sequencer.export() for sequencer in image.sequencers()]


def receive(instance: Instance, parts: Parts, mode: TransferMode.ValueType = TRANSFER_MODE_PRE_COPY) -> Receiver:
    receiver = Receiver(instance, mode, lambda offset, data: instance.image.store([(offset, data)]))
    for part in parts:
        receiver.take(part)
    receiver.check_complete()
    return receiver


async def stopped_at_end(pair: Pair, revision: int = 10):
    async with aclosing(pair.export(revision)) as export:
        async for part in export:
            yield part
            if part.round_end.last_before_stop:
                pair.h1.stop(1, revision)
