"""One watch on a prefix that outlives its streams: listed, then followed, resumed after what was last delivered.

              list                    changes
    listing --------> delivered ------------------+
       ^                  ^   stream broken: next |
       |                  +---- endpoint, resume--+
       +--- compacted, or not what was delivered--+

It promises that no change is left out or repeated and that a revision is never split. Revisions of an etcd that was
restored from a backup are others', though their numbers may be as high; so each stream begins by looking whether etcd
has what was delivered last.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Self

import grpc
from etcd3 import etcdrpc
from etcd3.etcdrpc import kv_pb2

from vfleet import cancellation
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.endpoints import COMPACTED, FUTURE, REQUIRE_LEADER, CompactedError, Endpoint, Endpoints
from vfleet.etcd.store import Changes, Event, KeyValue, Listing
from vfleet.etcd.wire import key_text, range_end

_log = logging.getLogger(__name__)

_DELETE = 1  # mvccpb.Event.DELETE


class _BrokenError(Exception):
    """The stream ended, or fell silent; it can be resumed."""


class _RestoredError(Exception):
    """etcd has not what the watch has delivered."""


@dataclass(frozen=True, slots=True)
class _Delivered:
    """How far the watch has come: to `revision`; and `last`, the last key of which it told that it was written.

    `last` stood so at `last_revision`; None if there was none yet.
    """

    revision: int
    last: KeyValue | Event | None = None
    last_revision: int = 0

    @classmethod
    def of(cls, listing: Listing) -> Self:
        """Return where a listing leads."""
        last = max(listing.items, key=lambda item: item.mod_revision, default=None)
        return cls(listing.revision, last, listing.revision)

    def then(self, changes: Changes) -> "_Delivered":
        """Return where changes lead from here."""
        puts = [event for event in changes.events if event.value is not None]
        if not puts:
            return replace(self, revision=changes.revision)
        return _Delivered(changes.revision, puts[-1], puts[-1].mod_revision)


async def watch(
    prefix: str, endpoints: Endpoints, clock: Clock, list_prefix: Callable[[str], Awaitable[Listing]]
) -> AsyncGenerator[Listing | Changes, None]:
    """Yield a Listing of the prefix, then its Changes, for ever, as `Store.watch` promises.

    An etcd out of reach is waited for. Raise only what etcd refuses for another reason (INTERNAL).
    """
    delivered: _Delivered | None = None
    restored = False
    delays = endpoints.delays()
    while True:
        endpoint = endpoints.current
        try:
            if delivered is None:
                listing = replace(await list_prefix(prefix), restored=restored)
                delivered, restored = _Delivered.of(listing), False
                yield listing
            async with aclosing(_follow(prefix, delivered, endpoint, endpoints.timeout_s, clock)) as stream:
                async for changes in stream:
                    delivered = delivered.then(changes)
                    delays = endpoints.delays()
                    yield changes
        except CompactedError:
            delivered = None
        except _RestoredError:
            _log.warning("watch on %s: etcd has not what it had; it was restored from a backup", prefix)
            delivered, restored = None, True
            await clock.sleep(next(delays))
        except VfleetError as error:
            if error.reason is not Reason.STORE_UNAVAILABLE:
                raise
            _log.warning("watch on %s waits: %s", prefix, error)
            await clock.sleep(next(delays))
        except _BrokenError as error:
            _log.info("watch on %s resumes: %s: %s", prefix, endpoint.address, error)
            endpoints.leave(endpoint)
            await clock.sleep(next(delays))


async def _follow(
    prefix: str, delivered: _Delivered, endpoint: Endpoint, timeout_s: float, clock: Clock
) -> AsyncGenerator[Changes, None]:
    """Yield what changed after `delivered`, from one stream. Raise _BrokenError when it ends, CompactedError.

    Raise _RestoredError before anything else if etcd has not what was delivered.

    A server that is alive answers the progress requests, so twice the time between them without a word is too long.
    Their answers say nothing about revisions here: before etcd 3.4.25 and 3.5.8 they could overtake events.
    """
    if not await endpoint.connected(timeout_s):
        raise _BrokenError("no connection")
    revision = delivered.revision
    call = endpoint.watch.Watch(_requests(prefix, revision, timeout_s, clock), metadata=REQUIRE_LEADER)
    responses = aiter(call)
    try:
        while True:
            async with asyncio.timeout(2 * timeout_s):
                response = await anext(responses)
            if response.created:
                # Only now: the stream ends with the process that has answered this.
                await _check_restored(delivered, endpoint, timeout_s)
            _check(response, revision)
            # etcd puts all events of a revision into one response, unless asked to fragment.
            events = tuple(_event(event) for event in response.events if event.kv.mod_revision > revision)
            if events:
                revision = events[-1].mod_revision
                yield Changes(revision, events)
    except grpc.aio.AioRpcError as error:
        raise _BrokenError(error.details() or error.code().name) from None
    except StopAsyncIteration:
        raise _BrokenError("etcd ended the stream") from None
    except asyncio.CancelledError:
        if cancellation.is_asked_for():
            raise
        raise _BrokenError("its channel was closed") from None
    except TimeoutError:
        raise _BrokenError(f"silent for {2 * timeout_s:.1f} s") from None
    finally:
        call.cancel()


async def _requests(prefix: str, delivered: int, timeout_s: float, clock: Clock) -> AsyncIterator[etcdrpc.WatchRequest]:
    # It starts at, not after, what was delivered: since 3.5.8 a watch from a future revision gets no progress answers.
    create = etcdrpc.WatchCreateRequest(key=prefix.encode(), range_end=range_end(prefix), start_revision=delivered)
    yield etcdrpc.WatchRequest(create_request=create)
    while True:
        await clock.sleep(timeout_s)
        yield etcdrpc.WatchRequest(progress_request=etcdrpc.WatchProgressRequest())


async def _check_restored(delivered: _Delivered, endpoint: Endpoint, timeout_s: float) -> None:
    """Raise _RestoredError if etcd has not what was delivered last, CompactedError if it can't be asked any more."""
    last = delivered.last
    if last is None:
        return
    request = etcdrpc.RangeRequest(key=last.key.encode(), revision=delivered.last_revision)
    try:
        response = await endpoint.kv.Range(request, timeout=timeout_s, metadata=REQUIRE_LEADER)
    except grpc.aio.AioRpcError as error:
        if error.details() == COMPACTED:
            raise CompactedError from None
        if error.details() == FUTURE:
            raise _RestoredError from None
        raise
    found = [(int(kv.create_revision), int(kv.mod_revision), bytes(kv.value)) for kv in response.kvs]
    if found != [(last.create_revision, last.mod_revision, last.value)]:
        raise _RestoredError


def _check(response: etcdrpc.WatchResponse, delivered: int) -> None:
    if response.compact_revision:
        raise CompactedError
    if response.canceled:
        raise _BrokenError(response.cancel_reason or "etcd cancelled the watch")
    if response.created and response.header.revision < delivered:
        # A member that lags, or, if nothing was delivered by which to tell, an etcd restored from a backup: a listing,
        # being linearizable, is right for both.
        raise CompactedError


def _event(event: kv_pb2.Event) -> Event:
    kv = event.kv
    value = None if event.type == _DELETE else bytes(kv.value)
    return Event(key_text(kv.key), value, int(kv.create_revision), int(kv.mod_revision))
