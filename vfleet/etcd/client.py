"""The real `Store`: a thin asyncio client of etcd, on the stubs of cslab-etcd3.

Reads are linearizable, every call has a deadline, and a transaction is sent at most once: when its answer is lost, it
raises OUTCOME_UNKNOWN. Failover and the meaning of failures are in `endpoints`, the watch is in `watch`.
"""

import logging
import re
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Self

from etcd3 import etcdrpc

from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.etcd.endpoints import REQUIRE_LEADER, CompactedError, Endpoint, Endpoints
from vfleet.etcd.store import Changes, Committed, KeyValue, Listing, Put, Transaction
from vfleet.etcd.watch import watch
from vfleet.etcd.wire import key_value, range_end, txn_request

if TYPE_CHECKING:
    from vfleet.tls import Tls

MAX_OPERATIONS = 128
MAX_REQUEST_BYTES = 3 << 19
TIMEOUT_S = 5.0
PAGE_KEYS = 1000
LIST_ATTEMPTS = 5

_AFFECTED_VERSION = re.compile(r"3\.5\.[012]$")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Status:
    """What a member says of itself. `leader` is a member's ID, 0 if it knows of no leader."""

    address: str
    version: str
    member: int
    leader: int
    revision: int


def can_lose_data(version: str) -> bool:
    """Return whether an etcd of this version can lose data when it is killed under load (etcd issue 13766)."""
    return _AFFECTED_VERSION.match(version) is not None


