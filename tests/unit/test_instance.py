"""One instance: what its accesses do, once; its reset; and what a restart leaves of it."""

import asyncio
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bench import BARS, COMMITTED, IDENTITY, MEMORY_BYTES, VIRTUAL_ADDRESS, Bench, attempt, reason_of
from support.manual_clock import ManualClock, settle

from hostd.image import FunctionImage, image_bytes
from hostd.instance import Instance, SequenceGapError
from hostd.models import checker
from hostd.rounds import THROTTLE_SLICE_S, Throttle
from vfleet.address import PAGE_BYTES
from vfleet.errors import Reason
from vfleet.v1.access_pb2 import (
    ACCESS_KIND_FENCE,
    ACCESS_KIND_READ,
    ACCESS_KIND_RESET,
    ACCESS_KIND_WRITE,
    ACCESS_STATUS_FORGOTTEN,
    ACCESS_STATUS_OK,
    ACCESS_STATUS_UNSUPPORTED_REQUEST,
)
from vfleet.v1.fabric_service_pb2 import REFUSAL_NOT_SERVING, REFUSAL_STALE_SESSION
from vfleet.v1.function_service_pb2 import DestroyFunctionRequest, ResetFunctionRequest
from vfleet.v1.host_records_pb2 import InstanceRecord, RestSource
from vfleet.v1.types_pb2 import (
    DEVICE_STATE_RUNNING,
)

RUNNING = DEVICE_STATE_RUNNING


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(tmp_path)
    yield found
    found.close()


def access(bench: Bench, generation: int = 1, *, session: int = 1, address: int | None = None, driver: str = "d1"):
    """Let a driver's access come to where the function's instance of the generation is, or would be."""
    instance = bench.functions.find("vf1", generation)
    at = instance.about.base if address is None and instance is not None else address or 0
    if instance is not None:
        instance.image.sequencer(driver)
    return bench.functions.admit(driver, "vf1", generation, (1, 1, session), at)


def prepared(bench: Bench, revision: int = 10, generation: int = 2, **where) -> Instance:
    """Make a target's instance that has all its state and waits for the proof that it is the home."""
    instance = bench.create(generation=generation, revision=revision, fresh=False, **where)
    bench.functions.complete_import(instance)
    return instance


# Accesses


def test_an_access_reaches_the_function_at_its_address_only(bench: Bench):
    bench.create("vf1")
    bench.create("vf2", vf_index=2)
    for device, vf_index in (("h1/nic0", 2), ("h1/nic0", 3), ("h1/nic1", 1)):
        assert access(bench, address=bench.segment.place(device, vf_index).base) == REFUSAL_NOT_SERVING
    assert access(bench, address=bench.segment.main_memory.base) == REFUSAL_NOT_SERVING
    assert isinstance(access(bench), tuple)


def test_an_earlier_session_is_refused_once_a_later_one_was_heard_of(bench: Bench):
    bench.create()
    assert isinstance(access(bench, session=2), tuple)
    assert access(bench, session=1) == REFUSAL_STALE_SESSION
    assert isinstance(access(bench, session=2), tuple)
    bench.restart()
    assert access(bench, session=1) == REFUSAL_STALE_SESSION
    assert isinstance(access(bench, session=1, driver="d2"), tuple)


def do(instance: Instance, sequence: int, offset: int, value: int | None = None):
    """Read, or write if there is a value, a word of the function's window as driver d1."""
    kind = ACCESS_KIND_READ if value is None else ACCESS_KIND_WRITE
    data = b"" if value is None else value.to_bytes(8, "little")
    return instance.access(instance.image.sequencer("d1"), sequence, kind, instance.about.base + offset, 8, data)


def test_a_repeated_access_gets_its_first_answer_and_has_no_second_effect(bench: Bench):
    instance = bench.create()
    doorbell = checker.channel_offset(0)
    do(instance, 1, checker.SCRATCH, 0x11)
    first = do(instance, 2, checker.SCRATCH)
    do(instance, 3, checker.SCRATCH, 0x22)
    do(instance, 4, doorbell, 1)
    for _ in range(3):
        assert do(instance, 2, checker.SCRATCH) == first == (ACCESS_STATUS_OK, (0x11).to_bytes(8, "little"))
        assert do(instance, 1, checker.SCRATCH, 0x11) == do(instance, 4, doorbell, 1) == (ACCESS_STATUS_OK, b"")
    assert do(instance, 5, checker.SCRATCH)[1] == (0x22).to_bytes(8, "little")
    assert do(instance, 6, doorbell + checker.REPEATED)[1] == bytes(8)


