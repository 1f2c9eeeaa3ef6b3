"""How long records of migrations are kept, and the deletion of those that are kept no longer.

Only what is over goes, in transactions of bounded size that compare each record with what was read. Every coordinator
does it: who comes second finds the record gone, and lets it be.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from coordinator import transaction
from coordinator.context import Context
from coordinator.snapshot import Stored
from coordinator.states import is_over
from vfleet.errors import VfleetError
from vfleet.v1.records_pb2 import Migration

# A client that repeats its request finds the migration, and not a new one, at least for this long after its end.
KEEP_AT_LEAST_S = 600.0
LOOK_EVERY_S = 60.0
# While there is more to delete than one transaction may.
LOOK_AGAIN_S = 1.0
BATCH = 100

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept of the records of migrations that are over: the latest `count` of them, none older than `age_s`."""

    count: int
    age_s: float


def outdated(records: Iterable[Stored[Migration]], retention: Retention, now: float) -> list[Stored[Migration]]:
    """Return the records that are not to be kept at `now` (seconds since 1970), the oldest first."""
    over = sorted(
        ((_finish_s(each.record), each) for each in records if is_over(each.record.phase)),
        key=lambda found: (found[0], found[1].create_revision),
    )
    surplus = max(0, len(over) - retention.count)
    return [
        each
        for index, (finish_s, each) in enumerate(over)
        if now - finish_s >= KEEP_AT_LEAST_S and (index < surplus or now - finish_s > retention.age_s)
    ]


async def forget_migrations(context: Context, retention: Retention) -> None:
    """Delete records that are not to be kept, looking every minute. For ever."""
    batch = min(BATCH, context.store.max_operations)
    while True:
        found = outdated(context.snapshot.migrations.values(), retention, context.clock.time())
        if found:
            try:
                committed = await context.store.commit(transaction.forget_migrations(found[:batch]))
                await context.catch_up(committed)
                if committed.succeeded:
                    _log.info("forgets %d migrations that are long over", len(found[:batch]))
            except VfleetError as error:
                _log.warning("migrations that are long over, to be forgotten later: %s", error.message)
        await context.clock.sleep(LOOK_AGAIN_S if len(found) > batch else LOOK_EVERY_S)


def _finish_s(migration: Migration) -> float:
    return migration.finish_time.seconds + migration.finish_time.nanos / 1e9
