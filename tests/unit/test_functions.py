"""A host's functions: what is made, stopped, resumed and destroyed, by whom, how often and how late."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.bench import ABORTED, BARS, COMMITTED, IDENTITY, MEMORY_BYTES, RESOLVE_MS, Bench, attempt, reason_of
from support.full_disk import full_disk

from hostd.instance import Instance
from vfleet.errors import Reason, VfleetError
from vfleet.v1.fabric_service_pb2 import REFUSAL_NOT_SERVING
from vfleet.v1.function_service_pb2 import ChangeStateRequest, CreateFunctionRequest, ResetFunctionRequest
from vfleet.v1.types_pb2 import (
    DECISION_UNSPECIFIED,
    DEVICE_STATE_PRE_COPY,
    DEVICE_STATE_RESUMING,
    DEVICE_STATE_RUNNING,
    DEVICE_STATE_STOP,
    DEVICE_STATE_STOP_COPY,
    Bar,
)

STALE = Reason.STALE_ATTEMPT
RUNNING = DEVICE_STATE_RUNNING
STOP_COPY = DEVICE_STATE_STOP_COPY


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    found = Bench(tmp_path)
    yield found
    found.close()


def states(bench: Bench) -> dict[tuple[str, int], int]:
    """Return the state of each instance, by function and generation."""
    return {(i.about.function, i.about.generation): i.state for i in bench.functions.instances()}


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


# Creation


def test_a_fresh_function_runs_with_its_registers_set_and_its_memory_zero(bench: Bench):
    instance = bench.create()
    assert (instance.state, instance.about.complete, instance.record.resolve_time) == (RUNNING, True, 0)
    expected = bytearray(MEMORY_BYTES)
    for offset, data in instance.model.reset():
        expected[offset : offset + len(data)] = data
    assert instance.image.memory == expected
    assert instance.about.base == bench.segment.place("h1/nic0", 1).base


def test_a_target_waits_empty_for_its_state_and_has_a_deadline(bench: Bench):
    instance = bench.create(generation=2, revision=10, fresh=False)
    assert (instance.state, instance.about.complete) == (DEVICE_STATE_RESUMING, False)
    assert instance.record.resolve_time == bench.clock.time() + RESOLVE_MS / 1000
    assert list(bench.functions.with_deadline()) == [instance]
    assert access(bench, 2) == REFUSAL_NOT_SERVING
    assert instance.image.memory == bytes(MEMORY_BYTES)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"function": "VF"}, "function"),
        ({"generation": 0}, "generation"),
        ({"identity": 0}, "identity"),
        ({"model": "none"}, "model"),
        ({"bars": [Bar(index=1, size_bytes=4096)]}, "bars"),
        ({"bars": []}, "bars"),
        ({"vf_index": 0}, "vf_index"),
        ({"vf_index": 33}, "vf_index"),
        ({"fresh": False, "resolve_after_ms": 0}, "resolve_after_ms"),
        ({"fresh": False, "migration": ""}, "migration"),
        ({"attempt": attempt(0)}, "attempt"),
    ],
)
def test_a_creation_that_makes_no_sense_is_refused_by_the_field(bench: Bench, change, field):
    good = CreateFunctionRequest(
        attempt=attempt(1),
        migration="m1",
        function="vf1",
        generation=1,
        device="h1/nic0",
        vf_index=1,
        bars=[Bar(index=index, size_bytes=size) for index, size in BARS.items()],
        identity=IDENTITY,
        model="checker",
        fresh=True,
        resolve_after_ms=1,
    )
    for name in change:
        good.ClearField(name)
    good.MergeFrom(CreateFunctionRequest(**change))
    assert reason_of(bench.functions.create, good) is Reason.INVALID_FIELD
    assert bench.functions.instances() == []
    assert bench.ledger.files() == []


def test_a_device_that_is_not_here_is_not_found(bench: Bench):
    assert reason_of(bench.create, device="nic9") is Reason.NOT_FOUND


def test_a_slot_has_one_function(bench: Bench):
    first = bench.create("vf1")
    assert reason_of(bench.create, "vf2", revision=2) is Reason.SLOT_TAKEN
    assert reason_of(bench.create, "vf1", generation=2, revision=2) is Reason.SLOT_TAKEN
    assert bench.functions.instances() == [first]


def test_a_slot_that_is_used_again_begins_with_zeros(bench: Bench):
    first = bench.create("vf1")
    first.image.store([(8192, b"secret")])
    bench.destroy(1, 2, COMMITTED)
    second = bench.create("vf2", revision=3)
    assert bytes(second.image.memory[8192:8198]) == bytes(6)
    assert second.image.sequencers() == []
    assert len(bench.ledger.files()) == 1


@pytest.mark.parametrize("damage", ["missing", "longer", "shorter"])
def test_a_host_does_not_start_with_zeros_where_the_memory_of_a_function_was(tmp_path: Path, damage: str):
    bench = Bench(tmp_path)
    instance = bench.create()
    instance.image.store([(8192, b"data")])
    path = bench.ledger.directory / "memory" / instance.record.file
    bench.close()
    whole = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(whole + bytes(4096) if damage == "longer" else whole[:-4096])
    with pytest.raises(VfleetError, match=f"{path} has .*; expected {len(whole)} bytes.*--power-cycle") as caught:
        bench.start()
    assert caught.value.reason is Reason.BAD_STATE
    path.write_bytes(whole)
    bench.start()
    assert bytes(bench.functions.require("vf1", 1).image.memory[8192:8196]) == b"data"
    bench.close()


# Requests that are repeated, late, lower, or another's


def test_a_stop_that_a_full_disk_did_not_take_is_durable_once_it_is_acknowledged(bench: Bench):
    bench.create()
    bench.functions.fence_for_export("vf1", 1, attempt(10))
    with full_disk():
        assert reason_of(bench.stop, 1, 10) is Reason.LIMIT_EXCEEDED
    bench.stop(1, 10)
    bench.restart()
    assert states(bench) == {("vf1", 1): STOP_COPY}


Action = Callable[[Bench], object]


def creating(revision: int, generation: int = 2) -> Action:
    return lambda bench: bench.create(generation=generation, revision=revision, fresh=False, device="nic1")


def completing(generation: int = 2) -> Action:
    return lambda bench: bench.functions.complete_import(bench.functions.require("vf1", generation))


def stopping(revision: int, generation: int = 1) -> Action:
    return lambda bench: bench.stop(generation, revision)


def resuming(revision: int, generation: int = 1) -> Action:
    return lambda bench: bench.resume(generation, revision)


def destroying(revision: int, generation: int, decision=COMMITTED) -> Action:
    return lambda bench: bench.destroy(generation, revision, decision)


def using(generation: int) -> Action:
    return lambda bench: access(bench, generation)


def importing(revision: int, generation: int = 2) -> Action:
    return lambda bench: bench.functions.fence_for_import("vf1", generation, attempt(revision))


def exporting(revision: int, generation: int = 1) -> Action:
    return lambda bench: bench.functions.fence_for_export("vf1", generation, attempt(revision))


WAITS = {("vf1", 1): RUNNING, ("vf1", 2): DEVICE_STATE_RESUMING}
HOME = {("vf1", 1): RUNNING}
HELD = {("vf1", 1): STOP_COPY}
MOVED = {("vf1", 2): RUNNING}
NOBODY: dict[tuple[str, int], int] = {}

# Each case begins with vf1 at home here, at generation 1, made by attempt 1: what was asked before, what is asked now,
# why it is refused, and the instances afterwards. A case that is not refused is asked twice.
CASES: dict[str, tuple[list[Action], Action, Reason | None, dict[tuple[str, int], int]]] = {
    "create": ([], creating(10), None, WAITS),
    "create, from an attempt below the one that made the function": ([stopping(10)], creating(9), STALE, HELD),
    "create, after the attempt's abort came first": ([destroying(10, 2, ABORTED)], creating(10), STALE, HOME),
    "create, again, after the abort": ([creating(10), destroying(10, 2, ABORTED)], creating(10), STALE, HOME),
    "create, again, after it was resumed": ([stopping(10), resuming(10)], creating(10), STALE, HOME),
    "create, again, after it was used, moved on and was scrubbed": (
        [creating(10), completing(), using(2), stopping(11, 2), destroying(11, 2)],
        creating(10),
        STALE,
        HOME,
    ),
    "destroy the source": ([stopping(10)], destroying(10, 1), None, NOBODY),
    "destroy the source that was never stopped": ([], destroying(10, 1), None, NOBODY),
    "destroy what isn't there": ([], destroying(10, 7), None, HOME),
    "destroy no generation": ([], destroying(10, 0), None, HOME),
    "destroy, undecided": ([stopping(10)], destroying(10, 1, DECISION_UNSPECIFIED), Reason.INVALID_FIELD, HELD),
    "destroy the source, from a lower attempt": ([stopping(10)], destroying(9, 1), STALE, HELD),
    "destroy the target, aborted": ([creating(10)], destroying(10, 2, ABORTED), None, HOME),
    "destroy the target, aborted, from a lower attempt": ([creating(10)], destroying(9, 2, ABORTED), STALE, WAITS),
    "destroy another attempt's target, aborted": ([creating(10)], destroying(11, 2, ABORTED), None, WAITS),
    "destroy the home as an aborted target": ([], destroying(10, 1, ABORTED), None, HOME),
    "destroy a stopped home as an aborted target": ([stopping(10)], destroying(10, 1, ABORTED), None, HELD),
    "stop": ([], stopping(10), None, HELD),
    "stop, again, after the resume": ([stopping(10), resuming(10)], stopping(10), STALE, HOME),
    "stop, after the attempt's abort came first": ([resuming(10)], stopping(10), STALE, HOME),
    "stop, from a lower attempt": ([stopping(10), resuming(10)], stopping(9), STALE, HOME),
    "stop what a lower attempt had stopped": ([stopping(10)], stopping(11), Reason.ILLEGAL_STATE, HELD),
    "stop another generation": ([], stopping(10, 2), Reason.WRONG_GENERATION, HOME),
    "stop what isn't there": ([destroying(9, 1)], stopping(10), Reason.NOT_FOUND, NOBODY),
    "stop a target that has not all its state": ([creating(10)], stopping(11, 2), Reason.ILLEGAL_STATE, WAITS),
    "stop a target that nobody used yet": (
        [destroying(9, 1), creating(10), completing()],
        stopping(11, 2),
        None,
        {("vf1", 2): STOP_COPY},
    ),
    "resume": ([stopping(10)], resuming(10), None, HOME),
    "resume what runs": ([], resuming(10), None, HOME),
    "resume what isn't there": ([destroying(9, 1)], resuming(10), None, NOBODY),
    "resume what another attempt stopped": ([stopping(10)], resuming(11), None, HELD),
    "resume, from a lower attempt": ([stopping(10), resuming(10), stopping(11)], resuming(10), STALE, HELD),
    "resume another generation": ([stopping(10)], resuming(10, 2), None, HELD),
    "import into another attempt's": ([creating(10)], importing(11), STALE, WAITS),
    "import, after the abort": ([creating(10), destroying(10, 2, ABORTED)], importing(10), STALE, HOME),
    "import into nothing": ([], importing(10), Reason.WRONG_GENERATION, HOME),
    "export, after the attempt's abort": ([resuming(10)], exporting(10), STALE, HOME),
    "export another generation": ([], exporting(10, 2), Reason.WRONG_GENERATION, HOME),
    "export what nobody used yet": ([destroying(9, 1), creating(10), completing()], exporting(11, 2), None, MOVED),
    "use a target before it has all its state": ([creating(10)], using(2), None, WAITS),
    "use a target": ([destroying(9, 1), creating(10), completing()], using(2), None, MOVED),
    "use a target after a later attempt was heard of": (
        [destroying(9, 1), creating(10), completing(), resuming(11, 7)],
        using(2),
        None,
        MOVED,
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_restarted", [False, True])
def test_what_may_be_asked_when_how_often_and_by_whom(bench: Bench, name: str, is_restarted: bool):
    before, now, refused, expected = CASES[name]
    bench.create()
    for action in before:
        action(bench)
    if is_restarted:
        bench.restart()
    for _ in range(2):
        assert reason_of(now, bench) is refused
        assert states(bench) == expected
    bench.restart()
    assert states(bench) == expected


def test_a_late_clean_up_never_hits_the_function_that_has_the_slot_by_now(bench: Bench):
    bench.create(revision=10, generation=2, fresh=False)
    bench.destroy(2, 10, ABORTED)
    other = bench.create("vf2", revision=11)
    bench.destroy(2, 10, ABORTED)
    assert bench.functions.instances() == [other]


def test_a_later_attempt_is_not_in_the_way_of_what_an_aborted_one_left(bench: Bench):
    left = bench.create(generation=2, revision=10, fresh=False)
    mine = bench.create(generation=2, revision=20, fresh=False, vf_index=2, migration="m2")
    assert bench.functions.fence_for_import("vf1", 2, attempt(20)) is mine
    assert bench.functions.find("vf1", 0) is mine
    bench.destroy(2, 20, ABORTED)
    assert bench.functions.instances() == [left]


def test_a_function_that_moves_between_two_devices_of_a_host(bench: Bench):
    bench.create()
    target = bench.create(generation=2, revision=10, fresh=False, device="nic1")
    bench.stop(1, 10)
    bench.functions.complete_import(target)
    assert access(bench, 1) == REFUSAL_NOT_SERVING
    assert access(bench, 2) == (target, target.image.sequencer("d1"))
    assert reason_of(bench.stop, 1, 10) is STALE, "the use has proved the commit, and so ended the attempt here"
    bench.destroy(1, 10, COMMITTED)
    assert states(bench) == MOVED


def test_the_same_move_aborted(bench: Bench):
    home = bench.create()
    prepared(bench, device="nic1")
    bench.stop(1, 10)
    bench.destroy(2, 10, ABORTED)
    bench.resume(1, 10)
    assert states(bench) == HOME
    assert access(bench, 1) == (home, home.image.sequencer("d1"))


def test_after_a_raise_only_an_attempt_of_since_then_lets_run_what_was_stopped_before(bench: Bench):
    """etcd may have forgotten that the migration that stopped it was committed; who asks since has asked all hosts."""
    bench.create()
    bench.stop(1, 10)
    bench.resume(1, 10, fleet_generation=2)
    assert states(bench) == HELD
    bench.resume(1, 5, begun_in=2, fleet_generation=2)
    assert states(bench) == HOME


def test_after_a_raise_the_abort_of_a_later_migration_lets_nothing_run_that_was_stopped_before(bench: Bench):
    """Its coordinator has asked no host, and etcd may have forgotten that the function has moved away from here."""
    bench.create()
    bench.stop(1, 10)
    bench.resume(1, 5, migration="m2", begun_in=2, fleet_generation=2)
    assert states(bench) == HELD


def test_a_stop_of_another_attempt_is_not_taken_over_and_then_ended_by_an_abort(bench: Bench):
    """etcd may have forgotten that the first was committed: the second's abort says nothing of that."""
    bench.create()
    bench.stop(1, 10)
    again = ChangeStateRequest(
        attempt=attempt(5, 2), migration="m2", function="vf1", generation=1, state=STOP_COPY, resolve_after_ms=1
    )
    assert reason_of(bench.functions.stop, again) is Reason.ILLEGAL_STATE
    bench.resume(1, 5, migration="m2", begun_in=2, fleet_generation=2)
    assert states(bench) == HELD


