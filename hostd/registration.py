"""This host in etcd: its record, its claim on a segment number, its registration under a lease; and what etcd says.

The order at a start: reload from the ledger, reconcile with etcd, then register. So nobody plans on a host that does
not know yet what was decided while it was away. A registration that is lost is made anew, in the same order; one that
is found in an etcd that was restored from a backup is given up until the fleet generation is raised.

That etcd has no record of something proves nothing: what is here goes only by a word that says so.
"""

import logging
from collections.abc import Callable, Sequence
from random import Random

from hostd.drivers import Drivers
from hostd.functions import Functions
from hostd.history import History
from hostd.resolution import Resolver
from hostd.translation import Entry
from vfleet.clock import Clock, backoff_delays
from vfleet.decision import lose_function
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import (
    DRIVERS,
    ENTRIES,
    FLEET_GENERATION,
    FUNCTIONS,
    SLOTS,
    entries_prefix,
    entry_key,
    host_key,
    registration_key,
    segment_key,
    witness_key,
)
from vfleet.etcd.records import decode, decode_if_possible, encode
from vfleet.etcd.session import Session
from vfleet.etcd.store import (
    Changes,
    Delete,
    Event,
    KeyValue,
    Listing,
    Put,
    Store,
    Transaction,
    absent,
    unchanged,
    value_is,
)
from vfleet.names import host_of
from vfleet.v1.records_pb2 import (
    FUNCTION_STATUS_ACTIVE,
    Driver,
    Function,
    Host,
)
from vfleet.v1.types_pb2 import TableEntry

RETRY_FIRST_S = 0.1
RETRY_LONGEST_S = 2.0
WITNESS_PAUSE_S = 1.0  # at least, between two writes of the witness
LOOK_S = 10.0

_log = logging.getLogger(__name__)


