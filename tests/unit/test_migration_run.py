"""The driver of a migration, request by request: what it sends to whom, and what it makes of each answer."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from google.protobuf.message import Message
from support.fleet_store import FleetStore
from support.fleet_values import LIMITS, move, three_hosts
from support.manual_clock import ManualClock

from coordinator import transaction
from coordinator.context import Context
from coordinator.inventory import Inventory
from coordinator.migration import RESOLVE_MARGIN_MS, Options, Run
from coordinator.planner import plan
from vfleet.decision import abort_transaction
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.etcd.records import decode
from vfleet.failure import abort_cause
from vfleet.v1.function_service_pb2 import ChangeStateRequest, CreateFunctionRequest, DestroyFunctionRequest
from vfleet.v1.hold_service_pb2 import EntryName, LiftHoldRequest, PlaceHoldRequest
from vfleet.v1.migration_service_pb2 import CopyProgress, LimitPolicy
from vfleet.v1.records_pb2 import Function, Migration, Phase, Step
from vfleet.v1.transfer_service_pb2 import (
    CopyOptions,
    ImportStateRequest,
    ImportStateResponse,
    WatchArrivalRequest,
    WatchArrivalResponse,
)
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.types_pb2 import Attempt, Decision, DeviceState, TableEntry, TransferMode

OPTIONS = Options(max_rounds=3, prepare_timeout_ms=50_000, hold_timeout_ms=20_000, acknowledge_timeout_ms=70)
COMMITTED, ABORTED = Decision.DECISION_COMMITTED, Decision.DECISION_ABORTED
Call = tuple[str, str, Message]


@dataclass
class Hosts:
    """All hosts: what they are asked, in order, and what goes wrong.

    `failures` are raised by method, one a call; `hangs` are methods that never answer; `on` is done when a method is
    called, by its name; `gone` are functions that have no source any more; `cut_short` says after how many answers the
    next watches of arrivals end.
    """

    calls: list[Call] = field(default_factory=list)
    failures: dict[str, list[VfleetError]] = field(default_factory=dict)
    hangs: set[str] = field(default_factory=set)
    on: dict[str, Callable[[], None]] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    is_cut_short: bool = False
    cut_short: list[int] = field(default_factory=list)
    last_copy_us: int = 0
    stopped: dict[str, asyncio.Event] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)

    def under(self, check: Callable[[], None]) -> "Hosts":
        return self

    def fabric_address(self, host: str) -> str:
        return f"{host}.fabric:1"

    async def create_function(self, host: str, request: CreateFunctionRequest) -> None:
        await self._enter("create", host, request)

    async def import_state(self, host: str, request: ImportStateRequest) -> AsyncIterator[ImportStateResponse]:
        await self._enter("import", host, request)
        stopped = self.stopped.setdefault(request.function, asyncio.Event())
        yield ImportStateResponse(rounds=1, received_bytes=4096, dirty_bytes=512)
        yield ImportStateResponse(
            rounds=2, received_bytes=4608, dirty_bytes=8, ready_to_stop=True, last_copy_us=self.last_copy_us
        )
        await stopped.wait()
        if not self.is_cut_short:
            yield ImportStateResponse(rounds=3, received_bytes=4616, complete=True)

    async def watch_arrival(self, host: str, request: WatchArrivalRequest) -> AsyncIterator[WatchArrivalResponse]:
        await self._enter("arrive", host, request)
        answers = self.cut_short.pop() if self.cut_short else 3
        for missing_bytes in (8192, 4096, 0)[:answers]:
            yield WatchArrivalResponse(missing_bytes=missing_bytes)

    async def place_hold(self, host: str, request: PlaceHoldRequest) -> tuple[str, ...]:
        await self._enter("hold", host, request)
        return self.silent

    async def change_state(self, host: str, request: ChangeStateRequest) -> bool:
        await self._enter("resume" if request.state == DeviceState.DEVICE_STATE_RUNNING else "stop", host, request)
        self.stopped.setdefault(request.function, asyncio.Event()).set()
        return request.function not in self.gone

    async def update_table(self, host: str, request: UpdateTableRequest) -> None:
        await self._enter("lift", host, request)

    async def lift_hold(self, host: str, request: LiftHoldRequest) -> None:
        await self._enter("restore", host, request)

    async def destroy_function(self, host: str, request: DestroyFunctionRequest) -> None:
        await self._enter("destroy", host, request)

    async def _enter(self, method: str, host: str, request: Message) -> None:
        copy = type(request)()
        copy.CopyFrom(request)
        self.calls.append((method, host, copy))
        if method in self.on:
            self.on[method]()
        if self.failures.get(method):
            raise self.failures[method].pop(0)
        if method in self.hangs:
            await asyncio.Event().wait()


class Rig:
    """A migration of vf1 (drivers on h1 and h3) to h2 and of vf2 (none) to h3, begun at `revision` and not run yet."""

    def __init__(self, mode: TransferMode.ValueType = TransferMode.TRANSFER_MODE_PRE_COPY) -> None:
        self.fleet = three_hosts()
        self.before = self.records()
        snapshot = self.fleet.snapshot()
        moves = [move("vf1", "h2/nic0"), move("vf2", "h3/nic0")]
        self.plan = plan(snapshot, moves, name="m1", coordinator="c1", limits=LIMITS)
        self.plan.mode = mode
        assert self.fleet.commit(transaction.begin(self.plan, 5, snapshot.fleet_generation_is_this))
        self.revision = self.fleet.revision
        self.attempt = Attempt(fleet_generation=1, revision=self.revision)
        self.clock, self.hosts, self.inventory = ManualClock(), Hosts(), Inventory()
        self.store = FleetStore(self.fleet, self.look)
        self.ended: list[Migration] = []
        self.look()

    def look(self) -> None:
        """Let the inventory see what the store has."""
        self.inventory.snapshot = self.fleet.snapshot()
        self.inventory.notify()

    def records(self) -> dict[str, Message]:
        kinds = {keys.FUNCTIONS: Function, keys.ENTRIES: TableEntry}
        return {
            key: decode(kind, item)
            for prefix, kind in kinds.items()
            for key, item in self.fleet.items.items()
            if key.startswith(prefix)
        }

    @property
    def record(self) -> Migration:
        return decode(Migration, self.fleet.items[keys.migration_key("m1")])

    def decide(self, *, committed: bool) -> None:
        """Decide the migration, as its owner or another would."""
        if committed:
            decision = transaction.commit(self.record, self.revision, 0)
        else:
            decision = abort_transaction(self.record, self.revision, "because", Step.STEP_COPY, 0, None)
        assert self.fleet.commit(decision)
        self.look()

    def new_run(self, options: Options | None = OPTIONS, **more: float) -> Run:
        return Run(
            Context("c1", self.store, self.inventory, self.hosts, self.clock, Random(7), ended=self.ended.append),
            self.record,
            begin_revision=self.revision,
            mod_revision=self.fleet.items[keys.migration_key("m1")].mod_revision,
            owner_revision=self.fleet.items[keys.owner_key("m1")].mod_revision,
            options=options,
            **more,
        )

    async def run(self, options: Options | None = OPTIONS) -> None:
        """Take the migration to its end."""
        await self.clock.until_done(self.new_run(options).run(), 0.25)

    def asked(self, *methods: str) -> list[tuple[str, str, str]]:
        """Return method, host and function (if it has one) of each call, sorted; only those of `methods`, if given."""
        return sorted(
            (method, host, getattr(request, "function", ""))
            for method, host, request in self.hosts.calls
            if not methods or method in methods
        )

    def request(self, method: str, host: str, function: str = "") -> Message:
        """Return the one request of a method to a host for a function."""
        (found,) = [
            request
            for called, at, request in self.hosts.calls
            if (called, at, getattr(request, "function", "")) == (method, host, function)
        ]
        return found


@pytest.fixture
def rig() -> Rig:
    return Rig()


def names(generation: int, *drivers: str) -> list[EntryName]:
    return [EntryName(driver=driver, function="vf1", generation=generation) for driver in drivers]


UNTIL_COMMIT = [
    ("create", "h2", "vf1"),
    ("create", "h3", "vf2"),
    ("hold", "h1", ""),
    ("hold", "h3", ""),
    ("import", "h2", "vf1"),
    ("import", "h3", "vf2"),
    ("stop", "h1", "vf1"),
    ("stop", "h1", "vf2"),
]
AFTER_COMMIT = [("destroy", "h1", "vf1"), ("destroy", "h1", "vf2"), ("lift", "h1", ""), ("lift", "h3", "")]
AFTER_ABORT = [
    ("destroy", "h2", "vf1"),
    ("destroy", "h3", "vf2"),
    ("restore", "h1", ""),
    ("restore", "h3", ""),
    ("resume", "h1", "vf1"),
    ("resume", "h1", "vf2"),
]


async def test_a_migration_asks_each_host_once_for_what_is_its_part(rig: Rig):
    await rig.run()
    assert rig.record.phase == Phase.PHASE_DONE
    assert rig.asked() == sorted(UNTIL_COMMIT + AFTER_COMMIT)
    order = [method for method, _, _ in rig.hosts.calls]
    assert order == ["create"] * 2 + ["import"] * 2 + ["stop"] * 2 + ["hold"] * 2 + ["lift"] * 2 + ["destroy"] * 2


async def test_the_requests_before_the_decision_name_attempt_function_generation_and_deadline(rig: Rig):
    await rig.run()
    vf1, vf2 = rig.plan.moves
    for part in (vf1, vf2):
        assert rig.request("create", part.target.host, part.function) == CreateFunctionRequest(
            attempt=rig.attempt,
            migration="m1",
            function=part.function,
            generation=4,
            device=part.target.device,
            vf_index=1,
            bars=part.bars,
            identity=7,
            model="checker",
            resolve_after_ms=50_000 + RESOLVE_MARGIN_MS,
        )
        assert rig.request("import", part.target.host, part.function) == ImportStateRequest(
            attempt=rig.attempt,
            function=part.function,
            generation=4,
            source_host="h1",
            source_address="h1.fabric:1",
            source_incarnation="h1-boot",
            source_generation=3,
            options=CopyOptions(mode=TransferMode.TRANSFER_MODE_PRE_COPY, max_rounds=3),
        )
        assert rig.request("stop", "h1", part.function) == ChangeStateRequest(
            attempt=rig.attempt,
            migration="m1",
            function=part.function,
            generation=3,
            state=DeviceState.DEVICE_STATE_STOP_COPY,
            resolve_after_ms=20_000 + RESOLVE_MARGIN_MS,
        )
    assert vf1.bars
    for host, driver in (("h1", "d1"), ("h3", "d2")):
        assert rig.request("hold", host) == PlaceHoldRequest(
            attempt=rig.attempt,
            migration="m1",
            entries=names(3, driver),
            acknowledge_timeout_ms=70,
            resolve_after_ms=20_000 + RESOLVE_MARGIN_MS,
        )


@pytest.mark.parametrize("is_adopted", [False, True])
async def test_after_commit_tables_change_to_what_etcd_says_and_the_sources_go(rig: Rig, is_adopted: bool):
    if is_adopted:
        rig.decide(committed=True)
    await rig.run(None if is_adopted else OPTIONS)
    assert rig.record.phase == Phase.PHASE_DONE
    for host, driver in (("h1", "d1"), ("h3", "d2")):
        kv = rig.fleet.items[keys.entry_key(host, driver, "vf1")]
        entry = decode(TableEntry, kv)
        entry.revision = kv.mod_revision
        assert rig.request("lift", host) == UpdateTableRequest(attempt=rig.attempt, entries=[entry], lift=True)
        assert (entry.generation, entry.revision) == (4, rig.revision + 1)
    for function in ("vf1", "vf2"):
        assert rig.request("destroy", "h1", function) == DestroyFunctionRequest(
            attempt=rig.attempt, function=function, generation=3, decision=COMMITTED
        )
    assert rig.asked() == sorted((UNTIL_COMMIT if not is_adopted else []) + AFTER_COMMIT)


def assert_undone(rig: Rig) -> None:
    """Assert that the migration is ABORTED, that each host was asked to undo its part, and that nothing has changed."""
    assert rig.record.phase == Phase.PHASE_ABORTED
    assert rig.asked("destroy", "restore", "resume", "lift") == AFTER_ABORT
    assert rig.records() == rig.before
    for part in rig.plan.moves:
        assert rig.request("destroy", part.target.host, part.function) == DestroyFunctionRequest(
            attempt=rig.attempt, function=part.function, generation=4, decision=ABORTED
        )
        assert rig.request("resume", "h1", part.function) == ChangeStateRequest(
            attempt=rig.attempt,
            migration="m1",
            function=part.function,
            generation=3,
            state=DeviceState.DEVICE_STATE_RUNNING,
        )
    for host, driver in (("h1", "d1"), ("h3", "d2")):
        assert rig.request("restore", host) == LiftHoldRequest(attempt=rig.attempt, entries=names(3, driver))


async def test_an_adopter_aborts_what_is_undecided_and_undoes_it(rig: Rig):
    await rig.run(None)
    assert_undone(rig)
    assert rig.record.abort_reason == "its coordinator ended before it was decided"
    assert (rig.record.abort_step, rig.record.abort_host) == (Step.STEP_UNSPECIFIED, "")


async def test_an_adopter_undoes_what_was_aborted(rig: Rig):
    rig.decide(committed=False)
    await rig.run(None)
    assert_undone(rig)
    assert (rig.record.abort_reason, rig.record.abort_step) == ("because", Step.STEP_COPY)


@pytest.mark.parametrize("committed", [True, False])
async def test_what_is_over_needs_nothing(rig: Rig, committed: bool):
    rig.decide(committed=committed)
    finish = transaction.finish(rig.record, rig.fleet.revision, finished_by="c2", now=0)
    owner_revision = rig.fleet.items[keys.owner_key("m1")]
    assert rig.fleet.commit(finish)
    rig.fleet.items[keys.owner_key("m1")] = owner_revision
    rig.look()
    await rig.run(None)
    assert rig.record.finished_by == "c2"
    assert rig.ended == []
    assert rig.hosts.calls == []
    assert rig.store.commits == 0


@pytest.mark.parametrize(
    ("method", "step"),
    [("create", "CREATE"), ("import", "COPY"), ("hold", "HOLD"), ("stop", "HOLD")],
)
@pytest.mark.parametrize("host", ["", "h2"])
async def test_a_failure_before_commit_is_why_it_was_aborted_and_where(rig: Rig, method: str, step: str, host: str):
    metadata = {"host": host} if host else {}
    rig.hosts.failures[method] = [VfleetError(Reason.LIMIT_EXCEEDED, "no more memory", metadata=metadata)]
    await rig.run()
    assert_undone(rig)
    assert rig.record.abort_host == host
    assert (rig.record.abort_reason, rig.record.abort_step) == ("no more memory", Step.Value(f"STEP_{step}"))
    assert abort_cause(rig.record) is Reason.LIMIT_EXCEEDED


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("create", Options(prepare_timeout_ms=20), "20 ms passed before the drivers could be held"),
        ("import", Options(prepare_timeout_ms=20), "20 ms passed before the drivers could be held"),
        ("hold", Options(hold_timeout_ms=20), "20 ms passed before the last difference was copied"),
        ("stop", Options(hold_timeout_ms=20), "20 ms passed before the last difference was copied"),
    ],
)
async def test_a_host_that_does_not_answer_in_time_is_why_it_was_aborted(
    rig: Rig, method: str, options: Options, reason: str
):
    rig.hosts.hangs = {method}
    await rig.run(options)
    assert_undone(rig)
    assert rig.record.abort_reason == reason


async def test_a_copy_that_ends_before_it_is_complete_is_an_error_of_the_target(rig: Rig):
    rig.hosts.is_cut_short = True
    await rig.run()
    assert_undone(rig)
    assert rig.record.abort_reason in {
        f"host {part.target.host!r}, ImportState: ended before the state of {part.function!r} was complete"
        for part in rig.plan.moves
    }


async def test_commit_waits_for_the_copy_even_when_all_are_held_and_stopped(rig: Rig):
    rig.hosts.on["stop"] = lambda: rig.hosts.stopped.clear()
    await rig.run(Options(hold_timeout_ms=50))
    assert_undone(rig)
    assert rig.record.abort_reason == "50 ms passed before the last difference was copied"


async def test_a_driver_that_does_not_acknowledge_is_no_obstacle(rig: Rig, caplog: pytest.LogCaptureFixture):
    rig.hosts.silent = ("d1", "d3")
    with caplog.at_level("INFO"):
        await rig.run()
    assert rig.record.phase == Phase.PHASE_DONE
    assert "held without acknowledgement: d1, d3" in caplog.text


async def test_the_progress_of_the_copies_is_shown(rig: Rig):
    migrating = rig.new_run()
    assert migrating.copies.progress() == [CopyProgress(function=f) for f in ("vf1", "vf2")]
    seen = []
    notify = rig.inventory.notify

    def noted(migration: str = "") -> None:
        seen.append(migrating.copies.progress()[0])
        notify(migration)

    rig.inventory.notify = noted
    await rig.clock.until_done(migrating.run(), 0.25)
    for rounds, received, dirty in ((1, 4096, 512), (2, 4608, 8), (3, 4616, 0)):
        progress = CopyProgress(function="vf1", rounds=rounds, received_bytes=received, dirty_bytes=dirty)
        progress.estimated_blackout.FromMicroseconds(0)
        assert progress in seen


async def test_a_cancel_while_it_copies_is_seen_at_once_and_undone(rig: Rig):
    def cancel() -> None:
        if rig.record.phase == Phase.PHASE_PREPARING:
            rig.decide(committed=False)

    rig.hosts.hangs = {"import"}
    rig.hosts.on["import"] = cancel
    await rig.run()
    assert_undone(rig)
    assert rig.record.abort_reason == "because"
    assert rig.asked("hold", "stop") == []


@pytest.mark.parametrize("method", ["create", "import", "hold", "stop"])
async def test_a_run_whose_migration_was_adopted_stops_and_decides_nothing(rig: Rig, method: str):
    def adopt() -> None:
        rig.fleet.put(keys.owner_key("m1"), "c2")
        rig.look()

    rig.hosts.hangs = {method}
    rig.hosts.on[method] = adopt
    with pytest.raises(VfleetError) as refused:
        await rig.run()
    assert refused.value.reason is Reason.CONFLICT
    assert rig.record.phase == Phase.PHASE_PREPARING
    assert rig.asked("lift", "destroy", "resume", "restore") == []


async def test_nothing_of_the_preparation_goes_on_while_it_is_undone(rig: Rig):
    ended = []

    async def import_that_is_slow_to_end(host: str, request: ImportStateRequest) -> AsyncIterator[ImportStateResponse]:
        if rig.record.phase == Phase.PHASE_PREPARING:
            rig.decide(committed=False)
        try:
            await asyncio.Event().wait()
            yield ImportStateResponse()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)
            ended.append(rig.asked("destroy", "resume", "restore"))

    rig.hosts.import_state = import_that_is_slow_to_end
    await rig.run()
    assert rig.record.phase == Phase.PHASE_ABORTED
    assert ended == [[], []]


async def test_a_commit_that_comes_too_late_is_an_abort(rig: Rig):
    rig.store.answers = ["lost"] * 60
    await rig.run(Options(hold_timeout_ms=5_000))
    assert_undone(rig)
    assert rig.record.abort_reason == "etcd did not take the COMMIT in time"
    assert abort_cause(rig.record) is Reason.LIMIT_EXCEEDED
    assert (rig.record.abort_step, rig.record.abort_host) == (Step.STEP_COMMIT, "")


async def test_a_commit_that_etcd_takes_in_time_is_one(rig: Rig):
    rig.store.answers = ["lost"] * 3
    await rig.run(Options(hold_timeout_ms=5_000))
    assert rig.record.phase == Phase.PHASE_DONE


@pytest.mark.parametrize(("after_s", "phase"), [(4.999, Phase.PHASE_DONE), (5.0, Phase.PHASE_ABORTED)])
async def test_the_time_to_commit_counts_from_when_the_hold_began(rig: Rig, after_s: float, phase: Phase.ValueType):
    def pass_time() -> None:
        rig.clock.now = held_s + after_s

    held_s = rig.clock.now = rig.clock.now + 100
    rig.hosts.on["stop"] = pass_time
    await rig.new_run(Options(hold_timeout_ms=5_000)).run()
    assert rig.record.phase == phase


async def test_a_commit_whose_comparisons_fail_is_aborted_with_what_changed(rig: Rig):
    rig.hosts.on["stop"] = lambda: rig.fleet.put(keys.registration_key("h2"), "h2-again")
    await rig.run()
    assert rig.record.phase == Phase.PHASE_ABORTED
    assert rig.record.abort_step == Step.STEP_COMMIT
    assert rig.record.abort_reason == f"changed since the plan was made: {keys.registration_key('h2')}"


def unreachable() -> VfleetError:
    return VfleetError(Reason.UNREACHABLE, "no answer")


@pytest.mark.parametrize("method", ["lift", "destroy"])
async def test_a_consequence_is_repeated_until_it_is_acknowledged(rig: Rig, method: str):
    rig.hosts.failures[method] = [unreachable() for _ in range(6)]
    await rig.run()
    assert rig.record.phase == Phase.PHASE_DONE
    assert len(rig.asked(method)) == 2 + 6


@pytest.mark.parametrize("method", ["restore", "destroy", "resume"])
async def test_an_undoing_is_repeated_until_it_is_acknowledged(rig: Rig, method: str):
    rig.hosts.failures[method] = [unreachable() for _ in range(6)]
    await rig.run(None)
    assert rig.record.phase == Phase.PHASE_ABORTED
    assert len(rig.asked(method)) == 2 + 6


@pytest.mark.parametrize("reason", [Reason.NOT_FOUND, Reason.STALE_ATTEMPT])
@pytest.mark.parametrize("method", ["lift", "destroy"])
async def test_a_host_on_which_nothing_is_left_is_not_asked_again(rig: Rig, method: str, reason: Reason):
    rig.hosts.failures[method] = [VfleetError(reason, "nothing")] * 2
    await rig.run()
    assert rig.record.phase == Phase.PHASE_DONE
    assert len(rig.asked(method)) == 2


async def test_an_undoing_that_finds_no_source_leaves_the_target_which_etcd_has_forgotten_to_be_the_home(rig: Rig):
    rig.hosts.gone.add("vf1")
    await rig.run(None)
    assert rig.record.phase == Phase.PHASE_ABORTED
    assert rig.asked("destroy", "restore", "resume", "lift") == [each for each in AFTER_ABORT if each != AFTER_ABORT[0]]


async def test_a_target_is_destroyed_only_after_its_source_has_answered(rig: Rig):
    rig.hosts.failures["resume"] = [unreachable() for _ in range(3)]
    await rig.run(None)
    order = [(method, request.function) for method, _, request in rig.hosts.calls if method in ("resume", "destroy")]
    for function in ("vf1", "vf2"):
        of_function = [method for method, other in order if other == function]
        assert of_function == ["resume"] * (len(of_function) - 1) + ["destroy"]


async def test_the_target_of_a_source_that_went_with_its_machine_is_destroyed(rig: Rig):
    rig.fleet.put(keys.registration_key("h1"), "h1-again")
    rig.look()
    await rig.run(None)
    assert rig.asked("destroy", "resume") == AFTER_ABORT[:2]


@pytest.mark.parametrize("since", ["begin", "create"])
async def test_a_target_started_anew_since_the_plan_is_asked_for_nothing_more(rig: Rig, since: str):
    """What it would make, nobody would undo: that is looked for on the machine of the plan."""

    def again() -> None:
        rig.fleet.put(keys.registration_key("h2"), "h2-again")
        rig.look()

    if since == "begin":
        again()
    else:
        rig.hosts.on["create"] = again
    await rig.run()
    assert rig.record.phase == Phase.PHASE_ABORTED
    assert rig.record.abort_reason == "host 'h2' was started anew since the plan was made"
    assert ("create", "h2", "vf1") not in rig.asked() or since == "create"
    assert ("import", "h2", "vf1") not in rig.asked()


async def test_a_machine_started_anew_has_nothing_to_undo(rig: Rig):
    for host in ("h1", "h2", "h3"):
        rig.fleet.put(keys.registration_key(host), f"{host}-again")
    rig.look()
    await rig.run(None)
    assert rig.record.phase == Phase.PHASE_ABORTED
    assert rig.hosts.calls == []


async def test_a_machine_started_anew_has_no_source_but_is_told_its_table(rig: Rig):
    rig.decide(committed=True)
    for host in ("h1", "h2", "h3"):
        rig.fleet.put(keys.registration_key(host), f"{host}-again")
    rig.look()
    await rig.run(None)
    assert rig.record.phase == Phase.PHASE_DONE
    assert rig.asked() == [("lift", "h1", ""), ("lift", "h3", "")]


async def test_a_machine_is_given_up_once_it_is_known_to_be_another(rig: Rig):
    def again() -> None:
        rig.fleet.put(keys.registration_key("h1"), "h1-again")
        rig.look()

    rig.hosts.failures["destroy"] = [unreachable(), unreachable()]
    rig.hosts.on["destroy"] = again
    await rig.run()
    assert rig.record.phase == Phase.PHASE_DONE
    assert len(rig.asked("destroy")) == 1


@pytest.mark.parametrize("begin_s", [None, 0.5])
async def test_it_notes_who_finished_when_and_how_long_each_step_took(rig: Rig, begin_s: float | None):
    def later(seconds: int) -> Callable[[], None]:
        def wait() -> None:
            rig.clock.now += seconds

        return wait

    for seconds, method in enumerate(("create", "import", "hold", "lift", "destroy"), start=1):
        rig.hosts.on[method] = later(seconds)
    began_s = rig.clock.now
    await rig.new_run(**({"begin_s": begin_s} if begin_s else {})).run()
    # There are two calls of each.
    steps = [("CREATE", 2), ("COPY", 4), ("HOLD", 6), ("COMMIT", 0), ("LIFT", 8), ("SCRUB", 10)]
    took = [(Step.Name(step.step)[5:], step.duration.ToNanoseconds() / 1e9) for step in rig.record.steps]
    assert took == ([("BEGIN", begin_s)] if begin_s else []) + steps
    assert rig.record.decide_time.ToSeconds() == began_s + 12
    assert rig.record.finish_time.ToSeconds() == began_s + 30
    assert rig.record.finished_by == "c1"
    assert rig.ended == [rig.record]


async def test_it_ends_when_the_inventory_has_its_end(rig: Rig):
    rig.decide(committed=True)
    migrating = rig.new_run(None)
    rig.store.changed = lambda: None
    running = asyncio.create_task(migrating.run())
    for _ in range(20):
        await rig.clock.advance(0.25)
    assert rig.record.phase == Phase.PHASE_DONE
    assert not running.done()
    rig.look()
    await running


# How the state is copied


POST_COPY = replace(OPTIONS, mode=TransferMode.TRANSFER_MODE_POST_COPY)


@pytest.mark.parametrize("is_adopted", [False, True])
async def test_in_post_copy_a_source_goes_only_after_all_has_arrived_at_its_target(is_adopted: bool):
    rig = Rig(TransferMode.TRANSFER_MODE_POST_COPY)
    if is_adopted:
        rig.decide(committed=True)
    rig.hosts.failures["arrive"] = [VfleetError(Reason.UNREACHABLE, "broke off")] * 3
    await rig.run(None if is_adopted else POST_COPY)
    assert rig.record.phase == Phase.PHASE_DONE
    for part in rig.plan.moves:
        watched = WatchArrivalRequest(attempt=rig.attempt, function=part.function, generation=4)
        calls = [
            (method, request.function) for method, _, request in rig.hosts.calls if method in ("arrive", "destroy")
        ]
        last = max(index for index, call in enumerate(calls) if call == ("arrive", part.function))
        assert last < calls.index(("destroy", part.function))
        assert ("arrive", part.target.host, watched) in rig.hosts.calls
    assert len([method for method, *_ in rig.hosts.calls if method == "arrive"]) == 5


async def test_in_post_copy_a_source_stays_when_its_target_stops_telling_before_all_is_there():
    rig = Rig(TransferMode.TRANSFER_MODE_POST_COPY)
    rig.hosts.cut_short = [0, 1, 2]
    await rig.run(POST_COPY)
    assert rig.record.phase == Phase.PHASE_DONE
    assert len([method for method, *_ in rig.hosts.calls if method == "arrive"]) == 5


async def test_in_post_copy_a_source_stays_while_its_target_can_not_be_asked():
    rig = Rig(TransferMode.TRANSFER_MODE_POST_COPY)
    rig.hosts.hangs.add("arrive")
    running = asyncio.create_task(rig.new_run(POST_COPY).run())
    for _ in range(100):
        await rig.clock.advance(1.0)
    assert rig.record.phase == Phase.PHASE_COMMITTED
    assert not rig.asked("destroy")
    running.cancel()


async def test_in_post_copy_nobody_waits_for_what_was_to_arrive_at_a_machine_that_was_started_anew():
    rig = Rig(TransferMode.TRANSFER_MODE_POST_COPY)
    rig.decide(committed=True)
    for host in ("h2", "h3"):
        rig.fleet.put(keys.registration_key(host), f"{host}-again")
    rig.look()
    await rig.run(None)
    assert rig.record.phase == Phase.PHASE_DONE
    assert rig.asked("arrive", "destroy") == AFTER_COMMIT[:2]


@pytest.mark.parametrize("answer", [Reason.NOT_FOUND, Reason.STALE_ATTEMPT])
async def test_in_post_copy_a_target_that_has_no_such_instance_needs_nothing(answer: Reason):
    rig = Rig(TransferMode.TRANSFER_MODE_POST_COPY)
    rig.hosts.failures["arrive"] = [VfleetError(answer, "lost")] * 2
    await rig.run(POST_COPY)
    assert rig.record.phase == Phase.PHASE_DONE


@pytest.mark.parametrize("policy", [LimitPolicy.LIMIT_POLICY_ABORT, LimitPolicy.LIMIT_POLICY_FORCE])
async def test_a_limit_that_can_not_be_met_ends_as_the_policy_says(rig: Rig, policy: LimitPolicy.ValueType):
    rig.hosts.last_copy_us = 9_000
    await rig.run(replace(OPTIONS, downtime_limit_ms=5, limit_policy=policy))
    if policy == LimitPolicy.LIMIT_POLICY_FORCE:
        assert rig.record.phase == Phase.PHASE_DONE
        return
    assert_undone(rig)
    assert rig.record.abort_step == Step.STEP_COPY
    assert "expected at most 5 ms: 8 bytes are dirty after 2 rounds" in rig.record.abort_reason
    assert not rig.asked("hold", "stop")


async def test_a_source_is_told_the_limit_and_the_bandwidth(rig: Rig):
    await rig.run(replace(OPTIONS, downtime_limit_ms=5, bandwidth_mib_per_s=3))
    options = rig.request("import", "h2", "vf1").options
    assert (options.has_limit, options.last_copy_limit_us, options.bandwidth_bytes_per_s) == (True, 5_000, 3 << 20)
