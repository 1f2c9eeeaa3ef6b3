"""What changes in the fleet, told in words: a coordinator's memory of the latest changes, for whoever watches.

It is fed by the inventory's watch, so it costs no request to etcd and no write. Nothing depends on it: it is gone with
its process, and where changes may be missing it says so.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from coordinator.snapshot import Snapshot, Stored
from vfleet.clock import Clock
from vfleet.etcd import keys
from vfleet.etcd.store import Changes
from vfleet.history import blackout_s
from vfleet.v1.fleet_service_pb2 import EventKind, FleetEvent
from vfleet.v1.records_pb2 import Coordinator, Cordon, Function, FunctionStatus, Host, Migration, Phase, Step

MAX_EVENTS = 1000

RecordT = TypeVar("RecordT")


class EventLog:
    """The latest events. A position is how many there were before."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._events: deque[FleetEvent] = deque()
        self._known_from = 0
        self.end = 0

    def listed(self, before: int, revision: int) -> None:
        """Take note that the fleet was read as a whole, after it was known up to revision `before` (0: never)."""
        if before:
            what = f"read as a whole: what changed since revision {before} is not told"
            self._add(EventKind.EVENT_KIND_FLEET, "", what, revision)
        self._known_from = revision

    def follow(self, snapshot: Snapshot, changes: Changes) -> None:
        """Move a snapshot forward by changes, and take note of them."""
        for event in changes.events:
            told = [(each, each.before(snapshot, event.key)) for each in _TOPICS if event.key.startswith(each.prefix)]
            snapshot.apply(Changes(event.mod_revision, (event,)))
            for topic, tell in told:
                for what in tell():
                    self._add(topic.kind, event.key.removeprefix(topic.prefix), what, event.mod_revision)
        snapshot.apply(Changes(changes.revision, ()))

    def start(self, after_revision: int) -> int:
        """Return the position of the first event after a revision, or, for 0, of the first that is remembered."""
        if after_revision == 0:
            return self._first
        if after_revision < self._known_from:
            return self._first - 1
        return next(
            (self._first + i for i, each in enumerate(self._events) if each.revision > after_revision), self.end
        )

    def read(self, position: int) -> list[FleetEvent]:
        """Return the events from a position on. If some of them are forgotten, the first says so."""
        events = list(self._events)[max(0, position - self._first) :]
        if position < self._first:
            what = f"what changed before revision {self._known_from} is not known here"
            events.insert(0, self._event(EventKind.EVENT_KIND_FLEET, "", what, self._known_from))
        return events

    @property
    def _first(self) -> int:
        return self.end - len(self._events)

    def _add(self, kind: EventKind.ValueType, name: str, what: str, revision: int) -> None:
        if len(self._events) == MAX_EVENTS:
            self._known_from = self._events.popleft().revision
        self._events.append(self._event(kind, name, what, revision))
        self.end += 1

    def _event(self, kind: EventKind.ValueType, name: str, what: str, revision: int) -> FleetEvent:
        event = FleetEvent(kind=kind, name=name, what=what, revision=revision)
        event.time.FromNanoseconds(round(self._clock.time() * 1e9))
        return event


Tell = Callable[[], Iterator[str]]


@dataclass(frozen=True, slots=True)
class _Topic:
    """Keys whose changes are told. `before` looks at a key, and returns what tells of its change once that is made."""

    prefix: str
    kind: EventKind.ValueType
    before: Callable[[Snapshot, str], Tell]


def _topic(
    prefix: str,
    kind: EventKind.ValueType,
    table: Callable[[Snapshot], Mapping[str, Stored[RecordT]]],
    words: Callable[[RecordT | None, RecordT | None], Iterator[str]],
) -> _Topic:
    def before(snapshot: Snapshot, key: str) -> Tell:
        records, name = table(snapshot), key.removeprefix(prefix)
        was = records.get(name)

        def tell() -> Iterator[str]:
            now = records.get(name)
            return words(was.record if was else None, now.record if now else None)

        return tell

    return _Topic(prefix, kind, before)


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
        what += f" at {Step.Name(after.abort_step).removeprefix('STEP_').lower()}: {after.abort_reason}"
    elif after.phase in (Phase.PHASE_DONE, Phase.PHASE_ABORTED):
        took_ms = (after.finish_time.ToNanoseconds() - after.begin_time.ToNanoseconds()) / 1e6
        what += f" after {took_ms:.1f} ms"
        blackout = blackout_s(after)
        if blackout is not None:
            what += f", blackout {f'at most {blackout * 1000:.1f} ms' if blackout else 'none'}"
    yield what


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


_TOPICS = (
    _topic(keys.FUNCTIONS, EventKind.EVENT_KIND_FUNCTION, lambda s: s.functions, _function),
    _topic(keys.MIGRATIONS, EventKind.EVENT_KIND_MIGRATION, lambda s: s.migrations, _migration),
    _topic(keys.HOSTS, EventKind.EVENT_KIND_HOST, lambda s: s.hosts, _host),
    _topic(keys.REGISTRATIONS, EventKind.EVENT_KIND_HOST, lambda s: s.registrations, _registration),
    _topic(keys.CORDONS, EventKind.EVENT_KIND_CORDON, lambda s: s.cordons, _cordon),
    _topic(keys.COORDINATORS, EventKind.EVENT_KIND_COORDINATOR, lambda s: s.coordinators, _coordinator),
    _topic(keys.FLEET_GENERATION, EventKind.EVENT_KIND_FLEET, lambda s: s.fleet_generations, _generation),
)
