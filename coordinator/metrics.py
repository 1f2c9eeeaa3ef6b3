"""What a coordinator tells Prometheus: the migrations that it finished, and the fleet as its inventory has it.

A migration is counted once, when its end is written, by the coordinator that wrote it: the sum over coordinators is
the fleet's. The fleet itself every coordinator tells, the same but for the watch's delay.
"""

from collections.abc import Callable, Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import Metric

from coordinator.inventory import Inventory
from coordinator.term import Term
from vfleet.clock import Clock
from vfleet.history import blackout_s, is_complete, spans
from vfleet.metrics import BLACKOUT_BUCKETS_S, MIGRATION_BUCKETS_S, gauge, gauges
from vfleet.v1.records_pb2 import Migration, Phase, Step
from vfleet.v1.types_pb2 import ErrorReason, TransferMode

_NOT_OVER: Final = (Phase.PHASE_PREPARING, Phase.PHASE_COMMITTED, Phase.PHASE_ABORTING)


class Ended:
    """Counts migrations that are over."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._count = Counter(
            "vfleet_migrations_total",
            "Migrations that this coordinator finished, by outcome; of aborted ones, at which step and why.",
            ("outcome", "step", "cause"),
            registry=registry,
        )
        self._count.labels("done", "", "")  # a rate is to be had from the first one on
        self._duration = Histogram(
            "vfleet_migration_duration_seconds",
            "How long migrations took, from BEGIN to FINISH, by outcome.",
            ("outcome",),
            registry=registry,
            buckets=MIGRATION_BUCKETS_S,
        )
        self._step = Histogram(
            "vfleet_migration_step_duration_seconds",
            "How long each step of a migration took, as far as this coordinator did it.",
            ("step",),
            registry=registry,
            buckets=MIGRATION_BUCKETS_S,
        )
        self._blackout = Histogram(
            "vfleet_migration_blackout_seconds",
            "For how long drivers were on hold at most, by outcome and mode; of migrations that no other took over.",
            ("outcome", "mode"),
            registry=registry,
            buckets=BLACKOUT_BUCKETS_S,
        )

    def __call__(self, migration: Migration) -> None:
        """Count a migration whose FINISH this coordinator wrote."""
        outcome = "done" if migration.phase == Phase.PHASE_DONE else "aborted"
        step = short(Step.Name(migration.abort_step), "STEP_")
        cause = short(ErrorReason.Name(migration.abort_cause), "ERROR_REASON_")
        self._count.labels(outcome, step, cause).inc()
        if migration.HasField("begin_time"):  # one that was queued may have ended there
            took_ns = migration.finish_time.ToNanoseconds() - migration.begin_time.ToNanoseconds()
            # Another coordinator's clock may have said when it began.
            self._duration.labels(outcome).observe(max(0, took_ns) / 1e9)
        for span in spans(migration):
            self._step.labels(short(Step.Name(span.step), "STEP_")).observe(span.duration_s)
        has_drivers = any(move.entries for move in migration.moves)
        blackout = blackout_s(migration) if has_drivers and is_complete(migration) else None
        if blackout is not None:
            mode = short(TransferMode.Name(migration.mode), "TRANSFER_MODE_")
            self._blackout.labels(outcome, mode).observe(blackout)


def fleet_metrics(inventory: Inventory, clock: Clock, term: Callable[[], Term | None]) -> Iterator[Metric]:
    """Yield the fleet as the inventory has it now, without a walk of it, and what the term, if there is one, runs."""
    snapshot, now = inventory.snapshot, term()
    active = [stored.record for stored in snapshot.active_migrations.values()]
    phases = dict.fromkeys(_NOT_OVER, 0)
    for record in active:
        phases[record.phase] += 1
    oldest_s = max((clock.time() - record.begin_time.ToNanoseconds() / 1e9 for record in active), default=0.0)
    yield gauge(
        "vfleet_coordinator_active", "1 while it has a session with etcd and may do something.", now is not None
    )
    yield gauge(
        "vfleet_etcd_restored",
        "1 while etcd is one restored from a backup whose fleet generation was not raised.",
        inventory.is_behind,
    )
    yield gauges(
        "vfleet_migrations_active",
        "Migrations of the fleet that are begun and not over, by phase.",
        "phase",
        ((short(Phase.Name(phase), "PHASE_"), count) for phase, count in phases.items()),
    )
    yield gauge("vfleet_migrations_owned", "Migrations that this coordinator drives.", len(now.runs) if now else 0)
    yield gauge(
        "vfleet_migrations_orphaned",
        "Migrations of the fleet that are not over and that nobody drives.",
        sum(record.name not in snapshot.owners for record in active),
    )
    yield gauge("vfleet_migrations_queued", "Migrations of the fleet that wait to begin.", len(snapshot.queue))
    yield gauge(
        "vfleet_migration_oldest_age_seconds",
        "How long ago the oldest migration that is not over began; 0 if there is none.",
        max(0.0, oldest_s),
    )
    yield gauges(
        "vfleet_hosts",
        "Hosts of the fleet, by whether their daemon is registered.",
        "registered",
        (
            ("true", len(snapshot.registrations)),
            ("false", len(snapshot.hosts.keys() - snapshot.registrations.keys())),
        ),
    )
    counted = len(snapshot.unfinished_functions) + len(snapshot.lost_functions)
    yield gauges(
        "vfleet_functions",
        "Functions of the fleet: active, being made or deleted, or lost with their machine.",
        "status",
        (
            ("active", len(snapshot.functions) - counted),
            ("unfinished", len(snapshot.unfinished_functions)),
            ("lost", len(snapshot.lost_functions)),
        ),
    )
    yield gauge("vfleet_drivers", "Drivers of the fleet.", len(snapshot.drivers))


def short(name: str, prefix: str) -> str:
    """Return an enum's value as a label: without its prefix, in lower case; nothing for the one that is not set."""
    found = name.removeprefix(prefix).lower()
    return "" if found == "unspecified" else found
