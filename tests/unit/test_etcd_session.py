"""A session against a store whose answers, and a clock whose time, the test decides."""

import asyncio
from collections.abc import Callable

import pytest

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.session import Session

TTL_S = 9


class ManualClock:
    """Time passes when the test says so; sleepers wake when their time has come."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self._sleepers.append((self.now + seconds, event))
        await event.wait()

    async def advance(self, seconds: float) -> None:
        self.now += seconds
        for due in [sleeper for sleeper in self._sleepers if sleeper[0] <= self.now]:
            self._sleepers.remove(due)
            due[1].set()
        for _ in range(10):
            await asyncio.sleep(0)


class LeaseStore:
    """The leases of a store: `answer` says what becomes of each renewal."""

    def __init__(self) -> None:
        self.granted: list[int] = []
        self.renewed: list[int] = []
        self.revoked: list[int] = []
        self.answer: Callable[[], bool] = lambda: True
        self.gate: asyncio.Event | None = None

    @property
    def renewals(self) -> int:
        return len(self.renewed)

    async def grant_lease(self, ttl_s: int) -> int:
        self.granted.append(ttl_s)
        return 7

    async def keep_lease_alive(self, lease: int) -> bool:
        self.renewed.append(lease)
        if self.gate is not None:
            await self.gate.wait()
        return self.answer()

    async def revoke_lease(self, lease: int) -> None:
        self.revoked.append(lease)


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def leases():
    return LeaseStore()


@pytest.fixture
async def session(clock, leases):
    async with await Session.open(leases, clock, TTL_S) as session:
        await clock.advance(0)
        yield session


def unavailable() -> bool:
    raise VfleetError(Reason.STORE_UNAVAILABLE, "etcd did not answer")


async def test_is_renewed_every_third_of_its_ttl(clock, leases, session):
    for n in range(1, 13):
        await clock.advance(TTL_S / 3)
        assert leases.renewals == n
        session.check()


async def test_keeps_the_lease_that_it_was_granted_and_is_no_busier_than_that(clock, leases, session):
    assert leases.granted == [TTL_S]
    for _ in range(4 * TTL_S):
        await clock.advance(0.25)
    assert leases.renewed == [7] * 3


async def test_tells_who_waits_for_its_loss_when_its_ttl_is_over_and_not_later(clock, leases, session):
    leases.answer = unavailable
    await clock.advance(TTL_S - 0.5)
    assert not session.lost.is_set()
    await clock.advance(0.5)
    assert session.lost.is_set()


async def test_is_lost_when_etcd_never_answers(clock, leases, session):
    """The wait for an answer is on the event loop's clock: here for the 64th of a second that is left."""
    leases.answer = unavailable
    for _ in range(16):
        await clock.advance(0.5)
    leases.gate = asyncio.Event()
    renewals = leases.renewals
    await clock.advance(1 - 1 / 64)
    assert leases.renewals == renewals + 1
    clock.now += 1 / 64
    async with asyncio.timeout(20):
        await session.lost.wait()


async def test_is_lost_when_etcd_says_so(clock, leases, session):
    leases.answer = lambda: False
    await clock.advance(TTL_S / 3)
    assert session.lost.is_set()
    with pytest.raises(VfleetError) as lost:
        session.check()
    assert lost.value.reason is Reason.CONFLICT
    assert lost.value.message == "lease 7 is lost: work under it has ended"
    assert lost.value.metadata == {"lease": "7"}


async def test_is_lost_when_nothing_was_confirmed_for_its_ttl(clock, leases, session):
    leases.answer = unavailable
    for _ in range(8):
        await clock.advance(1)
    assert leases.renewals > 2
    assert not session.is_lost
    await clock.advance(1)
    assert session.lost.is_set()


async def test_its_ttl_counts_from_when_the_renewal_was_sent(clock, leases, session):
    leases.gate = asyncio.Event()
    await clock.advance(3)
    await clock.advance(4)
    leases.gate.set()
    await clock.advance(0)
    leases.answer = unavailable
    await clock.advance(TTL_S - 4 - 0.5)
    assert not session.is_lost
    await clock.advance(0.5)
    assert session.is_lost


async def test_a_holder_that_makes_no_progress_loses_it(clock, leases):
    alive = True
    async with await Session.open(leases, clock, TTL_S, lambda: alive) as session:
        await clock.advance(0)
        await clock.advance(3)
        assert leases.renewals == 1
        alive = False
        for _ in range(9):
            await clock.advance(1)
        assert leases.renewals == 1
        assert session.lost.is_set()


async def test_knows_at_once_after_a_stop_before_any_task_ran(clock, session):
    clock.now += TTL_S
    assert session.is_lost
    assert session.lost.is_set()


async def test_a_renewal_confirmed_too_late_does_not_bring_it_back(clock, leases, session):
    leases.gate = asyncio.Event()
    await clock.advance(3)
    clock.now += TTL_S - 3
    assert session.is_lost
    leases.gate.set()
    await clock.advance(0)
    assert session.is_lost
    assert session.lost.is_set()


async def test_closing_revokes_and_ends_it(clock, leases):
    session = await Session.open(leases, clock, TTL_S)
    await session.close()
    assert leases.revoked == [7]
    assert session.is_lost


async def test_closing_without_etcd_leaves_the_lease_to_expire(clock, leases, caplog):
    session = await Session.open(leases, clock, TTL_S)

    async def refuse(lease: int) -> None:
        unavailable()

    leases.revoke_lease = refuse
    await session.close()
    assert "left to expire" in caplog.text


async def test_a_ttl_of_a_second_will_do(clock, leases):
    async with await Session.open(leases, clock, 1) as session:
        session.check()


async def test_a_ttl_below_a_second_is_refused(clock, leases):
    with pytest.raises(VfleetError, match="ttl_s is 0; expected at least 1 second"):
        await Session.open(leases, clock, 0)
