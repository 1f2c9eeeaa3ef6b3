"""One instance of a function: its place, its state after VFIO, its device model and its image.

An instance serves accesses of its own generation only, and only while it runs. Whether it may run is decided in etcd;
this room knows nothing of that.
"""

import asyncio
import mmap
from collections.abc import Callable, Iterable, Sequence

from hostd.arrival import Arrival, Range
from hostd.device_state import AFTER_FAULT, AFTER_RESET, next_state, path, serves
from hostd.engine_part import EnginePart
from hostd.grant import Grant
from hostd.image import FunctionImage
from hostd.models.base import DeviceModel, Section
from hostd.rounds import Throttle
from hostd.sequencer import Result, Sequencer
from vfleet.address import window_offset
from vfleet.v1.access_pb2 import (
    ACCESS_KIND_FENCE,
    ACCESS_KIND_READ,
    ACCESS_KIND_RESET,
    ACCESS_STATUS_FORGOTTEN,
    ACCESS_STATUS_OK,
    ACCESS_STATUS_UNSUPPORTED_REQUEST,
    AccessKind,
)
from vfleet.v1.function_service_pb2 import FunctionInstance
from vfleet.v1.host_records_pb2 import InstanceRecord
from vfleet.v1.types_pb2 import Attempt, DeviceState


class SequenceGapError(Exception):
    """An access came ahead of its turn; `expected` is the sequence that the function will take next."""

    def __init__(self, expected: int) -> None:
        super().__init__(f"expected sequence {expected}")
        self.expected = expected