def test_plain_memory_is_written_and_read_once_from_its_first_word_to_its_last(bench: Bench):
    instance, ends = bench.create(), (LOCAL.start, LOCAL.stop - 8)
    for sequence, offset in enumerate(ends, start=1):
        assert do(instance, sequence, offset, sequence) == (ACCESS_STATUS_OK, b"")
    answers = [do(instance, sequence, offset) for sequence, offset in enumerate(ends, start=3)]
    assert answers == [(ACCESS_STATUS_OK, value.to_bytes(8, "little")) for value in (1, 2)]
    do(instance, 5, LOCAL.start, 0x33)
    for _ in range(2):
        assert do(instance, 1, LOCAL.start, 1) == (ACCESS_STATUS_OK, b"")
        assert [do(instance, sequence, offset) for sequence, offset in enumerate(ends, start=3)] == answers
        bench.restart()
        instance = bench.functions.find("vf1", 1)
    assert do(instance, 6, LOCAL.start)[1] == (0x33).to_bytes(8, "little")
    with pytest.raises(SequenceGapError):
        do(instance, 8, LOCAL.start, 0x44)


def test_only_an_instance_that_has_just_been_made_is_taken_to_be_empty(bench: Bench):
    assert bench.create().is_blank is True
    bench.restart()
    assert bench.functions.find("vf1", 1).is_blank is False


def test_a_gap_is_refused_and_changes_nothing(bench: Bench):
    instance = bench.create()
    do(instance, 1, checker.SCRATCH, 0x11)
    for sequence in (3, 4, 1 << 60):
        with pytest.raises(SequenceGapError) as caught:
            do(instance, sequence, checker.SCRATCH, 0x22)
        assert caught.value.expected == 2
        assert str(caught.value) == "expected sequence 2"
    assert do(instance, 2, checker.SCRATCH)[1] == (0x11).to_bytes(8, "little")


def test_an_access_of_more_than_64_ago_is_forgotten_and_never_done_again(bench: Bench):
    instance = bench.create()
    do(instance, 1, checker.SCRATCH, 0x11)
    for sequence in range(2, 66):
        do(instance, sequence, checker.IDENTITY)
    assert do(instance, 2, checker.IDENTITY)[0] == ACCESS_STATUS_OK
    do(instance, 66, checker.SCRATCH, 0x22)
    assert do(instance, 1, checker.SCRATCH, 0x11) == (ACCESS_STATUS_FORGOTTEN, b"")
    assert do(instance, 67, checker.SCRATCH)[1] == (0x22).to_bytes(8, "little")


def test_what_no_bar_claims_reads_all_ones_and_is_counted(bench: Bench):
    instance = bench.create()
    assert do(instance, 1, 8192) == (ACCESS_STATUS_UNSUPPORTED_REQUEST, b"\xff" * 8)
    assert do(instance, 2, MEMORY_BYTES, 1) == (ACCESS_STATUS_UNSUPPORTED_REQUEST, b"")
    assert do(instance, 1, 8192) == (ACCESS_STATUS_UNSUPPORTED_REQUEST, b"\xff" * 8)
    assert instance.unsupported_requests == 2


# Reset, restart


def reset(bench: Bench, generation: int = 1) -> None:
    bench.functions.reset(ResetFunctionRequest(function="vf1", generation=generation))


def test_a_reset_zeroes_memory_and_registers_and_the_sequences_go_on(bench: Bench):
    instance = bench.create()
    do(instance, 1, checker.SCRATCH, 0x11)
    instance.image.store([(MEMORY_BYTES - 4, b"last")])
    reset(bench)
    assert instance.image.sequencer("d1").last == 1
    assert do(instance, 2, checker.SCRATCH) == (ACCESS_STATUS_OK, bytes(8))
    assert do(instance, 3, checker.IDENTITY)[1] == IDENTITY.to_bytes(8, "little")
    assert bytes(instance.image.memory[-4:]) == bytes(4)


