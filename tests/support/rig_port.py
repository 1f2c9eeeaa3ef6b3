"""A driver's port to a device in the rig: posted writes arrive late, the device moves, and the clock is virtual."""

from dataclasses import dataclass, field
from random import Random

from support.bus_master_rig import Rig

from vfleet.limits import INTERRUPT_PAGE_ADDRESS


@dataclass
class CountingTally:
    """What a driver told of."""

    done: int = 0
    resumed_at: int = 0
    wrong: list[str] = field(default_factory=list)

    def completed(self, submitted: float) -> None:
        self.done += 1

    def resumed(self, operations: int) -> None:
        self.resumed_at = operations

    def lost(self, what: str) -> None:
        self.wrong.append(f"lost {what}")

    def repeated(self, what: str) -> None:
        self.wrong.append(f"repeated {what}")

    def reordered(self, what: str) -> None:
        self.wrong.append(f"reordered {what}")

    def mismatch(self, what: str) -> None:
        self.wrong.append(f"mismatch {what}")

    def error(self, what: str) -> None:
        self.wrong.append(f"error {what}")


class RigPort:
    """The port (hostd.workloads.port.Port). It is `stopping` when the test says so, or `stop_at` by its clock."""

    def __init__(self, rig: Rig, span_bytes: int, random: Random | None = None) -> None:
        self.rig = rig
        self.memory = memoryview(rig.main)
        self.memory_address = rig.main_address
        self.span_bytes = span_bytes
        self.interrupt_address = INTERRUPT_PAGE_ADDRESS
        self.clock_s = 1.0
        self.stopping = False
        self.stop_at: float | None = None
        self._random = random
        self._posted: list[tuple[int, bytes]] = []
        self._seen = rig.interrupts.copy()

    @property
    def is_stopping(self) -> bool:
        return self.stopping or (self.stop_at is not None and self.clock_s >= self.stop_at)

    async def read(self, offset: int, length: int) -> bytes:
        self.deliver()
        return self.rig.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        self._posted.append((offset, data))
        if self._random is not None and self._random.random() < 0.5:
            self.deliver()

    async def flush(self) -> None:
        self.deliver()

    async def interrupt(self, data: int, timeout_s: float | None = None) -> int:
        self.deliver()
        while self.rig.interrupts[data] == self._seen[data]:
            if self._random is not None and self._random.random() < 0.1:
                self.rig.move()
            if not self.rig.step():
                assert timeout_s is not None, "it would wait for ever"
                self.clock_s += timeout_s
                return 0
        count = self.rig.interrupts[data] - self._seen[data]
        self._seen[data] = self.rig.interrupts[data]
        self.clock_s += 0.001
        return count

    def interrupts(self, data: int) -> int:
        return self.rig.interrupts[data]

    def now(self) -> float:
        return self.clock_s

    async def pause(self, seconds: float) -> None:
        self.clock_s += seconds

    def deliver(self, most: int | None = None) -> None:
        """Let posted writes arrive: all, or the first so many."""
        count = len(self._posted) if most is None else most
        for offset, data in self._posted[:count]:
            self.rig.write(offset, data)
        del self._posted[:count]

    def die(self) -> None:
        """The driver's daemon is killed: of the posted writes only the first have arrived."""
        if self._random is not None:
            self.deliver(self._random.randint(0, len(self._posted)))
        self._posted.clear()