class Instance:
    """A function in one slot. `record` is what the ledger knows of it; `changed` is set at every change of state.

    Of a bus master, `master` is the engine's part of the image, and `kicked` is set whenever there may be work.
    `on_close` is called when the instance goes: whoever waits for another host on its behalf has to let go. `on_reset`
    is a driver's reset, from whoever can do it so that a kill in the middle lets it be done again.
    """

    def __init__(self, record: InstanceRecord, model: DeviceModel, image: FunctionImage) -> None:
        self.record = record
        self.model = model
        self.image = image
        self.changed = asyncio.Event()
        self.kicked = asyncio.Event()
        self.on_close: Callable[[], None] = lambda: None
        self.on_reset: Callable[[], None] = self.reset
        self.master = EnginePart(image, image.engine_start) if image.engine_start is not None else None
        self._plain_start, self._plain_end = model.plain_memory.start, model.plain_memory.stop
        self.resets = 0
        self.unsupported_requests = 0
        self.frames_dropped = 0
        self.is_blank = False  # all of its image is zero, since no import has begun yet
        self.is_importing = False
        self.is_post_copied = False
        self.exported_to: Attempt | None = None  # in PRE_COPY
        self.is_closed = False
        # What makes accesses and work wait: slowed down by a copy, or local memory that is still at the source.
        self.throttle: Throttle | None = None
        self.arrival = Arrival(image, model.local_memory) if record.HasField("rest_source") else None

    @property
    def about(self) -> FunctionInstance:
        """The instance as the contract shows it."""
        return self.record.instance

    @property
    def state(self) -> DeviceState.ValueType:
        """Where it is in VFIO's state machine."""
        return self.record.instance.state

    @property
    def is_serving(self) -> bool:
        """Whether it serves accesses of its generation."""
        return serves(self.record.instance.state)

    @property
    def answers(self) -> bool:
        """Whether it answers accesses of its generation: also in ERROR, as a device does that is broken."""
        return self.is_serving or self.state == AFTER_FAULT

    @property
    def has_run(self) -> bool:
        """Whether it is, or was, the function's home at its generation, by the proof of an access or by etcd's word."""
        return self.about.state not in (DeviceState.DEVICE_STATE_RESUMING, DeviceState.DEVICE_STATE_STOP)

    @property
    def sections(self) -> Sequence[Section]:
        """What the image consists of: the model's sections and, of a bus master, the engine's."""
        return (*self.model.sections, self.master.section) if self.master is not None else self.model.sections

    def go_to(self, wanted: DeviceState.ValueType) -> None:
        """Walk VFIO's arcs to a state. Raise ILLEGAL_STATE if there is no way."""
        state = self.state
        for step in path(state, wanted):
            state = next_state(state, step)
        self._enter(state)

    def fail(self) -> None:
        """Take a device fault: until a reset, by a driver or an operator, accesses have no effect and read all ones."""
        self._enter(AFTER_FAULT)

    @property
    def is_gated(self) -> bool:
        """Whether anything can make accesses or work wait."""
        return self.throttle is not None or self.arrival is not None

    def blocks(self, ranges: Iterable[Range]) -> bool:
        """Return whether what touches these bytes has to wait (see `passed`). What is missing of them is asked for."""
        if self.throttle is not None and self.throttle.blocks():
            return True
        return self.arrival is not None and self.arrival.ask(ranges)

    async def passed(self, ranges: Iterable[Range]) -> None:
        """Wait until nothing blocks what touches these bytes; or the instance is closed, or may not run any more."""
        if self.throttle is not None:
            await self.throttle.opened()
        if self.arrival is not None:
            await self.arrival.arrived(ranges)

    def reset(self) -> None:
        """Do what a function-level reset does: zero the memory, but for a medium, and set the registers.

        Drivers' sequences go on, and so do those of a bus master; what it had sent, and nobody has taken, is cancelled.
        """
        size = self.master.section.start if self.master is not None else len(self.image.memory)
        kept = self.model.local_memory if self.model.keeps_local_memory else range(0)
        for zeroed in (range(kept.start), range(kept.stop, size)):
            for start in zeroed[:: 1 << 20]:
                self.image.store([(start, bytes(min(1 << 20, zeroed.stop - start)))])
        if self.master is not None:
            self.master.writes.cancel()
        self.image.store(self.model.reset())
        self.resets += 1
        if self.arrival is not None and not kept:
            # What comes now is of before the reset.
            self.arrival.need_nothing()
        if self.state == AFTER_FAULT:
            self._enter(AFTER_RESET)
        self.kicked.set()

    def access(
        self, sequencer: Sequencer, sequence: int, kind: AccessKind.ValueType, address: int, length: int, data: bytes
    ) -> Result:
        """Carry out one access once: a repeated one gets its first answer. The instance answers.

        Raise SequenceGapError if an earlier sequence is missing.
        """
        following = sequencer.last + 1
        if sequence < following:
            return sequencer.answer(sequence) or (ACCESS_STATUS_FORGOTTEN, b"")
        if sequence > following:
            raise SequenceGapError(following)
        if kind in (ACCESS_KIND_RESET, ACCESS_KIND_FENCE):
            return self._fence(sequencer, sequence, kind)
        if not self.is_serving:
            self.unsupported_requests += 1
            answer = b"\xff" * length if kind == ACCESS_KIND_READ else b""
            self.image.apply(sequencer, sequence, ACCESS_STATUS_UNSUPPORTED_REQUEST, answer)
            return ACCESS_STATUS_UNSUPPORTED_REQUEST, answer
        offset, memory = window_offset(address), self.image.memory
        if self._plain_start <= offset < self._plain_end:
            if kind == ACCESS_KIND_READ:
                data = bytes(memory[offset : offset + length])
                sequencer.advance(sequence, ACCESS_STATUS_OK, data)
                return ACCESS_STATUS_OK, data
            self.image.write_plain(sequencer, sequence, offset, data)
            return ACCESS_STATUS_OK, b""
        if kind == ACCESS_KIND_READ:
            read = self.model.read(memory, offset, length)
            answer, stores = read if read is not None else (b"\xff" * length, None)
        else:
            answer, stores = b"", self.model.write(memory, offset, data)
        status = ACCESS_STATUS_OK
        if stores is None:
            self.unsupported_requests += 1
            stores, status = (), ACCESS_STATUS_UNSUPPORTED_REQUEST
        self.image.apply(sequencer, sequence, status, answer, stores)
        if stores:
            self.kicked.set()
        return status, answer

    def _fence(self, sequencer: Sequencer, sequence: int, kind: AccessKind.ValueType) -> Result:
        """Answer with the last DMA write's sequence. After a reset none of up to then takes effect any more."""
        # What a broken device has not sent never arrives: nobody may wait for it.
        awaited = self.master if self.is_serving or kind == ACCESS_KIND_RESET else None
        sent = (awaited.writes.last if awaited is not None else 0).to_bytes(8, "little")
        if kind == ACCESS_KIND_RESET:
            self.on_reset()
        self.image.apply(sequencer, sequence, ACCESS_STATUS_OK, sent)
        return ACCESS_STATUS_OK, sent

    def grant(self, sequencer: Sequencer, base: int, span: int) -> Grant | None:
        """Give a driver that sees the window at `base` leave to access its plain memory directly, or don't."""
        if not self.is_serving or self.is_gated:
            return None
        return self.image.grant(sequencer, base, span, self.model.plain_memory)

    def shown(self) -> FunctionInstance:
        """Return a copy of `about` with the last sequence of each driver."""
        shown = FunctionInstance()
        shown.CopyFrom(self.about)
        for sequencer in self.image.sequencers():
            shown.last_sequences[sequencer.driver] = sequencer.last
        if self.master is not None:
            shown.dma_faults = self.master.faults
            shown.frames_dropped = self.frames_dropped
        return shown

    def close(self) -> None:
        """Unmap the image; who waits for a change of state is told."""
        self.release().close()

    def release(self) -> mmap.mmap:
        """Let go of the image's map and return it; who waits for a change of state is told."""
        self.is_closed = True
        self.changed.set()
        self.kicked.set()
        if self.arrival is not None:
            self.arrival.end()
        self.on_close()
        return self.image.release()

    def _enter(self, state: DeviceState.ValueType) -> None:
        self.record.instance.state = state
        self.image.revoke()
        self.changed.set()
        self.changed = asyncio.Event()
        self.kicked.set()
