"""All guests of a host: each has a holder, which is started when the driver is attached and ends when it is detached.

                       VMM comes            holder ends
    [ WAITING ] ─────────────────► [ CONNECTED ] ──────► [ LOST ]      until it is detached
         ▲  └─ holder ends: another ─┘ VMM goes  │
         └───────────────────────────────────────┘

A connection to a holder that breaks, and the holder lives, is made again: what wasn't done is done then.

What has become of a guest is in etcd, in a key that only this host writes.
"""

import asyncio
import contextlib
import logging
from pathlib import Path

from hostd.dma_receiver import DmaReceiver
from hostd.driver import Driver
from hostd.drivers import Drivers
from hostd.guest import holder_link
from hostd.guest.guest import HolderVersionError, LiveGuest
from hostd.guest.holder_link import HolderGoneError, HolderLink
from hostd.ledger import Ledger
from vfleet.clock import Clock
from vfleet.errors import VfleetError
from vfleet.etcd.keys import guest_key, guests_prefix
from vfleet.etcd.store import Delete, Put, Store, Transaction
from vfleet.log import bind
from vfleet.v1.host_records_pb2 import GuestRecord
from vfleet.v1.types_pb2 import (
    GUEST_STATE_CONNECTED,
    GUEST_STATE_LOST,
    GuestState,
)

ANSWER_MARGIN_MS = 500
"""How long before the VMM gives up the holder answers by itself."""
RETRY_S = 1.0
RECONNECT_S = 0.05
"""From the end of a connection to the next: a holder that is about to end has done so by then."""

_KIND = "guest"
_ENDING = "ending guest"
_log = logging.getLogger(__name__)


