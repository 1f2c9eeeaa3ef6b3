"""The functions that have an instance on this host: made, stopped, resumed and destroyed under the fence. Durable.

Nothing here decides where a function lives: etcd does. Preparatory requests are harmless while nothing is decided;
consequences come from those who have read the decision. An access, or a request, that names an instance's generation as
the function's home proves that the move to it was committed, and so lets a prepared instance run.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import BinaryIO

from hostd.arrival import Arrival
from hostd.deadlines import Deadlines
from hostd.device_state import AFTER_FAULT
from hostd.fence import Fences, order_of
from hostd.function_checks import check_deadline, check_whole, checked_model, is_of_before
from hostd.instance import Instance
from hostd.ledger import Ledger
from hostd.remains import Remains
from hostd.segment import Segment
from hostd.sequencer import Sequencer, SessionOrder
from hostd.slots import Slots
from vfleet import failpoint
from vfleet.address import PAGE_BYTES, location_of
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError, invalid_field, not_found
from vfleet.names import check_name
from vfleet.v1.fabric_service_pb2 import REFUSAL_NOT_SERVING, REFUSAL_STALE_SESSION, Refusal
from vfleet.v1.function_service_pb2 import (
    ChangeStateRequest,
    CreateFunctionRequest,
    DestroyFunctionRequest,
    FunctionInstance,
    ResetFunctionRequest,
)
from vfleet.v1.host_records_pb2 import InstanceRecord, RestSource
from vfleet.v1.transfer_service_pb2 import WatchArrivalRequest
from vfleet.v1.types_pb2 import (
    DECISION_ABORTED,
    DECISION_COMMITTED,
    DEVICE_STATE_PRE_COPY,
    DEVICE_STATE_RESUMING,
    DEVICE_STATE_RUNNING,
    DEVICE_STATE_STOP,
    DEVICE_STATE_STOP_COPY,
    Attempt,
)

_log = logging.getLogger(__name__)


class Functions:
    """All instances of the host.

    `deadlines` are those of all; `arrivals_changed` is set when the rest of one's state is to follow; `remains` are
    what the host has to free of those that are gone.
    """

    def __init__(self, segment: Segment, ledger: Ledger, fences: Fences, clock: Clock) -> None:
        self._segment = segment
        self._ledger = ledger
        self._fences = fences
        self._clock = clock
        self.remains = Remains(clock)
        self._slots = Slots(ledger, self.remains)
        self.listeners: list[Callable[[Instance], None]] = []  # told of each instance that is made
        self.deadlines = Deadlines()
        self.arrivals_changed = asyncio.Event()
        for instance in self._slots.instances():
            instance.on_reset = partial(self._reset, instance)
            if instance.state == DEVICE_STATE_PRE_COPY:
                # The export that made it so has ended with the daemon.
                instance.go_to(DEVICE_STATE_RUNNING)
            if instance.record.is_resetting:
                self._finish_reset(instance)

    def files(self) -> set[str]:
        """Return the names of the mapped files that instances use."""
        return self._slots.files()

    def instances(self) -> list[Instance]:
        """Return all instances, by device and VF index."""
        return self._slots.instances()

    def find(self, function: str, generation: int) -> Instance | None:
        """Return the function's instance of this generation (0: the newest), whatever its state.

        Of two, one is left by an attempt that was aborted; it is the later attempt's that is meant.
        """
        instances = self._slots.instances_of(function)
        named = (instance for instance in instances if generation in (0, instance.about.generation))
        return max(named, key=lambda i: (i.about.generation, order_of(i.about.attempt)), default=None)

    def require(self, function: str, generation: int) -> Instance:
        """Return what `find` does. Raise NOT_FOUND if there is none, WRONG_GENERATION if there are only others."""
        found = self.find(function, generation)
        if found is None:
            other = self.find(function, 0)
            if other is None:
                raise not_found("function", check_name("function", function))
            raise VfleetError(
                Reason.WRONG_GENERATION,
                f"function {function!r} is here at generation {other.about.generation}; the request names {generation}",
                metadata={"function": function, "generation": str(other.about.generation)},
            )
        return found

    def create(self, request: CreateFunctionRequest) -> Instance:
        """Make an instance (CreateFunction in the contract). Raise SLOT_TAKEN, STALE_ATTEMPT or INVALID_FIELD."""
        model = checked_model(request)
        place = self._segment.place(request.device, request.vf_index)
        self._fences.prepare(request.function, request.attempt)
        there = self._slots.find((request.device, request.vf_index))
        if there is not None:
            if there.about.function == request.function and there.about.attempt == request.attempt:
                return there
            raise VfleetError(
                Reason.SLOT_TAKEN,
                f"VF {request.vf_index} of device {request.device!r} is in use by function {there.about.function!r}",
                metadata={"device": request.device, "function": there.about.function},
            )
        failpoint.reach("hostd.create.before")
        attempt = request.attempt
        record = InstanceRecord(
            instance=FunctionInstance(
                function=request.function,
                generation=request.generation,
                attempt=attempt,
                device=request.device,
                vf_index=request.vf_index,
                base=place.base,
                state=DEVICE_STATE_RUNNING if request.fresh else DEVICE_STATE_RESUMING,
                complete=request.fresh,
                migration=request.migration,
                bars=request.bars,
                identity=request.identity,
                model=request.model,
            ),
            resolve_time=0 if request.fresh else self._clock.time() + request.resolve_after_ms / 1000,
            file=f"{request.function}-{attempt.fleet_generation}-{attempt.revision}",
        )
        instance = self._slots.make(record, model)
        if request.fresh:
            # All of a new file is zero.
            instance.image.store(model.reset())
        self._save(instance)
        self._slots.add(instance)
        instance.on_reset = partial(self._reset, instance)
        for listener in self.listeners:
            listener(instance)
        failpoint.reach("hostd.create.after")
        return instance

    def may_end_home(self, request: DestroyFunctionRequest) -> bool:
        """Return whether what a request ends has all of its function's state, and was not stopped by its attempt."""
        instance = self.find(request.function, request.generation) if request.generation else None
        return instance is not None and instance.about.complete and instance.about.stopped_by != request.attempt

    def destroy(self, request: DestroyFunctionRequest, fleet_generation: int = 0) -> None:
        """End an instance by a decision (DestroyFunction in the contract). Raise STALE_ATTEMPT or INVALID_FIELD.

        `fleet_generation` is the present one: what was made before it was raised may be a home that etcd has forgotten.
        """
        if request.decision not in (DECISION_COMMITTED, DECISION_ABORTED):
            raise invalid_field("decision", request.decision, "1 (COMMITTED) or 2 (ABORTED)")
        self._fences.conclude(request.function, request.attempt)
        instance = self.find(request.function, request.generation) if request.generation else None
        if instance is None:
            return
        # A later attempt that was aborted before may have left, or made, another instance of the same generation.
        if request.decision == DECISION_ABORTED and instance.about.attempt != request.attempt:
            return
        if request.decision == DECISION_ABORTED and (instance.has_run or is_of_before(instance, fleet_generation)):
            # Its attempt was, or may have been, committed before etcd was restored from a backup.
            _log.error(
                "function %s may live here by a commit that etcd has forgotten",
                request.function,
                extra={"function": request.function},
            )
            return
        with failpoint.around("hostd.destroy"):
            self.remove(instance)

    def remove(self, instance: Instance) -> None:
        """Reset an instance out of existence: nobody reaches its memory any more, and its slot is free and zero."""
        self._slots.remove(instance)

    def stop(self, request: ChangeStateRequest) -> Instance:
        """Stop a home for its last copy. Raise STALE_ATTEMPT, NOT_FOUND, WRONG_GENERATION or ILLEGAL_STATE.

        What another attempt has stopped is not this one's to stop: it would be this one's to let run again.
        """
        check_deadline(request.resolve_after_ms)
        self._fences.prepare(request.function, request.attempt)
        instance = self.require(request.function, request.generation)
        if instance.state == DEVICE_STATE_STOP_COPY:
            if instance.about.stopped_by != request.attempt:
                raise VfleetError(
                    Reason.ILLEGAL_STATE,
                    f"function {request.function!r} was stopped by another attempt, and is until that has ended",
                    metadata={"function": request.function},
                )
            # The first time the disk may have been full; what is answered is durable.
            self._save(instance)
            return instance
        self.prove(instance)
        check_whole(instance)
        with failpoint.around("hostd.stop"):
            instance.go_to(DEVICE_STATE_STOP_COPY)
            instance.about.stopped_by.CopyFrom(request.attempt)
            instance.record.keeps_rest = instance.is_post_copied
            instance.about.migration = request.migration
            instance.record.resolve_time = self._clock.time() + request.resolve_after_ms / 1000
            self._save(instance)
            # A COMMIT may follow that this host isn't told of; the witness of the fence may be older than a backup.
            self._fences.changes += 1
        return instance

    def resume(self, request: ChangeStateRequest, fleet_generation: int = 0) -> Instance | None:
        """Let a home run again that this attempt had stopped, or copies; else do nothing. A consequence of an abort.

        `fleet_generation` is the present one. Of a stop from before it was raised etcd may have forgotten the commit;
        that is ended by an attempt of the present one and of no migration, which comes from who has asked all hosts. A
        source from which the rest was fetched runs by no one's word: what it has is old.
        """
        self._fences.conclude(request.function, request.attempt)
        instance = self.find(request.function, request.generation)
        if instance is None or not instance.about.HasField("stopped_by"):
            if instance is not None and instance.exported_to == request.attempt and instance.is_serving:
                # If its target is cut off, the export ends only when the connection breaks.
                self.run(instance)
            return instance
        if is_of_before(instance, fleet_generation):
            is_sure = request.attempt.fleet_generation == fleet_generation and not request.migration
            may_run = is_sure and not instance.about.fetched
        else:
            may_run = instance.about.stopped_by == request.attempt
        if may_run:
            with failpoint.around("hostd.resume"):
                self.run(instance)
        return instance

    def reset(self, request: ResetFunctionRequest) -> None:
        """Do a function-level reset. Raise NOT_FOUND, WRONG_GENERATION, or ILLEGAL_STATE while it is stopped."""
        instance = self.require(request.function, request.generation)
        if not instance.is_serving and instance.state != AFTER_FAULT:
            raise VfleetError(
                Reason.ILLEGAL_STATE, f"function {request.function!r} does not run; a reset waits for that"
            )
        self._reset(instance)

    def fail(self, instance: Instance) -> None:
        """Let a running instance take a device fault."""
        instance.fail()
        self._save(instance)

    def run(self, instance: Instance) -> None:
        """Let an instance run: it is the function's home, by etcd's word."""
        instance.go_to(DEVICE_STATE_RUNNING)
        instance.throttle = None
        instance.about.ClearField("stopped_by")
        instance.record.keeps_rest = False
        instance.about.migration = ""
        instance.record.resolve_time = 0
        self._save(instance)

    def prove(self, instance: Instance) -> None:
        """Take it that etcd names this instance as home, because somebody who has read so said so."""
        if instance.state == DEVICE_STATE_STOP and instance.about.complete:
            with failpoint.around("hostd.prove"), self._ledger.together():
                self._fences.end(instance.about.function, instance.about.attempt)
                self.run(instance)

    def complete_import(
        self, instance: Instance, rest: RestSource | None = None, early: Iterable[tuple[int, bytes]] = ()
    ) -> None:
        """Note that an instance has all its state, or that a `rest` follows; it waits for the proof that it is home.

        `early` are the pages of the rest, by their offsets, that have come already.
        """
        with failpoint.around("hostd.complete"):
            instance.go_to(DEVICE_STATE_STOP)
            instance.about.complete = True
            if rest is not None:
                instance.about.arriving = True
                instance.record.rest_source.CopyFrom(rest)
                instance.arrival = Arrival(instance.image, instance.model.local_memory, is_new=True)
                for offset, data in early:
                    instance.arrival.take(offset // PAGE_BYTES, data)
            self._save(instance)
        if rest is not None:
            self.arrivals_changed.set()

    def keep_rest(self, instance: Instance) -> None:
        """Note that a source keeps what its target will fetch after COMMIT: the end of its attempt alone scrubs it."""
        instance.is_post_copied = True
        if instance.about.HasField("stopped_by") and not instance.record.keeps_rest:
            instance.record.keeps_rest = True
            self._save(instance)

    def hand_out_rest(self, instance: Instance) -> None:
        """Take it that the migration from here was committed, since only a target that runs fetches the rest."""
        if not instance.about.fetched:
            self._fences.end(instance.about.function, instance.about.stopped_by)
            instance.about.fetched = True
            self._save(instance)

    def complete_arrival(self, instance: Instance) -> None:
        """Note that all of an instance's state is here: its source is needed no more."""
        with failpoint.around("hostd.arrived"):
            instance.about.arriving = False
            instance.record.ClearField("rest_source")
            self._save(instance)
        if instance.arrival is not None:
            instance.arrival.end()
        instance.arrival = None

    def conclude(self, request: WatchArrivalRequest) -> Instance:
        """Take it that a migration to here was committed. Raise STALE_ATTEMPT, NOT_FOUND or WRONG_GENERATION."""
        self._fences.conclude(request.function, request.attempt)
        instance = self.require(request.function, request.generation)
        self.prove(instance)
        return instance

    def postpone(self, instance: Instance, resolve_time: float) -> None:
        """Give an instance another deadline, in seconds since 1970."""
        instance.record.resolve_time = resolve_time
        self._save(instance)

    def admit(
        self, driver: str, function: str, generation: int, session: SessionOrder, address: int
    ) -> tuple[Instance, Sequencer] | Refusal.ValueType:
        """Find the home that an access goes to, walking the segment's tree by its address, or say why it is refused.

        Of a driver that the function doesn't know, accesses are those of before it was forgotten.
        """
        instance = self.answering(function, generation, address)
        if instance is None:
            return REFUSAL_NOT_SERVING
        sequencer = instance.image.known_sequencer(driver)
        if sequencer is None or session < sequencer.session:
            return REFUSAL_STALE_SESSION
        if session > sequencer.session:
            sequencer.set_session(session)
        return instance, sequencer

    def answering(self, function: str, generation: int, address: int) -> Instance | None:
        """Return the home that a fabric address leads to, if it is this function's, of this generation, and answers."""
        route = self._segment.route(location_of(address).routing_id)
        instance = self._slots.find((route.device, route.vf_index)) if route is not None else None
        if instance is None or (instance.about.function, instance.about.generation) != (function, generation):
            return None
        self.prove(instance)
        return instance if instance.answers else None

    def fence_for_export(self, function: str, generation: int, attempt: Attempt) -> Instance:
        """Return a home whose state may be copied out for an attempt. Raise as `stop` does."""
        self._fences.prepare(function, attempt)
        instance = self.require(function, generation)
        self.prove(instance)
        check_whole(instance)
        return instance

    def fence_for_import(self, function: str, generation: int, attempt: Attempt) -> Instance:
        """Return the instance that an attempt made. Raise STALE_ATTEMPT, NOT_FOUND or WRONG_GENERATION."""
        self._fences.prepare(function, attempt)
        instance = self.require(function, generation)
        if instance.about.attempt != attempt:
            raise VfleetError(
                Reason.STALE_ATTEMPT,
                f"the instance of function {function!r} was made by another attempt",
                metadata={"function": function},
            )
        return instance

    def open_image(self, instance: Instance) -> BinaryIO:
        """Open the file of an instance's image, for a copy."""
        return self._slots.open_image(instance)

    def with_deadline(self) -> Iterator[Instance]:
        """Yield the instances that wait for a decision, each until its `record.resolve_time`."""
        return (instance for instance in self.instances() if instance.record.resolve_time)

    def close(self) -> None:
        """Unmap all images."""
        self._slots.close()
        self.remains.close()

    def _reset(self, instance: Instance) -> None:
        # A daemon that is killed in the middle does it again when it comes back.
        instance.record.is_resetting = True
        self._save(instance)
        self._finish_reset(instance)

    def _finish_reset(self, instance: Instance) -> None:
        instance.reset()
        instance.record.is_resetting = False
        self._save(instance)

    def _save(self, instance: Instance) -> None:
        self._slots.save(instance)
        self.deadlines.note(instance.record.resolve_time)
