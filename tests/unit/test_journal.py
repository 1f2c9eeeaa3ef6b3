"""The journal: after a transaction is settled it is known what the record is, whatever the store answered."""

from collections.abc import Callable
from random import Random

import pytest
from support.fleet_store import FleetStore
from support.fleet_values import LIMITS, move, three_hosts
from support.manual_clock import ManualClock

from coordinator import transaction
from coordinator.context import Context
from coordinator.inventory import Inventory
from coordinator.journal import RETRY_FIRST_S, RETRY_LONGEST_S, Journal
from coordinator.planner import plan
from vfleet.decision import abort_transaction
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.records import decode
from vfleet.etcd.store import KeyValue, Put, Transaction, absent, unchanged, value_is
from vfleet.v1.records_pb2 import Migration, Phase, Step

RECORD, OWNER, REGISTRATION2 = keys.migration_key("m1"), keys.owner_key("m1"), keys.registration_key("h2")


class Rig:
    """A migration that has begun, and its owner's journal."""

    def __init__(self) -> None:
        self.fleet = three_hosts()
        snapshot = self.fleet.snapshot()
        migration = plan(snapshot, [move("vf1", "h2/nic0")], name="m1", coordinator="c1", limits=LIMITS)
        assert self.fleet.commit(transaction.begin(migration, 5, snapshot.fleet_generation_is_this))
        self.begin_revision = self.fleet.revision
        self.store = FleetStore(self.fleet)
        self.clock = ManualClock()
        self.inventory = Inventory()
        self.is_lost = False
        context = Context("c1", self.store, self.inventory, None, self.clock, Random(7), self.check)
        record = decode(Migration, self.fleet.items[RECORD])
        self.journal = Journal(context, record, self.begin_revision, self.begin_revision)
        self.made = 0

    def check(self) -> None:
        if self.is_lost:
            raise VfleetError(Reason.CONFLICT, "the session is lost")

    def commit(self) -> Transaction:
        self.made += 1
        return transaction.commit(self.journal.record, self.begin_revision, 0)

    def abort_by_another(self) -> None:
        record, revision = decode(Migration, self.fleet.items[RECORD]), self.fleet.items[RECORD].mod_revision
        assert self.fleet.commit(abort_transaction(record, revision, "why not", Step.STEP_COPY, 0, None))

    async def settle(self, make: Callable[[], Transaction] | None = None, step_s: float = 0.005) -> float:
        """Settle COMMIT, or what is made, and return the seconds that it took, in steps."""
        began_s = self.clock.now
        await self.clock.until_done(self.journal.settle(make or self.commit), step_s)
        return self.clock.now - began_s

    def knows(self, phase: Phase.ValueType) -> bool:
        """Return whether what the journal has is what the store has, in this phase."""
        kv, journal = self.fleet.items[RECORD], self.journal
        return (journal.record, journal.mod_revision) == (decode(Migration, kv), kv.mod_revision) and (
            journal.record.phase == phase
        )


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def test_what_was_written_is_what_is_known(rig: Rig):
    await rig.settle()
    assert rig.knows(Phase.PHASE_COMMITTED)
    assert rig.store.commits == 1


async def test_what_is_known_is_the_record_wherever_it_stands_among_the_writes(rig: Rig):
    def record_last() -> Transaction:
        commit = rig.commit()
        return Transaction(commit.compares, commit.writes[::-1])

    await rig.settle(record_last)
    assert rig.knows(Phase.PHASE_COMMITTED)


@pytest.mark.parametrize(
    ("answers", "commits"),
    [(["lost"], 2), (["lost", "lost", "lost"], 4), (["unanswered"], 1), (["late"], 2), (["lost", "unanswered"], 2)],
)
async def test_what_has_no_answer_is_read_back_or_sent_again(rig: Rig, answers: list[str], commits: int):
    rig.store.answers = list(answers)
    await rig.settle()
    assert rig.knows(Phase.PHASE_COMMITTED)
    assert rig.store.commits == rig.made == commits


async def test_an_unknown_outcome_may_turn_out_to_be_anothers(rig: Rig):
    rig.store.answers = ["lost"]
    rig.abort_by_another()
    await rig.settle()
    assert rig.knows(Phase.PHASE_ABORTING)
    assert rig.store.commits == 1


async def test_another_who_was_first_is_believed(rig: Rig):
    rig.abort_by_another()
    await rig.settle()
    assert rig.knows(Phase.PHASE_ABORTING)
    assert rig.store.commits == 1


async def test_each_try_is_made_anew(rig: Rig):
    rig.store.answers = ["lost"]
    record = rig.journal.record

    def abort_at_last() -> Transaction:
        rig.made += 1
        return abort_transaction(record, rig.begin_revision, f"try {rig.made}", Step.STEP_COMMIT, 0, rig.journal.owned)

    await rig.settle(abort_at_last)
    assert rig.knows(Phase.PHASE_ABORTING)
    assert rig.journal.record.abort_reason == "try 2"


async def test_the_pauses_grow_to_their_bound(rig: Rig):
    rig.store.answers = ["lost"]
    assert RETRY_FIRST_S / 2 <= await rig.settle() <= RETRY_FIRST_S + 0.02
    rig = Rig()
    rig.store.answers = ["lost"] * 30
    assert 20 * RETRY_LONGEST_S / 2 <= await rig.settle(step_s=0.5) <= 30 * RETRY_LONGEST_S


