"""A host of the demo's topology on the bench: its ledger, functions and drivers, with a clock that moves by hand."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

from support.fake_dma import FakeDmaLinks
from support.fake_fabric import FakeFabric
from support.manual_clock import ManualClock

from hostd.dma_receiver import Receivers
from hostd.dma_sender import DmaReach
from hostd.drivers import Drivers
from hostd.engine import Engine, Engines
from hostd.fence import Fences
from hostd.functions import Functions
from hostd.instance import Instance
from hostd.ledger import Ledger
from hostd.reach import Reach
from hostd.segment import Segment
from hostd.topology import load
from hostd.translation import Entry
from vfleet.address import bar_span, table_offset
from vfleet.errors import Reason, VfleetError
from vfleet.v1.function_service_pb2 import ChangeStateRequest, CreateFunctionRequest, DestroyFunctionRequest
from vfleet.v1.hold_service_pb2 import EntryName, LiftHoldRequest, PlaceHoldRequest
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.types_pb2 import (
    DECISION_ABORTED,
    DECISION_COMMITTED,
    DEVICE_STATE_RUNNING,
    DEVICE_STATE_STOP_COPY,
    Attempt,
    Bar,
    Decision,
    TableEntry,
)

DEMO = Path(__file__).parents[2] / "vfleet" / "topologies" / "demo.yaml"
SEGMENTS = {"h1": 1, "h2": 2, "h3": 3}
IDENTITY = 0xFEED
BARS = {0: 4096, 2: 1 << 16}
MEMORY_BYTES = bar_span(BARS)
RESOLVE_MS = 10_000
COMMITTED = DECISION_COMMITTED
ABORTED = DECISION_ABORTED
VIRTUAL_ADDRESS = 1 << 40


@cache
def segment_of(host: str) -> Segment:
    return Segment(load(DEMO, host))


def attempt(revision: int, fleet_generation: int = 1) -> Attempt:
    return Attempt(fleet_generation=fleet_generation, revision=revision)


def reason_of(action, *arguments, **named) -> Reason | None:
    """Return why `action` is refused, or None if it isn't."""
    try:
        action(*arguments, **named)
    except VfleetError as error:
        return error.reason
    return None


