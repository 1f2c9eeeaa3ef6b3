"""The vfleet command against a coordinator and a hostd that answer from memory, over real gRPC."""
# ruff: noqa: N802  # servicers have the methods of the protos

import asyncio
import inspect
import io
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer
import yaml

from vfleet.address import table_offset
from vfleet.cli import (
    cluster,
    contexts,
    drain,
    fleet,
    get,
    history,
    migration,
    operations,
    plan,
    rearrange,
    top,
    workload,
)
from vfleet.cli.main import app, run
from vfleet.client import move_request
from vfleet.errors import Reason, VfleetError, invalid_field, not_found
from vfleet.parts import part_of
from vfleet.rpc import Server
from vfleet.v1 import driver_service_pb2 as driver_pb2
from vfleet.v1 import fleet_service_pb2 as fleet_pb2
from vfleet.v1 import migration_service_pb2 as migration_pb2
from vfleet.v1.driver_service_pb2_grpc import DriverServiceServicer, add_DriverServiceServicer_to_server
from vfleet.v1.fleet_service_pb2_grpc import FleetServiceServicer, add_FleetServiceServicer_to_server
from vfleet.v1.migration_service_pb2 import MoveProgress, MoveState
from vfleet.v1.migration_service_pb2_grpc import MigrationServiceServicer, add_MigrationServiceServicer_to_server
from vfleet.v1.placement_pb2 import (
    Boundary,
    BoundaryRule,
    Candidate,
    Constraints,
    Explanation,
    GroupRule,
    Merit,
    Placement,
    PlacementFilter,
    Preference,
    Rejection,
    Relation,
    Relaxation,
)
from vfleet.v1.records_pb2 import (
    Cordon,
    Device,
    Driver,
    Function,
    FunctionStatus,
    Host,
    Migration,
    Move,
    Phase,
    Place,
    Step,
    StepDuration,
)
from vfleet.v1.types_pb2 import GUEST_STATE_WAITING, Attempt, Bar, ErrorReason, Manufacturer, TableEntry

BASE = 0x0001_0180_0000_0000
VIRTUAL_ADDRESS = 0x1000_0000
ENTRY = TableEntry(
    driver="d1",
    function="vf1",
    host="h1",
    virtual_address=VIRTUAL_ADDRESS,
    length_bytes=0x200000,
    offset=table_offset(BASE, VIRTUAL_ADDRESS),
    generation=1,
)
FUNCTION = Function(
    name="vf1",
    identity=7,
    generation=1,
    device="h1/nic0",
    vf_index=1,
    base=BASE,
    bars=[Bar(index=0, size_bytes=4096), Bar(index=2, size_bytes=1 << 20)],
    status=FunctionStatus.FUNCTION_STATUS_ACTIVE,
    drivers=["d1"],
    model="checker",
)


CHANGE = migration_pb2.DeviceChange(device="h1/nic0", total_vfs=32, used_before=24, used_after=16)


def device(host: str, name: str) -> fleet_pb2.DeviceUse:
    return fleet_pb2.DeviceUse(
        device=Device(
            name=f"{host}/{name}",
            host=host,
            routing_id=0x100,
            model="checker",
            manufacturer=Manufacturer(vendor_id=0x1AF4, device_id=0x10C0),
            io_type="network",
            total_vfs=32,
            first_vf_offset=128,
            vf_stride=1,
            bars=FUNCTION.bars,
        ),
        segment=int(host[1:]),
        used_slots=1,
    )


def a_migration(request: migration_pb2.CreateMigrationRequest | migration_pb2.PlanMigrationRequest) -> Migration:
    return Migration(
        moves=[
            Move(
                function=move.function,
                identity=FUNCTION.identity,
                source=Place(device="h1/nic0", vf_index=1, base=BASE, generation=1, segment=1, routing_id=0x180),
                target=Place(
                    device=move.target_device or "h2/nic0",
                    vf_index=move.target_vf_index or 1,
                    base=0x0002_1110_0000_0000,
                    generation=2,
                    segment=2,
                    routing_id=0x1110,
                ),
            )
            for move in request.moves
        ]
    )


def an_explanation(chosen: str) -> Explanation:
    """Return why vf1 goes to h2/nic0, or, if nothing is chosen, why nowhere."""
    merits = [Merit(preference=Preference.PREFERENCE_LEAST_LOADED, value="3 of 64 slots in use")]
    rejections = [
        Rejection(
            device="h1/nic0",
            filter=PlacementFilter.PLACEMENT_FILTER_SOURCE,
            found="h1/nic0",
            expected="another device",
        ),
        Rejection(
            device="h3/nic0",
            filter=PlacementFilter.PLACEMENT_FILTER_GROUP,
            group=1,
            found="h3",
            expected="not within h3",
            by_plan=bool(chosen),
        ),
    ]
    candidates = [Candidate(device="h2/nic0", merits=merits)] if chosen else []
    placement = Placement(function="vf1", source="h1/nic0", device=chosen, candidates=candidates, rejections=rejections)
    relaxation = Relaxation(
        filter=PlacementFilter.PLACEMENT_FILTER_CORDON, remedy="uncordon host h2", devices={"vf1": "h2/nic0"}
    )
    return Explanation(placements=[placement], relaxations=[] if chosen else [relaxation])


