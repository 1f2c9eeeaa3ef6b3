"""How long records of migrations are kept, and the deletion of those that are kept no longer.

Only what is over goes, in transactions of bounded size that compare each record with what was read. Every coordinator
does it: who comes second finds the record gone, and lets it be.
"""

import asyncio
import heapq
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

from coordinator import transaction
from coordinator.context import Context
from coordinator.snapshot import Snapshot, Stored
from coordinator.states import is_over
from vfleet.errors import VfleetError
from vfleet.v1.records_pb2 import Migration

# A client that repeats its request finds the migration, and not a new one, at least for this long after its end.
KEEP_AT_LEAST_S = 600.0
LOOK_EVERY_S = 60.0
# While there is more to delete than one transaction may.
LOOK_AGAIN_S = 1.0
BATCH = 100
SLICE = 500  # records that are looked at in one go

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept of the records of migrations that are over: the latest `count` of them, none older than `age_s`."""

    count: int
    age_s: float


def outdated(over: Sequence[Stored[Migration]], retention: Retention, now: float, most: int) -> list[Stored[Migration]]:
    """Return which records of migrations that are over are not to be kept at `now`, in seconds since 1970.

    The oldest first, and `most` at most.
    """
    surplus = len(over) - retention.count
    found = []
    # FINISH was the last that wrote them.
    for index, each in enumerate(heapq.nsmallest(most, over, key=attrgetter("mod_revision"))):
        age_s = now - _finish_s(each.record)
        if age_s >= KEEP_AT_LEAST_S and (index < surplus or age_s > retention.age_s):
            found.append(each)
    return found


async def forget_migrations(context: Context, retention: Retention) -> None:
    """Delete records that are not to be kept, looking every minute. For ever."""
    batch = min(BATCH, context.store.max_operations)
    while True:
        found = outdated(await _over(context.snapshot), retention, context.clock.time(), batch)
        if found:
            try:
                committed = await context.store.commit(transaction.forget_migrations(found))
                await context.catch_up(committed)
                if committed.succeeded:
                    _log.info("forgets %d migrations that are long over", len(found))
            except VfleetError as error:
                _log.warning("migrations that are long over, to be forgotten later: %s", error.message)
        await context.clock.sleep(LOOK_AGAIN_S if len(found) == batch else LOOK_EVERY_S)


async def _over(snapshot: Snapshot) -> list[Stored[Migration]]:
    """Return the records of migrations that are over. Others have their turn meanwhile: drivers may be on hold."""
    records, over = list(snapshot.migrations.values()), []
    for start in range(0, len(records), SLICE):
        over += [each for each in records[start : start + SLICE] if is_over(each.record.phase)]
        await asyncio.sleep(0)
    return over


def _finish_s(migration: Migration) -> float:
    """Return when a migration was over, or, if its record does not tell, when it began."""
    time = migration.finish_time if migration.HasField("finish_time") else migration.begin_time
    return time.seconds + time.nanos / 1e9