class Guests:
    """The guests of a host, with holders whose files are in `directory`."""

    def __init__(
        self, host: str, drivers: Drivers, ledger: Ledger, store: Store, clock: Clock, directory: Path
    ) -> None:
        self._host = host
        self._drivers = drivers
        self._ledger = ledger
        self._store = store
        self._clock = clock
        self._directory = directory
        self._kept: dict[str, tuple[DmaReceiver, asyncio.Task[None]]] = {}  # by driver
        self._ending: set[str] = set()  # drivers whose holders end: none of them gets another before that
        self._must_tell = asyncio.Event()

    async def run(self) -> None:
        """Keep a holder for each guest that is attached, and none for others, for ever."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._tell_always())
                for name, record in self._ledger.items(_ENDING, GuestRecord):
                    self._begin_to_end(group, name, record)
                while True:
                    self._drivers.attachments_changed.clear()
                    self._follow(group)
                    await self._drivers.attachments_changed.wait()
        finally:
            self._kept.clear()
            self._ending.clear()

    def _follow(self, group: asyncio.TaskGroup) -> None:
        records = dict(self._ledger.items(_KIND, GuestRecord))
        for name in {**records, **self._kept}:
            driver = self._drivers.find(name)
            attachment = _attachment_of(driver) if driver is not None else None
            if attachment is None or (name in self._kept and self._kept[name][0] is not attachment):
                self._begin_to_end(group, name, records.get(name, GuestRecord()))
        for driver in self._drivers.all():
            attachment = _attachment_of(driver)
            if attachment is not None and driver.name not in self._ending and driver.name not in self._kept:
                task = group.create_task(self._keep(driver), name=f"guest {driver.name}")
                self._kept[driver.name] = attachment, task

    def _begin_to_end(self, group: asyncio.TaskGroup, name: str, record: GuestRecord) -> None:
        if name not in self._ending:
            self._ending.add(name)
            group.create_task(self._end(name, record), name=f"end guest {name}")

    async def _end(self, name: str, record: GuestRecord) -> None:
        """End the holder of a driver that is attached no more, or anew."""
        # Noted, so that nobody takes it for the holder of another attachment.
        self._ledger.put(_ENDING, name, record)
        if name in self._kept:
            _, task = self._kept.pop(name)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._end_holder(name)
        holder_link.forget(self._directory, name, record.socket)
        with self._ledger.together():
            self._ledger.delete(_KIND, name)
            self._ledger.delete(_ENDING, name)
        if (driver := self._drivers.find(name)) is not None:
            driver.guest_state = GuestState.GUEST_STATE_UNSPECIFIED
        self._must_tell.set()
        self._ending.discard(name)
        self._drivers.attachments_changed.set()

    async def _end_holder(self, name: str) -> None:
        while True:
            try:
                link = holder_link.connect(self._directory, name)
                if link is not None:
                    await link.quit()
                    await holder_link.until_reaped(self._directory, name, self._clock)
            except (VfleetError, OSError) as error:
                _log.error("the end of guest %s's holder is put off: %s", name, error)
                await self._clock.sleep(RETRY_S)
            else:
                return

    async def _keep(self, driver: Driver) -> None:
        """Serve a guest through its holder, for ever, or until its holder ends under a VMM."""
        bind(driver=driver.name, function=_function_of(driver))
        while True:
            record = self._ledger.get(_KIND, driver.name, GuestRecord) or GuestRecord()
            if record.lost:
                self._set(driver, GUEST_STATE_LOST)
                return
            link = None
            try:
                link = await self._link(driver, record)
                if link is None:
                    self._lose(driver, None)
                    return
                await self._serve(driver, link)
            except HolderVersionError as error:
                if not record.connected:
                    _log.warning("%s: it has no VMM, so it ends, and another takes its place", error)
                    await self._end_holder(driver.name)
                    continue
                # The ledger is not told: a hostd of the holder's version goes on with it.
                _log.error("%s: to this hostd the guest is lost; start the one before, or attach anew", error)
                driver.guest_state = GUEST_STATE_LOST
                self._must_tell.set()
                return
            except VfleetError as error:
                _log.error("the guest is begun anew: %s", error)
                await self._clock.sleep(RETRY_S)
            except Exception:  # noqa: BLE001  # a defect harms this guest, neither others nor the host
                _log.exception("the guest is begun anew")
                await self._clock.sleep(RETRY_S)
            finally:
                if link is not None:
                    link.close()

    async def _link(self, driver: Driver, record: GuestRecord) -> HolderLink | None:
        """Connect to the guest's holder, or start one. Return None if it has ended under a VMM."""
        link = holder_link.connect(self._directory, driver.name)
        if link is not None or record.connected:
            return link
        guest = driver.record.guest
        within_ms = guest.message_timeout_ms - ANSWER_MARGIN_MS
        # Noted first: a daemon that is killed in between has a holder that it must end.
        self._ledger.put(_KIND, driver.name, GuestRecord(socket=guest.socket))
        return await holder_link.start(self._directory, driver.name, guest.socket, within_ms, self._clock)

    async def _serve(self, driver: Driver, link: HolderLink) -> None:
        live = LiveGuest(driver, _function_of(driver), link, lambda state: self._set(driver, state))
        try:
            await live.run()
        except HolderGoneError:
            await self._clock.sleep(RECONNECT_S)
            with contextlib.suppress(OSError, ValueError):
                holder_link.reap(int((self._directory / f"{driver.name}.pid").read_text()))
            record = self._ledger.get(_KIND, driver.name, GuestRecord)
            if holder_link.is_there(self._directory, driver.name):
                _log.warning("the connection to the holder is broken, and made again")
            elif record is not None and record.connected:
                self._lose(driver, live)
        finally:
            live.end()

    def _lose(self, driver: Driver, live: LiveGuest | None) -> None:
        """Say that a guest's device is dead: its VMM never connects again."""
        _log.error("the holder has ended under its VMM: the device is dead; detach and attach anew")
        if live is not None:
            live.reset()
        self._set(driver, GUEST_STATE_LOST)

    def _set(self, driver: Driver, state: GuestState.ValueType) -> None:
        if driver.guest_state != state:
            driver.guest_state = state
            record = GuestRecord(
                socket=driver.record.guest.socket,
                connected=state == GUEST_STATE_CONNECTED,
                lost=state == GUEST_STATE_LOST,
            )
            self._ledger.put(_KIND, driver.name, record)
            self._must_tell.set()

    async def _tell_always(self) -> None:
        """Write to etcd what has become of the guests, whenever that changes."""
        told: dict[str, GuestState.ValueType] | None = None
        while True:
            self._must_tell.clear()
            try:
                if told is None:
                    items = (await self._store.list(guests_prefix(self._host))).items
                    told = {item.key.rpartition("/")[2]: GuestState.GUEST_STATE_UNSPECIFIED for item in items}
                await self._tell(told)
            except VfleetError as error:
                _log.warning("what has become of the guests could not be told: %s", error)
                await self._clock.sleep(RETRY_S)
            else:
                await self._must_tell.wait()

    async def _tell(self, told: dict[str, GuestState.ValueType]) -> None:
        drivers = [driver for name in self._kept if (driver := self._drivers.find(name)) is not None]
        states = {driver.name: driver.guest_state for driver in drivers if driver.guest_state}
        for name, state in states.items():
            if told.get(name) != state:
                put = Put(guest_key(self._host, name), GuestState.Name(state).encode())
                await self._store.commit(Transaction((), (put,)))
                told[name] = state
        for name in [name for name in told if name not in states]:
            await self._store.commit(Transaction((), (Delete(guest_key(self._host, name)),)))
            del told[name]


def _function_of(driver: Driver) -> str:
    """Return the function that a guest's driver is attached to; empty for another driver, or none."""
    if driver.guest_memory is None:
        return ""
    return next((function for function in driver.table.by_function if function), "")


def _attachment_of(driver: Driver) -> DmaReceiver | None:
    """Return what a guest's driver has for as long as it is attached; None for another driver, or none."""
    return driver.receivers.get(_function_of(driver))
