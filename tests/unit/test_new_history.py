"""A host's tables over a raised fleet generation, lost functions, and an abort that contradicts a home."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.bench import MEMORY_BYTES, VIRTUAL_ADDRESS, Bench, attempt, reason_of
from support.manual_clock import settle

from hostd.models import checker
from vfleet.errors import Reason, VfleetError
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_STATUS_OK
from vfleet.v1.driver_service_pb2 import NOTIFICATION_KIND_LOST
from vfleet.v1.function_service_pb2 import DestroyFunctionRequest
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.types_pb2 import DECISION_ABORTED, Attempt, TableEntry

OLD, NEW = 0x0001_0180 << 32, 0x0002_1110 << 32


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """A host whose driver d1 is attached to vf1, which lives there; etcd's entry is of revision 500."""
    found = Bench(tmp_path)
    found.create()
    found.drivers.recorded("d1", 0)
    found.drivers.follow([found.message(OLD, revision=500)], 500, complete=True)
    await settle()
    yield found
    found.close()


def lost(bench: Bench, revision: int) -> TableEntry:
    entry = bench.message(OLD, revision=revision)
    entry.lost = True
    return entry


async def read(bench: Bench) -> int:
    driver = bench.drivers.require("d1")
    access = await driver.submit(ACCESS_KIND_READ, VIRTUAL_ADDRESS + checker.IDENTITY, 8, b"", sequence=0)
    (status, data), _ = await access.result(1.0)
    assert status == ACCESS_STATUS_OK
    return int.from_bytes(data, "little")


async def test_before_the_raise_a_lower_revision_changes_nothing_and_after_it_it_counts(bench: Bench) -> None:
    bench.drivers.follow([bench.message(NEW, generation=2, revision=40)], 40, complete=True)
    assert bench.entry().generation == 1
    bench.drivers.forget_revisions()
    bench.drivers.follow([bench.message(NEW, generation=2, revision=40)], 40, complete=True)
    assert (bench.entry().generation, bench.entry().revision) == (2, 40)
    bench.drivers.follow([bench.message(NEW, generation=2, revision=39)], 41, complete=False)
    assert bench.entry().revision == 40


async def test_what_a_backup_forgot_stays_until_etcd_says_otherwise(bench: Bench) -> None:
    bench.drivers.forget_revisions()
    bench.drivers.follow([], 40, complete=True)
    assert bench.entry().revision == 0
    await read(bench)
    bench.restart()
    assert bench.entry().revision == 0
    assert bench.drivers.detach("d1", "vf1", 41) is not None
    assert "vf1" not in bench.drivers.require("d1").table.by_function


async def test_a_generation_does_not_go_back_over_the_raise(bench: Bench) -> None:
    bench.drivers.follow([bench.message(NEW, generation=2, revision=501)], 501, complete=False)
    bench.drivers.forget_revisions()
    bench.drivers.follow([bench.message(OLD, revision=40)], 40, complete=True)
    assert (bench.entry().generation, bench.entry().revision) == (2, 0)
    bench.drivers.follow([bench.message(NEW, generation=2, revision=41)], 41, complete=False)
    assert (bench.entry().generation, bench.entry().revision) == (2, 41)


async def test_but_it_does_where_the_commit_was_undone(bench: Bench) -> None:
    """What waits for an answer is sent to the home that the function has never left."""

    def go_back(*, goes_back: bool = True) -> tuple[int, int]:
        fence, entries = Attempt(fleet_generation=2, revision=41), [bench.message(OLD, revision=41)]
        request = UpdateTableRequest(attempt=fence, entries=entries, goes_back=goes_back)
        bench.drivers.update(request, fleet_generation=2)
        return bench.entry().generation, bench.entry().revision

    await read(bench)
    bench.drivers.follow([bench.message(NEW, generation=2, revision=501)], 501, complete=False)
    driver = bench.drivers.require("d1")
    waiting = await driver.submit(ACCESS_KIND_READ, VIRTUAL_ADDRESS, 8, b"", sequence=0)
    assert go_back() == (2, 501), "it is of the present history"
    bench.drivers.forget_revisions()
    assert go_back(goes_back=False) == (2, 0)
    assert go_back() == (1, 41)
    (status, _), sequence = await waiting.result(1.0)
    assert (status, sequence) == (ACCESS_STATUS_OK, 2)


async def test_a_word_of_an_earlier_fleet_generation_takes_nothing_back(bench: Bench) -> None:
    bench.drivers.follow([bench.message(NEW, generation=2, revision=501)], 501, complete=False)
    bench.drivers.forget_revisions()
    entries = [bench.message(OLD, revision=41)]
    fence = Attempt(fleet_generation=1, revision=502)
    bench.drivers.update(UpdateTableRequest(attempt=fence, entries=entries, goes_back=True), fleet_generation=2)
    assert (bench.entry().generation, bench.entry().revision) == (2, 0)


