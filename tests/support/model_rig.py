"""A device model on the bench, with all that it needs around it: engine, main memory, interrupts and a wire.

The engine is as unkind as the contract allows: what was read may be thrown away, posted writes arrive late (in order,
before the next read), and the function may move between any two steps: then only the sections of its image go along.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from random import Random

from hostd.models import create_model
from hostd.models.base import DmaRead, DmaWrite, Frame, Store
from vfleet.address import bar_span
from vfleet.limits import INTERRUPT_PAGE_ADDRESS

MEMORY_ADDRESS = 0x1_0000_0000
STEP_BYTES = 12 * 1024
STEPS = 100_000


class Rig:
    """One function and its driver's main memory. `random` decides what the engine does; None makes it do its best."""

    def __init__(
        self,
        model: str,
        bars: Mapping[int, int],
        identity: int = 0x1122_3344_5566_7788,
        memory_bytes: int = 1 << 20,
        random: Random | None = None,
    ) -> None:
        self._make = lambda: create_model(model, identity, bars)
        self._random = random
        self.model = self._make()
        self.image = bytearray(bar_span(bars) + self.model.private_bytes)
        self.memory = bytearray(memory_bytes)
        self.frames: deque[bytes] = deque()
        self.interrupts: Counter[int] = Counter()
        self.stray_writes: list[DmaWrite] = []
        self.moves = 0
        self.thrown_away = 0
        self._posted: deque[DmaWrite] = deque()
        self._apply(self.model.reset())

    def read(self, offset: int, length: int) -> int | None:
        """Return a register, little-endian; None if nobody claims it."""
        answer = self.model.read(memoryview(self.image), offset, length)
        if answer is None:
            return None
        data, stores = answer
        assert len(data) == length
        self._apply(stores)
        return int.from_bytes(data, "little")

    def write(self, offset: int, value: int, length: int) -> bool:
        """Write a register; return whether anybody claims it."""
        stores = self.model.write(memoryview(self.image), offset, value.to_bytes(length, "little"))
        self._apply(stores or ())
        return stores is not None

    def flush(self) -> None:
        """Let all posted writes arrive."""
        while self._posted:
            self._arrive(self._posted.popleft())

    def step(self) -> bool:
        """Do one piece of work, or begin one and throw away what was read. Return False if there is none."""
        view = memoryview(self.image)
        work = self.model.work(view)
        if work is None:
            self.flush()
            return False
        data = self._read(work.reads)
        if self._chance(0.1):
            self.thrown_away += 1
            return True
        assert self.model.work(view) == work
        before = bytes(self.image)
        step = self.model.finish(view, work, data)
        assert self.image == before, "a model puts nothing into memory itself"
        self._check_size(step.stores, step.sends)
        self._apply(step.stores)
        assert self.image != before, f"the same work would come again for ever: {work}"
        for send in step.sends:
            if isinstance(send, Frame):
                assert 14 <= len(send.data) <= 1518
                self.frames.append(send.data)
            else:
                assert 1 <= len(send.data) <= 4096
                self._posted.append(send)
        if self._random is None or self._chance(0.5):
            self.flush()
        return True

    def run(self) -> None:
        """Work until there is no more."""
        for _ in range(STEPS):
            if not self.step():
                return
        raise AssertionError("the model never comes to rest")

    def receive(self, frame: bytes) -> bool:
        """Offer a frame from the wire; return whether it was taken."""
        step = self.model.receive(memoryview(self.image), frame)
        if step is None:
            return False
        assert not step.sends
        self._apply(step.stores)
        return True

    def move(self, falsify: Callable[[bytearray], None] | None = None) -> None:
        """Let the function go on at a new home, which has what the sections hold and nothing else."""
        moved = bytearray(len(self.image))
        for section in self.model.sections:
            part = slice(section.start, section.start + section.length)
            moved[part] = self.image[part]
        assert moved == self.image, "a byte that isn't zero lies in no section"
        if falsify is not None:
            falsify(moved)
        self.image, self.model = moved, self._make()
        self.moves += 1

    def _read(self, reads: Iterable[DmaRead]) -> list[bytes] | None:
        self.flush()
        data = []
        for read in reads:
            assert 1 <= read.length <= 4096
            start = read.address - MEMORY_ADDRESS
            if not 0 <= start <= len(self.memory) - read.length:
                return None
            data.append(bytes(self.memory[start : start + read.length]))
        return data

    def _arrive(self, write: DmaWrite) -> None:
        start = write.address - MEMORY_ADDRESS
        if write.address == INTERRUPT_PAGE_ADDRESS and len(write.data) == 4:
            self.interrupts[int.from_bytes(write.data, "little")] += 1
        elif 0 <= start <= len(self.memory) - len(write.data):
            self.memory[start : start + len(write.data)] = write.data
        else:
            self.stray_writes.append(write)

    def _apply(self, stores: Iterable[Store]) -> None:
        for offset, data in stores:
            assert data
            assert 0 <= offset <= len(self.image) - len(data)
            self.image[offset : offset + len(data)] = data

    def _check_size(self, stores: Sequence[Store], sends: Sequence[DmaWrite | Frame]) -> None:
        assert len(stores) <= 64
        assert len(sends) <= 64
        assert sum(len(data) for _, data in stores) + sum(len(send.data) for send in sends) <= STEP_BYTES

    def _chance(self, probability: float) -> bool:
        return self._random is not None and self._random.random() < probability