@dataclass
class Fake(FleetServiceServicer, MigrationServiceServicer, DriverServiceServicer):
    """Answers what a fleet of two hosts would; `refuse` makes it refuse everything. Records what it was asked."""

    address: str = ""
    refuse: VfleetError | None = None
    outcome: Phase.ValueType = Phase.PHASE_DONE
    explanation: Explanation | None = None
    is_stuck: bool = False
    is_partial: bool = False
    moves: list[str] = field(default_factory=lambda: ["vf1", "vf2"])
    functions: list[Function] = field(default_factory=lambda: [FUNCTION])
    migrations: list[str] = field(default_factory=lambda: ["m-1"])
    guests: list[Driver] = field(default_factory=list)
    cause: ErrorReason.ValueType = ErrorReason.ERROR_REASON_UNREACHABLE
    queued: list[migration_pb2.MoveRequest] = field(default_factory=list)
    is_given_up: bool = False
    refusals: list[VfleetError] = field(default_factory=list)
    requests: list[object] = field(default_factory=list)

    def seen(self, request: object) -> None:
        self.requests.append(request)
        if self.refuse is not None:
            raise self.refuse
        if self.refusals:
            raise self.refusals.pop(0)

    async def ListHosts(self, request, context):
        self.seen(request)
        # A page a host, however many were asked for.
        number = int(request.page_token or "1")
        host = Host(name=f"h{number}", segment=number, address=self.address, incarnation="abc", registered=True)
        if number == 2:
            host.cordons.add(part=part_of("host", "h2"), reason="firmware")
            host.cordons.add(part=part_of("device", "h2/nic0"))
        return fleet_pb2.ListHostsResponse(hosts=[host], next_page_token="" if number == 2 else str(number + 1))

    async def ListDevices(self, request, context):
        self.seen(request)
        return fleet_pb2.ListDevicesResponse(devices=[device("h1", "nic0"), device("h2", "nic0")])

    async def ListFunctions(self, request, context):
        self.seen(request)
        return fleet_pb2.FleetServiceListFunctionsResponse(functions=self.functions)

    async def ListDrivers(self, request, context):
        self.seen(request)
        driver = Driver(name="d1", host="h1", main_memory_bytes=4096, entries=[ENTRY])
        return fleet_pb2.FleetServiceListDriversResponse(drivers=[driver, *self.guests])

    async def CreateFunction(self, request, context):
        self.seen(request)
        return fleet_pb2.FleetServiceCreateFunctionResponse(function=FUNCTION)

    async def DeleteFunction(self, request, context):
        self.seen(request)
        return fleet_pb2.DeleteFunctionResponse()

    async def AttachDriver(self, request, context):
        self.seen(request)
        if request.HasField("guest"):
            self.guests.append(Driver(name=request.driver, host=request.host, guest_state=GUEST_STATE_WAITING))
        return fleet_pb2.AttachDriverResponse(entry=ENTRY)

    async def DetachDriver(self, request, context):
        self.seen(request)
        return fleet_pb2.DetachDriverResponse()

    async def DeleteDriver(self, request, context):
        self.seen(request)
        return fleet_pb2.FleetServiceDeleteDriverResponse()

    async def CheckFleet(self, request, context):
        self.seen(request)
        return fleet_pb2.CheckFleetResponse()

    async def BumpGeneration(self, request, context):
        self.seen(request)
        return fleet_pb2.BumpGenerationResponse(generation=2)

    async def ForgetHost(self, request, context):
        self.seen(request)
        return fleet_pb2.ForgetHostResponse(lost_functions=["vf1"])

    async def Cordon(self, request, context):
        self.seen(request)
        return fleet_pb2.CordonResponse(cordon=Cordon(part=request.part, reason=request.reason))

    async def Uncordon(self, request, context):
        self.seen(request)
        return fleet_pb2.UncordonResponse()

    async def Drain(self, request, context):
        self.seen(request)
        names = ["vf1", "vf2", "vf3"]
        waiting = [MoveProgress(function=name, state=MoveState.MOVE_STATE_WAITING) for name in names]
        yield migration_pb2.DrainResponse(functions=waiting, is_first=True)
        moved = MoveProgress(function="vf2", state=MoveState.MOVE_STATE_MOVED, device="h2/nic0", migration="m-1")
        moved.held.FromMilliseconds(12)
        yield migration_pb2.DrainResponse(functions=[moved])
        # As if another coordinator went on: of vf1 it knows nothing any more.
        yield migration_pb2.DrainResponse(functions=waiting[2:], is_first=True)
        state = MoveState.MOVE_STATE_STUCK if self.is_stuck else MoveState.MOVE_STATE_MOVED
        last = MoveProgress(function="vf3", state=state, why="no device is like it" if self.is_stuck else "")
        yield migration_pb2.DrainResponse(functions=[last], is_over=True)

    async def PlanRearrangement(self, request, context):
        self.seen(request)
        plan = migration_pb2.Rearrangement(goal=request.goal, changes=[CHANGE] if self.moves else [])
        for name in self.moves:
            plan.moves.add(function=name, source_device="h1/nic0", target_device="h2/nic0", why="it is the fullest")
        return migration_pb2.PlanRearrangementResponse(
            plan=plan,
            before=migration_pb2.FleetFigures(highest_load=0.75, devices_in_use=1),
            after=migration_pb2.FleetFigures(highest_load=0.5, devices_in_use=2),
            stuck=[migration_pb2.StuckFunction(function="vf9", why="function 'vf9' is in migration 'm-1'")],
            is_partial=self.is_partial,
        )

    async def Rearrange(self, request, context):
        self.seen(request)
        moving = [MoveProgress(function=m.function, state=MoveState.MOVE_STATE_MOVING) for m in request.plan.moves]
        yield migration_pb2.RearrangeResponse(functions=moving, is_first=True)
        state = MoveState.MOVE_STATE_STUCK if self.is_stuck else MoveState.MOVE_STATE_MOVED
        for each in moving:
            each.state, each.device, each.why = state, "h2/nic0", "it was moved" if self.is_stuck else ""
        yield migration_pb2.RearrangeResponse(functions=moving, is_over=True)

    async def WatchEvents(self, request, context):
        self.seen(request)
        for name, what in (("h2", "cordoned: firmware"), ("h2", "uncordoned")):
            event = fleet_pb2.FleetEvent(kind=fleet_pb2.EVENT_KIND_CORDON, name=name, what=what, revision=7)
            event.time.FromMilliseconds(1_500)
            yield fleet_pb2.WatchEventsResponse(events=[event])

    async def PlanMigration(self, request, context):
        self.seen(request)
        if self.explanation is not None:
            return migration_pb2.PlanMigrationResponse(explanation=self.explanation)
        explanation = an_explanation("h2/nic0") if request.explain else None
        return migration_pb2.PlanMigrationResponse(migration=a_migration(request), explanation=explanation)

    async def CreateMigration(self, request, context):
        self.seen(request)
        migration = a_migration(request)
        migration.name, migration.phase = request.request_id, Phase.PHASE_PREPARING
        return migration_pb2.CreateMigrationResponse(migration=migration)

    async def GetMigration(self, request, context):
        self.seen(request)
        return migration_pb2.GetMigrationResponse(migration=self.over(request.name))

    async def ListMigrations(self, request, context):
        self.seen(request)
        if self.queued:
            return migration_pb2.ListMigrationsResponse(migrations=[self.over("m-q")])
        response = migration_pb2.ListMigrationsResponse(migrations=map(self.over, self.migrations))
        for over in response.migrations:
            over.moves.extend(a_migration(migration_pb2.PlanMigrationRequest(moves=[move_request("vf1")])).moves)
        return response

    async def WatchMigration(self, request, context):
        self.seen(request)
        if self.is_stuck:
            yield migration_pb2.WatchMigrationResponse(migration=Migration(name=request.name))
            await asyncio.sleep(60)
        running = Migration(name=request.name, phase=Phase.PHASE_PREPARING)
        copy = migration_pb2.CopyProgress(
            function="vf1",
            rounds=1,
            received_bytes=1 << 20,
            dirty_bytes=8192,
            dirty_bytes_per_s=3 << 20,
            throttle_percent=20,
        )
        copy.estimated_blackout.FromMicroseconds(7_250)
        copies = [copy]
        yield migration_pb2.WatchMigrationResponse(migration=running, step=Step.STEP_COPY, copies=copies)
        yield migration_pb2.WatchMigrationResponse(migration=self.over(request.name))

    async def CancelMigration(self, request, context):
        self.seen(request)
        migration = Migration(name=request.name, phase=Phase.PHASE_ABORTING)
        return migration_pb2.CancelMigrationResponse(migration=migration)

    async def StartWorkload(self, request, context):
        self.seen(request)
        return driver_pb2.StartWorkloadResponse()

    async def StopWorkload(self, request, context):
        self.seen(request)
        return driver_pb2.StopWorkloadResponse(report=driver_pb2.WorkloadReport(operations=1234567))

    async def GetWorkloadReport(self, request, context):
        self.seen(request)
        return driver_pb2.GetWorkloadReportResponse(report=driver_pb2.WorkloadReport(operations=1234567))

    def over(self, name: str) -> Migration:
        if self.queued:
            return self.waiting(name)
        aborted = self.outcome == Phase.PHASE_ABORTED
        migration = Migration(
            name=name,
            phase=self.outcome,
            attempt=Attempt(fleet_generation=1, revision=42),
            abort_reason="h2 is gone" if aborted else "",
            abort_step=Step.STEP_COPY if aborted else Step.STEP_UNSPECIFIED,
            abort_cause=self.cause if aborted else 0,
            steps=[StepDuration(step=Step.STEP_BEGIN)],
        )
        migration.steps[0].duration.FromMilliseconds(7)
        migration.begin_time.SetInParent()
        return migration

    def waiting(self, name: str) -> Migration:
        """Return one that is queued, or was given up there."""
        migration = Migration(name=name, phase=Phase.PHASE_QUEUED, coordinator="c1")
        for move in self.queued:
            migration.moves.add(function=move.function)
            if move.target_device:
                migration.moves[-1].target.MergeFrom(Place(device=move.target_device, vf_index=move.target_vf_index))
        if self.is_given_up:
            migration.phase, migration.abort_cause = Phase.PHASE_ABORTED, ErrorReason.ERROR_REASON_LIMIT_EXCEEDED
            migration.abort_reason = "it could not begin before its deadline"
            migration.finish_time.FromSeconds(1_000)
            migration.attempt.revision = 42  # that of its record
        return migration


