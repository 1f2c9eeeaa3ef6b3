"""The checker of chaos goes red on each kind of falsified history, and stays green on the honest one."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from support.chaos.check_accesses import check_accesses, check_devices, check_identities, check_sequences
from support.chaos.check_remains import check_remains, last_sequences, outcomes, unfinished
from support.chaos.findings import Findings
from support.chaos.history import Access, Log, read_logs
from support.chaos.remains import REGISTERS, HostRemains, Record, Remains

from vfleet.v1.driver_service_pb2 import DriverState, WorkloadReport
from vfleet.v1.function_service_pb2 import FunctionInstance
from vfleet.v1.hold_service_pb2 import Hold
from vfleet.v1.records_pb2 import (
    Device,
    Driver,
    Function,
    FunctionStatus,
    Host,
    Migration,
    Move,
    Phase,
    Place,
    Slot,
)
from vfleet.v1.types_pb2 import Attempt, DeviceState, TableEntry

IDENTITY = 0x1D
MINE, THEIRS = 0x18000, 0x18180
RING, RUNG = 0x140, 0x148


def access(
    sequence: int, offset: int, *, read: int | None = None, write: int | None = None, driver: str = "d1"
) -> Access:
    """Return an access that takes from `sequence` to half a second later; without a sequence, one without an answer."""
    value = read if write is None else write
    return Access(driver, "vf1", write is None, offset, value or 0, sequence, float(sequence), sequence + 0.5)


# d1 writes to MINE and rings, d2 writes to THEIRS; both read both. Sequence and time go together here.
HONEST = (
    access(1, MINE, write=101),
    access(2, MINE, read=101),
    access(3, RING, write=1),
    access(4, MINE, write=102),
    access(5, RUNG, read=1),
    access(6, THEIRS, read=201),
    access(7, 0x08, read=IDENTITY),
    access(8, MINE, read=102),
    access(1, THEIRS, write=201, driver="d2"),
    access(2, MINE, read=101, driver="d2"),
    replace(access(3, THEIRS, write=202, driver="d2"), start_s=7.0, end_s=7.5),
    replace(access(4, MINE, read=102, driver="d2"), start_s=9.0, end_s=9.5),
)


def words(**changes: int) -> dict[str, dict[int, int]]:
    """Return what vf1 holds after HONEST, with `changes`: "at_" and the offset in hexadecimal."""
    own = dict.fromkeys((*REGISTERS, *range(0x10000, 0x20000, 8)), 0)
    own |= {MINE: 102, THEIRS: 202, RUNG: 1, RUNG + 8: 1, 0x108: 5, 0x110: 5}
    own |= {int(name.removeprefix("at_"), 16): value for name, value in changes.items()}
    return {"vf1": own}


def workload(**changes: int) -> WorkloadReport:
    return WorkloadReport(**{"driver": "d0", "function": "vf1", "operations": 20, **changes})


def changed(index: int, **changes: object) -> tuple[Access, ...]:
    return (*HONEST[:index], replace(HONEST[index], **changes), *HONEST[index + 1 :])


def judge(
    accesses: tuple[Access, ...] = HONEST,
    held: dict[str, dict[int, int]] | None = None,
    report: WorkloadReport | None = None,
    last: dict[tuple[str, str], int] | None = None,
) -> dict[str, int]:
    findings = Findings()
    contents = check_accesses(accesses, findings)
    check_devices(contents, held or words(), [report or workload()], findings)
    check_sequences(accesses, last or {("d1", "vf1"): 8, ("d2", "vf1"): 4}, findings)
    check_identities(accesses, {"vf1": IDENTITY}, findings)
    return dict(findings.counts)


def test_an_honest_history_has_nothing_wrong():
    assert judge() == {}


@pytest.mark.parametrize(
    ("accesses", "found"),
    [
        pytest.param(changed(7, value=101), {"lost": 1}, id="its own write is not there"),
        pytest.param(changed(1, value=102), {"reordered": 1}, id="a read shows what its driver writes later"),
        pytest.param(changed(1, value=201), {"misrouted": 1}, id="what was written elsewhere"),
        pytest.param(changed(1, value=777), {"mismatches": 1}, id="what nobody wrote"),
        pytest.param(changed(1, is_ok=False), {"mismatches": 1}, id="nobody claimed it"),
        pytest.param(changed(4, value=0), {"lost": 1}, id="a ring did not arrive"),
        pytest.param(changed(4, value=2), {"repeated": 1}, id="a ring arrived twice"),
        pytest.param(changed(6, value=0x2E), {"misrouted": 1}, id="another function answered"),
        pytest.param(changed(2, sequence=2), {"reordered": 1, "repeated": 1}, id="a sequence was given twice"),
        pytest.param((*HONEST[:1], *HONEST[2:]), {"repeated": 1}, id="a sequence that nobody used"),
        pytest.param(changed(11, value=101), {"lost": 1}, id="another driver reads what is over: two homes"),
        pytest.param(changed(5, value=202), {"reordered": 1}, id="another driver reads what is not yet written"),
        pytest.param(
            (*changed(9, start_s=4.0, end_s=6.0, value=102)[:11], replace(HONEST[11], value=101)),
            {"repeated": 1},
            id="an old value came back",
        ),
        pytest.param((*HONEST, access(0, MINE, read=0)), {"unfinished": 1}, id="no answer in the end"),
    ],
)
def test_a_falsified_answer_is_found(accesses: tuple[Access, ...], found: dict[str, int]):
    assert judge(accesses) == found


@pytest.mark.parametrize(
    ("held", "found"),
    [
        ({"at_18000": 101}, {"lost": 1}),
        ({"at_18180": 203}, {"repeated": 1}),
        ({"at_148": 0, "at_150": 0}, {"lost": 1}),
        ({"at_150": 0}, {"lost": 1}),
        ({"at_158": 3}, {"lost": 3}),
        ({"at_160": 2}, {"repeated": 2}),
        ({"at_168": 1}, {"reordered": 1}),
        ({"at_108": 4, "at_110": 4}, {"lost": 1}),
        ({"at_108": 6, "at_110": 6}, {"repeated": 1}),
    ],
)
def test_a_device_that_holds_something_else_is_found(held: dict[str, int], found: dict[str, int]):
    assert judge(held=words(**held)) == found


@pytest.mark.parametrize(
    ("report", "found"),
    [
        *(({kind: 2}, {kind: 2}) for kind in ("lost", "repeated", "reordered", "misrouted", "mismatches")),
        ({"errors": 1}, {"mismatches": 1}),
        ({"failure": "why"}, {"unfinished": 1}),
    ],
)
def test_what_a_workload_reports_is_counted(report: dict[str, int], found: dict[str, int]):
    assert judge(report=workload(**report)) == found


@pytest.mark.parametrize(("home_says", "found"), [(7, {"lost": 1}), (9, {"repeated": 1})])
def test_a_home_that_got_less_far_or_further_is_found(home_says: int, found: dict[str, int]):
    assert judge(last={("d1", "vf1"): home_says, ("d2", "vf1"): 4}) == found


def test_an_unanswered_write_took_effect_if_and_only_if_the_sequences_say_so():
    open_write = access(0, MINE, write=103)
    took_effect = (*HONEST[:8], open_write, access(10, MINE, read=103), *HONEST[8:])
    did_not = (*HONEST[:8], open_write, access(9, MINE, read=102), *HONEST[8:])
    assert judge(took_effect, words(at_18000=103), last={("d1", "vf1"): 10, ("d2", "vf1"): 4}) == {}
    assert judge(did_not, last={("d1", "vf1"): 9, ("d2", "vf1"): 4}) == {}
    assert judge((*took_effect[:9], access(10, MINE, read=102), *HONEST[8:]), words(at_18000=103))["lost"] >= 1
    assert judge((*did_not[:9], access(9, MINE, read=103), *HONEST[8:]))["mismatches"] == 1


def test_logs_are_read_as_they_were_written(tmp_path):
    log = Log(tmp_path / "d1.jsonl")
    for item in HONEST[:8]:
        log.add(item)
    log.close()
    assert tuple(read_logs([tmp_path / "d1.jsonl"])) == HONEST[:8]


# --- what is left ---

BASE = 2 << 48 | 0x0111 << 32
VIRTUAL = 1 << 40
OFFSET = (BASE - VIRTUAL) % (1 << 64)


def instance(**changes: object) -> FunctionInstance:
    about = {
        "function": "vf1",
        "generation": 2,
        "device": "h2/nic0",
        "vf_index": 2,
        "base": BASE,
        "complete": True,
        "state": DeviceState.DEVICE_STATE_RUNNING,
        "last_sequences": {"d1": 8},
    }
    return FunctionInstance(**{**about, **changes})


def entry(**changes: object) -> TableEntry:
    about = {
        "driver": "d1",
        "function": "vf1",
        "virtual_address": VIRTUAL,
        "offset": OFFSET,
        "generation": 2,
        "host": "h1",
    }
    return TableEntry(**{**about, **changes})


def function(**changes: object) -> Function:
    about = {"name": "vf1", "identity": IDENTITY, "generation": 2, "device": "h2/nic0", "vf_index": 2, "base": BASE}
    status = FunctionStatus.FUNCTION_STATUS_ACTIVE
    return Function(**{**about, "status": status, "drivers": ["d1"], **changes})


def migration(phase: Phase.ValueType = Phase.PHASE_DONE, to: int = 2, **changes: object) -> Migration:
    source = Place(device="h1/nic0", vf_index=1, generation=to - 1)
    target = Place(device="h2/nic0", vf_index=2, generation=to)
    return Migration(phase=phase, moves=[Move(function="vf1", source=source, target=target)], **changes)


class World:
    """A fleet with one function that has moved once, as it is left; tests spoil it."""

    def __init__(self) -> None:
        device = Device(name="h2/nic0", routing_id=0x100, first_vf_offset=0x10, vf_stride=1)
        self.records = {
            "hosts/h1": Host(name="h1", segment=1),
            "hosts/h2": Host(name="h2", segment=2, devices=[device]),
            "functions/vf1": function(),
            "slots/h2/nic0/2": Slot(function="vf1"),
            "drivers/d1": Driver(name="d1", host="h1"),
            "entries/h1/d1/vf1": entry(),
            "migrations/m1": migration(coordinator="c1", finished_by="c1"),
            "migrations/m2": migration(Phase.PHASE_ABORTED, to=3),
        }
        self.instances = {"h1": [], "h2": [instance()]}
        self.drivers = {"h1": [DriverState(driver="d1", entries=[entry()])], "h2": []}
        self.holds = {"h1": [], "h2": []}

    def remains(self) -> Remains:
        hosts = {h: HostRemains(self.instances[h], self.drivers[h], self.holds[h]) for h in ("h1", "h2")}
        records = {k: Record(m if isinstance(m, bytes) else m.SerializeToString(), 1) for k, m in self.records.items()}
        return Remains(records, hosts, {}, [])

    def judge(self) -> dict[str, int]:
        findings = Findings()
        check_remains(self.remains(), findings)
        return dict(findings.counts)


def test_a_clean_fleet_has_nothing_wrong():
    world = World()
    assert world.judge() == {}
    assert unfinished(world.remains().records) == []
    assert last_sequences(world.remains().hosts) == {("d1", "vf1"): 8}


def put(key: str, record: object) -> Callable[[World], None]:
    return lambda world: world.records.update({key: record})


def drop(key: str) -> Callable[[World], None]:
    return lambda world: world.records.pop(key)


def spoil(kind: str, host: str, *items: object) -> Callable[[World], None]:
    return lambda world: getattr(world, kind).update({host: list(items)})


@pytest.mark.parametrize(
    ("spoiled", "found"),
    [
        pytest.param(put("locks/vf1", b"m1"), {"residue": 1}, id="a lock"),
        pytest.param(put("owners/m1", b"c1"), {"residue": 1}, id="an owner key"),
        pytest.param(put("slots/h1/nic0/1", Slot(function="vf1")), {"residue": 1}, id="the source's slot"),
        pytest.param(put("slots/h2/nic0/2", Slot(function="vf1", migration="m1")), {"residue": 1}, id="a reservation"),
        pytest.param(drop("slots/h2/nic0/2"), {"residue": 1}, id="a home without a slot"),
        pytest.param(put("migrations/m3", migration(Phase.PHASE_COMMITTED, to=3)), {"unfinished": 1}, id="half a move"),
        pytest.param(put("migrations/m3", migration(Phase.PHASE_PREPARING, to=3)), {"unfinished": 1}, id="undecided"),
        pytest.param(put("migrations/m3", migration(to=2)), {"mismatches": 2}, id="two commits of one generation"),
        pytest.param(drop("migrations/m1"), {"mismatches": 1}, id="a generation without a commit"),
        pytest.param(
            put("migrations/m2", migration(Phase.PHASE_DONE, to=3)), {"mismatches": 2}, id="a commit that moved nothing"
        ),
        pytest.param(spoil("holds", "h1", Hold(driver="d1", function="vf1")), {"residue": 1}, id="a hold"),
        pytest.param(
            spoil("instances", "h1", instance(device="h1/nic0", vf_index=1, generation=1)),
            {"residue": 1},
            id="a source",
        ),
        pytest.param(spoil("instances", "h1", instance()), {"residue": 1}, id="the same home twice"),
        pytest.param(spoil("instances", "h2"), {"lost": 1}, id="no home"),
        pytest.param(spoil("instances", "h2", instance(complete=False)), {"residue": 1}, id="an empty home"),
        pytest.param(
            spoil("instances", "h2", instance(state=DeviceState.DEVICE_STATE_STOP_COPY)), {"residue": 1}, id="stopped"
        ),
        pytest.param(
            spoil("instances", "h2", instance(stopped_by=Attempt(revision=7))),
            {"residue": 1},
            id="stopped by an attempt",
        ),
        pytest.param(
            put("functions/vf1", function(status=FunctionStatus.FUNCTION_STATUS_LOST)),
            {"lost": 1},
            id="a lost function",
        ),
        pytest.param(
            spoil("drivers", "h1", DriverState(driver="d1", entries=[entry(generation=1)])),
            {"residue": 1},
            id="stale entry",
        ),
        pytest.param(
            spoil("drivers", "h1", DriverState(driver="d1", entries=[entry(held=True)])),
            {"residue": 1},
            id="held entry",
        ),
        pytest.param(spoil("drivers", "h1", DriverState(driver="d1")), {"residue": 1}, id="an entry that did not come"),
        pytest.param(
            spoil("drivers", "h2", DriverState(driver="d9")), {"residue": 1}, id="a driver that the fleet does not know"
        ),
        pytest.param(
            spoil("drivers", "h1", DriverState(driver="d1", entries=[entry()], unanswered={"vf1": 3})),
            {"unfinished": 3},
            id="accesses that wait",
        ),
        pytest.param(put("functions/vf1", function(drivers=[])), {"residue": 1}, id="an entry of nobody"),
        pytest.param(
            put("functions/vf1", function(drivers=["d1", "d2"])), {"lost": 1}, id="a driver without its entry"
        ),
    ],
)
def test_what_is_left_behind_is_found(spoiled: Callable[[World], None], found: dict[str, int]):
    world = World()
    spoiled(world)
    assert world.judge() == found


def test_an_offset_that_leads_elsewhere_is_found():
    world = World()
    world.records["entries/h1/d1/vf1"] = entry(offset=OFFSET + 4096)
    world.drivers["h1"] = [DriverState(driver="d1", entries=[entry(offset=OFFSET + 4096)])]
    assert world.judge() == {"misrouted": 1}


def test_a_base_that_is_not_the_arithmetic_of_its_place_is_found():
    world = World()
    world.records["hosts/h2"].segment = 3
    assert world.judge() == {"misrouted": 1}


def test_outcomes_tell_who_ended_a_migration():
    world = World()
    world.records["migrations/m3"] = migration(Phase.PHASE_DONE, coordinator="c1", finished_by="c2")
    reason = "host h1 waited past its deadline, and no coordinator ran the migration"
    world.records["migrations/m4"] = migration(Phase.PHASE_ABORTED, abort_reason=reason)
    ended = outcomes(world.remains().records)
    assert (ended["PHASE_DONE"], ended["PHASE_ABORTED"], ended["adopted"], ended["resolved"]) == (2, 2, 1, 1)


def test_a_kind_that_nobody_counts_is_refused():
    with pytest.raises(ValueError, match="kind is 'strange'"):
        Findings().add("strange", "what is shown must be complete")