async def test_accesses_to_a_lost_function_fail_at_once_and_the_driver_is_told_once(bench: Bench) -> None:
    driver, told = bench.drivers.require("d1"), []
    driver.listeners.append(lambda notification: told.append(notification.kind))
    await bench.hold(501, ("d1", "vf1", 1))
    waiting = await driver.submit(ACCESS_KIND_READ, VIRTUAL_ADDRESS, 8, b"", sequence=0)
    told.clear()
    for revision in (502, 503):
        bench.drivers.follow([lost(bench, revision)], revision, complete=False)
    with pytest.raises(VfleetError) as caught:
        await waiting.result(1.0)
    assert caught.value.reason is Reason.FUNCTION_LOST
    assert told == [NOTIFICATION_KIND_LOST]
    for sequence in (0, 1):
        with pytest.raises(VfleetError) as caught:
            await driver.submit(ACCESS_KIND_READ, VIRTUAL_ADDRESS, 8, b"", sequence=sequence)
        assert caught.value.reason is Reason.FUNCTION_LOST
    bench.restart()
    with pytest.raises(VfleetError):
        await read(bench)


async def test_a_lost_function_that_is_found_again_is_served_from_where_it_was(bench: Bench) -> None:
    before = await read(bench)
    bench.drivers.follow([lost(bench, 502)], 502, complete=False)
    bench.drivers.follow([bench.message(OLD, revision=503)], 503, complete=False)
    await settle()
    assert await read(bench) == before


async def test_an_abort_does_not_end_an_instance_that_has_been_the_home(bench: Bench) -> None:
    """Only who has read a restored etcd can say so."""
    home = bench.functions.find("vf1", 1)
    assert home is not None
    bench.destroy(1, home.about.attempt.revision, DECISION_ABORTED)
    assert bench.functions.find("vf1", 1) is home
    await read(bench)


async def test_nor_one_that_an_abort_of_before_the_raise_may_be_wrong_about(tmp_path: Path) -> None:
    """It has all its state, and nobody has accessed it: etcd may have forgotten that its attempt was committed."""
    bench = Bench(tmp_path)
    instances = [
        bench.create(name, revision=revision, fresh=False, vf_index=revision)
        for revision, name in enumerate(("vf1", "vf2", "vf3"), start=1)
    ]
    for instance in instances[:2]:
        bench.functions.complete_import(instance)
    for (name, revision), generation in (("vf1", 1), 2), (("vf2", 2), 1), (("vf3", 3), 2):
        request = DestroyFunctionRequest(
            attempt=attempt(revision), function=name, generation=1, decision=DECISION_ABORTED
        )
        bench.functions.destroy(request, generation)
    assert [instance.is_closed for instance in instances] == [False, True, True]
    # The attempt is over here all the same.
    assert reason_of(bench.create, revision=1, fresh=False) is Reason.STALE_ATTEMPT
    bench.close()


def test_what_may_end_a_home_is_told_from_what_ends_a_migration(bench: Bench) -> None:
    def may_end(function: str, generation: int, revision: int) -> bool:
        request = DestroyFunctionRequest(attempt=attempt(revision), function=function, generation=generation)
        return bench.functions.may_end_home(request)

    target = bench.create("vf2", revision=2, fresh=False, device="nic1")
    assert may_end("vf1", 1, 3)
    assert not may_end("vf2", 1, 3)
    bench.functions.complete_import(target)
    assert may_end("vf2", 1, 3)
    bench.stop(1, 4)
    assert may_end("vf1", 1, 3)
    assert not may_end("vf1", 1, 4)
    assert not may_end("vf9", 1, 4)
    assert not may_end("vf1", 2, 4)


@pytest.mark.parametrize("complete", [False, True])
async def test_an_entry_where_a_forgotten_one_lies_waits_and_keeps_no_other_from_coming(
    bench: Bench, complete: bool
) -> None:
    bench.drivers.forget_revisions()
    bench.drivers.recorded("d2", 0)
    after = VIRTUAL_ADDRESS + MEMORY_BYTES
    entries = [
        bench.message(OLD, function="vf2", revision=40),
        bench.message(OLD, function="vf3", revision=40, virtual_address=after),
        bench.message(OLD, driver="d2", function="vf2", revision=40),
    ]
    bench.drivers.follow(entries, 40, complete=complete)
    assert set(bench.drivers.require("d1").table.by_function) == {"vf1", "vf3"}
    assert set(bench.drivers.require("d2").table.by_function) == {"vf2"}
    bench.drivers.detach("d1", "vf1", 41)
    bench.drivers.follow([bench.message(OLD, function="vf2", revision=42)], 42, complete=False)
    assert set(bench.drivers.require("d1").table.by_function) == {"vf2", "vf3"}
