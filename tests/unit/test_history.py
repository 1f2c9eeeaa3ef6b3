"""What a host makes of an etcd that was restored from a backup, and of a raised fleet generation."""

import asyncio
from pathlib import Path
from random import Random

import pytest
from support.manual_clock import settle
from support.restorable_store import RestorableStore

from hostd.fence import Fences
from hostd.history import History
from hostd.ledger import Ledger
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import FLEET_GENERATION, witness_key
from vfleet.etcd.store import Put, Transaction, absent
from vfleet.v1.types_pb2 import Attempt

NOTHING = Transaction((), ())
KEY = witness_key("h1")


class World:
    def __init__(self, path: Path) -> None:
        self.path, self.etcd, self.random = path, RestorableStore(), Random(7)
        self.etcd.pass_revision(100)
        self.start()

    def start(self) -> None:
        """Start the daemon anew."""
        self.ledger = Ledger(self.path)
        self.fences = Fences(self.ledger)
        self.history = History("h1", self.ledger, self.fences, self.random)

    def kill(self) -> None:
        self.ledger.close()
        self.start()

    async def write(self) -> bool:
        return await self.history.write(self.etcd, NOTHING)

    async def write_and_lose(self, fate: str) -> None:
        self.etcd.fate = fate
        with pytest.raises(VfleetError, match="lost"):
            await self.write()

    async def witness(self) -> str:
        stored = await self.etcd.get(KEY)
        return stored.value.decode() if stored is not None else ""

    async def is_restored(self) -> bool:
        try:
            await self.history.read(self.etcd)
        except VfleetError as error:
            return error.reason is Reason.CONFLICT and "bump-generation" in error.message
        return False


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_revisions_that_grow_are_nothing_special(world: World) -> None:
    assert await world.history.read(world.etcd) is None
    assert await world.history.read(world.etcd) is None
    world.etcd.pass_revision(101)
    assert await world.history.read(world.etcd) is None
    assert world.history.generation == 1


@pytest.mark.parametrize("how", ["read", "told", "attempt", "restarted"])
async def test_an_etcd_behind_what_was_seen_is_not_believed_however_it_was_seen(world: World, how: str) -> None:
    earlier = world.etcd.back_up()
    world.etcd.pass_revision(150)
    await world.history.read(world.etcd)
    if how in ("told", "attempt"):
        world.etcd.pass_revision(199)
        earlier = world.etcd.back_up()
    if how == "told":
        world.history.saw(200)
    elif how == "attempt":
        world.fences.prepare("vf1", Attempt(fleet_generation=1, revision=200))
    world.etcd.restore(earlier)
    if how == "restarted":
        world.kill()
    assert await world.is_restored()
    with pytest.raises(VfleetError):
        await world.history.check(world.etcd)
    with pytest.raises(VfleetError):
        await world.write()


async def test_a_raised_generation_begins_a_new_order(world: World) -> None:
    world.history.saw(5)
    world.etcd.pass_revision(200)
    await world.history.read(world.etcd)
    world.etcd.state.revision = 49
    world.etcd.put(FLEET_GENERATION, "2")
    raised = await world.history.read(world.etcd)
    assert raised is not None
    assert (raised.fleet_generation, raised.revision) == (2, 50)
    with pytest.raises(VfleetError, match="raised"):
        await world.history.check(world.etcd)
    with pytest.raises(VfleetError, match="raised"):
        await world.write()
    world.kill()
    assert await world.history.read(world.etcd) == raised
    world.history.begin(raised)
    assert world.history.generation == 2
    await world.history.check(world.etcd)
    world.history.saw(40)
    assert not await world.is_restored()
    world.etcd.state.revision = 49
    assert await world.is_restored()
    world.etcd.put(FLEET_GENERATION, "1")
    world.etcd.pass_revision(1000)
    assert await world.is_restored()


# The witness


@pytest.mark.parametrize("is_killed", [False, True])
async def test_an_etcd_that_lacks_the_witness_is_not_believed_however_far_it_has_come(
    world: World, is_killed: bool
) -> None:
    await world.write()
    backup = world.etcd.back_up()
    world.fences.prepare("vf1", Attempt(fleet_generation=1, revision=90))
    assert await world.write()
    world.etcd.restore(backup)
    world.etcd.pass_revision(1000)
    if is_killed:
        world.kill()
    assert await world.is_restored()
    with pytest.raises(VfleetError):
        await world.write()
    world.etcd.put(FLEET_GENERATION, "2")
    raised = await world.history.read(world.etcd)
    assert raised is not None
    world.history.begin(raised)
    # Any witness will do now, until this host has written its own again, which is due.
    assert await world.history.read(world.etcd) is None
    assert world.history.is_due
    backup = world.etcd.back_up()
    assert await world.write()
    world.etcd.restore(backup)
    world.etcd.pass_revision(2000)
    assert await world.is_restored()


async def test_a_witness_that_is_gone_is_missed(world: World) -> None:
    backup = world.etcd.back_up()
    await world.write()
    world.etcd.restore(backup)
    world.etcd.pass_revision(1000)
    assert await world.is_restored()