class Bench:
    """A host whose daemon can be started anew. `session` counts the starts."""

    def __init__(
        self,
        path: Path,
        host: str = "h1",
        clock: ManualClock | None = None,
        fabric: FakeFabric | None = None,
        dma_links: FakeDmaLinks | None = None,
        model: str = "checker",
        *,
        has_engines: bool = True,
    ) -> None:
        """With `has_engines`, which need a running loop, bus masters do their work."""
        self.model = model
        self.has_engines = has_engines
        self.dma_links = dma_links or FakeDmaLinks(is_automatic=True)
        self.path = path
        self.host = host
        self.segment = segment_of(host)
        self.clock = clock or ManualClock()
        self.fabric = fabric or FakeFabric(is_automatic=True)
        self.session = 0
        self.start()

    def start(self) -> None:
        self.session += 1
        self.ledger = Ledger(self.path)
        self.fences = Fences(self.ledger)
        self.functions = Functions(self.segment, self.ledger, self.fences, self.clock)
        self.reach = Reach(
            self.segment.number, self.session, lambda: 1, self.functions, self.fabric, self.clock, Random(7)
        )
        place = self.segment.main_memory
        receivers = Receivers(place, self.ledger, self.session, lambda: 1)
        self.drivers = Drivers(self.host, place, self.ledger, self.fences, self.clock, self.reach, receivers)
        if self.has_engines:
            dma_reach = DmaReach(self.segment.number, self.drivers, self.dma_links, self.clock, Random(8))
            self.engines = Engines(self.functions, dma_reach, allows_faults=True)

    def close(self) -> None:
        for task in self.engines._tasks if self.has_engines else ():
            task.cancel()
        self.drivers.close()
        self.functions.close()
        self.ledger.close()

    def restart(self) -> None:
        """Start the daemon anew: nothing but what is on disk is left."""
        self.close()
        self.start()

    # Functions

    def create(
        self,
        function: str = "vf1",
        generation: int = 1,
        revision: int = 1,
        *,
        fresh: bool = True,
        device: str = "nic0",
        vf_index: int = 1,
        migration: str = "m1",
        bars: dict[int, int] | None = None,
        identity: int = IDENTITY,
        model: str | None = None,
    ) -> Instance:
        return self.functions.create(
            CreateFunctionRequest(
                attempt=attempt(revision),
                migration="" if fresh else migration,
                function=function,
                generation=generation,
                device=f"{self.host}/{device}",
                vf_index=vf_index,
                bars=[Bar(index=index, size_bytes=size) for index, size in (bars or BARS).items()],
                identity=identity,
                model=model or self.model,
                fresh=fresh,
                resolve_after_ms=0 if fresh else RESOLVE_MS,
            )
        )

    def engine(self, generation: int = 0, *, function: str = "vf1") -> Engine:
        """Return the engine of a bus master's instance."""
        instance = self.functions.require(function, generation)
        return next(engine for engine in self.engines.all() if engine.instance is instance)

    def destroy(self, generation: int, revision: int, decision: Decision.ValueType, *, function: str = "vf1") -> None:
        self.functions.destroy(
            DestroyFunctionRequest(
                attempt=attempt(revision), function=function, generation=generation, decision=decision
            )
        )

    def stop(self, generation: int, revision: int, *, function: str = "vf1", migration: str = "m1") -> Instance:
        return self.functions.stop(
            ChangeStateRequest(
                attempt=attempt(revision),
                migration=migration,
                function=function,
                generation=generation,
                state=DEVICE_STATE_STOP_COPY,
                resolve_after_ms=RESOLVE_MS,
            )
        )

    def resume(
        self,
        generation: int,
        revision: int,
        *,
        function: str = "vf1",
        migration: str = "",
        begun_in: int = 1,
        fleet_generation: int = 1,
    ) -> Instance | None:
        """Resume by an attempt of fleet generation `begun_in`, at a host that knows of `fleet_generation`."""
        request = ChangeStateRequest(
            attempt=attempt(revision, begun_in),
            migration=migration,
            function=function,
            generation=generation,
            state=DEVICE_STATE_RUNNING,
        )
        return self.functions.resume(request, fleet_generation)

    # Drivers

    def message(
        self,
        base: int,
        *,
        driver: str = "d1",
        function: str = "vf1",
        generation: int = 1,
        revision: int = 1,
        virtual_address: int = VIRTUAL_ADDRESS,
        length: int = MEMORY_BYTES,
    ) -> TableEntry:
        """Return an entry as etcd has it."""
        return TableEntry(
            driver=driver,
            function=function,
            virtual_address=virtual_address,
            length_bytes=length,
            offset=table_offset(base, virtual_address),
            generation=generation,
            host=self.host,
            revision=revision,
        )

    def entry(self, driver: str = "d1", function: str = "vf1") -> Entry:
        return self.drivers.require(driver).table.by_function[function]

    async def hold(
        self,
        revision: int,
        *names: tuple[str, str, int],
        timeout_ms: int = 0,
        migration: str = "m1",
    ) -> list[str]:
        """Place holds on (driver, function, generation)."""
        return await self.drivers.place_hold(
            PlaceHoldRequest(
                attempt=attempt(revision),
                migration=migration,
                entries=entry_names(names),
                acknowledge_timeout_ms=timeout_ms,
                resolve_after_ms=RESOLVE_MS,
            )
        )

    def lift(self, revision: int, *names: tuple[str, str, int]) -> None:
        self.drivers.lift(LiftHoldRequest(attempt=attempt(revision), entries=entry_names(names)))

    def update(self, revision: int, *entries: TableEntry, lift: bool) -> None:
        self.drivers.update(UpdateTableRequest(attempt=attempt(revision), entries=entries, lift=lift))


def entry_names(names: Sequence[tuple[str, str, int]]) -> list[EntryName]:
    return [
        EntryName(driver=driver, function=function, generation=generation) for driver, function, generation in names
    ]