@pytest.fixture
async def fake() -> AsyncIterator[Fake]:
    servicer = Fake()
    server = Server(["vfleet.v1.FleetService", "vfleet.v1.MigrationService", "vfleet.v1.DriverService"])
    add_FleetServiceServicer_to_server(servicer, server.grpc)
    add_MigrationServiceServicer_to_server(servicer, server.grpc)
    add_DriverServiceServicer_to_server(servicer, server.grpc)
    servicer.address = f"127.0.0.1:{server.listen('127.0.0.1:0')}"
    await server.start()
    yield servicer
    await server.stop(0)


@dataclass
class Result:
    code: int
    out: str
    err: str


Vfleet = Callable[..., "asyncio.Future[Result]"]


@pytest.fixture
def vfleet(fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Vfleet:
    """Run the vfleet command with the fake as its coordinator."""
    monkeypatch.setenv("VFLEET_COORDINATOR", fake.address)
    monkeypatch.setenv("VFLEET_INSECURE", "1")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    async def command(*arguments: str) -> Result:
        code = await asyncio.to_thread(run, arguments)
        return Result(code, *capsys.readouterr())

    return command


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("hosts", ["h1", "h2", "0x0001", "yes", "yes: firmware; device h2/nic0"]),
        ("devices", ["h1/nic0", "0001:01:00.0", "0: 4 KiB, 2: 1 MiB"]),
        ("functions", ["vf1", "active", "0x0001018000000000", "d1"]),
        ("drivers", ["d1", "h1", "vf1"]),
        ("migrations", ["m-1", "done"]),
    ],
)
async def test_get_prints_a_table_for_people(vfleet: Vfleet, kind: str, words: list[str]) -> None:
    result = await vfleet("get", kind)
    assert (result.code, result.err) == (0, "")
    for word in words:
        assert word in result.out


async def test_get_takes_all_pages(vfleet: Vfleet) -> None:
    result = await vfleet("get", "hosts", "-o", "json")
    assert [host["name"] for host in json.loads(result.out)["hosts"]] == ["h1", "h2"]


@pytest.mark.parametrize("kind", ["hosts", "devices", "functions", "drivers", "migrations"])
async def test_json_and_yaml_say_the_same(vfleet: Vfleet, kind: str) -> None:
    as_json = json.loads((await vfleet("get", kind, "-o", "json")).out)
    as_yaml = yaml.safe_load((await vfleet("get", kind, "-o", "yaml")).out)
    assert as_json == as_yaml
    assert next(iter(as_json)) == kind


async def test_json_has_the_fields_of_the_protos_even_when_empty(vfleet: Vfleet) -> None:
    function = json.loads((await vfleet("describe", "function", "vf1", "-o", "json")).out)
    assert function["vf_index"] == 1
    assert function["base"] == str(BASE)
    assert function["migration"] == ""


async def test_describe_function_prints_how_addresses_are_computed(vfleet: Vfleet) -> None:
    out = (await vfleet("describe", "function", "vf1")).out
    assert "0001:01:10.0" in out
    assert "0x0001018000000000 = 0x0001 << 48 | 0x0180 << 32" in out
    assert re.search(r"BAR 2\s+0x0001018000100000, 1 MiB", out)
    assert f"{ENTRY.offset:#018x}" in out