def test_a_reset_by_a_driver_has_its_place_among_its_accesses_and_is_done_once(bench: Bench):
    instance = bench.create()
    sequencer, base = instance.image.sequencer("d1"), instance.about.base
    do(instance, 1, checker.SCRATCH, 0x11)
    for _ in range(2):
        assert instance.access(sequencer, 2, ACCESS_KIND_RESET, base, 8, b"") == (ACCESS_STATUS_OK, bytes(8))
    assert do(instance, 3, checker.SCRATCH) == (ACCESS_STATUS_OK, bytes(8))
    do(instance, 4, checker.SCRATCH, 0x22)
    assert instance.access(sequencer, 2, ACCESS_KIND_RESET, base, 8, b"") == (ACCESS_STATUS_OK, bytes(8))
    assert do(instance, 5, checker.SCRATCH)[1] == (0x22).to_bytes(8, "little")
    assert instance.resets == 1


def test_a_driver_finds_a_broken_function_broken_and_can_reset_it(bench: Bench):
    instance = bench.create()
    sequencer, base = instance.image.sequencer("d1"), instance.about.base
    do(instance, 1, checker.SCRATCH, 0x11)
    bench.functions.fail(instance)
    assert isinstance(access(bench), tuple)
    assert do(instance, 2, checker.SCRATCH, 0x22) == (ACCESS_STATUS_UNSUPPORTED_REQUEST, b"")
    assert do(instance, 3, checker.SCRATCH) == (ACCESS_STATUS_UNSUPPORTED_REQUEST, b"\xff" * 8)
    assert int.from_bytes(instance.image.memory[checker.SCRATCH : checker.SCRATCH + 8], "little") == 0x11
    assert instance.unsupported_requests == 2
    for _ in range(2):
        assert instance.access(sequencer, 4, ACCESS_KIND_RESET, base, 8, b"") == (ACCESS_STATUS_OK, bytes(8))
    assert (instance.state, instance.resets) == (RUNNING, 1)
    do(instance, 5, checker.SCRATCH, 0x33)
    assert do(instance, 6, checker.SCRATCH)[1] == (0x33).to_bytes(8, "little")
    # A repeated access has the answer that it had.
    assert do(instance, 3, checker.SCRATCH) == (ACCESS_STATUS_UNSUPPORTED_REQUEST, b"\xff" * 8)


def test_a_fence_changes_nothing(bench: Bench):
    instance = bench.create()
    sequencer, base = instance.image.sequencer("d1"), instance.about.base
    do(instance, 1, checker.SCRATCH, 0x11)
    before = bytes(instance.image.memory)
    assert instance.access(sequencer, 2, ACCESS_KIND_FENCE, base, 8, b"") == (ACCESS_STATUS_OK, bytes(8))
    assert bytes(instance.image.memory) == before
    with pytest.raises(SequenceGapError):
        instance.access(sequencer, 4, ACCESS_KIND_FENCE, base, 8, b"")


def test_a_reset_by_a_driver_that_a_kill_interrupts_is_done_before_anything_else(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
):
    instance = bench.create()
    sequencer, base = instance.image.sequencer("d1"), instance.about.base
    do(instance, 1, checker.SCRATCH, 0x11)

    def killed() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(instance, "reset", killed)
    with pytest.raises(KeyboardInterrupt):
        instance.access(sequencer, 2, ACCESS_KIND_RESET, base, 8, b"")
    bench.restart()
    again = bench.functions.require("vf1", 1)
    assert again.image.sequencer("d1").last == 1
    assert do(again, 2, checker.SCRATCH)[1] == bytes(8)


def test_a_reset_leaves_a_medium_as_it_is(tmp_path: Path):
    """A function-level reset resets an NVMe controller; what is on its namespaces is no part of that (NVMe 1.4, 7.3.2).

    All else is as in a controller that was just made.
    """
    bench = Bench(tmp_path, model="nvme", has_engines=False)
    bars = {0: 16 << 10, 2: 1 << 20}
    instance = bench.create(bars=bars)
    medium = slice(instance.model.local_memory.start, instance.model.local_memory.stop)
    expected = bytearray(instance.image.memory)
    expected[medium] = bytes(range(256)) * 4096
    instance.image.store([(medium.start, bytes(expected[medium])), (0x24, b"\xa5"), (medium.stop + 8, b"\xa5" * 64)])
    reset(bench)
    assert instance.image.memory == expected
    bench.close()