def test_a_stop_is_something_that_the_witness_has_to_tell_of(bench: Bench):
    """A COMMIT may follow that this host hears nothing of, and an etcd that was restored to before it."""
    bench.create()
    bench.functions.fence_for_export("vf1", 1, attempt(10))
    before = bench.fences.changes
    bench.stop(1, 10)
    assert bench.fences.changes > before
    before = bench.fences.changes
    bench.stop(1, 10)
    assert bench.fences.changes == before


def test_a_host_that_has_not_heard_of_the_raise_yet_lets_nothing_run_by_it(bench: Bench):
    bench.create()
    bench.stop(1, 10)
    bench.resume(1, 5, begun_in=2)
    assert states(bench) == HELD


# Proof


def test_a_prepared_target_runs_once_somebody_names_it_as_the_home(bench: Bench):
    instance = prepared(bench)
    assert instance.state == DEVICE_STATE_STOP
    bench.restart()
    found = access(bench, 2)
    assert isinstance(found, tuple)
    assert (found[0].state, found[0].about.migration, found[0].record.resolve_time) == (RUNNING, "", 0)
    assert list(bench.functions.with_deadline()) == []
    assert reason_of(bench.create, generation=2, revision=10, fresh=False) is STALE


@pytest.mark.parametrize("generation", [1, 3])
def test_another_generation_proves_nothing(bench: Bench, generation: int):
    instance = prepared(bench)
    assert access(bench, generation, address=instance.about.base) == REFUSAL_NOT_SERVING
    assert instance.state == DEVICE_STATE_STOP


def test_a_copy_that_a_kill_ended_is_not_under_way_after_it(bench: Bench):
    instance = bench.create()
    instance.go_to(DEVICE_STATE_PRE_COPY)
    bench.functions.reset(ResetFunctionRequest(function="vf1", generation=1))
    assert instance.state == DEVICE_STATE_PRE_COPY
    bench.restart()
    assert states(bench) == {("vf1", 1): RUNNING}
