r"""The rest of a function's state, after the lift: fetched for accesses that wait, and all else in the background.

    the instance runs -> pages asked for, one request each -\
                      -> all others, one part after another +-> all is here -> its source may be scrubbed
    its source is gone for good before that -> the function is LOST, in etcd; then the instance goes

The source keeps its stopped instance until this host has said that all has arrived. A request that fails is made again,
for ever, unless etcd, or the source itself, says that what it asks for is no more. Nothing is fetched before the
instance runs: until then the migration may abort, and the wire is needed for what the driver waits for.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from random import Random

from hostd.arrival import FETCH_PAGES, Arrival
from hostd.functions import Functions
from hostd.history import History
from hostd.instance import Instance
from hostd.state_stream import bad_state, check_pages
from hostd.traffic import Traffic
from vfleet import failpoint, log
from vfleet.address import PAGE_BYTES
from vfleet.clock import Clock, backoff_delays
from vfleet.decision import lose_function
from vfleet.errors import Reason, VfleetError, not_found
from vfleet.etcd.keys import ENTRIES, function_key, host_key, registration_key
from vfleet.etcd.records import decode
from vfleet.etcd.store import Compare, Store, absent, unchanged, value_is
from vfleet.principal import server_name
from vfleet.roles import Role
from vfleet.rpc import Channels, stream
from vfleet.v1.records_pb2 import FUNCTION_STATUS_ACTIVE, FUNCTION_STATUS_LOST, Function
from vfleet.v1.records_pb2 import Host as HostRecord
from vfleet.v1.transfer_service_pb2 import (
    FetchStateRequest,
    StatePages,
    WatchArrivalRequest,
    WatchArrivalResponse,
)
from vfleet.v1.transfer_service_pb2_grpc import TransferServiceStub

FETCH_TIMEOUT_S = 2.0  # of pages that an access waits for
SILENCE_S = 5.0  # of the stream of all others; at 1 MiB/s a chunk takes 0.25 s
RETRY_FIRST_S = 0.01
RETRY_LONGEST_S = 1.0
MAX_FETCHES = 8
PUSH_PAGES = 16384  # asked for at once: what is done for a request does not grow with the function
PUSH_AFTER_S = 0.05  # the accesses that waited during the hold come first
TELL_S = 0.1

# What the source's own host answers when it has no such instance any more.
_NO_MORE = frozenset({Reason.NOT_FOUND, Reason.WRONG_GENERATION})

_log = logging.getLogger(__name__)


class Rest:
    """Completes the instances of a host whose state is still arriving."""

    def __init__(
        self,
        host: str,
        incarnation: str,
        functions: Functions,
        history: History,
        channels: Channels,
        store: Store,
        clock: Clock,
        random: Random,
        traffic: Traffic,
    ) -> None:
        self._host = host
        self._incarnation = incarnation
        self._functions = functions
        self._history = history
        self._channels = channels
        self._store = store
        self._clock = clock
        self._random = random
        self._traffic = traffic

    async def run(self) -> None:
        """Complete whatever is arriving, and will be, for ever."""
        begun: set[Instance] = set()
        async with asyncio.TaskGroup() as group:
            while True:
                self._functions.arrivals_changed.clear()
                begun = {instance for instance in begun if instance.arrival is not None and not instance.is_closed}
                for instance in self._functions.instances():
                    if instance.arrival is not None and instance not in begun:
                        begun.add(instance)
                        group.create_task(self._complete(instance, instance.arrival))
                await self._functions.arrivals_changed.wait()

    async def _complete(self, instance: Instance, arrival: Arrival) -> None:
        about = instance.about
        log.bind(function=about.function, attempt=log.attempt_text(about.attempt))
        # One that has a fault since does not serve, but is the home still.
        while not (instance.has_run or instance.is_closed):
            await instance.changed.wait()
        if instance.is_closed:
            return
        with self._functions.open_image(instance) as file:
            arrival.through(file)
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(work(instance, arrival)) for work in (self._push, self._answer)]
                while arrival.missing_pages and not arrival.is_over:
                    await arrival.news()
                for task in tasks:
                    task.cancel()
            arrival.through(None)
        if not instance.is_closed:
            self._functions.complete_arrival(instance)
            _log.info("all of function %s has arrived", about.function)

    async def _push(self, instance: Instance, arrival: Arrival) -> None:
        """Take everything that is missing, part by part, begun again whenever a stream breaks."""
        await self._clock.sleep(PUSH_AFTER_S)
        delays = self._delays()
        pages = arrival.pages
        while not arrival.is_over:
            missing = arrival.missing_pages
            try:
                for start in range(pages.start, pages.stop, PUSH_PAGES):
                    await self._push_part(instance, arrival, range(start, min(start + PUSH_PAGES, pages.stop)))
            except VfleetError as error:
                await self._failed(instance, error)
            if arrival.missing_pages < missing:
                delays = self._delays()
            await self._clock.sleep(next(delays))

    async def _push_part(self, instance: Instance, arrival: Arrival, pages: range) -> None:
        if arrival.is_over or arrival.is_all_there(pages):
            return
        request = self._request(instance, pages.start, len(pages))
        request.arrived = arrival.as_bits(pages)
        request.bandwidth_bytes_per_s = instance.record.rest_source.bandwidth_bytes_per_s
        await self._take(instance, arrival, request, SILENCE_S, bulk=True)

    async def _answer(self, instance: Instance, arrival: Arrival) -> None:
        """Fetch what is asked for, a few at once."""
        fetching: dict[int, asyncio.Task[None]] = {}
        try:
            while not arrival.is_over:
                arrival.asked.clear()
                for block in sorted(arrival.wanted - fetching.keys())[: MAX_FETCHES - len(fetching)]:
                    fetching[block] = asyncio.create_task(self._fetch(instance, arrival, block))
                asked = asyncio.ensure_future(arrival.asked.wait())
                try:
                    await asyncio.wait((asked, *fetching.values()), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    asked.cancel()
                for block, task in list(fetching.items()):
                    if task.done():
                        task.result()
                        # Who waits asks at all that arrives: until now it was on its way.
                        arrival.wanted.discard(block)
                        del fetching[block]
        finally:
            for task in fetching.values():
                task.cancel()
            await asyncio.gather(*fetching.values(), return_exceptions=True)

    async def _fetch(self, instance: Instance, arrival: Arrival, block: int) -> None:
        first = max(block * FETCH_PAGES, arrival.pages.start)
        count = min((block + 1) * FETCH_PAGES, arrival.pages.stop) - first
        request = self._request(instance, first, count)
        for delay_s in self._delays():
            if arrival.is_over or not arrival.is_missing([(request.image_offset, request.length_bytes)]):
                return
            try:
                await self._take(instance, arrival, request, FETCH_TIMEOUT_S)
            except VfleetError as error:
                await self._failed(instance, error)
                await self._clock.sleep(delay_s)

    def _request(self, instance: Instance, first: int, count: int) -> FetchStateRequest:
        return FetchStateRequest(
            attempt=instance.about.attempt,
            function=instance.about.function,
            generation=instance.record.rest_source.generation,
            image_offset=first * PAGE_BYTES,
            length_bytes=count * PAGE_BYTES,
        )

    async def _take(
        self, instance: Instance, arrival: Arrival, request: FetchStateRequest, silence_s: float, *, bulk: bool = False
    ) -> None:
        """Take the pages asked for. Raise UNREACHABLE if none comes for `silence_s`, or what the source answers."""
        source = instance.record.rest_source
        method = TransferServiceStub(
            self._channels.to(source.address, server_name(Role.HOST, source.host), bulk=bulk)
        ).FetchState
        responses = stream(method, request, address=source.address, incarnation=source.incarnation)
        first = request.image_offset // PAGE_BYTES
        asked_for = range(first, first + request.length_bytes // PAGE_BYTES)
        try:
            while True:
                async with asyncio.timeout(silence_s):
                    response = await anext(responses, None)
                if response is None:
                    return
                if arrival.is_over:
                    return
                _check_asked_for(instance, response.pages, asked_for)
                self._traffic.state_bytes += len(response.pages.data)
                failpoint.reach("hostd.arrive")
                arrival.take(
                    response.pages.image_offset // PAGE_BYTES,
                    response.pages.data,
                    response.pages.zero_bytes // PAGE_BYTES,
                )
        except TimeoutError:
            message = f"{source.address} sent no page of function {request.function!r} for {silence_s:g} s"
            raise VfleetError(Reason.UNREACHABLE, message) from None
        finally:
            await responses.aclose()

    async def _failed(self, instance: Instance, error: VfleetError) -> None:
        """Take it that pages did not come; say LOST if they never will."""
        _log.warning("function %s waits for its state: %s", instance.about.function, error.message)
        try:
            await self._say_lost_if_gone(instance, has_none=error.reason in _NO_MORE)
        except VfleetError as unknown:
            _log.warning(
                "function %s: it can't be said what became of its source: %s", instance.about.function, unknown
            )

    async def _say_lost_if_gone(self, instance: Instance, *, has_none: bool) -> None:
        await self._history.check(self._store)
        about = instance.about
        gone = await self._source_is_gone(instance, has_none=has_none)
        stored = await self._store.get(function_key(about.function))
        if gone is None or stored is None or instance.is_closed:
            return
        function = decode(Function, stored)
        is_home = (function.identity, function.generation, function.device, function.vf_index) == (
            about.identity,
            about.generation,
            about.device,
            about.vf_index,
        )
        if not is_home:
            return
        if function.status == FUNCTION_STATUS_ACTIVE:
            still_this_one = value_is(registration_key(self._host), self._incarnation.encode())
            entries = (await self._store.list(ENTRIES)).items
            loss = lose_function(function, stored.mod_revision, entries, *gone, still_this_one)
            with failpoint.around("hostd.lose"):
                if not (await self._store.commit(loss)).succeeded:
                    return
            _log.error("function %s was lost: part of its state was still at its source", about.function)
        elif function.status != FUNCTION_STATUS_LOST:
            return
        if not instance.is_closed:
            self._functions.remove(instance)

    async def _source_is_gone(self, instance: Instance, *, has_none: bool) -> tuple[Compare, ...] | None:
        """Return by what etcd, or the source, says that the state there is no more; None if it may be there."""
        source = instance.record.rest_source
        registered = await self._store.get(registration_key(source.host))
        if registered is not None:
            if registered.value.decode() != source.incarnation:
                return (value_is(registration_key(source.host), registered.value),)
        else:
            stored = await self._store.get(host_key(source.host))
            if stored is None:
                return (absent(host_key(source.host)), absent(registration_key(source.host)))
            if decode(HostRecord, stored).incarnation != source.incarnation:
                return (unchanged(host_key(source.host), stored.mod_revision),)
        return () if has_none else None

    def _delays(self) -> Iterator[float]:
        return backoff_delays(self._random, RETRY_FIRST_S, RETRY_LONGEST_S)


async def watch_arrival(
    functions: Functions, clock: Clock, request: WatchArrivalRequest
) -> AsyncGenerator[WatchArrivalResponse, None]:
    """Yield how much of an instance's state is missing, until nothing is (WatchArrival in the contract).

    Raise STALE_ATTEMPT, WRONG_GENERATION, or NOT_FOUND, also when the function is lost meanwhile.
    """
    instance = functions.conclude(request)
    while (arrival := instance.arrival) is not None:
        if arrival.missing_pages:
            yield WatchArrivalResponse(missing_bytes=arrival.missing_pages * PAGE_BYTES)
        if not arrival.is_over:
            await arrival.news()
            # That all is here counts once it is durable.
            await clock.sleep(TELL_S if arrival.missing_pages else 0)
        elif instance.is_closed:
            break
    if instance.is_closed:
        raise not_found("function", request.function)
    yield WatchArrivalResponse()


def _check_asked_for(instance: Instance, pages: StatePages, asked_for: range) -> None:
    """Raise BAD_STATE unless pages are whole, and some of those asked for."""
    check_pages(instance, pages)
    count = len(pages.data) // PAGE_BYTES or pages.zero_bytes // PAGE_BYTES
    first = pages.image_offset // PAGE_BYTES
    is_one = bool(pages.data) != bool(pages.zero_bytes) and not pages.zero_bytes % PAGE_BYTES
    if not is_one or first < asked_for.start or first + count > asked_for.stop:
        raise bad_state(instance, f"pages at {pages.image_offset:#x} were not asked for")