async def test_a_backup_that_has_the_witness_has_forgotten_nothing_of_this_host(world: World) -> None:
    await world.write()
    backup = world.etcd.back_up()
    world.etcd.put("/elsewhere", "")
    world.etcd.restore(backup)
    world.etcd.pass_revision(1000)
    assert not await world.is_restored()


async def test_a_machine_that_knows_no_witness_takes_what_is_there(world: World) -> None:
    world.etcd.put(KEY, "of-the-machine-before")
    assert not await world.is_restored()
    assert await world.write()
    world.etcd.put(KEY, "of-another-machine")
    assert await world.is_restored()


async def test_every_witness_is_another(world: World) -> None:
    seen = set()
    for _ in range(5):
        await world.write()
        seen.add(await world.witness())
    assert len(seen) == 5


@pytest.mark.parametrize("is_killed", [False, True])
@pytest.mark.parametrize("fate", ["before", "after", "late"])
async def test_a_write_whose_answer_is_lost_is_known_either_way(world: World, fate: str, is_killed: bool) -> None:
    await world.write()
    first = await world.witness()
    await world.write_and_lose(fate)
    assert (await world.witness() == first) == (fate != "after")
    if is_killed:
        world.kill()
    assert not await world.is_restored()
    world.etcd.arrive()
    assert not await world.is_restored()
    assert await world.write()
    assert not await world.is_restored()


async def test_a_late_write_that_arrives_under_the_next_is_no_others(world: World) -> None:
    await world.write()
    await world.write_and_lose("late")
    commit = world.etcd.commit

    async def overtaken(transaction: Transaction):
        world.etcd.arrive()
        return await commit(transaction)

    world.etcd.commit = overtaken
    assert not await world.write()
    world.etcd.commit = commit
    assert await world.write()
    assert not await world.is_restored()


async def test_the_first_write_of_all_may_be_lost_too(world: World) -> None:
    await world.write_and_lose("late")
    world.kill()
    assert not await world.is_restored()
    world.etcd.arrive()
    assert not await world.is_restored()
    assert await world.write()


async def test_a_transaction_goes_with_the_witness_or_not_at_all(world: World) -> None:
    taken = Transaction((absent("/a"),), (Put("/a", b"1"),))
    assert await world.history.write(world.etcd, taken)
    before = await world.witness()
    assert not await world.history.write(world.etcd, taken)
    assert await world.witness() == before
    assert not await world.is_restored()


async def test_a_witness_is_due_after_what_must_not_be_forgotten_and_only_then(world: World) -> None:
    assert world.history.is_due
    await world.write()
    assert not world.history.is_due
    world.history.took_over()
    assert world.history.is_due
    await world.write()
    first, second = (Attempt(fleet_generation=1, revision=revision) for revision in (90, 91))
    for act, attempt in ((world.fences.prepare, first), (world.fences.conclude, first), (world.fences.end, second)):
        act("vf1", attempt)
        assert world.history.is_due
        await world.write()
        assert not world.history.is_due
    world.fences.conclude("vf1", second)
    assert not world.history.is_due
    world.fences.prepare("vf2", first)
    await world.write_and_lose("before")
    assert world.history.is_due


async def test_what_is_done_while_the_witness_is_written_makes_the_next_one_due(world: World) -> None:
    commit = world.etcd.commit

    async def meanwhile(transaction: Transaction):
        world.history.took_over()
        return await commit(transaction)

    world.etcd.commit = meanwhile
    assert await world.write()
    assert world.history.is_due


async def test_nobody_waits_for_a_witness_that_etcd_is_slow_to_take(world: World) -> None:
    """A hold past its deadline is resolved after a check."""
    await world.write()
    commit, may_go_on = world.etcd.commit, asyncio.Event()

    async def slow(transaction: Transaction):
        await may_go_on.wait()
        return await commit(transaction)

    world.etcd.commit = slow
    writing = asyncio.create_task(world.write())
    await settle()
    await world.history.check(world.etcd)
    may_go_on.set()
    assert await writing
    await world.history.check(world.etcd)


async def test_an_answer_that_comes_only_after_the_raise_says_nothing_of_what_follows(world: World) -> None:
    await world.write()
    backup, commit, may_answer = world.etcd.back_up(), world.etcd.commit, asyncio.Event()

    async def late_answer(transaction: Transaction):
        committed = await commit(transaction)
        await may_answer.wait()
        return committed

    world.etcd.commit = late_answer
    writing = asyncio.create_task(world.write())
    await settle()
    world.etcd.commit = commit
    world.etcd.restore(backup)
    world.etcd.put(FLEET_GENERATION, "2")
    world.history.begin(await world.history.read(world.etcd))
    may_answer.set()
    with pytest.raises(VfleetError, match="raised"):
        await writing
    assert not await world.is_restored()
    assert await world.write()
    assert not await world.is_restored()


async def test_reads_and_writes_at_once_mistake_nothing(world: World) -> None:
    """A read that was answered before a write must not be compared with what is known after it."""
    get = world.etcd.get

    async def slow(key: str):
        stored = await get(key)
        await asyncio.sleep(0)
        return stored

    world.etcd.get = slow
    await world.write()
    reads = [world.history.read(world.etcd) for _ in range(20)]
    writes = [world.write() for _ in range(20)]
    both = [each for pair in zip(reads, writes, strict=True) for each in pair]
    assert set(await asyncio.gather(*both)) == {None, True}
