"""Recovery: whatever was begun and isn't ended by who began it is taken over.

A migration without an owner is adopted, from its record alone: undecided it is aborted, decided it is carried out. A
function that stays in creation or deletion, which has no owner key, is driven on by every coordinator, each with pauses
that grow: several at once do no harm, because each write compares the record and each request is fenced.
"""

import logging

from coordinator.context import Context
from coordinator.fleet import Fleet
from coordinator.journal import RETRY_FIRST_S, RETRY_LONGEST_S
from coordinator.term import Term
from vfleet.clock import backoff_delays
from vfleet.errors import VfleetError

REDRIVE_FIRST_S = 2.0
REDRIVE_LONGEST_S = 30.0

_log = logging.getLogger(__name__)


async def adopt_orphans(context: Context, term: Term) -> None:
    """Adopt migrations that nobody drives, as soon as the inventory shows one. For ever."""
    delays = backoff_delays(context.random, RETRY_FIRST_S, RETRY_LONGEST_S)
    while True:
        await context.inventory.until(lambda: bool(term.orphans()))
        for name in term.orphans():
            try:
                # Another adoption may have waited; meanwhile this one may have become another's.
                if name in term.orphans():
                    await term.adopt(name)
                    delays = backoff_delays(context.random, RETRY_FIRST_S, RETRY_LONGEST_S)
            except VfleetError as error:
                _log.warning("migration %s can't be adopted yet: %s", name, error.message, extra={"migration": name})
                await context.clock.sleep(next(delays))


async def finish_functions(context: Context, term: Term, fleet: Fleet) -> None:
    """Drive on functions that stay in creation or deletion, whoever began that. For ever."""
    driven: set[str] = set()

    def unfinished() -> list[str]:
        return sorted(context.snapshot.unfinished_functions - driven)

    async def drive(name: str) -> None:
        try:
            # Not at once: the call that began it, here or at another coordinator, most often ends it.
            for delay_s in backoff_delays(context.random, REDRIVE_FIRST_S, REDRIVE_LONGEST_S):
                await context.clock.sleep(delay_s)
                try:
                    await fleet.finish(name)
                except VfleetError as error:
                    _log.warning("function %s, to be tried again: %s", name, error.message, extra={"function": name})
                else:
                    return
        finally:
            driven.discard(name)

    while True:
        await context.inventory.until(lambda: bool(unfinished()))
        for name in unfinished():
            driven.add(name)
            term.spawn(drive(name))