def test_resets_are_counted_for_who_has_begun_something_before_one(bench: Bench):
    instance = bench.create()
    counts = [instance.resets]
    for _ in range(3):
        reset(bench)
        counts.append(instance.resets)
    assert counts == [0, 1, 2, 3]


class NoRegisters:
    """A device model whose registers are all 0 after a reset."""

    local_memory = plain_memory = range(0)
    keeps_local_memory = False

    def reset(self) -> tuple:
        return ()


def test_a_reset_leaves_nothing_of_a_large_memory():
    image = FunctionImage(mmap.mmap(-1, image_bytes(4 << 20)))
    image.store([(0, b"\xff" * (4 << 20))])
    instance = Instance(InstanceRecord(), NoRegisters(), image)
    instance.reset()
    assert instance.image.memory == bytes(4 << 20)
    instance.close()


def test_a_reset_is_refused_of_what_does_not_run(bench: Bench):
    bench.create()
    bench.stop(1, 10)
    assert reason_of(reset, bench) is Reason.ILLEGAL_STATE
    assert reason_of(reset, bench, 2) is Reason.WRONG_GENERATION


def test_a_reset_that_a_kill_interrupts_is_finished_after_it(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    instance = bench.create()
    instance.image.store([(8, b"registers"), (MEMORY_BYTES - 4, b"last")])

    def killed() -> None:
        instance.image.store([(0, bytes(4096))])
        raise KeyboardInterrupt

    monkeypatch.setattr(instance, "reset", killed)
    with pytest.raises(KeyboardInterrupt):
        reset(bench)
    for _ in range(2):
        bench.restart()
        again = bench.functions.require("vf1", 1)
        expected = bytearray(MEMORY_BYTES)
        for offset, data in again.model.reset():
            expected[offset : offset + len(data)] = data
        assert again.image.memory == expected
    again.image.store([(MEMORY_BYTES - 4, b"kept")])
    bench.restart()
    assert bytes(bench.functions.require("vf1", 1).image.memory[-4:]) == b"kept"


def test_a_restart_keeps_everything(bench: Bench):
    do(bench.create(), 1, checker.SCRATCH, 0x11)
    bench.create("vf2", generation=5, revision=3, fresh=False, vf_index=2)
    prepared(bench, revision=12, generation=2, device="nic1")
    bench.stop(1, 12)
    before = [(i.shown(), i.record.resolve_time, bytes(i.image.memory)) for i in bench.functions.instances()]
    bench.clock.now += 5
    bench.restart()
    assert [(i.shown(), i.record.resolve_time, bytes(i.image.memory)) for i in bench.functions.instances()] == before
    assert bench.functions.files() == set(bench.ledger.files())


def test_a_file_that_a_kill_left_before_its_record_is_not_taken_over(bench: Bench):
    instance = bench.create()
    file = instance.record.file
    bench.functions.destroy(
        DestroyFunctionRequest(attempt=attempt(1), function="vf1", generation=1, decision=COMMITTED)
    )
    with bench.ledger.map_file(file, 4096) as mapped:
        mapped[:] = b"x" * 4096
    bench.ledger.erase()
    bench.restart()
    assert bench.create().record.file == file
    assert bytes(bench.functions.require("vf1", 1).image.memory[64:128]) == bytes(64)


def test_who_waits_for_a_change_of_state_hears_of_the_end(bench: Bench):
    instance = bench.create()
    assert (instance.is_importing, instance.is_closed) == (False, False)
    assert not instance.changed.is_set()
    instance.close()
    assert instance.is_closed is True
    assert instance.changed.is_set()


# What it shows


def test_what_is_shown_says_how_far_each_driver_is(bench: Bench):
    instance = bench.create()
    for sequence in (1, 2, 3):
        do(instance, sequence, checker.SCRATCH)
    instance.image.sequencer("d2")
    shown = instance.shown()
    assert dict(shown.last_sequences) == {"d1": 3, "d2": 0}
    shown.ClearField("last_sequences")
    assert shown == instance.about
    shown.generation = 9
    assert instance.about.generation == 1


def test_a_new_instance_takes_part_in_no_copy_and_has_counted_nothing(bench: Bench):
    instance = bench.create()
    assert (instance.is_gated, instance.is_post_copied, instance.exported_to) == (False, False, None)
    assert (instance.unsupported_requests, instance.frames_dropped) == (0, 0)


# What has to wait

LOCAL = checker.Checker(IDENTITY, BARS).local_memory
REGISTER, MISSING = [(0, 8)], [(LOCAL.start, 8)]


@pytest.fixture
def arriving() -> Instance:
    """A function that runs at its new home while its local memory is still at the source."""
    image = FunctionImage(mmap.mmap(-1, image_bytes(MEMORY_BYTES)))
    return Instance(InstanceRecord(rest_source=RestSource()), checker.Checker(IDENTITY, BARS), image)


def slow_down(instance: Instance) -> ManualClock:
    """Let an instance work in half of each slice of time; it is the beginning of one."""
    clock = ManualClock(0.0)
    instance.throttle = Throttle(clock)
    instance.throttle.percent = 50
    return clock


def arrive(instance: Instance) -> None:
    assert instance.arrival is not None
    instance.arrival.take(LOCAL.start // PAGE_BYTES, bytes(LOCAL.stop - LOCAL.start))


def test_what_has_not_arrived_blocks_what_touches_it_and_is_asked_for(arriving: Instance):
    assert arriving.arrival is not None
    assert not arriving.blocks(REGISTER)
    assert not arriving.arrival.wanted
    assert arriving.blocks(MISSING)
    assert arriving.arrival.wanted
    arrive(arriving)
    assert not arriving.blocks(MISSING)
    arriving.close()


def test_a_function_that_is_slowed_down_is_blocked_whatever_is_touched(arriving: Instance):
    clock = slow_down(arriving)
    for blocks, phase in ((False, 0.25), (True, 0.75)):
        clock.now = phase * THROTTLE_SLICE_S
        assert arriving.blocks(REGISTER) is blocks
    arriving.close()


async def test_who_waits_goes_on_once_nothing_blocks_any_more(arriving: Instance):
    await arriving.passed(REGISTER)
    clock = slow_down(arriving)
    clock.now = 0.75 * THROTTLE_SLICE_S
    register, missing = (asyncio.create_task(arriving.passed(ranges)) for ranges in (REGISTER, MISSING))
    await settle()
    assert (register.done(), missing.done()) == (False, False)
    await clock.advance(0.5 * THROTTLE_SLICE_S)
    assert (register.done(), missing.done()) == (True, False)
    arrive(arriving)
    await missing
    arriving.close()


async def test_an_instance_that_goes_lets_go_who_waits_and_what_it_has_with_other_hosts(arriving: Instance):
    gone = []
    arriving.on_close = lambda: gone.append(arriving)
    waiting = asyncio.create_task(arriving.passed(MISSING))
    await settle()
    arriving.close()
    await waiting
    assert gone == [arriving]


def test_a_reset_needs_nothing_that_has_not_arrived(arriving: Instance):
    arriving.reset()
    assert not arriving.blocks(MISSING)
    arriving.close()


def test_plain_memory_is_granted_only_while_it_runs_and_nothing_can_block(bench: Bench):
    instance = bench.create()
    sequencer = instance.image.sequencer("d1")
    grant = instance.grant(sequencer, VIRTUAL_ADDRESS, MEMORY_BYTES)
    assert grant is not None
    assert (grant.sequencer, grant.base, grant.span) == (sequencer, VIRTUAL_ADDRESS, MEMORY_BYTES)
    assert range(grant.low, grant.low + grant.size) == LOCAL
    slow_down(instance)
    assert instance.grant(sequencer, VIRTUAL_ADDRESS, MEMORY_BYTES) is None
    instance.throttle = None
    assert instance.grant(sequencer, VIRTUAL_ADDRESS, MEMORY_BYTES) is not None
    bench.stop(1, 10)
    assert instance.grant(sequencer, VIRTUAL_ADDRESS, MEMORY_BYTES) is None
