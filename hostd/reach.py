"""How a driver's queue reaches its function's home, wherever that is: on this host, or across the fabric."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from hostd.fabric import Fabric
from hostd.functions import Functions
from hostd.home import forget_driver, last_sequence
from hostd.translation import Entry
from vfleet.address import location_of, translate
from vfleet.clock import Clock
from vfleet.v1.access_pb2 import Session
from vfleet.v1.fabric_service_pb2 import DmaWindow, ForgetDriverRequest, GetSequenceRequest


@dataclass(frozen=True, slots=True)
class Reach:
    """What a queue reaches homes by: this host's own functions, and the fabric.

    `starts` is how often the daemon was started, and grows with it; `fleet_generation` is the present one.
    """

    segment: int
    starts: int
    fleet_generation: Callable[[], int]
    functions: Functions
    fabric: Fabric
    clock: Clock
    random: Random

    def new_session(self, entry: Entry) -> Session:
        """Return the session that begins with a question to an entry's home: later than all before it."""
        return Session(fleet_generation=self.fleet_generation(), revision=entry.revision, start=self.starts)

    async def ask_sequence(self, entry: Entry, session: Session, dma: DmaWindow | None) -> int:
        """Ask an entry's home how far it got with the driver, which makes it prove that it is the home.

        It learns of the window that the function's DMA may go to, if there is one. Raise ILLEGAL_STATE if it isn't the
        home, UNREACHABLE if there is no answer.
        """
        request = GetSequenceRequest(
            driver=entry.driver,
            function=entry.function,
            generation=entry.generation,
            session=session,
            dma=dma,
        )
        segment = segment_of(entry)
        if segment == self.segment:
            return last_sequence(self.functions, request)
        return await self.fabric.to(segment).get_sequence(request)

    def forget(self, entry: Entry, session: Session, dma: DmaWindow | None) -> None:
        """Let an entry's home forget the driver's session, and its attachment if it had a window."""
        request = ForgetDriverRequest(
            driver=entry.driver,
            function=entry.function,
            generation=entry.generation,
            session=session,
            attachment=dma.attachment if dma is not None else None,
        )
        segment = segment_of(entry)
        if segment == self.segment:
            forget_driver(self.functions, request)
        else:
            self.fabric.to(segment).forget_driver(request)


def segment_of(entry: Entry) -> int:
    """Return the segment of the host to which an entry leads."""
    return location_of(translate(entry.virtual_address, entry.offset)).segment
