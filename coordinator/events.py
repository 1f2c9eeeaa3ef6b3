"""What changes in the fleet, told in words: a coordinator's memory of the latest changes, for whoever watches.

It is fed by the inventory's watch, so it costs no request to etcd and no write. Nothing depends on it: it is gone with
its process, and where changes may be missing it says so.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple, TypeVar

from coordinator.snapshot import Snapshot, Stored
from vfleet.clock import Clock
from vfleet.etcd import keys
from vfleet.etcd.store import Changes, Event
from vfleet.history import blackout_s
from vfleet.v1.fleet_service_pb2 import EventKind, FleetEvent
from vfleet.v1.migration_service_pb2 import QueuedMigration
from vfleet.v1.records_pb2 import Coordinator, Cordon, Function, FunctionStatus, Host, Migration, Phase, Step

MAX_EVENTS = 1000  # changes, of which not each is an event

RecordT = TypeVar("RecordT")


Tell = Callable[[], Iterator[str]]


class _Change(NamedTuple):
    """A change, which `tell` puts into words: none, if it is no event."""

    time_s: float
    kind: EventKind.ValueType
    name: str
    tell: Tell
    revision: int


class EventLog:
    """The latest changes. A position is how many there were before.

    A change is put into words when it is read: most are never read.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._changes: deque[_Change] = deque()
        self._known_from = 0
        self.end = 0

    def listed(self, before: int, revision: int) -> None:
        """Take note that the fleet was read as a whole, after it was known up to revision `before` (0: never)."""
        if before:
            what = f"read as a whole: what changed since revision {before} is not told"
            self._add(EventKind.EVENT_KIND_FLEET, "", lambda: iter((what,)), revision)
        self._known_from = revision

    def follow(self, snapshot: Snapshot, changes: Changes) -> None:
        """Move a snapshot forward by changes, and take note of them."""
        for event in changes.events:
            topic = _TOPICS.get(event.key[: event.key.find("/", len(keys.PREFIX)) + 1])
            if topic is None:
                snapshot.take(event)
            else:
                name = event.key.removeprefix(topic.prefix)
                self._add(topic.kind, name, topic.take(snapshot, name, event), event.mod_revision)
        snapshot.apply(Changes(changes.revision, ()))

    def start(self, after_revision: int) -> int:
        """Return the position of the first change after a revision, or, for 0, of the first that is remembered."""
        if after_revision == 0:
            return self._first
        if after_revision < self._known_from:
            return self._first - 1
        found = (self._first + i for i, change in enumerate(self._changes) if change.revision > after_revision)
        return next(found, self.end)

    def read(self, position: int) -> list[FleetEvent]:
        """Return the events from a position on. If some of them are forgotten, the first says so."""
        events: list[FleetEvent] = []
        if position < self._first:
            what = f"what changed before revision {self._known_from} is not known here"
            missing = (self._clock.time(), EventKind.EVENT_KIND_FLEET, "", lambda: iter((what,)), self._known_from)
            events += _events(_Change(*missing))
        for change in islice(self._changes, max(0, position - self._first), None):
            events += _events(change)
        return events

    @property
    def _first(self) -> int:
        return self.end - len(self._changes)

    def _add(self, kind: EventKind.ValueType, name: str, tell: Tell, revision: int) -> None:
        if len(self._changes) == MAX_EVENTS:
            self._known_from = self._changes.popleft().revision
        self._changes.append(_Change(self._clock.time(), kind, name, tell, revision))
        self.end += 1


def _events(change: _Change) -> Iterator[FleetEvent]:
    for what in change.tell():
        event = FleetEvent(kind=change.kind, name=change.name, what=what, revision=change.revision)
        event.time.FromNanoseconds(round(change.time_s * 1e9))
        yield event


@dataclass(frozen=True, slots=True)
class _Topic:
    """Keys whose changes are told. `take` lets a snapshot take a change of one over, and returns what tells of it."""

    prefix: str
    kind: EventKind.ValueType
    take: Callable[[Snapshot, str, Event], Tell]


def _topic(
    prefix: str,
    kind: EventKind.ValueType,
    table: Callable[[Snapshot], Mapping[str, Stored[RecordT]]],
    words: Callable[[RecordT | None, RecordT | None], Iterator[str]],
) -> _Topic:
    def take(snapshot: Snapshot, name: str, event: Event) -> Tell:
        records = table(snapshot)
        before = records.get(name)
        snapshot.take(event)
        after = records.get(name)
        return partial(words, before.record if before else None, after.record if after else None)

    return _Topic(prefix, kind, take)


