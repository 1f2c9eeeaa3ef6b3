"""The engine: it runs the device models that are bus masters, one task an instance.

    work --> its DMA reads --> the same work still? --> finish --> step, durable --> what it sends, until acknowledged

A step is one call in the event loop, so a function that is stopped has done all of it or nothing; what was being read
then is thrown away, and the new home reads it again. What a step sends is durable with what it stores (engine_part.py).
The engine takes no work while that has no room for the largest step; without room for frames, none that sends one.
"""

import asyncio
import contextlib
import enum
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hostd.dma_sender import DmaReach, DmaSender, NotNowError
from hostd.engine_part import EnginePart
from hostd.functions import Functions
from hostd.instance import Instance
from hostd.memory import NotAtHandError
from hostd.models.base import MAX_DMA_BYTES, MAX_FRAME_BYTES, BusMaster, Frame, FrameSender, Step, Store, Work
from vfleet import log
from vfleet.background import in_background
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.v1.fabric_service_pb2 import DmaRead
from vfleet.v1.function_service_pb2 import (
    FAULT_KIND_DEVICE,
    FAULT_KIND_DMA_DELAY,
    FAULT_KIND_DMA_READ,
    FAULT_KIND_DMA_WRITE,
    FAULT_KIND_MODEL,
    InjectFaultRequest,
)

MAX_FAULTS = 1 << 16
MAX_DELAY_MS = 60_000

_log = logging.getLogger(__name__)


class Delivery(enum.Enum):
    """What became of a frame that was offered to a function."""

    TAKEN = enum.auto()
    REPEATED = enum.auto()
    NO_ROOM = enum.auto()
    NOT_RUNNING = enum.auto()


@dataclass(slots=True)
class Faults:
    """What was injected and has not gone wrong yet."""

    reads: int = 0
    writes: int = 0
    delays: int = 0
    delay_s: float = 0.0


class FrameOutbox:
    """The frames that a function has sent, until whoever switches them says that they are where they belong.

    Frames have the function's own sequence, from 1. Those not acknowledged move with the function. `on_frames` is
    called when there are more, and when the function begins to run: then those that are left have to be sent again.
    """

    def __init__(self, instance: Instance, part: EnginePart) -> None:
        self.on_frames: Callable[[], None] = lambda: None
        self._instance = instance
        self._frames = part.frames

    def peek(self, after: int = 0) -> list[tuple[int, bytes]]:
        """Return the (sequence, frame) of those not acknowledged, the oldest first, of a later sequence than `after`.

        Nothing while the function doesn't run.
        """
        if not self._instance.is_serving or self._instance.is_closed:
            return []
        entries = self._frames.entries(self._frames.head)
        return [(entry.sequence, entry.data) for entry in entries if entry.sequence > after]

    def acknowledge(self, sequence: int) -> None:
        """Let go of all frames up to a sequence. Does nothing while the function doesn't run."""
        if self._instance.is_serving and not self._instance.is_closed:
            self._frames.acknowledge(sequence)
            self._instance.kicked.set()