async def test_describe_device_prints_where_its_vfs_are(vfleet: Vfleet) -> None:
    out = (await vfleet("describe", "device", "h1/nic0")).out
    assert "routing ID 0x0100 + 128 + (n - 1) * 1" in out
    assert "01:10.0 to 01:13.7" in out


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (["host", "h9"], "host"),
        (["device", "h9/nic0"], "device"),
        (["function", "vf9"], "function"),
        (["driver", "d9"], "driver"),
    ],
)
async def test_what_is_not_there_is_bad_input(vfleet: Vfleet, arguments: list[str], kind: str) -> None:
    result = await vfleet("describe", *arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err == f"vfleet: no {kind} named '{arguments[1]}'\n"


async def test_migrate_to_one_device(vfleet: Vfleet, fake: Fake) -> None:
    result = await vfleet("migrate", "vf1", "vf2", "--to", "h2/nic0", "--request-id", "mine")
    assert (result.code, result.out) == (0, "mine has begun; follow it with: vfleet watch mine\n")
    (request,) = fake.requests
    assert request.request_id == "mine"
    assert [(move.function, move.target_device) for move in request.moves] == [("vf1", "h2/nic0"), ("vf2", "h2/nic0")]


async def test_migrate_a_group_to_several_devices(vfleet: Vfleet, fake: Fake) -> None:
    assert (await vfleet("migrate", "vf1=h2/nic0:4", "vf2=h3/nic1", "vf3", "--to", "h2/nic0:5")).code == 0
    (request,) = fake.requests
    moves = [(move.function, move.target_device, move.target_vf_index) for move in request.moves]
    assert moves == [("vf1", "h2/nic0", 4), ("vf2", "h3/nic1", 0), ("vf3", "h2/nic0", 5)]


async def test_migrate_says_how_to_copy(vfleet: Vfleet, fake: Fake) -> None:
    assert (await vfleet("migrate", "vf1=h2/nic0")).code == 0
    options = ("--mode", "post-copy", "--downtime-limit", "20", "--on-limit", "force", "--max-rounds", "3")
    assert (await vfleet("migrate", "vf1=h2/nic0", *options, "--bandwidth", "200")).code == 0
    plain, precise = (request.options for request in fake.requests)
    assert plain == migration_pb2.MigrationOptions(mode=1, limit_policy=1)
    assert precise == migration_pb2.MigrationOptions(
        mode=2, downtime_limit_ms=20, limit_policy=2, max_rounds=3, bandwidth_mib_per_s=200
    )


@pytest.mark.parametrize(
    "options", [("--mode", "cold"), ("--on-limit", "wait"), ("--max-rounds", "-1"), ("--bandwidth", str(1 << 32))]
)
async def test_migrate_refuses_what_can_not_be_meant(vfleet: Vfleet, fake: Fake, options: tuple[str, str]) -> None:
    result = await vfleet("migrate", "vf1=h2/nic0", *options)
    assert (result.code, fake.requests) == (2, [])
    assert options[0] in result.err


async def test_every_migration_gets_a_request_id_of_its_own(vfleet: Vfleet, fake: Fake) -> None:
    await vfleet("migrate", "vf1=h2/nic0")
    await vfleet("migrate", "vf1=h2/nic0")
    first, second = (request.request_id for request in fake.requests)
    assert first
    assert first != second


async def test_a_dry_run_only_plans(vfleet: Vfleet, fake: Fake) -> None:
    result = await vfleet("migrate", "vf1=h2/nic0", "--dry-run")
    assert result.code == 0
    assert "0002:11:02.0" in result.out
    assert [type(request) for request in fake.requests] == [migration_pb2.PlanMigrationRequest]


async def test_plan_shows_the_verdict_on_each_device(vfleet: Vfleet, fake: Fake) -> None:
    result = await vfleet("plan", "vf1")
    assert (result.code, result.err) == (0, "")
    assert re.search(r"vf1 +h2/nic0 +chosen +3 of 64 slots in use\n", result.out)
    assert re.search(r"vf1 +h1/nic0 +rejected: source +h1/nic0 +another device\n", result.out)
    assert re.search(r"vf1 +h3/nic0 +rejected by the plan: group 1 +h3 +not within h3\n", result.out)
    assert re.search(r"vf1 +h1/nic0 +h2/nic0 +1\n", result.out)
    brief = await vfleet("plan", "vf1", "--brief")
    assert "h2/nic0" in brief.out
    assert "rejected" not in brief.out
    assert [request.explain for request in fake.requests] == [True, False]


async def test_plan_for_programs_says_all(vfleet: Vfleet, fake: Fake) -> None:
    result = await vfleet("plan", "vf1", "-o", "json")
    (placement,) = json.loads(result.out)["explanation"]["placements"]
    assert placement["device"] == "h2/nic0"
    assert [(r["device"], r["filter"], r["found"], r["expected"]) for r in placement["rejections"]] == [
        ("h1/nic0", "PLACEMENT_FILTER_SOURCE", "h1/nic0", "another device"),
        ("h3/nic0", "PLACEMENT_FILTER_GROUP", "h3", "not within h3"),
    ]


async def test_a_plan_that_there_is_none_of_says_what_would_do(vfleet: Vfleet, fake: Fake) -> None:
    fake.explanation = an_explanation("")
    result = await vfleet("plan", "vf1")
    assert (result.code, result.err) == (1, "vfleet: no choice of devices meets what is asked for vf1\n")
    assert re.search(r"uncordon host h2 +cordon +vf1=h2/nic0\n", result.out)
    assert (await vfleet("plan", "vf1", "-o", "json")).code == 1
    fake.explanation.ClearField("relaxations")
    assert "no single change is known that would make it possible" in (await vfleet("plan", "vf1")).out


async def test_history_shows_homes_and_migrations(vfleet: Vfleet, fake: Fake) -> None:
    fake.outcome = Phase.PHASE_ABORTED
    result = await vfleet("history", "vf1")
    assert (result.code, result.err) == (0, "")
    assert re.search(r"^1 +h1/nic0 +1$", result.out, re.MULTILINE)
    assert re.search(
        r"^1 +h1/nic0 +1 +m-1 .* aborted, to h2/nic0, at copy: h2 is gone +none$", result.out, re.MULTILINE
    )
    (asked,) = (request for request in fake.requests if isinstance(request, migration_pb2.ListMigrationsRequest))
    assert asked.function == "vf1"


async def test_the_history_of_a_function_that_is_no_more_is_that_of_its_name(vfleet: Vfleet, fake: Fake) -> None:
    fake.functions = []
    result = await vfleet("history", "vf1")
    assert result.code == 0
    assert result.out.endswith("vf1 is no more\n")
    fake.migrations = []
    assert (await vfleet("history", "vf1")).code == 2


async def test_events_are_a_line_each(vfleet: Vfleet, fake: Fake) -> None:
    result = await vfleet("events", "-f")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == "1970-01-01 00:00:01.500Z  cordon       h2                  cordoned: firmware"
    programs = await vfleet("events", "-o", "json")
    assert [json.loads(line)["what"] for line in programs.out.splitlines()] == ["cordoned: firmware", "uncordoned"]
    assert [request.follow for request in fake.requests] == [True, False]


async def test_a_timeline_is_drawn_into_a_file(vfleet: Vfleet, tmp_path) -> None:
    file = tmp_path / "m-1.svg"
    result = await vfleet("describe", "migration", "m-1", "--svg", str(file))
    assert (result.code, result.err) == (0, "")
    assert file.read_text().startswith("<svg")
    nowhere = await vfleet("describe", "migration", "m-1", "--svg", str(tmp_path / "no" / "m-1.svg"))
    assert nowhere.code == 1
    assert re.fullmatch(r"vfleet: [^\n]+\n", nowhere.err)


async def test_plan_and_migrate_ask_for_the_same(vfleet: Vfleet, fake: Fake) -> None:
    options = ("--adapter", "same", "--power-domain", "different", "--attachment", "lan", "--attachment", "san")
    options += ("--prefer", "pack", "--prefer", "driver-host", "--together", "vf1,vf2", "--apart", "vf1,vf3@bridge")
    for command in (("plan",), ("migrate",), ("migrate", "--dry-run")):
        assert (await vfleet(*command, "vf1", *options)).code == 0
    assert [request.moves[0].target_device for request in fake.requests] == ["", "", ""]
    wanted = Constraints(
        boundaries=[
            BoundaryRule(boundary=Boundary.BOUNDARY_PHYSICAL_ADAPTER, relation=Relation.RELATION_SAME),
            BoundaryRule(boundary=Boundary.BOUNDARY_POWER_DOMAIN, relation=Relation.RELATION_DIFFERENT),
        ],
        groups=[
            GroupRule(functions=["vf1", "vf2"], boundary=Boundary.BOUNDARY_HOST, relation=Relation.RELATION_SAME),
            GroupRule(
                functions=["vf1", "vf3"], boundary=Boundary.BOUNDARY_BRIDGE, relation=Relation.RELATION_DIFFERENT
            ),
        ],
        preferences=[Preference.PREFERENCE_PACK, Preference.PREFERENCE_DRIVER_HOST],
        attachments=["lan", "san"],
    )
    assert [request.constraints for request in fake.requests] == [wanted] * 3


async def test_a_cordon_is_shown_with_its_reason(vfleet: Vfleet, fake: Fake) -> None:
    assert (
        await vfleet("cordon", "host", "h2", "--reason", "new firmware")
    ).out == "host h2 is cordoned: new firmware\n"
    assert (await vfleet("uncordon", "device", "h2/nic0")).out == "device h2/nic0 is in use\n"
    assert [(type(request), request.part) for request in fake.requests] == [
        (fleet_pb2.CordonRequest, part_of("host", "h2")),
        (fleet_pb2.UncordonRequest, part_of("device", "h2/nic0")),
    ]
    assert re.search(r"Cordoned +yes: firmware; device h2/nic0\n", (await vfleet("describe", "host", "h2")).out)


async def test_a_drain_shows_how_far_the_whole_is(vfleet: Vfleet, fake: Fake) -> None:
    result = await vfleet("drain", "host", "h1", "--parallel", "2", "--apart", "vf1,vf2")
    assert result.code == 0
    assert "1/3 vf2 moved to h2/nic0, drivers held for 12.0 ms\n2/3 vf1 moved\n3/3 vf3 moved\n" in result.err
    assert "host h1: 3 moved, 0 stuck; it stays cordoned" in result.out
    (request,) = fake.requests
    assert (request.part, request.parallel) == (part_of("host", "h1"), 2)
    assert len(request.constraints.groups) == 1


async def test_a_plan_of_many_moves_is_shown_before_it_is_done(vfleet: Vfleet, fake: Fake) -> None:
    result = await vfleet("rebalance", "--tolerance", "5", "--within-hosts", "--parallel", "2", "--yes")
    assert result.code == 0
    assert re.search(r"vf1 +h1/nic0 +h2/nic0 +it is the fullest\n", result.out)
    assert re.search(r"h1/nic0 +32 +24 +16\n", result.out)
    assert re.search(r"highest load of a device +75% +50%\n", result.out)
    assert re.search(r"vf9 +function 'vf9' is in migration 'm-1'\n", result.out)
    assert re.search(r"vf1 +moved +h2/nic0", result.out)
    assert result.out.endswith("2 moved, 0 stuck\n")
    planned, done = fake.requests
    assert (planned.goal, planned.tolerance_percent) == (migration_pb2.REARRANGEMENT_GOAL_EVEN, 5)
    assert [each.function for each in done.plan.moves] == ["vf1", "vf2"]
    assert (done.plan.goal, list(done.plan.changes), done.parallel) == (planned.goal, [CHANGE], 2)
    same_host = BoundaryRule(boundary=Boundary.BOUNDARY_HOST, relation=Relation.RELATION_SAME)
    assert list(done.constraints.boundaries) == list(planned.constraints.boundaries) == [same_host]


@pytest.mark.parametrize(
    ("free", "goal"), [("devices", "REARRANGEMENT_GOAL_FREE_DEVICES"), ("hosts", "REARRANGEMENT_GOAL_FREE_HOSTS")]
)
async def test_a_dry_run_moves_nothing(vfleet: Vfleet, fake: Fake, free: str, goal: str) -> None:
    result = await vfleet("defragment", "--free", free, "--dry-run", "-o", "json")
    assert json.loads(result.out)["plan"]["goal"] == goal
    assert [type(request) for request in fake.requests] == [migration_pb2.PlanRearrangementRequest]


@pytest.mark.parametrize(("answer", "requests"), [("y\n", 2), ("n\n", 1), ("\n", 1)])
async def test_at_a_terminal_somebody_is_asked(
    vfleet: Vfleet, fake: Fake, monkeypatch: pytest.MonkeyPatch, answer: str, requests: int
) -> None:
    terminal = io.StringIO(answer)
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr("sys.stdin", terminal)
    result = await vfleet("defragment")
    assert result.code == 0
    assert "Move 2 functions? [y/N]" in result.err
    assert ("nothing is moved" in result.out) is (requests == 1)
    assert len(fake.requests) == requests


async def test_with_nothing_to_do_nobody_is_asked(vfleet: Vfleet, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.moves.clear()
    result = await vfleet("rebalance", "--yes")
    assert (result.code, len(fake.requests)) == (0, 1)
    assert result.out.endswith("nothing to do\n")
    assert json.loads((await vfleet("rebalance", "--yes", "-o", "json")).out)["functions"] == []


async def test_a_plan_that_is_not_all_says_so(vfleet: Vfleet, fake: Fake) -> None:
    fake.is_partial = True
    assert "there is more to do when it is done" in (await vfleet("rebalance", "--dry-run")).out


async def test_what_could_not_be_rearranged_is_named(vfleet: Vfleet, fake: Fake) -> None:
    fake.is_stuck = True
    result = await vfleet("defragment", "--yes")
    assert result.code == 1
    assert result.out.endswith("0 moved, 2 stuck\n")
    assert result.err.endswith("vfleet: can't move vf1, vf2\n")
    functions = json.loads((await vfleet("defragment", "--yes", "-o", "json")).out)["functions"]
    assert [each["why"] for each in functions] == ["it was moved"] * 2


async def test_a_drain_that_leaves_something_names_it_and_fails(vfleet: Vfleet, fake: Fake) -> None:
    fake.is_stuck = True
    result = await vfleet("drain", "device", "h1/nic0")
    assert result.code == 1
    assert re.search(r"vf3 +stuck +no device is like it\n", result.out)
    assert result.err.endswith("vfleet: can't move vf3\n")
    functions = json.loads((await vfleet("drain", "device", "h1/nic0", "-o", "json")).out)["functions"]
    assert {each["function"]: each["state"].removeprefix("MOVE_STATE_") for each in functions} == {
        "vf1": "MOVED",
        "vf2": "MOVED",
        "vf3": "STUCK",
    }


async def test_migrate_waits_and_shows_how_it_ended(vfleet: Vfleet) -> None:
    result = await vfleet("migrate", "vf1=h2/nic0", "--wait", "--request-id", "mine")
    assert result.code == 0
    progress = "round 1, 1.0 MiB received, 8.0 KiB dirty at 3.0 MiB/s, blackout 7.2 ms, slowed by 20 %"
    assert result.err == f"mine: preparing, copy; vf1: {progress}\nmine: done\n"
    assert re.search(r"begin\s+7\.0 ms", result.out)


async def test_an_aborted_migration_is_a_failure(vfleet: Vfleet, fake: Fake) -> None:
    fake.outcome = Phase.PHASE_ABORTED
    result = await vfleet("migrate", "vf1=h2/nic0", "--wait", "--request-id", "mine")
    assert result.code == 1
    assert "vfleet: mine was aborted at copy: h2 is gone (" in result.err


async def test_an_aborted_migration_says_where_why_what_was_undone_and_what_to_do(vfleet: Vfleet, fake: Fake) -> None:
    fake.outcome = Phase.PHASE_ABORTED
    result = await vfleet("migrate", "vf1", "--wait", "--request-id", "mine")
    undone = "the copies at the targets are destroyed; the functions are where they were"
    advice = "try again; if it fails again, look after the host, or name another target"
    assert f"vfleet: mine was aborted at copy: h2 is gone ({undone}); {advice}\n" in result.err
    assert re.search(r"What to do +try again; if it fails again, look after the host", result.out)


@pytest.mark.parametrize(("cause", "tries"), [("UNREACHABLE", 3), ("BAD_STATE", 1), ("CANCELLED", 1)])
async def test_migrate_tries_again_what_may_pass_and_only_that(
    vfleet: Vfleet, fake: Fake, monkeypatch: pytest.MonkeyPatch, cause: str, tries: int
) -> None:
    monkeypatch.setattr(migration, "_RETRY_FIRST_S", 0.001)
    fake.outcome, fake.cause = Phase.PHASE_ABORTED, ErrorReason.Value(f"ERROR_REASON_{cause}")
    assert (await vfleet("migrate", "vf1", "--retries", "2", "--request-id", "mine", "--priority", "-3")).code == 1
    asked = [request for request in fake.requests if isinstance(request, migration_pb2.CreateMigrationRequest)]
    assert [request.request_id for request in asked] == ["mine", "mine-2", "mine-3"][:tries]
    assert {request.priority for request in asked} == {-3}


async def test_migrate_tries_again_what_was_refused_for_what_may_pass(
    vfleet: Vfleet, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under the same name: nothing has begun that had it, or it is the same migration."""
    monkeypatch.setattr(migration, "_RETRY_FIRST_S", 0.001)
    fake.refusals = [
        VfleetError(Reason.IN_MIGRATION, "function 'vf1' is in migration 'm-7'"),
        VfleetError(Reason.NO_FREE_SLOT, "device h2/nic0 has no free slot"),
    ]
    result = await vfleet("migrate", "vf1", "--retries", "2", "--request-id", "mine")
    assert result.code == 0
    assert result.err.startswith("mine: function 'vf1' is in migration 'm-7'; tried again\nmine: device h2/nic0 ")
    asked = [request for request in fake.requests if isinstance(request, migration_pb2.CreateMigrationRequest)]
    assert [request.request_id for request in asked] == ["mine"] * 3


@pytest.mark.parametrize("reason", [Reason.IN_MIGRATION, Reason.NOT_FOUND])
async def test_migrate_gives_up_what_is_refused_for_good_or_too_often(
    vfleet: Vfleet, fake: Fake, monkeypatch: pytest.MonkeyPatch, reason: Reason
) -> None:
    monkeypatch.setattr(migration, "_RETRY_FIRST_S", 0.001)
    fake.refuse = VfleetError(reason, "no")
    result = await vfleet("migrate", "vf1", "--retries", "1", "--request-id", "mine")
    is_bad = reason is Reason.NOT_FOUND
    assert (result.code, len(fake.requests)) == ((2, 1) if is_bad else (1, 2))
    assert result.err.endswith("vfleet: no\n")


async def test_no_try_begins_after_the_time_is_over(vfleet: Vfleet, fake: Fake) -> None:
    """The first pause is half a second at the least."""
    fake.outcome = Phase.PHASE_ABORTED
    result = await vfleet("migrate", "vf1", "--retries", "3", "--timeout", "0.3")
    assert (result.code, "tried again" in result.err) == (1, False)
    assert sum(isinstance(request, migration_pb2.CreateMigrationRequest) for request in fake.requests) == 1


async def test_what_waits_to_begin_has_no_time_and_no_places_yet(vfleet: Vfleet, fake: Fake) -> None:
    fake.queued = [move_request("vf1"), move_request("vf2", "h2/nic0", 4)]
    wide = (await vfleet("get", "migrations", "--active", "-o", "wide")).out
    assert re.search(r"^m-q +queued +vf1, vf2=h2/nic0 +c1$", wide, re.MULTILINE)
    shown = (await vfleet("describe", "migration", "m-q")).out
    assert re.search(r"^vf1 +to +not planned$", shown, re.MULTILINE)
    assert re.search(r"^vf2 +to +h2/nic0 +4$", shown, re.MULTILINE)
    assert "0x0000000000000000" not in shown
    assert re.search(r"^m-q +queued +vf1, vf2 to h2/nic0$", (await vfleet("top")).out, re.MULTILINE)


async def test_what_never_began_says_so(vfleet: Vfleet, fake: Fake, tmp_path: Path) -> None:
    fake.queued, fake.is_given_up = [move_request("vf1")], True
    shown = (await vfleet("describe", "migration", "m-q")).out
    assert re.search(r"^Aborted +it could not begin before its deadline$", shown, re.MULTILINE)
    assert re.search(r"^Attempt +none$", shown, re.MULTILINE)
    assert re.search(r"^Undone +it had not begun$", shown, re.MULTILINE)
    assert re.search(r"^What to do +try again when fewer migrations are under way", shown, re.MULTILINE)
    drawn = await vfleet("describe", "migration", "m-q", "--svg", str(tmp_path / "q.svg"))
    assert (drawn.code, drawn.err) == (1, "vfleet: migration 'm-q' never began: it has no timeline\n")
    fake.functions = []
    assert "m-q" not in (await vfleet("history", "vf1")).out


async def test_watch_for_programs_is_a_line_an_update(vfleet: Vfleet) -> None:
    result = await vfleet("watch", "m-1", "-o", "json")
    updates = [json.loads(line) for line in result.out.splitlines()]
    assert [update["migration"]["phase"] for update in updates] == ["PHASE_PREPARING", "PHASE_DONE"]
    assert (result.code, result.err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["hosts"], ["h1", "h2"]),
        (["hosts", "--state", "cordoned"], ["h2"]),
        (["hosts", "--host", "h1"], ["h1"]),
        (["hosts", "--state", "unregistered"], []),
        (["devices", "--host", "h2", "--state", "free"], ["h2/nic0"]),
        (["devices", "--state", "full"], []),
        (["functions", "--host", "h1", "--state", "active"], ["vf1"]),
        (["functions", "--host", "h2"], []),
        (["functions", "--state", "migrating"], []),
        (["drivers", "--host", "h1"], ["d1"]),
        (["migrations", "--host", "h2", "--state", "done"], ["m-1"]),
        (["migrations", "--host", "h3"], []),
        (["migrations", "--state", "active"], []),
    ],
)
async def test_get_lists_what_is_asked_for_by_name(vfleet: Vfleet, arguments: list[str], names: list[str]) -> None:
    result = await vfleet("get", *arguments, "-o", "name")
    assert (result.code, result.out.splitlines()) == (0, names)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("devices", ["h1/nic0", "1af4:10c0"]),
        ("functions", ["vf1", "0x0000000000000007", "2: 1 MiB"]),
        ("drivers", ["d1", "4 KiB", "0x0000000010000000"]),
        ("migrations", ["m-1", "none", "1970-01-01 00:00:00.000Z"]),
    ],
)
async def test_a_wide_list_says_more(vfleet: Vfleet, kind: str, words: list[str]) -> None:
    narrow, wide = (await vfleet("get", kind)).out, (await vfleet("get", kind, "-o", "wide")).out
    for word in words:
        assert word in wide
    assert words[-1] not in narrow


@pytest.mark.parametrize("arguments", [["top", "--once"], ["top"]])
async def test_top_shows_one_frame_where_there_is_no_terminal(vfleet: Vfleet, arguments: list[str]) -> None:
    result = await vfleet(*arguments)
    assert (result.code, result.err) == (0, "")
    assert "2 of 2 hosts registered, 1 functions, 1 active, 0 in a migration" in result.out
    assert re.search(r"^h2 +yes +yes: firmware; device h2/nic0 +0 +1 of 32$", result.out, re.MULTILINE)
    assert re.search(r"^vf1 +active +h1/nic0, VF 1 +1 +1$", result.out, re.MULTILINE)
    assert re.search(r"^m-1 +done +vf1 to h2/nic0 +[\d.]+ s +none$", result.out, re.MULTILINE)


async def test_top_fills_a_terminal_and_leaves_it_as_it_was(vfleet: Vfleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    # The fake's events come to an end, and with them the view.
    result = await vfleet("top")
    assert result.code == 0
    before, _, screen = result.out.partition("\x1b[?1049h")
    assert before == ""
    assert "hosts registered" in screen
    assert "\x1b[?1049l" in screen


@pytest.mark.parametrize(
    ("variables", "colours", "bold"),
    [({}, False, False), ({"FORCE_COLOR": "1"}, True, True), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False, True)],
)
async def test_colours_are_for_terminals_and_can_be_turned_off(
    vfleet: Vfleet, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], colours: bool, bold: bool
) -> None:
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)  # FORCE_COLOR makes a terminal of what is none
    out = (await vfleet("get", "functions")).out
    assert ("\x1b[32m" in out, "\x1b[1m" in out) == (colours, bold)


async def test_filters_hold_for_programs_too(vfleet: Vfleet) -> None:
    result = await vfleet("get", "hosts", "--state", "cordoned", "-o", "json")
    assert [host["name"] for host in json.loads(result.out)["hosts"]] == ["h2"]


@pytest.mark.parametrize(
    "command", [["migrate", "vf1=h2/nic0", "--wait"], ["watch", "m-1"], ["cancel", "m-1", "--wait"]]
)
async def test_waiting_ends_in_time(vfleet: Vfleet, fake: Fake, command: list[str]) -> None:
    fake.is_stuck = True
    result = await vfleet(*command, "--timeout", "0.2")
    assert (result.code, result.out) == (1, "")
    assert re.search(r"^vfleet: m-\w+ is not over after 0\.2 s, and goes on; .*: vfleet watch m-\w+$", result.err, re.M)


async def test_cancel_waits_until_all_is_back(vfleet: Vfleet, fake: Fake) -> None:
    fake.outcome = Phase.PHASE_ABORTED
    assert (await vfleet("cancel", "m-1", "--wait")).out == "m-1 is aborted\n"


@pytest.fixture
def settings(vfleet: Vfleet, fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file of settings in which the fake is `lab`; no other way leads there."""
    monkeypatch.delenv("VFLEET_COORDINATOR")
    path = tmp_path / "config" / "vfleet" / "config.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(
        f"# mine\ncontexts:\n  lab: {{coordinator: '{fake.address}'}}\n  nowhere: {{coordinator: '127.0.0.1:1'}}\n"
    )
    return path


async def test_a_context_names_a_cluster(vfleet: Vfleet, settings, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await vfleet("get", "hosts")).code == 2
    assert (await vfleet("--context", "lab", "get", "hosts")).code == 0
    monkeypatch.setenv("VFLEET_CONTEXT", "lab")
    assert (await vfleet("get", "hosts")).code == 0
    unknown = await vfleet("--context", "other", "get", "hosts")
    assert unknown.code == 2
    assert "expected one of the contexts of" in unknown.err
    assert "local, lab, nowhere" in unknown.err


async def test_the_context_that_is_used_stays_and_so_does_the_rest_of_the_file(vfleet: Vfleet, settings) -> None:
    before = settings.read_text()
    for name in ("nowhere", "lab"):
        assert (await vfleet("context", "use", name)).code == 0
    assert settings.read_text() == f"current: lab\n{before}"
    assert (await vfleet("get", "hosts")).code == 0
    assert re.search(r"^\* +lab +127", (await vfleet("context", "list")).out, re.MULTILINE)
    assert (await vfleet("context", "use", "other")).code == 2
    assert (await vfleet("context", "use", "local")).code == 0
    assert (await vfleet("get", "hosts")).code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("contexts: [", "expected YAML"),
        ("[]", "expected a mapping"),
        ("contexts: {lab: {}}", "contexts.lab"),
        ("contexts: {lab: {coordinator: 'a:1', etcd: 'a:2'}}", "one of coordinator and etcd"),
        ("contexts: {lab: {coordinator: nowhere}}", "contexts.lab.coordinator"),
        ("contexts: {lab: {etcd: 'a:1', colour: red}}", "colour"),
        ("contexts: {7: {etcd: 'a:1'}}", "a mapping of names"),
        ("current: lab", "current is 'lab'"),
        ("colour: red", "colour"),
    ],
)
async def test_bad_settings_are_one_line_that_names_the_field(vfleet: Vfleet, settings, text: str, words: str) -> None:
    settings.write_text(text)
    result = await vfleet("get", "hosts")
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"vfleet: [^\n]+\n", result.err)
    assert words in result.err


