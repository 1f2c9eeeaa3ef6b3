"""A host's drivers: entries that come by call and by watch, holds, lifts, and what late and repeated requests do."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.bench import IDENTITY, MEMORY_BYTES, VIRTUAL_ADDRESS, Bench, reason_of
from support.driver_bench import D1, MIB, NEW, OLD, attached, new, old, read, seen, told
from support.manual_clock import settle

from vfleet.address import WINDOW_BYTES, table_offset, window_offset
from vfleet.errors import Reason, VfleetError
from vfleet.limits import INTERRUPT_PAGE_ADDRESS, MAIN_MEMORY_VIRTUAL_ADDRESS
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE, ACCESS_STATUS_OK
from vfleet.v1.driver_service_pb2 import (
    NOTIFICATION_KIND_ATTACHED,
    NOTIFICATION_KIND_DETACHED,
)
from vfleet.v1.types_pb2 import TableEntry


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    found = attached(tmp_path)
    await settle()
    yield found
    found.close()


# Drivers and their main memory


async def test_a_driver_is_made_once_and_its_main_memory_never_changes_its_size(bench: Bench):
    first = bench.drivers.recorded("d2", MIB)
    assert bench.drivers.recorded("d2", MIB) is first
    assert reason_of(bench.drivers.recorded, "d2", 2 * MIB) is Reason.ALREADY_EXISTS
    assert reason_of(bench.drivers.recorded, "d2", 0) is Reason.ALREADY_EXISTS
    assert [driver.name for driver in bench.drivers.all()] == ["d1", "d2"]


@pytest.mark.parametrize("size", [-4096, 1, 4097, (1 << 30) + 4096])
async def test_main_memory_is_whole_pages_and_at_most_1_gib(bench: Bench, size: int):
    assert reason_of(bench.drivers.recorded, "d2", size) is Reason.INVALID_FIELD
    assert reason_of(bench.drivers.require, "d2") is Reason.NOT_FOUND


async def test_main_memories_lie_side_by_side_in_the_root_complexs_window(bench: Bench):
    def bases() -> dict[str, int]:
        states = [bench.drivers.state(driver) for driver in bench.drivers.all()]
        return {s.driver: s.main_memory_base - bench.segment.main_memory.base for s in states if s.main_memory_base}

    for name, size in (("a", MIB), ("b", 2 * MIB), ("c", MIB)):
        bench.drivers.recorded(name, size)
    assert bases() == {"a": 0, "b": MIB, "c": 3 * MIB}
    bench.drivers.delete("b")
    bench.drivers.recorded("e", 3 * MIB)
    bench.drivers.recorded("f", MIB)
    assert bases() == {"a": 0, "c": 3 * MIB, "e": 4 * MIB, "f": MIB}
    bench.restart()
    assert bases() == {"a": 0, "c": 3 * MIB, "e": 4 * MIB, "f": MIB}


async def test_main_memory_ends_with_the_window_and_leaves_the_interrupt_page_out(bench: Bench):
    below = INTERRUPT_PAGE_ADDRESS - (3 << 30)
    sizes = [1 << 30, 1 << 30, 1 << 30, below, WINDOW_BYTES - INTERRUPT_PAGE_ADDRESS - 4096]
    for number, size in enumerate(sizes):
        bench.drivers.recorded(f"m{number}", size)
    last = bench.drivers.state(bench.drivers.require("m4"))
    assert window_offset(last.main_memory_base) == INTERRUPT_PAGE_ADDRESS + 4096
    assert reason_of(bench.drivers.recorded, "more", 4096) is Reason.LIMIT_EXCEEDED
    assert reason_of(bench.drivers.require, "more") is Reason.NOT_FOUND


async def test_main_memory_is_read_and_written_outlives_a_restart_and_is_zero_for_the_next(bench: Bench):
    bench.drivers.recorded("d2", MIB)

    async def access(kind, data: bytes = b"") -> bytes:
        driver = bench.drivers.require("d2")
        submitted = await driver.submit(kind, MAIN_MEMORY_VIRTUAL_ADDRESS + 4096, 8, data, sequence=0)
        ((status, found), sequence) = await submitted.result(1)
        assert (status, sequence) == (ACCESS_STATUS_OK, 0)
        return found

    await access(ACCESS_KIND_WRITE, b"12345678")
    bench.restart()
    assert await access(ACCESS_KIND_READ) == b"12345678"
    bench.drivers.delete("d2")
    bench.drivers.delete("d2")
    bench.drivers.recorded("d2", MIB)
    assert await access(ACCESS_KIND_READ) == bytes(8)


async def test_a_driver_with_a_function_is_in_use(bench: Bench):
    assert reason_of(bench.drivers.delete, "d1") is Reason.IN_USE
    bench.drivers.detach("d1", "vf1", 5)
    bench.drivers.delete("d1")
    assert bench.drivers.all() == []


async def test_a_driver_that_was_deleted_is_not_made_by_a_late_call(bench: Bench):
    bench.drivers.follow([old(bench)], 30, complete=True)
    assert reason_of(bench.drivers.create, "d2", 0, 30) is Reason.CONFLICT
    bench.drivers.create("d2", 0, 31)
    bench.drivers.create("d1", 0, 1)


# Entries, by call and by watch


async def test_an_attached_driver_reaches_its_function(bench: Bench):
    (status, data), sequence = await (await read(bench)).result(1)
    assert (status, int.from_bytes(data, "little"), sequence) == (ACCESS_STATUS_OK, IDENTITY, 1)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"host": "h2"}, "entry.host"),
        ({"driver": ""}, "entry.driver"),
        ({"function": ""}, "entry.function"),
        ({"revision": 0}, "entry.revision"),
        ({"virtual_address": 1}, "virtual_address"),
        ({"length_bytes": 0}, "length_bytes"),
    ],
)
async def test_an_entry_that_makes_no_sense_is_refused_by_the_field(bench: Bench, change, field):
    message = bench.message(OLD, function="vf2", virtual_address=2 << 40)
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(VfleetError) as caught:
        bench.drivers.attach(message)
    assert caught.value.metadata["field"] == field
    assert len(bench.drivers.require("d1").table.entries) == 1


async def test_an_attachment_of_a_driver_that_is_not_here_is_not_found(bench: Bench):
    assert reason_of(bench.drivers.attach, old(bench, driver="d9")) is Reason.NOT_FOUND


async def test_attached_again_is_attached_once(bench: Bench):
    listened = told(bench)
    table = bench.drivers.require("d1").table
    bench.drivers.attach(old(bench))
    bench.drivers.follow([old(bench)], 5, complete=True)
    bench.drivers.attach(old(bench))
    assert bench.drivers.require("d1").table is table
    assert listened == []


async def test_entries_that_overlap_are_refused_and_nothing_changes(bench: Bench):
    clash = bench.message(NEW, function="vf2", revision=5, virtual_address=VIRTUAL_ADDRESS + 4096)
    assert reason_of(bench.drivers.attach, clash) is Reason.ALREADY_EXISTS
    assert seen(bench, "vf2") is None
    bench.restart()
    assert seen(bench, "vf2") is None


@pytest.mark.parametrize("way", ["call", "watch"])
async def test_a_newer_entry_counts_and_an_older_one_changes_nothing(bench: Bench, way: str):
    def take(entry: TableEntry) -> None:
        if way == "call":
            bench.update(entry.revision, entry, lift=True)
        else:
            bench.drivers.follow([entry], entry.revision, complete=False)

    take(new(bench))
    assert seen(bench) == (2, False)
    assert bench.entry().offset == table_offset(NEW, VIRTUAL_ADDRESS)
    table = bench.drivers.require("d1").table
    bench.drivers.follow([old(bench)], 1, complete=False)
    bench.drivers.attach(old(bench))
    bench.update(30, old(bench, revision=20), lift=True)
    assert bench.drivers.require("d1").table is table
    bench.restart()
    assert bench.entry() == table.by_function["vf1"]


async def test_a_function_made_anew_begins_at_generation_1_and_its_later_revision_counts(bench: Bench):
    bench.drivers.follow([new(bench)], 20, complete=True)
    bench.drivers.follow([old(bench, revision=40)], 40, complete=True)
    assert seen(bench) == (1, False)


async def test_a_detached_function_is_gone_and_a_later_attachment_stays(bench: Bench):
    listened = told(bench)
    bench.drivers.detach("d1", "vf1", 5)
    bench.drivers.detach("d1", "vf1", 5)
    bench.drivers.detach("d9", "vf1", 5)
    assert seen(bench) is None
    bench.drivers.attach(old(bench, revision=8))
    bench.drivers.detach("d1", "vf1", 5)
    assert seen(bench) == (1, False)
    assert listened == [
        (NOTIFICATION_KIND_DETACHED, "vf1"),
        (NOTIFICATION_KIND_ATTACHED, "vf1"),
    ]
    bench.restart()
    assert seen(bench) == (1, False)


@pytest.mark.parametrize("watch_is_at", [0, 1, 5, 9])
@pytest.mark.parametrize("way", ["attach", "watch", "update"])
async def test_a_late_attachment_never_brings_back_what_was_detached(bench: Bench, watch_is_at: int, way: str):
    """The call to detach may be ahead of the watch, which tells of the attachment, and of its end, after it."""
    bench.drivers.follow([], watch_is_at, complete=False)
    bench.drivers.detach("d1", "vf1", 5)
    if way == "attach":
        bench.drivers.attach(old(bench, revision=3))
    elif way == "update":
        bench.update(3, old(bench, revision=3), lift=True)
    elif watch_is_at < 3:
        bench.drivers.follow([old(bench, revision=3)], 3, complete=False)
    assert seen(bench) is None
    bench.drivers.follow([], 9, complete=False)
    bench.drivers.attach(old(bench, revision=3))
    assert seen(bench) is None
    bench.drivers.attach(old(bench, revision=10))
    assert seen(bench) == (1, False)


async def test_a_complete_listing_takes_away_what_it_lacks_but_nothing_later(bench: Bench):
    bench.drivers.attach(bench.message(NEW, function="vf2", revision=8, virtual_address=2 << 40))
    bench.drivers.recorded("d2", MIB)
    bench.drivers.follow([], 5, complete=True)
    assert seen(bench) is None
    assert seen(bench, "vf2") == (1, False)
    assert bench.drivers.require("d2").table.by_function.keys() == {""}


async def test_accesses_of_a_detached_function_fail_and_the_function_forgets_the_driver(bench: Bench):
    await bench.hold(10, D1)
    waiting = await read(bench)
    bench.drivers.detach("d1", "vf1", 5)
    with pytest.raises(VfleetError) as caught:
        await waiting.result(1)
    assert caught.value.reason is Reason.TRANSLATION_FAULT
    assert bench.drivers.holds() == []
    assert bench.functions.require("vf1", 1).image.sequencers() == []
    with pytest.raises(VfleetError) as caught:
        await read(bench)
    assert caught.value.reason is Reason.TRANSLATION_FAULT


# What a driver asks for


@pytest.mark.parametrize(
    ("address", "length", "reason"),
    [
        (VIRTUAL_ADDRESS - 8, 8, Reason.TRANSLATION_FAULT),
        (VIRTUAL_ADDRESS + MEMORY_BYTES, 8, Reason.TRANSLATION_FAULT),
        (0, 8, Reason.TRANSLATION_FAULT),
        (VIRTUAL_ADDRESS + 4, 8, Reason.INVALID_FIELD),
        (VIRTUAL_ADDRESS, 3, Reason.INVALID_FIELD),
        (VIRTUAL_ADDRESS, 0, Reason.INVALID_FIELD),
        (VIRTUAL_ADDRESS, 8192, Reason.INVALID_FIELD),
    ],
)
async def test_what_is_not_mapped_is_a_fault_and_what_is_no_access_is_refused(bench: Bench, address, length, reason):
    driver = bench.drivers.require("d1")
    with pytest.raises(VfleetError) as caught:
        await driver.submit(ACCESS_KIND_READ, address, length, b"", sequence=0)
    assert caught.value.reason is reason
    assert bench.drivers.state(driver).translation_faults == (reason is Reason.TRANSLATION_FAULT)


async def test_the_state_of_a_driver_shows_its_table_its_sequences_and_what_waits(bench: Bench):
    await (await read(bench)).result(1)
    await bench.hold(10, D1)
    waiting = await read(bench)
    state = bench.drivers.state(bench.drivers.require("d1"))
    assert (dict(state.last_sequences), dict(state.unanswered)) == ({"vf1": 1}, {"vf1": 1})
    assert [(entry.function, entry.held) for entry in state.entries] == [("vf1", True)]
    bench.lift(10, D1)
    await waiting.result(1)
