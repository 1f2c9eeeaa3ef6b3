"""A store that a test can cut off, and before whose reads it can let something happen."""

from collections.abc import Callable

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.store import Committed, KeyValue, Listing, Store, Transaction


class InterposedStore:
    """A `Store` over another. `before_get` is called with each key that is read."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_down = False
        self.before_get: Callable[[str], None] = lambda key: None
        self.reads = 0

    def __getattr__(self, name: str):
        return getattr(self._store, name)

    async def get(self, key: str) -> KeyValue | None:
        self.reads += 1
        self._check()
        self.before_get(key)
        return await self._store.get(key)

    async def list(self, prefix: str) -> Listing:
        self.reads += 1
        self._check()
        return await self._store.list(prefix)

    async def commit(self, transaction: Transaction) -> Committed:
        self._check()
        return await self._store.commit(transaction)

    def _check(self) -> None:
        if self.is_down:
            raise VfleetError(Reason.STORE_UNAVAILABLE, "etcd is out of reach")
