"""How many migrations go on at once, and in what order others wait for their turn. Pure.

What would pass a limit waits in etcd, under queue/MIGRATION: its coordinator begins it when there is room, another does
if that one is gone, and any of them can cancel it. It leaves the queue in the transaction that makes its record.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from coordinator.snapshot import Snapshot, Stored
from vfleet.errors import Reason
from vfleet.etcd.keys import migration_key, queue_key
from vfleet.etcd.records import encode
from vfleet.etcd.store import Delete, Put, Transaction, absent, unchanged
from vfleet.names import host_of
from vfleet.v1.migration_service_pb2 import QueuedMigration
from vfleet.v1.records_pb2 import Migration, Move, Phase, Place
from vfleet.v1.types_pb2 import ErrorReason

MAX_PRIORITY = 100
MAX_QUEUED = 10_000
DEFAULT_DEADLINE_MS = 3_600_000
MAX_DEADLINE_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class Allowance:
    """How many migrations may be under way in the fleet, and from or to one host, and one device.

    Each coordinator counts those of all. Two that begin one at the same moment may pass a limit by one.
    """

    fleet: int = 256
    host: int = 64
    device: int = 64

    def passed(self, snapshot: Snapshot, devices: Iterable[str]) -> str | None:
        """Return the limit that one migration more would pass that takes place on these devices, or None."""
        active = len(snapshot.active_migrations)
        if active >= self.fleet:
            return f"{_are(active)} under way in the fleet, which may have {self.fleet}"
        names = set(devices)
        for places, limit in ((names, self.device), (set(map(host_of, names)), self.host)):
            for place in sorted(places):
                if snapshot.active_at[place] >= limit:
                    count = snapshot.active_at[place]
                    return f"{_are(count)} under way from or to {place}, which may have {limit}"
        return None


def _are(migrations: int) -> str:
    return "1 migration is" if migrations == 1 else f"{migrations} migrations are"


DEFAULT_ALLOWANCE = Allowance()


def known_devices(snapshot: Snapshot, queued: QueuedMigration) -> set[str]:
    """Return the devices that a queued migration is sure to take functions from or to."""
    homes = (snapshot.functions.get(move.function) for move in queued.request.moves)
    named = {move.target_device for move in queued.request.moves if move.target_device}
    return named | {home.record.device for home in homes if home is not None}


def in_order(snapshot: Snapshot) -> list[Stored[QueuedMigration]]:
    """Return what is queued: the highest priority first, then who came first."""
    return sorted(snapshot.queue.values(), key=lambda each: (-each.record.request.priority, each.create_revision))


def as_migration(stored: Stored[QueuedMigration]) -> Stored[Migration]:
    """Return a queued migration as it is shown: its moves have no places yet but those that were asked for."""
    queued = stored.record
    shown = Migration(name=queued.request.request_id, phase=Phase.PHASE_QUEUED, coordinator=queued.coordinator)
    shown.trace_parent = queued.trace_parent
    for move in queued.request.moves:
        target = Place(device=move.target_device, vf_index=move.target_vf_index)
        shown.moves.append(Move(function=move.function, target=target if move.target_device else None))
    return Stored(shown, stored.create_revision, stored.mod_revision)


def enqueue(queued: QueuedMigration) -> Transaction:
    """Return the entry of a migration into the queue, unless there is one of its name."""
    name = queued.request.request_id
    return Transaction((absent(queue_key(name)), absent(migration_key(name))), (Put(queue_key(name), encode(queued)),))


def give_up(
    stored: Stored[QueuedMigration], reason: str, cause: Reason, coordinator: str, now: float
) -> tuple[Transaction, Migration]:
    """Return the end of a migration that never began, and what it is then: ABORTED, at no step."""
    record = as_migration(stored).record
    record.phase = Phase.PHASE_ABORTED
    record.abort_reason = reason
    record.abort_cause = ErrorReason.Value(f"ERROR_REASON_{cause}")
    record.finished_by = coordinator
    for time in (record.decide_time, record.finish_time):
        time.FromNanoseconds(round(now * 1e9))
    name = record.name
    return Transaction(
        (unchanged(queue_key(name), stored.mod_revision), absent(migration_key(name))),
        (Delete(queue_key(name)), Put(migration_key(name), encode(record))),
    ), record
