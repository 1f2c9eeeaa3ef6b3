"""Built-in workloads: started, stopped, killed and gone on with, and what their reports say."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.bench import MEMORY_BYTES, VIRTUAL_ADDRESS, Bench
from support.manual_clock import settle

from hostd.models import checker
from hostd.workload import DEFAULT_WINDOW, LATENCIES_KEPT, STOP_LATENCY_S, Measurement, Workload, Workloads
from hostd.workloads.kinds import new_workload
from vfleet.errors import Reason, VfleetError
from vfleet.v1.access_pb2 import ACCESS_KIND_READ
from vfleet.v1.driver_service_pb2 import StartWorkloadRequest, WorkloadOptions, WorkloadReport

D1 = ("d1", "vf1")
FIGURES = ("lost", "repeated", "reordered", "misrouted", "mismatches", "errors")


class Rig:
    """A host whose driver d1 is attached to vf1, which lives there, and whose workloads survive `kill`."""

    def __init__(self, path: Path) -> None:
        self.bench = Bench(path)
        self.instance = self.bench.create()
        self.bench.drivers.recorded("d1", 0)
        self.bench.drivers.attach(self.bench.message(self.instance.about.base))
        self.workloads = Workloads(self.bench.drivers, self.bench.ledger, self.bench.clock, new_workload)

    async def start(self, driver: str = "d1", function: str = "vf1", **options: int) -> None:
        request = StartWorkloadRequest(driver=driver, function=function, options=WorkloadOptions(**options))
        await self.workloads.start(request)

    def report(self, *, restart_measurement: bool = False) -> WorkloadReport:
        return self.workloads.report(*D1, restart_measurement=restart_measurement)

    async def reach(self, operations: int) -> None:
        """Wait until the workload has verified so many accesses."""
        async with asyncio.timeout(10):
            while self.report().operations < operations:
                await asyncio.sleep(0)

    async def kill(self) -> None:
        """Let the daemon die and come back."""
        await self.workloads.close()
        self.bench.restart()
        self.instance = self.bench.functions.require("vf1", 1)
        self.workloads = Workloads(self.bench.drivers, self.bench.ledger, self.bench.clock, new_workload)
        self.workloads.resume()

    async def close(self) -> None:
        await self.workloads.close()
        self.bench.close()


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    found = Rig(tmp_path)
    yield found
    await found.close()


def figures(report: WorkloadReport) -> dict[str, int]:
    """Return what is wrong."""
    return {name: getattr(report, name) for name in FIGURES if getattr(report, name)}


async def refusal(work) -> VfleetError:
    with pytest.raises(VfleetError) as caught:
        await work
    return caught.value


async def test_a_workload_verifies_all_that_it_does_until_it_is_stopped(rig: Rig):
    await rig.start()
    await rig.reach(500)
    report = await rig.workloads.stop(*D1)
    assert (report.running, report.failure, figures(report)) == (False, "", {})
    assert report.operations % DEFAULT_WINDOW == 0
    assert report.virtual_address == VIRTUAL_ADDRESS
    assert rig.report() == report
    await settle()
    assert rig.report().operations == report.operations
    assert (await rig.workloads.stop(*D1)) == report


async def test_a_killed_workload_goes_on_where_the_function_is(rig: Rig):
    await rig.start(seed=7)
    for operations in (100, 200, 300):
        await rig.reach(operations)
        await rig.kill()
        assert rig.report().running
    await rig.reach(400)
    report = await rig.workloads.stop(*D1)
    assert (figures(report), report.failure) == ({}, "")
    last = int.from_bytes(rig.instance.image.memory[0x108:0x110], "little")
    assert 0 <= last * 4 - report.operations < 4


class Defective(Workload):
    """A workload whose driver has a defect."""

    async def _run(self) -> None:
        raise IndexError("an entry that there isn't")


async def test_a_workload_with_a_defect_says_that_it_has_ended(rig: Rig):
    rig.workloads = Workloads(rig.bench.drivers, rig.bench.ledger, rig.bench.clock, Defective)
    await rig.start()
    await settle()
    assert not rig.workloads.is_running(*D1)
    assert (rig.report().running, rig.report().failure) == (False, "IndexError: an entry that there isn't")
    await rig.kill()
    await settle()
    assert not rig.report().running


async def test_a_stopped_workload_is_not_begun_again_by_a_restart(rig: Rig):
    await rig.start()
    await rig.reach(100)
    report = await rig.workloads.stop(*D1)
    await rig.kill()
    await settle()
    assert not rig.workloads.is_running(*D1)
    assert (rig.report().operations, rig.report().running) == (report.operations, False)


async def test_a_workload_can_be_started_anew(rig: Rig):
    for channel in (0, 0, 5):
        await rig.start(channel=channel)
        await rig.reach(100)
        assert figures(await rig.workloads.stop(*D1)) == {}


async def test_a_held_workload_waits_and_its_gap_is_measured(rig: Rig):
    await rig.start()
    await rig.reach(100)
    assert await rig.bench.hold(10, ("d1", "vf1", 1), timeout_ms=60_000) == [], "a workload acknowledges"
    await settle()
    before = rig.report().operations
    await rig.bench.clock.advance(2)
    rig.bench.lift(10, ("d1", "vf1", 1))
    await rig.reach(before + 100)
    report = rig.report(restart_measurement=True)
    assert (report.longest_gap.ToSeconds(), report.blackout.ToSeconds()) == (2, 2)
    report = rig.report()
    assert (report.longest_gap.ToSeconds(), report.blackout.ToSeconds()) == (0, 0)


async def test_a_rate_is_kept_and_a_stop_does_not_wait_for_it(rig: Rig):
    await rig.start(accesses_per_second=2, window=10)
    await settle()
    assert rig.report().operations == 10
    await rig.bench.clock.advance(4.9)
    assert rig.report().operations == 10
    await rig.bench.clock.advance(1)
    assert rig.report().operations == 20
    stopping = asyncio.create_task(rig.workloads.stop(*D1))
    await rig.bench.clock.advance(STOP_LATENCY_S)
    assert (await stopping).operations == 20


async def test_what_the_device_answers_wrongly_is_counted(rig: Rig):
    await rig.start(window=8)
    await rig.reach(80)
    # The device loses what it knew of its doorbells, and a word of its memory.
    image = rig.instance.image
    image.store([(checker.channel_offset(0) + checker.LAST, bytes(48)), (MEMORY_BYTES // 2, bytes(MEMORY_BYTES // 2))])
    await rig.reach(rig.report().operations + 400)
    found = figures(await rig.workloads.stop(*D1))
    assert found.keys() == {"lost", "mismatches"}
    await rig.kill()
    assert figures(rig.report()) == found


async def test_another_function_at_the_address_is_noticed(rig: Rig):
    await rig.start()
    await rig.reach(100)
    rig.instance.image.store([(checker.IDENTITY, bytes(8))])
    await rig.reach(rig.report().operations + 100)
    assert figures(await rig.workloads.stop(*D1)).keys() == {"misrouted"}


@pytest.mark.parametrize("is_attached_again", [False, True])
@pytest.mark.parametrize("is_pausing", [False, True])
async def test_a_workload_whose_function_is_detached_ends_and_says_why(rig: Rig, is_pausing, is_attached_again):
    await rig.start(accesses_per_second=1 if is_pausing else 0)
    await settle()
    if not is_pausing:
        await rig.bench.hold(10, ("d1", "vf1", 1))
    rig.bench.drivers.detach("d1", "vf1", 5)
    if is_attached_again:
        rig.bench.drivers.attach(rig.bench.message(rig.instance.about.base, revision=6))
    await rig.bench.clock.advance(60)
    assert not rig.workloads.is_running(*D1)
    report = rig.report()
    assert not report.running
    assert "detached" in report.failure or "not attached" in report.failure


async def test_a_workload_whose_function_was_detached_and_attached_during_a_restart_ends_and_says_why(rig: Rig):
    await rig.start()
    await rig.reach(100)
    await rig.workloads.close()
    rig.bench.drivers.detach("d1", "vf1", 5)
    rig.bench.drivers.attach(rig.bench.message(rig.instance.about.base, revision=6))
    await rig.kill()
    await settle()
    assert not rig.workloads.is_running(*D1)
    assert (rig.report().running, "began anew" in rig.report().failure) == (False, True)


# What is refused


@pytest.mark.parametrize(
    ("driver", "function", "reason"),
    [("d9", "vf1", Reason.NOT_FOUND), ("d1", "vf9", Reason.TRANSLATION_FAULT), ("d1", "", Reason.INVALID_FIELD)],
)
async def test_without_a_driver_and_its_function_there_is_no_workload(rig: Rig, driver, function, reason):
    assert (await refusal(rig.start(driver, function))).reason is reason
    if function:
        with pytest.raises(VfleetError) as caught:
            rig.workloads.report(driver, function, restart_measurement=False)
        assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize("options", [{"channel": 8}, {"window": 65}, {"memory_bytes": 1 << 40}])
async def test_options_that_do_not_fit_the_device_are_refused(rig: Rig, options):
    assert (await refusal(rig.start(**options))).reason is Reason.INVALID_FIELD
    assert not rig.workloads.is_running(*D1)


async def test_one_workload_at_a_time(rig: Rig):
    await rig.bench.hold(10, ("d1", "vf1", 1))
    starting = asyncio.create_task(rig.start())
    await settle()
    assert (await refusal(rig.start())).reason is Reason.IN_USE
    rig.bench.lift(10, ("d1", "vf1", 1))
    await starting
    assert (await refusal(rig.start())).reason is Reason.IN_USE


async def test_a_function_that_does_not_answer_starts_no_workload(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hostd.workload.START_TIMEOUT_S", 0.02)
    await rig.bench.hold(10, ("d1", "vf1", 1))
    assert (await refusal(rig.start())).reason is Reason.HOLD_TIMEOUT
    assert not rig.workloads.is_running(*D1)
    rig.bench.lift(10, ("d1", "vf1", 1))
    await rig.start()
    await rig.reach(100)
    assert figures(await rig.workloads.stop(*D1)) == {}


async def test_a_stop_during_a_hold_returns_in_time_and_takes_effect_later(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hostd.workload.STOP_TIMEOUT_S", 0.02)
    await rig.start()
    await rig.reach(100)
    await rig.bench.hold(10, ("d1", "vf1", 1))
    await settle()
    for _ in range(2):
        report = await rig.workloads.stop(*D1)
        assert (report.running, report.failure) == (True, "")
    assert (await refusal(rig.start())).reason is Reason.IN_USE
    rig.bench.lift(10, ("d1", "vf1", 1))
    async with asyncio.timeout(10):
        while rig.workloads.is_running(*D1):
            await asyncio.sleep(0)
    assert rig.report().operations == report.operations + DEFAULT_WINDOW
    assert figures(await rig.workloads.stop(*D1)) == {}


async def test_a_workload_that_is_killed_while_it_stops_stays_stopped(rig: Rig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("hostd.workload.STOP_TIMEOUT_S", 0.02)
    await rig.start()
    await rig.reach(100)
    await rig.bench.hold(10, ("d1", "vf1", 1))
    await settle()
    assert (await rig.workloads.stop(*D1)).running
    await rig.kill()
    rig.bench.lift(10, ("d1", "vf1", 1))
    async with asyncio.timeout(10):
        while rig.workloads.is_running(*D1):
            await asyncio.sleep(0)
    assert figures(rig.report()) == {}
    await rig.start()
    assert rig.report().running
    assert figures(await rig.workloads.stop(*D1)) == {}


async def test_a_device_that_is_no_checker_is_refused(rig: Rig):
    rig.instance.image.store([(checker.IDENTIFICATION, b"else")])
    assert (await refusal(rig.start())).reason is Reason.ILLEGAL_STATE


async def test_a_client_still_reads_what_the_workloads_driver_sees(rig: Rig):
    await rig.start()
    await rig.reach(50)
    await rig.workloads.stop(*D1)
    driver = rig.bench.drivers.require("d1")
    submitted = await driver.submit(ACCESS_KIND_READ, VIRTUAL_ADDRESS + checker.IDENTITY, 8, b"", sequence=0)
    _, sequence = await submitted.result(1)
    assert sequence == rig.report().operations + 5


# Measurement


def test_the_gap_is_the_longest_time_in_which_something_waited_and_nothing_was_answered():
    measured = Measurement(100.0)
    measured.answered(100.0, 100.5)
    assert measured.longest_gap_s == 0.5
    measured.answered(100.0, 101.5)
    assert measured.longest_gap_s == 1.0
    measured.answered(109.0, 109.5)
    assert measured.longest_gap_s == 1.0, "nothing waited from 101.5 to 109"


@pytest.mark.parametrize(
    ("last_answer", "submitted", "answered", "blackout_s"),
    [
        pytest.param(99.0, 98.0, 104.5, 5.5, id="the wait began before the hold"),
        pytest.param(99.0, 101.0, 104.5, 4.5, id="it began on hold"),
        pytest.param(101.0, 100.5, 104.5, 4.5, id="an answer came on hold"),
        pytest.param(99.0, 109.0, 109.5, 4.5, id="nothing waited from 104 to 109"),
    ],
)
def test_a_blackout_is_from_the_hold_to_the_first_answer_after_the_lift(
    last_answer: float, submitted: float, answered: float, blackout_s: float
):
    measured = Measurement(90.0)
    measured.answered(90.0, min(last_answer, 99.0))
    measured.held(100.0)
    if last_answer > 100.0:
        measured.answered(99.5, last_answer)
    assert measured.blackout_s == 0.0
    measured.lifted(104.0)
    measured.answered(submitted, answered)
    assert measured.blackout_s == blackout_s
    measured.answered(answered, answered + 50.0)
    assert measured.blackout_s == blackout_s


def test_quantiles_are_of_the_latest_latencies():
    measured = Measurement(0.0)
    assert measured.latency_s(0.5) == 0.0
    for latency in range(100):
        measured.answered(0.0, float(latency))
    assert [measured.latency_s(quantile) for quantile in (0.0, 0.5, 0.99, 1.0)] == [0.0, 50.0, 99.0, 99.0]
    for _ in range(LATENCIES_KEPT):
        measured.answered(0.0, 7.0)
    assert measured.latency_s(1.0) == 7.0
