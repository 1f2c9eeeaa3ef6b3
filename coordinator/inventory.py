"""The inventory: a snapshot of the fleet, kept by one watch on everything that vfleet stores.

The watch survives reconnects and compaction (then it brings a new listing). Whoever wrote to etcd waits for the
revision of the write and then reads it here; whoever waits for a change waits for a condition on the snapshot. Most
wait for something of one migration; these look only when that one changes, so that a hundred at once don't cost the
square of it.

In an etcd that was restored from a backup nothing that was read before counts; nor does what is read there, until the
fleet generation is raised, which the watch begins anew with.
"""

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from coordinator.events import EventLog
from coordinator.snapshot import Snapshot
from vfleet.clock import Clock, SystemClock
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import MIGRATIONS, OWNERS, PREFIX
from vfleet.etcd.store import Changes, Listing, Store

_Waiters = dict[asyncio.Future[None], Callable[[], bool]]


class Inventory:
    """The fleet as far as the watch has brought it. `run` is to be running; `snapshot` is valid once `ready` is set."""

    def __init__(self, clock: Clock | None = None) -> None:
        """`clock` says when events happen that the log has."""
        self.log = EventLog(clock or SystemClock())
        self.snapshot = Snapshot(Listing(0, ()))
        # How often etcd was found to lack what was read before: restored from a backup.
        self.restorations = 0
        # Whether that is so and the fleet generation has not been raised since.
        self.is_behind = False
        self._highest_generation = 1
        self._waiters: dict[str, _Waiters] = {}  # by the migration that they wait for; "" for any change

    async def run(self, store: Store) -> None:
        """Follow the store for ever. Raise VfleetError if it can't be listed at all, or not be understood."""
        while True:
            async with aclosing(store.watch(PREFIX)) as updates:
                async for update in updates:
                    if isinstance(update, Listing):
                        self._take(update)
                        self.notify()
                    else:
                        self.log.follow(self.snapshot, update)
                        self._notify("", *_concerned(update))
                    if self.snapshot.fleet_generation > self._highest_generation:
                        break

    def _take(self, listing: Listing) -> None:
        if listing.restored or listing.revision < self.snapshot.revision:
            self.restorations += 1
            self.is_behind = True
        self.log.listed(self.snapshot.revision, listing.revision)
        self.snapshot = Snapshot(listing)
        if self.snapshot.fleet_generation > self._highest_generation:
            self._highest_generation = self.snapshot.fleet_generation
            self.is_behind = False

    def notify(self, *migrations: str) -> None:
        """Let those who wait look at their conditions again: all, or those who wait for something of `migrations`."""
        self._notify(*(migrations or list(self._waiters)))

    async def until(self, condition: Callable[[], bool], migration: str = "") -> None:
        """Wait until `condition` holds. It is looked at now and after each change of the snapshot or `notify`.

        Given `migration`, it is looked at only after changes of that migration's record and owner key, and after
        `notify` with its name. A VfleetError that `condition` raises is raised here. It may hold no more when the
        waiting task runs, if the fleet has changed again by then.
        """
        if condition():
            return
        waiter = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(migration, {})
        waiters[waiter] = condition
        try:
            await waiter
        finally:
            del waiters[waiter]
            if not waiters and self._waiters.get(migration) is waiters:
                del self._waiters[migration]

    async def wait_for(self, revision: int) -> None:
        """Wait until the snapshot includes `revision`, which is to be that of a change of vfleet's own keys.

        Raise CONFLICT if etcd is restored from a backup meanwhile: it may never get there.
        """
        restorations = self.restorations

        def reached() -> bool:
            if self.restorations != restorations:
                raise VfleetError(Reason.CONFLICT, f"etcd was restored from a backup before it had revision {revision}")
            return self.snapshot.revision >= revision

        await self.until(reached)

    def _notify(self, *migrations: str) -> None:
        for migration in migrations:
            for waiter, condition in list(self._waiters.get(migration, {}).items()):
                if waiter.done():
                    continue
                try:
                    if condition():
                        waiter.set_result(None)
                except VfleetError as error:
                    waiter.set_exception(error)


def _concerned(changes: Changes) -> set[str]:
    """Return the migrations whose record or owner key has changed."""
    return {
        event.key.removeprefix(prefix)
        for event in changes.events
        for prefix in (MIGRATIONS, OWNERS)
        if event.key.startswith(prefix)
    }
