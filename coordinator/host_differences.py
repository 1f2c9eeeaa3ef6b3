"""Differences between etcd and what the hosts have: instances, drivers, tables, holds. Pure.

A host that can't be asked is said to be silent; nothing is concluded from what it doesn't say. Whatever a function's
lock says is under way is passed.
"""

from collections.abc import Iterator

from coordinator.findings import Call, Finding, View, finding
from coordinator.instance_differences import instance_findings, missing_instances
from coordinator.table_differences import table_findings
from vfleet.decision import outcome
from vfleet.v1.fleet_service_pb2 import DifferenceKind
from vfleet.v1.hold_service_pb2 import EntryName, Hold, LiftHoldRequest
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.types_pb2 import Decision, TableEntry


def host_findings(view: View) -> Iterator[Finding]:
    """Yield what hosts have and etcd doesn't, or the other way round."""
    for host, why in sorted(view.silent.items()):
        registered = "registered" if host in view.snapshot.registrations else "not registered"
        yield finding(
            DifferenceKind.DIFFERENCE_KIND_HOST_UNREACHABLE,
            host=host,
            etcd=registered,
            says=why,
            remedy=f"none: start its hostd, or, if it never comes back: vfleet fleet forget-host {host}",
        )
    for host, state in sorted(view.hosts.items()):
        for instance in state.instances:
            if not view.is_busy(instance.function) and instance.migration not in view.snapshot.active_migrations:
                yield from instance_findings(view, host, instance)
        for hold in state.holds:
            if view.is_over(hold.migration) and not view.is_busy(hold.function):
                yield _hold(view, host, hold)
        yield from table_findings(view, host)
    for name, stored in sorted(view.snapshot.functions.items()):
        yield from missing_instances(view, name, stored)


def _hold(view: View, host: str, hold: Hold) -> Finding:
    stored = view.snapshot.entries_of(hold.driver).get(hold.function)
    migration = view.snapshot.migrations.get(hold.migration)
    request: UpdateTableRequest | LiftHoldRequest
    if stored is not None and migration is not None and outcome(migration.record) == Decision.DECISION_COMMITTED:
        entry = TableEntry()
        entry.CopyFrom(stored.record)
        entry.revision = stored.mod_revision
        request = UpdateTableRequest(attempt=hold.attempt, entries=[entry], lift=True)
    else:
        name = EntryName(driver=hold.driver, function=hold.function, generation=hold.generation)
        request = LiftHoldRequest(attempt=hold.attempt, entries=[name])
    return finding(
        DifferenceKind.DIFFERENCE_KIND_HOLD,
        host=host,
        function=hold.function,
        driver=hold.driver,
        migration=hold.migration,
        etcd="the migration is over",
        says="its hold is there",
        remedy="lift the hold",
        repair=Call(host, request),
    )