class Registration:
    """Keeps this host registered, and its state reconciled with etcd."""

    def __init__(
        self,
        host: Host,
        functions: Functions,
        drivers: Drivers,
        resolver: Resolver,
        history: History,
        store: Store,
        clock: Clock,
        random: Random,
        lease_ttl_s: int,
    ) -> None:
        self._host = host
        self._functions = functions
        self._drivers = drivers
        self._resolver = resolver
        self._history = history
        self._must_read_anew = False
        self._session: Session | None = None
        self._store = store
        self._clock = clock
        self._random = random
        self._lease_ttl_s = lease_ttl_s

    async def claim_segment(self) -> None:
        """Claim the segment number for this host, for good. Raise SEGMENT_TAKEN if it is another host's.

        A host may change its segment, by its topology, while it has no functions and no drivers; else IN_USE is raised.
        """
        claim_key = segment_key(self._host.segment)
        claim = await self._store.get(claim_key)
        if claim is not None and claim.value.decode() != self._host.name:
            raise VfleetError(
                Reason.SEGMENT_TAKEN,
                f"segment {self._host.segment} of host {self._host.name!r} is claimed by host {claim.value.decode()!r}",
                metadata={"segment": str(self._host.segment), "host": claim.value.decode()},
            )
        stored = await self._store.get(host_key(self._host.name))
        before = decode(Host, stored).segment if stored is not None else self._host.segment
        if before != self._host.segment:
            await self._check_unused(before)
        transaction = Transaction(
            compares=(
                absent(claim_key) if claim is None else unchanged(claim_key, claim.mod_revision),
                unchanged(host_key(self._host.name), stored.mod_revision if stored is not None else 0),
            ),
            writes=(
                Put(claim_key, self._host.name.encode()),
                # A record that is right so far is left to the registration: it may be that of a namesake at work.
                *(
                    ()
                    if before == self._host.segment
                    else (Put(host_key(self._host.name), encode(self._host)), Delete(segment_key(before)))
                ),
            ),
        )
        if not (await self._store.commit(transaction)).succeeded:
            # Somebody claimed at the same moment; now it can be seen who.
            await self.claim_segment()

    async def run(self, registered: Callable[[], None]) -> None:
        """Keep the host registered, for ever. `registered` is told each time that it is.

        Raise ALREADY_EXISTS if, for longer than a lease can last, another machine is registered under the host's name
        and this one never was.
        """
        delays = backoff_delays(self._random, RETRY_FIRST_S, RETRY_LONGEST_S)
        give_up_s, was_registered = self._clock.monotonic() + 2 * self._lease_ttl_s + 1, False
        while True:
            try:
                await self._check_alone()
                await self.reconcile()
                async with await Session.open(self._store, self._clock, self._lease_ttl_s) as session:
                    await self._register(session)
                    self._session = session
                    await self._say_what_is_lost()
                    registered()
                    was_registered = True
                    delays = backoff_delays(self._random, RETRY_FIRST_S, RETRY_LONGEST_S)
                    await session.lost.wait()
                _log.warning("the registration of host %s was lost", self._host.name)
            except VfleetError as error:
                is_late = not was_registered and self._clock.monotonic() > give_up_s
                if error.reason is Reason.ALREADY_EXISTS and is_late:
                    raise
                _log.warning("host %s can't be registered: %s", self._host.name, error)
            await self._clock.sleep(next(delays))

    async def follow_entries(self) -> None:
        """Keep the tables of this host's drivers equal to etcd, for ever."""
        async for update in self._store.watch(entries_prefix(self._host.name)):
            await self._take(update)

    async def follow_generation(self) -> None:
        """Begin a new order of revisions whenever the fleet generation is raised, for ever."""
        async for _ in self._store.watch(FLEET_GENERATION):
            await self._agree()

    async def keep_witness(self) -> None:
        """Write the witness anew after what must not be forgotten, else see now and then that etcd has it, for ever.

        In a restored etcd this host's earlier registration, and its lease, may be alive.
        """
        looked_s = self._clock.monotonic()
        while True:
            await self._clock.sleep(WITNESS_PAUSE_S)
            session, is_due, now_s = self._session, self._history.is_due, self._clock.monotonic()
            if session is None or session.is_lost or not (is_due or now_s >= looked_s + LOOK_S):
                continue
            looked_s = now_s
            await self._agree()
            if self._history.is_new:
                # The generation was raised. In a restored etcd the lease may be alive without the registration.
                await self._register(session)
            elif is_due:
                await self._history.write(self._store, Transaction((), ()))

    async def follow_witness(self) -> None:
        """See that etcd has the witness whenever a watch can't go on where it was, for ever."""
        async for update in self._store.watch(witness_key(self._host.name)):
            if isinstance(update, Listing) and self.is_registered:
                await self._agree()

    async def check(self) -> None:
        """Raise CONFLICT if etcd's word is nothing to act upon: it was restored, or is to be read anew."""
        await self._history.check(self._store)

    async def reconcile(self) -> None:
        """Make this host what etcd says: drivers and entries there, decisions carried out, what moved away gone."""
        await self._agree()
        self._make_recorded(await self._store.list(DRIVERS))
        await self._take(await self._store.list(entries_prefix(self._host.name)))
        await self._resolver.resolve_all()
        await self._reconcile_functions()

    async def _reconcile_functions(self) -> None:
        # The instances are read first: one that is made meanwhile may be of a function made anew.
        instances = self._functions.instances()
        listing = await self._store.list(FUNCTIONS)
        await self._agree()
        # Of two functions that had one name at different times, a record says nothing of the other.
        functions = (decode_if_possible(Function, item) for item in listing.items)
        records = {(function.name, function.identity): function for function in functions if function is not None}
        for instance in instances:
            about = instance.about
            record = records.get((about.function, about.identity))
            settled = not instance.record.resolve_time and not instance.is_closed
            if settled and record is not None and record.generation > about.generation:
                _log.warning(
                    "function %s lives elsewhere; its instance here goes",
                    about.function,
                    extra={"function": about.function},
                )
                self._functions.remove(instance)

    async def _say_what_is_lost(self) -> None:
        """Mark functions LOST that were at home here on an earlier machine. Only the registered machine may say so."""
        functions = await self._store.list(FUNCTIONS)
        lost = [item for item in functions.items if self._is_lost(decode_if_possible(Function, item))]
        entries = await self._store.list(ENTRIES) if lost else Listing(0, ())
        still_this_one = value_is(registration_key(self._host.name), self._host.incarnation.encode())
        for item in lost:
            name = item.key.removeprefix(FUNCTIONS)
            _log.error("function %s was lost with what its home held in memory", name, extra={"function": name})
            loss = lose_function(decode(Function, item), item.mod_revision, entries.items, still_this_one)
            if not (await self._store.commit(loss)).succeeded:
                raise VfleetError(Reason.CONFLICT, f"{item.key} changed while it was marked LOST")

    def _is_lost(self, function: Function | None) -> bool:
        if function is None:
            return False
        is_here = host_of(function.device) == self._host.name and function.status == FUNCTION_STATUS_ACTIVE
        # On the very machine that the record names nothing can be lost: there, the record is an old backup's.
        return is_here and function.incarnation != self._host.incarnation

    async def _agree(self) -> None:
        """End the session and raise CONFLICT if etcd was restored; after a raise of the generation, read it anew."""
        try:
            raised = await self._history.read(self._store)
        except VfleetError as error:
            if error.reason is Reason.CONFLICT and self._session is not None:
                self._session.lost.set()
            raise
        if raised is not None:
            _log.warning("the fleet generation is %d: etcd is read anew", raised.fleet_generation)
            self._must_read_anew = True
            self._drivers.forget_revisions()
            self._history.begin(raised)
        if self._must_read_anew:
            await self._follow(await self._store.list(entries_prefix(self._host.name)))
            self._must_read_anew = False

    @property
    def is_registered(self) -> bool:
        """Whether the registration is there, as far as this host's clock can tell."""
        return self._session is not None and not self._session.is_lost

    async def _take(self, update: Listing | Changes) -> None:
        if isinstance(update, Listing):
            await self._agree()
        else:
            self._history.saw(update.revision)
        await self._follow(update)

    async def _follow(self, update: Listing | Changes) -> None:
        self._history.took_over()
        if isinstance(update, Listing):
            read = [_entry(item) for item in update.items]
            entries = [entry for entry in read if entry is not None]
            await self._make_drivers(entries)
            # What can't be read may be what a driver here has: nobody is detached on its word.
            self._drivers.follow(entries, update.revision, complete=len(entries) == len(read))
            return
        written = (_written(event) for event in update.events)
        entries = [entry for item in written if item is not None and (entry := _entry(item)) is not None]
        await self._make_drivers(entries)
        self._drivers.follow(entries, update.revision, complete=False)
        for event in update.events:
            if event.value is None:
                _, driver, function = event.key.rsplit("/", 2)
                self._drivers.detach(driver, function, event.mod_revision)

    async def _make_drivers(self, entries: Sequence[TableEntry]) -> None:
        """Make the drivers that have entries and are not known yet: the watch may be faster than the coordinator."""
        if all(self._drivers.find(entry.driver) is not None for entry in entries):
            return
        self._make_recorded(await self._store.list(DRIVERS))

    def _make_recorded(self, listing: Listing) -> None:
        for driver in (decode_if_possible(Driver, item) for item in listing.items):
            if driver is not None and driver.host == self._host.name:
                try:
                    guest = driver.guest if driver.HasField("guest") else None
                    self._drivers.recorded(driver.name, driver.main_memory_bytes, guest)
                except VfleetError as error:
                    # One that a backup has forgotten may be in its way; the others don't wait for that.
                    _log.error("driver %s can't be made: %s", driver.name, error, extra={"driver": driver.name})

    async def _register(self, session: Session) -> None:
        """Register, in the place of nobody or of ourselves. Raise ALREADY_EXISTS while another incarnation is."""
        key = registration_key(self._host.name)
        incarnation = self._host.incarnation.encode()
        stored_host = await self._store.get(host_key(self._host.name))
        if stored_host is None:
            # The fleet has forgotten this host, and its segment may be another's by now.
            await self.claim_segment()
            stored_host = await self._store.get(host_key(self._host.name))
        writes = (
            Put(key, incarnation, session.lease),
            Put(host_key(self._host.name), encode(self._host)),
        )
        for mine in (absent(key), value_is(key, incarnation)):
            compares = (mine, unchanged(host_key(self._host.name), stored_host.mod_revision if stored_host else 0))
            if await self._history.write(self._store, Transaction(compares, writes)):
                return
        session.lost.set()
        raise self._already_exists()

    async def _check_alone(self) -> None:
        """Raise ALREADY_EXISTS while another incarnation is registered: etcd then has that one's witness."""
        stored = await self._store.get(registration_key(self._host.name))
        if stored is not None and stored.value != self._host.incarnation.encode():
            raise self._already_exists()

    def _already_exists(self) -> VfleetError:
        return VfleetError(
            Reason.ALREADY_EXISTS,
            f"another machine is registered as host {self._host.name!r}; expected none, or this one",
            metadata={"host": self._host.name},
        )

    async def _check_unused(self, segment: int) -> None:
        slots = await self._store.list(f"{SLOTS}{self._host.name}/")
        drivers = [decode(Driver, item) for item in (await self._store.list(DRIVERS)).items]
        if slots.items or any(driver.host == self._host.name for driver in drivers):
            raise VfleetError(
                Reason.IN_USE,
                f"host {self._host.name!r} has segment {segment} and still has functions or drivers; expected none"
                f" before it takes segment {self._host.segment}",
                metadata={"host": self._host.name, "segment": str(segment)},
            )


def _written(event: Event) -> KeyValue | None:
    if event.value is None:
        return None
    return KeyValue(event.key, event.value, event.create_revision, event.mod_revision)


def _entry(item: KeyValue) -> TableEntry | None:
    """Return a stored entry; None, after a line in the log, if it is none, or not that of its key."""
    entry = decode_if_possible(TableEntry, item)
    if entry is None:
        return None
    entry.revision = item.mod_revision
    try:
        Entry.from_proto(entry)
    except VfleetError as error:
        _log.error("passed over: the entry at %s: %s", item.key, error.message)
        return None
    if entry_key(entry.host, entry.driver, entry.function) != item.key:
        _log.error("passed over: the entry at %s is that of another key", item.key)
        return None
    return entry