class Engine:
    """The engine of one instance."""

    def __init__(
        self, instance: Instance, model: BusMaster, part: EnginePart, functions: Functions, reach: DmaReach
    ) -> None:
        self.instance = instance
        self.frames = FrameOutbox(instance, part)
        self.faults = Faults()
        self._model = model
        self._part = part
        self._functions = functions
        self._clock = reach.clock
        self._sender = DmaSender(instance, part, reach, instance.kicked.set)
        instance.on_close = self._sender.close

    async def run(self) -> None:
        """Run the device until the instance is removed. It rests while the function doesn't run."""
        instance = self.instance
        log.bind(function=instance.about.function)
        told: asyncio.Event | None = None
        try:
            while not instance.is_closed:
                instance.kicked.clear()
                if instance.is_serving:
                    # It may have been stopped, and run again, since: during a read, say.
                    if instance.changed is not told:
                        told = instance.changed
                        self.frames.on_frames()
                    if await self._advance():
                        # Accesses, and other functions, have their turn between two steps.
                        await self._clock.sleep(0)
                        instance.kicked.set()
                await instance.kicked.wait()
        finally:
            self._sender.close()
            # Whoever switches the frames sees that there will be no more.
            self.frames.on_frames()

    def deliver(self, frame: bytes, sender: int, sequence: int) -> Delivery:
        """Offer a frame, which its sender's function, by its identity, has sent with a sequence of its own.

        It is taken once, however often it is offered: the sequence is durable with what the frame does.
        """
        if not self.instance.is_serving or self.instance.is_closed:
            return Delivery.NOT_RUNNING
        part = self._part
        if sequence <= part.last_from(sender):
            return Delivery.REPEATED
        noted = part.took_from(sender, sequence)
        if noted is None or not part.writes.has_room:
            return Delivery.NO_ROOM
        try:
            step = self._model.receive(self.instance.image.memory, frame)
            if step is None or not self._has_room_for(step):
                return Delivery.NO_ROOM
            self._apply(step, more=noted)
        except Exception as error:  # noqa: BLE001  # a defect of a model is a fault of its device, not of the host
            self._fail(error)
            return Delivery.NOT_RUNNING
        self.instance.kicked.set()
        return Delivery.TAKEN

    def forget_sender(self, sender: int) -> None:
        """Forget what was taken from a function that is no more."""
        self._part.forget_sender(sender)

    def inject(self, request: InjectFaultRequest) -> None:
        """Let something go wrong (InjectFault in the contract). Raise INVALID_FIELD, or ILLEGAL_STATE while stopped."""
        if not self.instance.is_serving:
            raise VfleetError(
                Reason.ILLEGAL_STATE, f"function {request.function!r} does not run; a fault waits for that"
            )
        if request.kind != FAULT_KIND_DEVICE and not 1 <= request.count <= MAX_FAULTS:
            raise invalid_field("count", request.count, f"1 to {MAX_FAULTS}")
        if request.kind == FAULT_KIND_DEVICE:
            self._functions.fail(self.instance)
        elif request.kind == FAULT_KIND_DMA_READ:
            self.faults.reads += request.count
        elif request.kind == FAULT_KIND_DMA_WRITE:
            self.faults.writes += request.count
        elif request.kind == FAULT_KIND_DMA_DELAY:
            if not 1 <= request.delay_ms <= MAX_DELAY_MS:
                raise invalid_field("delay_ms", request.delay_ms, f"1 to {MAX_DELAY_MS}")
            self.faults.delays, self.faults.delay_s = request.count, request.delay_ms / 1000
        elif request.kind == FAULT_KIND_MODEL:
            self._inject_into_model(request)
        else:
            raise invalid_field("kind", request.kind, f"1 ({FAULT_KIND_DMA_READ}) to {FAULT_KIND_MODEL}")

    def _has_room_for(self, step: Step) -> bool:
        part = self._part
        if not part.frames.has_room and any(isinstance(send, Frame) for send in step.sends):
            return False
        return part.writes.has_room

    def _work(self) -> Work | None:
        """Return what is to be done next, of what there is room for."""
        part, model, memory = self._part, self._model, self.instance.image.memory
        if not part.writes.has_room:
            return None
        if part.frames.has_room:
            return model.work(memory)
        return model.work_without_frames(memory) if isinstance(model, FrameSender) else None

    async def _advance(self) -> bool:
        """Do the next piece of work. Return False if there is none, or it has to wait for something."""
        try:
            self._sender.pump()
            work = self._work()
            if work is None:
                return False
            if self.instance.is_gated and self.instance.blocks(work.touches):
                await self.instance.passed(work.touches)
                return True
            data, is_same = await self._read(work) if work.reads else ([], True)
            if is_same:
                self._apply(self._model.finish(self.instance.image.memory, work, data), faults=int(data is None))
        except NotNowError:
            if not self.instance.is_closed:
                self._sender.wait()
            return False
        except Exception as error:  # noqa: BLE001  # a defect of a model is a fault of its device, not of the host
            self._fail(error)
            return False
        return True

    async def _read(self, work: Work) -> tuple[Sequence[bytes] | None, bool]:
        """Return what the work's reads return, and whether the work is still the same then. Raise NotNowError."""
        reads = self._translated(work)
        has_to_wait = self.faults.delays > 0
        if reads is None:
            return None, True
        if self._sender.is_local and not has_to_wait:
            with contextlib.suppress(NotAtHandError):
                return self._sender.read_local(reads), True
        attachment, resets = self._part.attachment, self.instance.resets
        if has_to_wait:
            self.faults.delays -= 1
            await self._clock.sleep(self.faults.delay_s)
            if self.instance.is_closed:
                return None, False
        sender = self._sender
        data = await (sender.fetch_local(reads) if sender.is_local else sender.read_remote(reads))
        instance = self.instance
        if instance.is_closed or not instance.is_serving or self._part.attachment != attachment:
            return None, False
        # After a reset the same work may come again, with other commands in the same place.
        return data, instance.resets == resets and self._work() == work

    def _translated(self, work: Work) -> list[DmaRead] | None:
        if self.faults.reads:
            self.faults.reads -= 1
            return None
        reads: list[DmaRead] = []
        for read in work.reads:
            address = self._part.translate(read.address, read.length)
            if address is None:
                return None
            reads.append(DmaRead(address=address, length_bytes=read.length))
        return reads

    def _apply(self, step: Step, *, more: Sequence[Store] = (), faults: int = 0) -> None:
        """Make a step durable, with `more` stores and DMA `faults`, and let what it sends go out."""
        part = self._part
        writes: list[tuple[int, bytes]] = []
        frames: list[tuple[int, bytes]] = []
        for send in step.sends:
            limit = MAX_FRAME_BYTES if isinstance(send, Frame) else MAX_DMA_BYTES
            if not 1 <= len(send.data) <= limit:
                raise VfleetError(Reason.INTERNAL, f"the device sends {len(send.data)} bytes; expected 1 to {limit}")
            if isinstance(send, Frame):
                frames.append((0, send.data))
                continue
            address = part.translate(send.address, len(send.data)) if not self.faults.writes else None
            if address is not None:
                writes.append((address, send.data))
            else:
                faults += 1
                self.faults.writes = max(self.faults.writes - 1, 0)
        sent = (*part.writes.put(writes), *part.frames.put(frames))
        self.instance.image.step([*step.stores, *sent, *more, *part.fault(faults)])
        if writes:
            self._sender.pump()
        if frames:
            self.frames.on_frames()

    def _inject_into_model(self, request: InjectFaultRequest) -> None:
        inject = getattr(self._model, "inject", None)
        stores = inject(self.instance.image.memory, request.name, request.count) if inject is not None else None
        if stores is None:
            raise invalid_field("name", request.name, f"a fault that the model {self._model.name!r} knows")
        self.instance.image.step(stores)
        self.instance.kicked.set()

    def _fail(self, error: Exception) -> None:
        _log.error("the device of function %s fails", self.instance.about.function, exc_info=error)
        if self.instance.is_serving and not self.instance.is_closed:
            self._functions.fail(self.instance)


