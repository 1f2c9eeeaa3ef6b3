"""A lease kept alive by the one who works under it, who learns at once when it may be gone.

Renewals are sent only while the holder makes progress, and the holder's own clock ends the session when no renewal was
confirmed in time. A lease proves nothing (comparisons in transactions do): this only stops useless work.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Self

from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.etcd.store import Store

RENEWALS_PER_TTL = 3
RETRIES_PER_TTL = 10

_log = logging.getLogger(__name__)


def _always() -> bool:
    return True


class Session:
    """A lease and the task that renews it. `lost` is set, for good, once the lease is or may be gone, or closed."""

    def __init__(
        self, store: Store, clock: Clock, ttl_s: int, alive: Callable[[], bool], lease: int, began_s: float
    ) -> None:
        self.lease = lease
        self.lost = asyncio.Event()
        self._store = store
        self._clock = clock
        self._ttl_s = ttl_s
        self._alive = alive
        self._expires_s = began_s + ttl_s
        self._task = asyncio.create_task(self._renew(), name=f"session {lease:x}")

    @classmethod
    async def open(cls, store: Store, clock: Clock, ttl_s: int, alive: Callable[[], bool] = _always) -> Self:
        """Return a session on a new lease of `ttl_s` seconds (at least 1), renewed while `alive()` is true.

        Raise INVALID_FIELD or STORE_UNAVAILABLE.
        """
        if ttl_s < 1:
            raise invalid_field("ttl_s", ttl_s, "at least 1 second")
        began_s = clock.monotonic()
        lease = await store.grant_lease(ttl_s)
        return cls(store, clock, ttl_s, alive, lease, began_s)

    @property
    def is_lost(self) -> bool:
        """Whether the lease is or may be gone, by the clock of this moment: true also right after a long stop."""
        if self._clock.monotonic() >= self._expires_s:
            self.lost.set()
        return self.lost.is_set()

    def check(self) -> None:
        """Raise CONFLICT, naming the lease, if the session is lost."""
        if self.is_lost:
            message = f"lease {self.lease:x} is lost: work under it has ended"
            raise VfleetError(Reason.CONFLICT, message, metadata={"lease": f"{self.lease:x}"})

    async def close(self) -> None:
        """End the session and revoke the lease. If etcd is out of reach, the lease ends by itself."""
        self.lost.set()
        self._task.cancel()
        await asyncio.wait({self._task})
        try:
            await self._store.revoke_lease(self.lease)
        except VfleetError as error:
            _log.warning("lease %x is left to expire: %s", self.lease, error)
        if not self._task.cancelled():
            self._task.result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _renew(self) -> None:
        try:
            pause_s = self._ttl_s / RENEWALS_PER_TTL
            while not self.is_lost:
                await self._clock.sleep(min(pause_s, self._expires_s - self._clock.monotonic()))
                renewed = self._alive() and await self._renewed_once()
                pause_s = self._ttl_s / (RENEWALS_PER_TTL if renewed else RETRIES_PER_TTL)
        finally:
            self.lost.set()

    async def _renewed_once(self) -> bool:
        sent_s = self._clock.monotonic()
        try:
            async with asyncio.timeout(self._expires_s - sent_s):
                exists = await self._store.keep_lease_alive(self.lease)
        except TimeoutError:
            return False
        except VfleetError as error:
            _log.warning("lease %x was not renewed: %s", self.lease, error)
            return False
        # Lost stays lost: an answer that comes too late renews nothing here.
        if not exists:
            _log.warning("lease %x is gone", self.lease)
            self.lost.set()
        elif not self.is_lost:
            self._expires_s = sent_s + self._ttl_s
        return exists