def _function(before: Function | None, after: Function | None) -> Iterator[str]:
    if after is None:
        yield "deleted"
        return
    if before is None:
        yield f"{_status(after)} at {_home(after)}"
        return
    if before.status != after.status:
        yield _status(after)
    if _home(before) != _home(after):
        yield f"moved from {_home(before)} to {_home(after)}, generation {after.generation}"
    for driver in sorted(set(after.drivers) - set(before.drivers)):
        yield f"driver {driver} attached"
    for driver in sorted(set(before.drivers) - set(after.drivers)):
        yield f"driver {driver} detached"


def _migration(before: Migration | None, after: Migration | None) -> Iterator[str]:
    if after is None:
        yield "its record is no longer kept"
        return
    if before is not None and before.phase == after.phase:
        return
    what = Phase.Name(after.phase).removeprefix("PHASE_").lower()
    if after.phase == Phase.PHASE_PREPARING:
        what += ": " + ", ".join(
            f"{move.function} from {move.source.device} to {move.target.device}" for move in after.moves
        )
    elif after.phase == Phase.PHASE_ABORTING:
        at = f" at {Step.Name(after.abort_step).removeprefix('STEP_').lower()}" if after.abort_step else ""
        what += f"{at}: {after.abort_reason}"
    elif after.phase == Phase.PHASE_ABORTED and not after.HasField("begin_time"):
        what += f": {after.abort_reason}"  # it was queued, and never began
    elif after.phase in (Phase.PHASE_DONE, Phase.PHASE_ABORTED):
        took_ms = (after.finish_time.ToNanoseconds() - after.begin_time.ToNanoseconds()) / 1e6
        what += f" after {took_ms:.1f} ms"
        blackout = blackout_s(after)
        if blackout is not None:
            what += f", blackout {f'at most {blackout * 1000:.1f} ms' if blackout else 'none'}"
    yield what


def _queued(before: QueuedMigration | None, after: QueuedMigration | None) -> Iterator[str]:
    # What becomes of it is told by its record.
    if before is None and after is not None:
        yield f"queued: {', '.join(move.function for move in after.request.moves)}"


def _host(before: Host | None, after: Host | None) -> Iterator[str]:
    if after is None:
        yield "forgotten"
    elif before is None:
        yield f"new, segment {after.segment:#06x}, at {after.address}"
    else:
        if before.incarnation != after.incarnation:
            yield f"started anew, incarnation {after.incarnation}"
        if before.address != after.address:
            yield f"at {after.address}"


def _registration(before: str | None, after: str | None) -> Iterator[str]:
    if before is None or after is None:
        yield "not registered any more" if after is None else "registered"


def _cordon(_: Cordon | None, after: Cordon | None) -> Iterator[str]:
    if after is None:
        yield "uncordoned"
    else:
        yield f"cordoned: {after.reason}" if after.reason else "cordoned"


def _coordinator(_: Coordinator | None, after: Coordinator | None) -> Iterator[str]:
    yield "gone" if after is None else f"serves at {after.address}"


def _generation(_: str | None, after: str | None) -> Iterator[str]:
    yield f"its generation is {after or 1}"


def _status(function: Function) -> str:
    return FunctionStatus.Name(function.status).removeprefix("FUNCTION_STATUS_").lower()


def _home(function: Function) -> str:
    return f"{function.device}, VF {function.vf_index}"


# By the first part of a key.
_TOPICS = {
    topic.prefix.removesuffix("generation"): topic
    for topic in (
        _topic(keys.FUNCTIONS, EventKind.EVENT_KIND_FUNCTION, lambda s: s.functions, _function),
        _topic(keys.MIGRATIONS, EventKind.EVENT_KIND_MIGRATION, lambda s: s.migrations, _migration),
        _topic(keys.QUEUE, EventKind.EVENT_KIND_MIGRATION, lambda s: s.queue, _queued),
        _topic(keys.HOSTS, EventKind.EVENT_KIND_HOST, lambda s: s.hosts, _host),
        _topic(keys.REGISTRATIONS, EventKind.EVENT_KIND_HOST, lambda s: s.registrations, _registration),
        _topic(keys.CORDONS, EventKind.EVENT_KIND_CORDON, lambda s: s.cordons, _cordon),
        _topic(keys.COORDINATORS, EventKind.EVENT_KIND_COORDINATOR, lambda s: s.coordinators, _coordinator),
        _topic(keys.FLEET_GENERATION, EventKind.EVENT_KIND_FLEET, lambda s: s.fleet_generations, _generation),
    )
}