async def test_settings_that_can_not_be_changed_by_line_stay(vfleet: Vfleet, settings) -> None:
    settings.write_text("{contexts: {lab: {etcd: 'a:1'}}}\n")
    assert (await vfleet("context", "use", "lab")).code == 2
    assert settings.read_text().startswith("{contexts")


STATES = [
    *(("migrations", name.removeprefix("PHASE_").lower()) for name, number in Phase.items() if number),
    *(
        ("functions", name.removeprefix("FUNCTION_STATUS_").lower())
        for name, number in FunctionStatus.items()
        if number
    ),
]


@pytest.mark.parametrize(("kind", "state"), STATES)
async def test_whatever_state_there_is_can_be_asked_for(vfleet: Vfleet, kind: str, state: str) -> None:
    assert (await vfleet("get", kind, "--state", state)).code == 0
    assert state in (await vfleet("get", "--help")).out


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("describe host ", ["h1", "h2"]),
        ("describe device h2", ["h2/nic0"]),
        ("describe migration ", ["m-1"]),
        ("history v", ["vf1"]),
        ("history x", []),
        ("delete driver ", ["d1"]),
        ("cordon host ", ["h1", "h2"]),
        ("drain device h1", ["h1/nic0"]),
        ("watch ", ["m-1"]),
        ("migrate vf1=h", ["vf1=h1/nic0", "vf1=h2/nic0"]),
        ("migrate vf1 --to h1", ["h1/nic0"]),
        ("get functions --state c", ["cordoned", "creating", "committed"]),
        ("get functions --host ", ["h1", "h2"]),
        ("context use ", ["local"]),
        ("describe host --coordinator 127.0.0.1:1 ", []),
    ],
)
async def test_names_are_completed_from_the_cluster(
    vfleet: Vfleet,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: str,
    names: list[str],
) -> None:
    # As a shell asks: the line so far, and which of its words is to be completed.
    line = f"vfleet {words}"
    monkeypatch.setenv("_VFLEET_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    with pytest.raises(SystemExit):
        await vfleet()
    assert capsys.readouterr().out.split() == names


async def test_bad_settings_complete_to_nothing(
    vfleet: Vfleet, settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings.write_text("contexts: [")
    monkeypatch.setenv("_VFLEET_COMPLETE", "complete_bash")
    for line in ("vfleet context use ", "vfleet --context "):
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        with pytest.raises(SystemExit):
            await vfleet()
        out, err = capsys.readouterr()
        assert (out.split(), err) == ([], "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["migrate", "vf1:4"],
        ["migrate", "vf1", "--host", "other"],
        ["migrate", "vf1", "--prefer", "luck"],
        ["migrate", "vf1", "--apart", "vf1"],
        ["migrate", "vf1", "--together", "vf1,vf2@room"],
        ["migrate", "vf1", "--together", "vf1,,vf2"],
        ["migrate", "vf1", "--attachment", "Not A Name"],
        ["plan"],
        ["plan", "vf1", "--to", "h2"],
        ["cordon"],
        ["cordon", "host", "Not A Name"],
        ["cordon", "h1"],
        ["cordon", "shelf", "h1/a"],
        ["uncordon", "host", "h1/nic0"],
        ["uncordon", "device", "nic0"],
        ["rebalance"],  # without a terminal, so without anybody to ask
        ["rebalance", "-o", "json"],
        ["rebalance", "--tolerance", "101", "--dry-run"],
        ["defragment", "--free", "racks", "--dry-run"],
        ["migrate", "vf1=h2"],
        ["migrate", "vf1="],
        ["migrate", "vf1", "--to", ""],
        ["migrate", "vf1", "--to", ":4"],
        ["migrate", "vf1", "--deadline", "86401"],
        ["plan", "vf1="],
        ["get", "hosts", "--active"],
        ["migrate", "vf1=h2/nic0:x"],
        ["migrate", "vf1=h2/nic0:-1"],
        ["migrate", "vf1=h2/nic0:99999999999"],
        ["migrate", "vf1=h2/nic0", "--to", "h3/nic0"],
        ["migrate", "\udcff=h2/nic0"],
        ["migrate", "vf1=h2/nic0", "--request-id", "Not A Name"],
        ["create", "function", "x" * 64, "--on", "h1/nic0"],
        ["create", "function", "vf1", "--on", "h1/nic0", "--vf", "-1"],
        ["create", "function", "vf1", "--on", "\udcff"],
        ["attach", "vf1", "--driver", "d1", "--virtual-address", "0x10000001"],
        ["attach", "vf1", "--driver", "d1", "--virtual-address", "0x10000000000000000"],
        ["attach", "vf1", "--driver", "d1", "--virtual-address", "here"],
        ["attach", "vf1", "--driver", "d1", "--host", "h1", "--main-memory-bytes", "4097"],
        ["attach", "vf1", "--driver", "d1", "--host", "h1", "--main-memory-bytes", "2147483648"],
        ["describe", "function", ""],
        ["describe", "gadget", "vf1"],
        ["describe", "function", "vf1", "--svg", "vf1.svg"],
        ["history"],
        ["history", "Not A Name"],
        ["workload", "start", "d1", "vf1", "--rate", "-1"],
        ["workload", "start", "d1", "vf1", "--channel", "99999999999"],
        ["get"],
        ["get", "gadgets"],
        ["get", "hosts", "--coordinator", "nowhere"],
        ["get", "hosts", "--coordinator", "127.0.0.1:0"],
        ["get", "hosts", "--coordinator", "127.0.0.1:99999"],
        ["get", "hosts", "--etcd", "127.0.0.1:2379"],  # with VFLEET_COORDINATOR, too
        ["get", "hosts", "-o", "xml"],
        ["get", "hosts", "--state", "lost"],
        ["get", "drivers", "--state", "active"],
        ["get", "functions", "--host", "h1/nic0"],
        ["get", "hosts", "--context", "lab"],
        ["--context", "lab", "get", "hosts"],  # with VFLEET_COORDINATOR, too
        ["--tls", "nowhere", "get", "hosts"],
        ["--tls", "nowhere", "--insecure", "get", "hosts"],
        ["--tls", "nowhere", "demo"],
        ["--tls", "nowhere", "up", "topology.yaml"],
        ["context", "use", "lab"],
        ["context"],
        ["migrate", "vf1=h2/nic0", "--timeout", "5"],
        ["migrate", "vf1=h2/nic0", "--wait", "--timeout", "0"],
        ["migrate", "vf1=h2/nic0", "--wait", "--timeout", "nan"],
        ["migrate", "vf1=h2/nic0", "--wait", "--timeout", "soon"],
        ["watch", "m-1", "--timeout", "-1"],
        ["cancel", "m-1", "--wait", "--timeout", "inf"],
        ["create"],
        ["fly"],
    ],
)
async def test_bad_input_is_one_line_and_nothing_is_asked(vfleet: Vfleet, fake: Fake, arguments: list[str]) -> None:
    result = await vfleet(*arguments)
    assert (result.code, result.out) == (2, "")
    assert re.fullmatch(r"vfleet: [^\n]+\n", result.err)
    assert fake.requests == []


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (invalid_field("function", "x", "y"), 2),
        (not_found("function", "vf1"), 2),
        (VfleetError(Reason.TARGET_IS_SOURCE, "vf1 is there"), 2),
        (VfleetError(Reason.GROUP_TOO_LARGE, "too many"), 2),
        (VfleetError(Reason.NO_FREE_SLOT, "full"), 1),
        (VfleetError(Reason.IN_MIGRATION, "vf1 is in m-1"), 1),
        (VfleetError(Reason.STORE_UNAVAILABLE, "etcd did not answer at 127.0.0.1:1, tried for 5.0 s"), 1),
        (VfleetError(Reason.INTERNAL, "a\nb"), 1),
    ],
)
async def test_what_the_coordinator_refuses_is_one_line(
    vfleet: Vfleet, fake: Fake, error: VfleetError, code: int
) -> None:
    fake.refuse = error
    result = await vfleet("migrate", "vf1=h2/nic0")
    assert (result.code, result.out) == (code, "")
    assert result.err == f"vfleet: {' '.join(error.message.split())}\n"
    assert len(fake.requests) == 1