class Engines:
    """The engines of all bus masters of a host."""

    def __init__(self, functions: Functions, reach: DmaReach, *, allows_faults: bool) -> None:
        self._functions = functions
        self._reach = reach
        self._allows_faults = allows_faults
        self._engines: dict[int, Engine] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.listeners: list[Callable[[Engine], None]] = []  # told of each engine that is made
        for instance in functions.instances():
            self._start(instance)
        functions.listeners.append(self._start)

    def all(self) -> list[Engine]:
        """Return the engines of all instances that are here."""
        return [engine for engine in self._engines.values() if not engine.instance.is_closed]

    def of(self, instance: Instance) -> Engine | None:
        """Return an instance's engine, or None if it masters no bus."""
        return self._engines.get(id(instance))

    def inject(self, request: InjectFaultRequest) -> None:
        """Let a function fail. Raise NOT_FOUND, WRONG_GENERATION, INVALID_FIELD, or ILLEGAL_STATE if it can't."""
        if not self._allows_faults:
            raise VfleetError(Reason.ILLEGAL_STATE, "faults are injected only if hostd was started with --allow-faults")
        instance = self._functions.require(request.function, request.generation)
        engine = self.of(instance)
        if engine is None:
            raise VfleetError(
                Reason.ILLEGAL_STATE,
                f"function {request.function!r} is a {instance.about.model!r}, which masters no bus: it has no faults",
                metadata={"function": request.function},
            )
        engine.inject(request)

    async def close(self) -> None:
        """End the tasks, as a kill would."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, instance: Instance) -> None:
        model = instance.model
        if instance.master is None or not isinstance(model, BusMaster):
            return
        engine = Engine(instance, model, instance.master, self._functions, self._reach)
        self._engines[id(instance)] = engine
        task = in_background(engine.run(), name=f"engine of {instance.about.function}")
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            del self._engines[id(instance)]

        task.add_done_callback(ended)
        for listener in self.listeners:
            listener(engine)
