"""A rig for bus masters: it plays the engine and main memory, and checks that a model keeps its contract.

It moves the device at will: the image is copied, and a new model goes on over the copy.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from random import Random

from hostd.models.base import BusMaster, DmaRead, DmaWrite, Frame, Step, Store, Work
from vfleet.limits import INTERRUPT_PAGE_ADDRESS

MAX_STEP_BYTES = 12 << 10
MAX_STEP_PARTS = 64
NewModel = Callable[[], BusMaster]


class Rig:
    """A model with its image, and `main` memory, at `main_address` for the device. All else is a DMA fault."""

    def __init__(self, new_model: NewModel, image_bytes: int, main_bytes: int, main_address: int) -> None:
        self._new_model = new_model
        self.model = new_model()
        self.image = bytearray(image_bytes)
        self.main = bytearray(main_bytes)
        self.main_address = main_address
        self.interrupts: Counter[int] = Counter()
        self.frames: list[bytes] = []
        self.stray_writes = 0
        self.faults: set[int] = set()
        """Pages of main memory, by address, that fault."""
        self.steps = 0
        self._apply(self.model.reset())

    def read(self, offset: int, length: int) -> bytes:
        answer = self.model.read(self._seen(), offset, length)
        assert answer is not None
        self._apply(answer[1])
        assert len(answer[0]) == length
        return answer[0]

    def write(self, offset: int, data: bytes) -> None:
        stores = self.model.write(self._seen(), offset, data)
        assert stores is not None
        self._apply(stores)

    def receive(self, frame: bytes) -> bool:
        """Offer a frame from the network; return whether the device has taken it."""
        step = self.model.receive(self._seen(), frame)
        if step is None:
            return False
        assert not step.sends
        self._apply(step.stores)
        return True

    def move(self) -> None:
        """Go on elsewhere: another model object, over a copy of the image."""
        self.model, self.image = self._new_model(), bytearray(self.image)

    def begin(self) -> tuple[Work, list[bytes] | None] | None:
        """Take the next work and do its reads."""
        work = self.model.work(self._seen())
        if work is None:
            return None
        assert hash(work.what) == hash(work.what)
        data = [self._dma_read(read) for read in work.reads]
        found = [part for part in data if part is not None]
        return work, found if len(found) == len(data) else None

    def end(self, begun: tuple[Work, list[bytes] | None]) -> bool:
        """Finish the work if it is still the next; return whether it was."""
        work, data = begun
        if self.model.work(self._seen()) != work:
            return False
        step = self.model.finish(self._seen(), work, data)
        self._check(step, work, data)
        changes = any(self.image[offset : offset + len(data)] != data for offset, data in step.stores)
        assert changes, f"{work} would come again for ever"
        self._apply(step.stores)
        for send in step.sends:
            if isinstance(send, Frame):
                self.frames.append(send.data)
            else:
                self._dma_write(send)
        self.steps += 1
        return True

    def step(self) -> bool:
        """Do one piece of work; return whether there was any."""
        begun = self.begin()
        return begun is not None and self.end(begun)

    def run(self, most: int = 100_000) -> int:
        """Work until there is none; return the steps done."""
        done = 0
        while self.step():
            done += 1
            assert done <= most, "the work has no end"
        return done

    def run_with_moves(self, random: Random, most: int = 100_000) -> None:
        """Work until there is none, moved at any point, with what was read thrown away at times."""
        for _ in range(most):
            begun = self.begin()
            if begun is None:
                return
            if random.random() < 0.2:
                self.move()
            if random.random() < 0.8:
                assert self.end(begun), "nothing came between"
            if random.random() < 0.2:
                self.move()
        raise AssertionError("the work has no end")

    def check_touches(self) -> None:
        """Check that the next work depends on no more of local memory than it says."""
        begun = self.begin()
        if begun is None:
            return
        work, data = begun
        other = bytearray(self.image)
        local = self.model.local_memory
        other[local.start : local.stop] = bytes(255 - value for value in other[local.start : local.stop])
        for offset, length in work.touches:
            assert local.start <= offset < offset + length <= local.stop
            other[offset : offset + length] = self.image[offset : offset + length]
        assert self.model.work(memoryview(other)) == work
        assert self.model.finish(memoryview(other), work, data) == self.model.finish(self._seen(), work, data)

    def _seen(self) -> memoryview:
        return memoryview(self.image).toreadonly()

    def _check(self, step: Step, work: Work, data: Sequence[bytes] | None) -> None:
        assert self.model.finish(self._seen(), work, data) == step
        stored, sent = sum(len(data) for _, data in step.stores), sum(len(send.data) for send in step.sends)
        assert stored + sent <= MAX_STEP_BYTES
        assert max(len(step.stores), len(step.sends)) <= MAX_STEP_PARTS
        local = self.model.local_memory
        for offset, data in step.stores:
            if local.start < offset + len(data) and offset < local.stop:
                assert any(start <= offset and offset + len(data) <= start + length for start, length in work.touches)

    def _apply(self, stores: Sequence[Store]) -> None:
        for offset, data in stores:
            assert 0 <= offset <= offset + len(data) <= len(self.image)
            self.image[offset : offset + len(data)] = data

    def _dma_read(self, read: DmaRead) -> bytes | None:
        assert 1 <= read.length <= 4096
        assert 0 <= read.address < 1 << 64
        start = self._place(read.address, read.length)
        return None if start is None else bytes(self.main[start : start + read.length])

    def _dma_write(self, write: DmaWrite) -> None:
        assert 1 <= len(write.data) <= 4096
        assert 0 <= write.address < 1 << 64
        if write.address == INTERRUPT_PAGE_ADDRESS:
            self.interrupts[int.from_bytes(write.data, "little")] += 1
            return
        start = self._place(write.address, len(write.data))
        if start is None:
            self.stray_writes += 1
        else:
            self.main[start : start + len(write.data)] = write.data

    def _place(self, address: int, length: int) -> int | None:
        start = address - self.main_address
        if start < 0 or start + length > len(self.main) or address & ~4095 in self.faults:
            return None
        return start