async def test_a_coordinator_that_is_down_is_passed_over(vfleet: Vfleet, fake: Fake) -> None:
    result = await vfleet("get", "hosts", "--coordinator", f"127.0.0.1:1,{fake.address}")
    assert result.code == 0


async def test_out_of_reach_names_the_address_and_the_time(vfleet: Vfleet) -> None:
    result = await vfleet("get", "hosts", "--coordinator", "127.0.0.1:1")
    assert result.code == 1
    assert re.fullmatch(
        r"vfleet: no answer from the coordinator at 127\.0\.0\.1:1, tried for \d\.\d s; .*\n", result.err
    )


async def test_without_a_cluster_it_says_how_to_get_one(
    vfleet: Vfleet, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.delenv("VFLEET_COORDINATOR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    result = await vfleet("get", "hosts")
    assert result.code == 2
    assert "vfleet up" in result.err


async def test_the_cluster_that_up_left_is_found(
    vfleet: Vfleet, fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    monkeypatch.delenv("VFLEET_COORDINATOR")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    (tmp_path / "vfleet").mkdir(exist_ok=True)
    (tmp_path / "vfleet" / "local.json").write_text(json.dumps({"coordinator": fake.address, "insecure": True}))
    assert (await vfleet("get", "hosts")).code == 0


async def test_workload_report_is_the_drivers_own_view(vfleet: Vfleet) -> None:
    result = await vfleet("workload", "stop", "d1", "vf1")
    assert result.code == 0
    assert re.search(r"Operations\s+1,234,567", result.out)
    assert re.search(r"Lost\s+0", result.out)


def examples() -> Iterator[str]:
    for module in (
        cluster,
        contexts,
        drain,
        fleet,
        get,
        history,
        migration,
        operations,
        plan,
        rearrange,
        top,
        workload,
    ):
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__:
                yield from re.findall(r"Example: (vfleet .*)", function.__doc__ or "")


@pytest.mark.parametrize("example", sorted(set(examples()) - {"vfleet up vfleet/topologies/demo.yaml"}))
async def test_the_examples_of_the_help_work(vfleet: Vfleet, example: str) -> None:
    result = await vfleet(*example.split()[1:])
    assert (result.code, result.out != "") == (0, True), result.err


def commands() -> Iterator[list[str]]:
    for name, command in typer.main.get_command(app).commands.items():
        inner = getattr(command, "commands", None)
        yield from ([name, each] for each in inner) if inner else [[name]]


@pytest.mark.parametrize("command", list(commands()), ids=" ".join)
async def test_every_command_has_an_example_in_its_help(vfleet: Vfleet, command: list[str]) -> None:
    assert f"Example: vfleet {' '.join(command)}" in (await vfleet(*command, "--help")).out


async def test_help_has_every_command_with_what_it_does(vfleet: Vfleet) -> None:
    out = (await vfleet()).out
    for name, *_ in commands():
        assert re.search(rf"(^|  ){name} +[A-Z]", out, re.MULTILINE)
    assert "..." not in out.partition("\n")[2]


async def test_help_fits_one_screen(vfleet: Vfleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = (await vfleet("--help")).out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
