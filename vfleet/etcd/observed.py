"""A store that measures another: how long each call took, how it ended, and for which trace it was."""

from collections.abc import AsyncGenerator, Awaitable
from typing import TypeVar

from prometheus_client import Histogram

from vfleet import tracing
from vfleet.clock import Clock
from vfleet.errors import VfleetError
from vfleet.etcd.store import Changes, Committed, KeyValue, Listing, Store, Transaction

ResultT = TypeVar("ResultT")


class ObservedStore:
    """`store`, with its calls in a histogram by operation and outcome. A watch is no call: it lasts for ever."""

    def __init__(self, store: Store, clock: Clock, durations: Histogram) -> None:
        self._store = store
        self._clock = clock
        self._durations = durations

    @property
    def max_operations(self) -> int:
        """Operations that one transaction may have."""
        return self._store.max_operations

    @property
    def max_request_bytes(self) -> int:
        """Size that one request may have."""
        return self._store.max_request_bytes

    async def get(self, key: str) -> KeyValue | None:
        """Do what the store does."""
        return await self._measured("get", self._store.get(key))

    async def list(self, prefix: str) -> Listing:
        """Do what the store does."""
        return await self._measured("list", self._store.list(prefix))

    async def commit(self, transaction: Transaction) -> Committed:
        """Do what the store does."""
        return await self._measured("commit", self._store.commit(transaction))

    async def grant_lease(self, ttl_s: int) -> int:
        """Do what the store does."""
        return await self._measured("grant_lease", self._store.grant_lease(ttl_s))

    async def keep_lease_alive(self, lease: int) -> bool:
        """Do what the store does."""
        return await self._measured("keep_lease_alive", self._store.keep_lease_alive(lease))

    async def revoke_lease(self, lease: int) -> None:
        """Do what the store does."""
        await self._measured("revoke_lease", self._store.revoke_lease(lease))

    def watch(self, prefix: str) -> AsyncGenerator[Listing | Changes, None]:
        """Do what the store does."""
        return self._store.watch(prefix)

    async def _measured(self, operation: str, answer: Awaitable[ResultT]) -> ResultT:
        began_s, outcome = self._clock.monotonic(), "cancelled"
        try:
            with tracing.calling(f"etcd {operation}"):
                result = await answer
        except VfleetError as error:
            outcome = error.reason.lower()
            raise
        else:
            outcome = "ok"
            return result
        finally:
            self._durations.labels(operation, outcome).observe(self._clock.monotonic() - began_s)