class EtcdStore:
    """etcd, as `vfleet.etcd.store.Store` describes it. Made by `connect` or `open`; to be closed."""

    def __init__(
        self,
        endpoints: Endpoints,
        clock: Clock,
        max_operations: int = MAX_OPERATIONS,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> None:
        self._endpoints = endpoints
        self._clock = clock
        self._max_operations = max_operations
        self._max_request_bytes = max_request_bytes

    @classmethod
    def open(
        cls,
        endpoints: Sequence[str],
        clock: Clock,
        random: Random,
        *,
        timeout_s: float = TIMEOUT_S,
        tls: "Tls | None" = None,
        max_operations: int = MAX_OPERATIONS,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> Self:
        """Return a store that uses the members at `endpoints` (HOST:PORT), whether one answers by now or not.

        `timeout_s` bounds each call with all its retries, and half of how long a watch may be silent. Raise
        INVALID_FIELD for an endpoint that is none.
        """
        if timeout_s <= 0:
            raise invalid_field("timeout_s", timeout_s, "more than 0 seconds")
        members = Endpoints(endpoints, clock, random, timeout_s=timeout_s, tls=tls)
        return cls(members, clock, max_operations, max_request_bytes)

    @classmethod
    async def connect(
        cls,
        endpoints: Sequence[str],
        clock: Clock,
        random: Random,
        *,
        timeout_s: float = TIMEOUT_S,
        tls: "Tls | None" = None,
        max_operations: int = MAX_OPERATIONS,
        max_request_bytes: int = MAX_REQUEST_BYTES,
    ) -> Self:
        """Return what `open` does, once one of the members has answered. Raise STORE_UNAVAILABLE if none does."""
        store = cls.open(
            endpoints,
            clock,
            random,
            timeout_s=timeout_s,
            tls=tls,
            max_operations=max_operations,
            max_request_bytes=max_request_bytes,
        )
        try:
            await store.check()
        except BaseException:
            await store.close()
            raise
        return store

    async def check(self) -> None:
        """Ask a member for its version, and warn of one that can lose data. Raise STORE_UNAVAILABLE if none answers."""
        status = await self.status()
        if can_lose_data(status.version):
            _log.warning(
                "etcd %s at %s can lose data when killed under load; use 3.5.3 or newer, or 3.4.23 or newer",
                status.version,
                status.address,
            )

    async def close(self) -> None:
        """Close all connections; calls and watches under way are cancelled."""
        await self._endpoints.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def max_operations(self) -> int:
        """Operations that one transaction may have."""
        return self._max_operations

    @property
    def max_request_bytes(self) -> int:
        """Size that one request may have."""
        return self._max_request_bytes

    async def status(self) -> Status:
        """Return what the first member that answers says of itself. Raise STORE_UNAVAILABLE."""

        async def send(endpoint: Endpoint, timeout_s: float) -> Status:
            response = await endpoint.maintenance.Status(etcdrpc.StatusRequest(), timeout=timeout_s)
            header = response.header
            return Status(endpoint.address, response.version, header.member_id, response.leader, header.revision)

        return await self._endpoints.call("status", send, repeatable=True)

    async def get(self, key: str) -> KeyValue | None:
        """Return the key, or None if it is absent. Linearizable."""
        response = await self._range(f"get {key}", etcdrpc.RangeRequest(key=key.encode()))
        return key_value(response.kvs[0]) if response.kvs else None

    async def list(self, prefix: str) -> Listing:
        """Return all keys with the prefix, as of one revision. Linearizable.

        Read in pages at the revision of the first. When that is compacted meanwhile, it begins again, five times at
        most before it raises STORE_UNAVAILABLE.
        """
        for _ in range(LIST_ATTEMPTS):
            try:
                return await self._pages(prefix)
            except CompactedError:
                _log.info("listing %s begins again: its revision was compacted", prefix)
        message = f"listing {prefix} was overtaken by compaction {LIST_ATTEMPTS} times"
        raise VfleetError(Reason.STORE_UNAVAILABLE, message)

    async def commit(self, transaction: Transaction) -> Committed:
        """Carry out a transaction, as `Store.commit` promises."""
        request = txn_request(transaction)
        self._check_limits(transaction.size, request.ByteSize())

        async def send(endpoint: Endpoint, timeout_s: float) -> etcdrpc.TxnResponse:
            return await endpoint.kv.Txn(request, timeout=timeout_s, metadata=REQUIRE_LEADER)

        what = f"transaction of {transaction.size} operations"
        try:
            response = await self._endpoints.call(what, send, repeatable=False)
        except VfleetError as error:
            if error.reason is not Reason.NOT_FOUND:
                raise
            leases = sorted({write.lease for write in transaction.writes if isinstance(write, Put) and write.lease})
            named = ",".join(f"{lease:x}" for lease in leases)
            message = f"nothing was written: lease {named} is gone ({error.message})"
            raise VfleetError(Reason.CONFLICT, message, metadata={"lease": named}) from None
        return Committed(bool(response.succeeded), int(response.header.revision))

    async def grant_lease(self, ttl_s: int) -> int:
        """Return a new lease that lives `ttl_s` seconds (at least 1) unless it is kept alive.

        Repeated when an answer is lost: a lease that nobody knows of does nothing, and ends by itself.
        """
        if ttl_s < 1:
            raise invalid_field("ttl_s", ttl_s, "at least 1 second")
        request = etcdrpc.LeaseGrantRequest(TTL=ttl_s)

        async def send(endpoint: Endpoint, timeout_s: float) -> int:
            response = await endpoint.lease.LeaseGrant(request, timeout=timeout_s, metadata=REQUIRE_LEADER)
            return int(response.ID)

        return await self._endpoints.call("grant a lease", send, repeatable=True)

    async def keep_lease_alive(self, lease: int) -> bool:
        """Renew the lease once; return False if it is gone."""
        request = etcdrpc.LeaseKeepAliveRequest(ID=lease)

        async def send(endpoint: Endpoint, timeout_s: float) -> bool:
            call = endpoint.lease.LeaseKeepAlive([request], timeout=timeout_s, metadata=REQUIRE_LEADER)
            try:
                return any([response.TTL > 0 async for response in call])
            finally:
                call.cancel()

        return await self._endpoints.call(f"keep lease {lease:x} alive", send, repeatable=True)

    async def revoke_lease(self, lease: int) -> None:
        """End the lease and delete its keys. Revoking one that is gone succeeds."""
        request = etcdrpc.LeaseRevokeRequest(ID=lease)

        async def send(endpoint: Endpoint, timeout_s: float) -> None:
            await endpoint.lease.LeaseRevoke(request, timeout=timeout_s, metadata=REQUIRE_LEADER)

        try:
            await self._endpoints.call(f"revoke lease {lease:x}", send, repeatable=True)
        except VfleetError as error:
            if error.reason is not Reason.NOT_FOUND:
                raise

    def watch(self, prefix: str) -> AsyncGenerator[Listing | Changes, None]:
        """Yield a Listing of the prefix, then its Changes, for ever, as `Store.watch` promises."""
        return watch(prefix, self._endpoints, self._clock, self.list)

    async def _pages(self, prefix: str) -> Listing:
        items: list[KeyValue] = []
        request = etcdrpc.RangeRequest(key=prefix.encode(), range_end=range_end(prefix), limit=PAGE_KEYS)
        while True:
            page = await self._range(f"list {prefix}", request)
            items += map(key_value, page.kvs)
            request.revision = request.revision or page.header.revision
            if not page.more:
                return Listing(int(request.revision), tuple(items))
            request.key = page.kvs[-1].key + b"\0"

    async def _range(self, what: str, request: etcdrpc.RangeRequest) -> etcdrpc.RangeResponse:
        async def send(endpoint: Endpoint, timeout_s: float) -> etcdrpc.RangeResponse:
            return await endpoint.kv.Range(request, timeout=timeout_s, metadata=REQUIRE_LEADER)

        return await self._endpoints.call(what, send, repeatable=True)

    def _check_limits(self, operations: int, request_bytes: int) -> None:
        for value, limit, unit in (
            (operations, self._max_operations, "operations"),
            (request_bytes, self._max_request_bytes, "bytes"),
        ):
            if value > limit:
                message = f"the transaction has {value} {unit}; etcd takes at most {limit}"
                raise VfleetError(Reason.LIMIT_EXCEEDED, message, metadata={"limit": str(limit)})