async def test_a_store_that_can_not_be_read_back_is_tried_again(rig: Rig):
    rig.store.answers = ["unanswered"]
    rig.store.unreadable = [Reason.OUTCOME_UNKNOWN, Reason.STORE_UNAVAILABLE]
    await rig.settle()
    assert rig.knows(Phase.PHASE_COMMITTED)
    assert rig.store.commits == 2


async def refusal(rig: Rig, make: Callable[[], Transaction] | None = None) -> VfleetError:
    with pytest.raises(VfleetError) as refused:
        await rig.settle(make)
    return refused.value


async def test_comparisons_that_fail_while_nothing_can_be_read_are_tried_again(rig: Rig):
    rig.fleet.put(REGISTRATION2, "anew")
    rig.store.unreadable = [Reason.STORE_UNAVAILABLE]
    assert (await refusal(rig)).metadata == {"keys": REGISTRATION2}
    assert rig.store.commits == 2


@pytest.mark.parametrize("answers", [["refused"], ["lost", "refused"]])
async def test_an_error_that_leaves_nothing_unknown_is_raised_at_once(rig: Rig, answers: list[str]):
    rig.store.answers = list(answers)
    assert (await refusal(rig)).reason is Reason.LIMIT_EXCEEDED
    assert not rig.store.answers


async def test_a_read_back_that_fails_for_good_is_raised(rig: Rig):
    rig.store.answers = ["lost"]
    rig.store.unreadable = [Reason.INTERNAL]
    assert (await refusal(rig)).reason is Reason.INTERNAL


async def test_a_session_that_is_lost_sends_nothing(rig: Rig):
    rig.is_lost = True
    assert (await refusal(rig)).message == "the session is lost"
    assert rig.store.commits == 0


async def test_a_session_that_is_lost_between_two_tries_sends_nothing_more(rig: Rig):
    rig.store.answers = ["lost"]

    def lose() -> Transaction:
        rig.is_lost = rig.made > 0
        return rig.commit()

    assert (await refusal(rig, lose)).message == "the session is lost"
    assert rig.store.commits == 1


async def test_a_record_that_is_gone_is_an_error(rig: Rig):
    del rig.fleet.items[RECORD]
    error = await refusal(rig)
    assert (error.reason, error.message) == (Reason.INTERNAL, "the record of migration 'm1' is gone")


def with_comparisons(rig: Rig, *compares) -> Callable[[], Transaction]:
    def make() -> Transaction:
        commit = rig.commit()
        return Transaction((*commit.compares, *compares), commit.writes)

    return make


async def test_a_conflict_names_the_keys_that_changed_and_no_others(rig: Rig):
    slot, driver, entry = keys.slot_key("h1/nic0", 1), keys.driver_key("d1"), keys.entry_key("h3", "d2", "vf1")
    holding = (
        absent("x"),
        unchanged("x", 0),
        value_is(REGISTRATION2, b"h2-boot"),
        unchanged(driver, rig.fleet.items[driver].mod_revision),
    )
    failing = (absent(slot), value_is("y", b"there"), value_is(keys.registration_key("h1"), b""), unchanged(entry, 1))
    make = with_comparisons(rig, *holding, *failing)
    error = await refusal(rig, make)
    named = f"{slot}, y, {keys.registration_key('h1')}, {entry}"
    assert (error.reason, error.metadata) == (Reason.CONFLICT, {"keys": named})
    assert error.message == f"changed since the plan was made: {named}"
    assert rig.knows(Phase.PHASE_PREPARING)


async def test_a_conflict_may_have_passed_before_it_is_looked_for(rig: Rig):
    rig.fleet.put("z", "")
    get = rig.store.get

    async def get_later(key: str) -> KeyValue | None:
        rig.fleet.items.pop("z", None)
        return await get(key)

    rig.store.get = get_later
    error = await refusal(rig, with_comparisons(rig, absent("z")))
    assert error.message == "changed since the plan was made: something that is as it was again"


async def test_what_is_read_back_is_the_record_of_now(rig: Rig):
    rig.abort_by_another()
    assert rig.journal.record.phase == Phase.PHASE_PREPARING
    await rig.journal.read_back()
    assert rig.knows(Phase.PHASE_ABORTING)


@pytest.mark.parametrize("is_mine", [True, False])
def test_what_is_owned_is_the_key_as_this_owner_wrote_it(rig: Rig, is_mine: bool):
    if not is_mine:
        rig.fleet.put(OWNER, "c1")
    assert rig.fleet.commit(Transaction((rig.journal.owned,), (Put("x", b""),))) == is_mine


@pytest.mark.parametrize(
    ("change", "is_overtaken"),
    [
        (lambda fleet: None, False),
        (lambda fleet: fleet.put(keys.owner_key("m2"), "c2"), False),
        (lambda fleet: fleet.items.pop(OWNER), True),
        (lambda fleet: fleet.put(OWNER, "c1"), True),
        (lambda fleet: fleet.items.pop(RECORD), True),
        (lambda fleet: fleet.put(RECORD, decode(Migration, fleet.items[RECORD])), True),
    ],
)
def test_it_is_overtaken_once_another_has_written_the_record_or_the_owner_key(rig: Rig, change, is_overtaken: bool):
    change(rig.fleet)
    rig.inventory.snapshot = rig.fleet.snapshot()
    assert rig.journal.is_overtaken() == is_overtaken
