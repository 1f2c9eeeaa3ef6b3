"""What is found when etcd and the hosts are compared, and what may be done about it. Fleets as values."""

from dataclasses import dataclass, field

import pytest
from support.fake_host import device
from support.fleet_values import FleetValues, three_hosts

from coordinator.findings import Call, Finding, HostState, View
from coordinator.host_differences import host_findings
from coordinator.record_differences import record_findings
from coordinator.snapshot import Snapshot
from vfleet.address import table_offset
from vfleet.etcd import keys
from vfleet.etcd.store import Put, Target, Transaction
from vfleet.names import host_of
from vfleet.v1.driver_service_pb2 import DriverState
from vfleet.v1.fabric_service_pb2 import ForgetDriverRequest
from vfleet.v1.fleet_service_pb2 import DifferenceKind
from vfleet.v1.function_service_pb2 import ChangeStateRequest, DestroyFunctionRequest, FunctionInstance
from vfleet.v1.hold_service_pb2 import Hold, LiftHoldRequest
from vfleet.v1.records_pb2 import Driver, Function, FunctionStatus, Migration, Move, Phase, Slot
from vfleet.v1.translation_service_pb2 import UpdateTableRequest
from vfleet.v1.types_pb2 import Attempt, DeviceState, TableEntry

RUNNING, STOP = DeviceState.DEVICE_STATE_RUNNING, DeviceState.DEVICE_STATE_STOP
STOP_COPY, RESUMING = DeviceState.DEVICE_STATE_STOP_COPY, DeviceState.DEVICE_STATE_RESUMING


@dataclass
class World:
    """A sound fleet, of which each test breaks something: what etcd has, and what the hosts say."""

    etcd: FleetValues = field(default_factory=three_hosts)
    instances: dict[str, list[FunctionInstance]] = field(default_factory=dict)
    drivers: dict[str, dict[str, DriverState]] = field(default_factory=dict)
    holds: dict[str, list[Hold]] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for host in ("h1", "h2", "h3"):
            self.instances[host], self.drivers[host], self.holds[host] = [], {}, []
        for stored in self.snapshot.functions.values():
            self.instance(stored.record)
        for name, driver in self.snapshot.drivers.items():
            self.drivers[driver.record.host][name] = DriverState(driver=name)
        for entry in self.snapshot.entries.values():
            shown = self.drivers[entry.record.host][entry.record.driver].entries.add()
            shown.CopyFrom(entry.record)
            shown.revision = entry.mod_revision

    @property
    def snapshot(self) -> Snapshot:
        return self.etcd.snapshot()

    def function(self, name: str) -> Function:
        copy = Function()
        copy.CopyFrom(self.snapshot.functions[name].record)
        return copy

    def instance(self, function: Function, **more: object) -> FunctionInstance:
        """Let the function's home have an instance; `more` are fields that are otherwise."""
        instance = FunctionInstance(
            function=function.name,
            generation=function.generation,
            attempt=function.attempt,
            device=function.device,
            vf_index=function.vf_index,
            base=function.base,
            state=RUNNING,
            complete=True,
            bars=function.bars,
            identity=function.identity,
            model=function.model,
        )
        for name, value in more.items():
            if name in ("attempt", "stopped_by"):
                getattr(instance, name).CopyFrom(value)
            else:
                setattr(instance, name, value)
        self.instances[host_of(instance.device)].append(instance)
        return instance

    def lock(self, function: str, migration: str, phase: Phase.ValueType = Phase.PHASE_PREPARING) -> None:
        self.etcd.put(
            keys.migration_key(migration), Migration(name=migration, phase=phase, moves=[Move(function=function)])
        )
        self.etcd.put(keys.lock_key(function), migration)
        self.etcd.put(keys.owner_key(migration), "c1")

    def entry(self, host: str, driver: str, function: str) -> TableEntry:
        return next(entry for entry in self.drivers[host][driver].entries if entry.function == function)

    def view(self) -> View:
        hosts = {
            host: HostState(tuple(self.instances[host]), tuple(self.holds[host]), tuple(self.drivers[host].values()))
            for host in self.instances
            if host not in self.silent
        }
        return View(self.snapshot, hosts, dict.fromkeys(sorted(self.silent), "no answer"))

    def findings(self) -> list[Finding]:
        view = self.view()
        return [*record_findings(view), *host_findings(view)]

    def one(self, kind: str) -> Finding:
        """Return the one finding, of this kind, that there is."""
        (only,) = self.findings()
        assert DifferenceKind.Name(only.difference.kind) == f"DIFFERENCE_KIND_{kind}"
        assert only.difference.repairable == (only.repair is not None)
        return only

    def carry_out(self, repair: Transaction | Call | None) -> None:
        """Do to etcd what a transaction would, if it holds."""
        assert isinstance(repair, Transaction)
        for compare in repair.compares:
            item = self.etcd.items.get(compare.key)
            found = {
                Target.VALUE: item.value if item else None,
                Target.CREATE_REVISION: item.create_revision if item else 0,
                Target.MOD_REVISION: item.mod_revision if item else 0,
            }[compare.target]
            assert found == compare.expected, compare
        for write in repair.writes:
            if isinstance(write, Put):
                self.etcd.put(write.key, write.value.decode("latin-1"))
                item = self.etcd.items[write.key]
                self.etcd.items[write.key] = type(item)(item.key, write.value, item.create_revision, item.mod_revision)
            else:
                del self.etcd.items[write.key]


@pytest.fixture
def world() -> World:
    return World()


def test_a_sound_fleet_has_no_difference(world: World) -> None:
    assert world.findings() == []


def test_a_function_that_moves_is_passed_whatever_it_looks_like(world: World) -> None:
    world.lock("vf1", "m1")
    home = world.instances["h1"][0]
    home.state = STOP_COPY
    target = Function()
    target.CopyFrom(world.function("vf1"))
    world.instance(target, device="h2/nic0", generation=4, state=RESUMING, complete=False, migration="m1")
    world.etcd.put(keys.slot_key("h2/nic0", 1), Slot(function="vf1", migration="m1"))
    world.entry("h1", "d1", "vf1").generation = 9
    world.holds["h1"].append(Hold(driver="d1", function="vf1", migration="m1"))
    assert world.findings() == []


@pytest.mark.parametrize("status", ["CREATING", "DELETING"])
def test_a_function_that_stays_in_creation_or_deletion_is_named_and_nothing_else_of_it(world: World, status) -> None:
    function = world.function("vf2")
    function.status = FunctionStatus.Value(f"FUNCTION_STATUS_{status}")
    revision = world.etcd.put(keys.function_key("vf2"), function)
    world.instances["h1"] = [each for each in world.instances["h1"] if each.function != "vf2"]
    found = world.one("UNFINISHED_FUNCTION")
    assert (found.difference.function, found.difference.host, found.repair) == ("vf2", "h1", None)
    assert status in found.difference.etcd_says
    assert f"revision {revision}" in found.difference.etcd_says, "so that one that changed meanwhile is another"


def test_an_instance_of_a_generation_that_is_over_is_destroyed_under_the_fence_of_what_was_read(world: World) -> None:
    world.instance(world.function("vf1"), device="h2/nic0", generation=2)
    repair = world.one("ORPHAN_INSTANCE").repair
    assert isinstance(repair, Call)
    assert repair.host == "h2"
    assert isinstance(repair.request, DestroyFunctionRequest)
    assert repair.request.generation == 2
    assert repair.request.attempt == Attempt(fleet_generation=1, revision=world.etcd.revision)


def test_a_source_from_which_the_home_still_fetches_is_not_left_over(world: World) -> None:
    world.instance(world.function("vf1"), device="h2/nic0", generation=2)
    home = next(each for each in world.instances["h1"] if each.function == "vf1")
    home.arriving = True
    assert not [
        each for each in world.findings() if each.difference.kind == DifferenceKind.DIFFERENCE_KIND_ORPHAN_INSTANCE
    ]
    home.arriving = False
    assert world.one("ORPHAN_INSTANCE").difference.host == "h2"


def test_a_stopped_source_is_not_destroyed_while_a_host_that_may_fetch_from_it_is_silent(world: World) -> None:
    stopped_by = Attempt(fleet_generation=1, revision=3)
    world.instance(world.function("vf1"), device="h2/nic0", generation=2, state=STOP_COPY, stopped_by=stopped_by)
    kind = DifferenceKind.DIFFERENCE_KIND_ORPHAN_INSTANCE
    (asked,) = [each for each in world.findings() if each.difference.kind == kind]
    assert asked.repair is not None
    world.silent.add("h1")
    (found,) = [each for each in world.findings() if each.difference.kind == kind]
    assert (found.difference.host, found.repair) == ("h2", None)


def test_a_prepared_instance_beside_the_home_was_not_committed(world: World) -> None:
    world.instance(world.function("vf1"), device="h2/nic0", generation=4, state=STOP)
    assert isinstance(world.one("ORPHAN_INSTANCE").repair, Call)


def test_a_home_that_nobody_has_accessed_yet_is_sound(world: World) -> None:
    world.instances["h1"][1].state = STOP
    assert world.findings() == []


def test_a_home_left_stopped_is_let_run_by_the_attempt_that_stopped_it(world: World) -> None:
    attempt = Attempt(fleet_generation=1, revision=3)
    home = world.instances["h1"][0]
    home.state = STOP_COPY
    home.stopped_by.CopyFrom(attempt)
    repair = world.one("STOPPED_INSTANCE").repair
    assert isinstance(repair, Call)
    assert isinstance(repair.request, ChangeStateRequest)
    assert (repair.request.attempt, repair.request.state) == (attempt, RUNNING)


@pytest.mark.parametrize("why_not", ["", "silent host", "later instance"])
def test_a_home_stopped_before_the_raise_runs_again_only_if_no_host_has_a_later_one(world: World, why_not: str) -> None:
    world.etcd.put(keys.FLEET_GENERATION, "2")
    home = world.instances["h1"][0]
    home.state = STOP_COPY
    home.stopped_by.CopyFrom(Attempt(fleet_generation=1, revision=3))
    if why_not == "silent host":
        world.silent.add("h3")
    elif why_not == "later instance":
        world.instance(world.function("vf1"), device="h2/nic0", generation=4)
    kind = DifferenceKind.DIFFERENCE_KIND_STOPPED_INSTANCE
    (found,) = [each for each in world.findings() if each.difference.kind == kind]
    if why_not:
        assert found.repair is None
    else:
        assert isinstance(found.repair, Call)
        assert isinstance(found.repair.request, ChangeStateRequest)
        assert found.repair.request.attempt == world.view().attempt
        assert found.repair.request.migration == "", "a migration's abort lets none such run"


@pytest.mark.parametrize("why_not", ["", "silent host", "later instance"])
def test_a_source_that_was_fetched_from_is_not_let_run_but_its_function_lost_if_no_host_has_a_later_one(
    world: World, why_not: str
) -> None:
    """A backup has forgotten the COMMIT; what the function did since went with the machine that was its home."""
    world.etcd.put(keys.FLEET_GENERATION, "2")
    home = world.instances["h1"][0]
    home.state, home.fetched = STOP_COPY, True
    home.stopped_by.CopyFrom(Attempt(fleet_generation=1, revision=3))
    if why_not == "silent host":
        world.silent.add("h3")
    elif why_not == "later instance":
        world.instance(world.function("vf1"), device="h2/nic0", generation=4)
    kind = DifferenceKind.DIFFERENCE_KIND_STOPPED_INSTANCE
    (found,) = [each for each in world.findings() if each.difference.kind == kind]
    if why_not:
        assert found.repair is None
        return
    world.carry_out(found.repair)
    assert world.function("vf1").status == FunctionStatus.FUNCTION_STATUS_LOST
    assert all(entry.record.lost for entry in world.snapshot.entries.values() if entry.record.function == "vf1")
    assert kind not in [each.difference.kind for each in world.findings()], "that it is LOST says it all"


def test_a_home_without_its_state_is_said_to_be_beyond_repair(world: World) -> None:
    world.instances["h1"][0].state, world.instances["h1"][0].complete = RESUMING, False
    assert world.one("STOPPED_INSTANCE").repair is None


def forget_a_move(world: World, **more: object) -> FunctionInstance:
    """Let h2 run vf1 at generation 4, which etcd has forgotten; the home that etcd names has nothing."""
    world.etcd.put(keys.FLEET_GENERATION, "2")
    world.instances["h1"] = [each for each in world.instances["h1"] if each.function != "vf1"]
    return world.instance(world.function("vf1"), device="h2/nic0", base=0x2_0501 << 32, generation=4, **more)


def test_the_record_follows_the_only_host_that_has_the_function(world: World) -> None:
    instance = forget_a_move(world)
    instance.base = base_of(world, "h2", 1)
    world.carry_out(world.one("FORGOTTEN_INSTANCE").repair)
    function = world.function("vf1")
    assert (function.device, function.generation, function.incarnation) == ("h2/nic0", 4, "h2-boot")
    assert list(function.drivers) == ["d1", "d2"]
    snapshot = world.snapshot
    assert set(snapshot.slots) == {"h2/nic0/1", "h1/nic0/2"}
    for entry in snapshot.entries.values():
        assert (entry.record.virtual_address + entry.record.offset) % 2**64 == function.base
        assert entry.record.generation == 4
    assert {DifferenceKind.Name(f.difference.kind) for f in world.findings()} == {"DIFFERENCE_KIND_STALE_ENTRY"}


@pytest.mark.parametrize("who_says_so", ["nobody", "a table", "silent host"])
def test_an_idle_instance_beside_the_home_is_ahead_only_if_a_table_leads_to_it(world: World, who_says_so: str) -> None:
    """Its attempt was committed if a driver was told; a host that can't be asked may have been."""
    instance = forget_a_move(world, state=STOP)
    instance.base = base_of(world, "h2", 1)
    home = world.function("vf1")
    world.instance(home)
    if who_says_so == "a table":
        for host, driver in (("h1", "d1"), ("h3", "d2")):
            world.entry(host, driver, "vf1").generation = 4
    elif who_says_so == "silent host":
        world.silent.add("h3")
    found = next(each for each in world.findings() if each.difference.host == "h2")
    kind = DifferenceKind.Name(found.difference.kind).removeprefix("DIFFERENCE_KIND_")
    assert kind == ("ORPHAN_INSTANCE" if who_says_so == "nobody" else "FORGOTTEN_INSTANCE")
    assert isinstance(found.repair, {"nobody": Call, "a table": Transaction, "silent host": type(None)}[who_says_so])


@pytest.mark.parametrize("is_led_to", [False, True])
def test_of_two_forgotten_moves_the_second_counts_only_if_a_table_leads_there(world: World, is_led_to: bool) -> None:
    """It was prepared for an attempt that may have been aborted, while drivers use the first one's target."""
    forget_a_move(world)
    world.instance(world.function("vf1"), device="h3/nic0", generation=5, state=STOP)
    if is_led_to:
        world.entry("h1", "d1", "vf1").generation = 5
    found = next(each for each in world.findings() if each.difference.host == "h3")
    kind = DifferenceKind.Name(found.difference.kind).removeprefix("DIFFERENCE_KIND_")
    assert kind == ("FORGOTTEN_INSTANCE" if is_led_to else "ORPHAN_INSTANCE")


def test_two_functions_that_have_changed_places_are_both_found_again(world: World) -> None:
    world.etcd.put(keys.FLEET_GENERATION, "2")
    places = {}
    for own, other in (("vf1", "vf2"), ("vf2", "vf1")):
        instance = next(each for each in world.instances["h1"] if each.function == own)
        place = world.function(other)
        instance.device, instance.vf_index, instance.base = place.device, place.vf_index, place.base
        instance.generation += 1
        places[own] = (place.device, place.vf_index)
    kind = DifferenceKind.DIFFERENCE_KIND_FORGOTTEN_INSTANCE
    for _ in places:
        world.carry_out(next(each for each in world.findings() if each.difference.kind == kind).repair)
    found = {name: world.function(name) for name in places}
    assert {name: (function.device, function.vf_index) for name, function in found.items()} == places
    slots = {f"{device}/{index}": name for name, (device, index) in places.items()}
    assert {slot: stored.record.function for slot, stored in world.snapshot.slots.items()} == slots


def base_of(world: World, host: str, vf_index: int) -> int:
    other = FleetValues()
    for segment, name in enumerate(("h1", "h2", "h3"), start=1):
        other.host(name, segment, device(f"{name}/nic0"))
        if name == host:
            other.function("any", device(f"{name}/nic0"), segment, vf_index)
    return other.snapshot().functions["any"].record.base


@pytest.mark.parametrize("why", ["silent host", "two instances", "slot of another"])
def test_the_record_follows_nobody_where_it_is_not_certain_whom(world: World, why: str) -> None:
    forget_a_move(world)
    if why == "silent host":
        world.silent.add("h3")
    elif why == "two instances":
        world.instance(world.function("vf1"), device="h3/nic0", generation=4)
    else:
        world.etcd.put(keys.slot_key("h2/nic0", 1), Slot(function="vf2"))
    kind = DifferenceKind.DIFFERENCE_KIND_FORGOTTEN_INSTANCE
    forgotten = [each for each in world.findings() if each.difference.kind == kind]
    assert forgotten
    assert [each.repair for each in forgotten] == [None] * len(forgotten)
    assert all(each.difference.remedy.startswith("none") for each in forgotten)


def test_an_instance_of_an_unknown_function_is_an_orphan_unless_a_backup_may_have_forgotten_it(world: World) -> None:
    unknown = Function()
    unknown.CopyFrom(world.function("vf1"))
    unknown.name = "vf9"
    world.instance(unknown, device="h3/nic0")
    assert isinstance(world.one("ORPHAN_INSTANCE").repair, Call)
    world.etcd.put(keys.FLEET_GENERATION, "2")
    world.carry_out(world.one("FORGOTTEN_INSTANCE").repair)
    assert world.function("vf9").identity == unknown.identity


def test_a_function_that_no_host_has_is_lost_if_every_host_was_asked(world: World) -> None:
    world.instances["h1"] = [each for each in world.instances["h1"] if each.function != "vf1"]
    world.silent.add("h2")
    (missing,) = [f for f in world.findings() if f.difference.function == "vf1"]
    assert missing.difference.kind == DifferenceKind.DIFFERENCE_KIND_MISSING_INSTANCE
    assert missing.repair is None
    world.silent.clear()
    world.carry_out(world.one("MISSING_INSTANCE").repair)
    assert world.function("vf1").status == FunctionStatus.FUNCTION_STATUS_LOST
    assert all(entry.record.lost for entry in world.snapshot.entries.values())


def test_nothing_is_concluded_from_a_silent_host(world: World) -> None:
    world.silent.add("h1")
    only = world.one("HOST_UNREACHABLE")
    assert (only.difference.host, only.difference.host_says, only.repair) == ("h1", "no answer", None)


@pytest.mark.parametrize(
    ("phase", "request_type"), [(Phase.PHASE_DONE, UpdateTableRequest), (Phase.PHASE_ABORTED, LiftHoldRequest)]
)
def test_a_hold_of_a_migration_that_is_over_is_lifted_as_it_was_decided(
    world: World, phase: Phase.ValueType, request_type: type
) -> None:
    world.etcd.put(keys.migration_key("m1"), Migration(name="m1", phase=phase))
    attempt = Attempt(fleet_generation=1, revision=2)
    world.holds["h1"].append(Hold(driver="d1", function="vf1", migration="m1", attempt=attempt, generation=3))
    world.entry("h1", "d1", "vf1").held = True
    repair = world.one("HOLD").repair
    assert isinstance(repair, Call)
    assert isinstance(repair.request, request_type)
    assert repair.request.attempt == attempt


@pytest.mark.parametrize("what", ["missing", "stale", "older"])
def test_an_entry_that_a_table_lacks_or_has_otherwise_is_written_again(world: World, what: str) -> None:
    entry = world.entry("h1", "d1", "vf1")
    if what == "missing":
        del world.drivers["h1"]["d1"].entries[:]
    elif what == "stale":
        entry.offset += 4096
    else:
        entry.revision -= 1
    key, before = keys.entry_key("h1", "d1", "vf1"), world.snapshot.entries["h1/d1/vf1"]
    world.carry_out(world.one("MISSING_ENTRY" if what == "missing" else "STALE_ENTRY").repair)
    assert world.snapshot.entries["h1/d1/vf1"].record == before.record
    assert world.etcd.items[key].mod_revision > before.mod_revision


@pytest.mark.parametrize("why_not", ["", "lost", "before the raise", "silent host", "later instance", "no home"])
def test_an_entry_of_a_move_that_was_undone_goes_back_if_no_host_has_a_later_instance(
    world: World, why_not: str
) -> None:
    """A backup has forgotten the commit, and an abort ended the target before anybody had accessed it."""
    entry = world.entry("h1", "d1", "vf1")
    entry.generation, entry.revision = entry.generation + 1, 0
    function = world.function("vf1")
    if why_not == "lost":
        function.status = FunctionStatus.FUNCTION_STATUS_LOST
        world.etcd.put(keys.function_key("vf1"), function)
        world.instances["h1"] = [each for each in world.instances["h1"] if each.function != "vf1"]
    elif why_not == "before the raise":
        entry.revision = 1
    elif why_not == "silent host":
        world.silent.add("h3")
    elif why_not == "later instance":
        later = function.generation + 1
        world.instance(function, device="h2/nic0", generation=later, state=RESUMING, complete=False)
    elif why_not == "no home":
        world.instances["h1"] = [each for each in world.instances["h1"] if each.function != "vf1"]
    kind = DifferenceKind.DIFFERENCE_KIND_STALE_ENTRY
    (found,) = [f for f in world.findings() if f.difference.kind == kind and f.difference.driver == "d1"]
    if why_not in ("", "lost"):
        assert isinstance(found.repair, Call)
        assert found.repair.host == "h1"
        stored = world.snapshot.entries["h1/d1/vf1"]
        recorded = TableEntry()
        recorded.CopyFrom(stored.record)
        recorded.revision = stored.mod_revision
        assert found.repair.request == UpdateTableRequest(
            attempt=world.view().attempt, entries=[recorded], goes_back=True
        )
    else:
        assert found.repair is None
        assert found.difference.remedy == "none: the function's record comes first"


def test_an_entry_that_etcd_deleted_is_taken_out_and_one_that_it_forgot_is_written(world: World) -> None:
    key = keys.entry_key("h3", "d2", "vf1")
    function = world.function("vf1")
    function.drivers[:] = ["d1"]
    world.etcd.put(keys.function_key("vf1"), function)
    del world.etcd.items[key]
    assert isinstance(world.one("EXTRA_ENTRY").repair, Call)
    world.entry("h3", "d2", "vf1").revision = 0
    del world.etcd.items[keys.driver_key("d2")]
    extra, unknown = sorted(world.findings(), key=lambda each: each.difference.kind)
    assert unknown.difference.kind == DifferenceKind.DIFFERENCE_KIND_DRIVER_UNKNOWN_TO_FLEET
    assert unknown.repair is None
    world.drivers["h3"]["d2"].guest.socket = "/run/d2.sock"
    extra = next(f for f in world.findings() if f.difference.kind == DifferenceKind.DIFFERENCE_KIND_EXTRA_ENTRY)
    world.carry_out(extra.repair)
    assert list(world.function("vf1").drivers) == ["d1", "d2"]
    assert world.snapshot.drivers["d2"].record.host == "h3"
    assert world.snapshot.drivers["d2"].record.guest.socket == "/run/d2.sock"
    assert key in world.etcd.items


def test_a_function_made_anew_in_the_very_place_of_the_one_that_a_backup_has_is_recorded(world: World) -> None:
    world.instances["h1"][0].identity += 1
    identity = world.instances["h1"][0].identity
    world.etcd.put(keys.FLEET_GENERATION, "2")
    found = {DifferenceKind.Name(each.difference.kind): each for each in world.findings()}
    world.carry_out(found["DIFFERENCE_KIND_FORGOTTEN_INSTANCE"].repair)
    assert world.function("vf1").identity == identity
    # The entries were written anew with it, which their hosts have not heard of here.
    assert {DifferenceKind.Name(f.difference.kind) for f in world.findings()} == {"DIFFERENCE_KIND_STALE_ENTRY"}


def test_of_two_entries_at_one_place_neither_is_repaired_before_one_is_detached(world: World) -> None:
    """An attachment that a backup forgot, and one that was made since where it lies."""
    kept = world.entry("h3", "d2", "vf1")
    kept.revision = 0
    function = world.function("vf1")
    function.drivers[:] = ["d1"]
    world.etcd.put(keys.function_key("vf1"), function)
    del world.etcd.items[keys.entry_key("h3", "d2", "vf1")]
    other = world.function("vf2")
    other.drivers[:] = ["d2"]
    world.etcd.put(keys.function_key("vf2"), other)
    entry = TableEntry(driver="d2", function="vf2", host="h3", generation=other.generation)
    entry.length_bytes = kept.length_bytes
    for offset, is_in_the_way in ((-4096, True), (4096, True), (-kept.length_bytes, False), (kept.length_bytes, False)):
        entry.virtual_address = kept.virtual_address + offset
        entry.offset = table_offset(other.base, entry.virtual_address)
        world.etcd.put(keys.entry_key("h3", "d2", "vf2"), entry)
        found = {DifferenceKind.Name(each.difference.kind): each for each in world.findings()}
        extra, missing = found["DIFFERENCE_KIND_EXTRA_ENTRY"], found["DIFFERENCE_KIND_MISSING_ENTRY"]
        assert [each.repair is None for each in (extra, missing)] == [is_in_the_way] * 2
        assert ("detach vf2" in extra.difference.remedy) == is_in_the_way
        assert ("detach vf1" in missing.difference.remedy) == is_in_the_way


@pytest.mark.parametrize("is_at_home", [False, True])
@pytest.mark.parametrize("fleet_generation", [1, 2])
@pytest.mark.parametrize("generation", [1, 9])
def test_a_function_made_anew_under_a_name_that_etcd_has_for_another_is_not_destroyed_if_it_may_be_forgotten(
    world: World, generation: int, fleet_generation: int, is_at_home: bool
) -> None:
    """Of the same name and another identity: left by a host that was forgotten, or made after the backup."""
    if not is_at_home:
        world.instances["h1"] = [each for each in world.instances["h1"] if each.function != "vf1"]
    world.etcd.put(keys.FLEET_GENERATION, str(fleet_generation))
    before = world.function("vf1")
    anew = world.function("vf1")
    anew.identity += 1
    anew.generation = generation
    world.instance(anew, device="h2/nic0")
    kinds = {DifferenceKind.Name(each.difference.kind) for each in world.findings() if each.difference.host == "h2"}
    is_forgotten = fleet_generation == 2 and not is_at_home
    assert kinds == {f"DIFFERENCE_KIND_{'FORGOTTEN' if is_forgotten else 'ORPHAN'}_INSTANCE"}
    repair = next(each.repair for each in world.findings() if each.difference.host == "h2")
    # Of two homes under one name neither goes by itself.
    assert (repair is None) == (fleet_generation == 2 and is_at_home)
    if is_forgotten:
        world.carry_out(repair)
    assert world.function("vf1").identity == (anew if is_forgotten else before).identity


@pytest.mark.parametrize("why_not", ["", "silent host", "its table"])
def test_what_a_function_keeps_for_a_driver_that_was_detached_is_let_go(world: World, why_not: str) -> None:
    """Room for it is bounded. A driver that has an entry still is one whose attachment a backup has forgotten."""
    home = world.instances["h1"][0]
    home.last_sequences.update({"d1": 5, "d2": 7})
    assert world.findings() == []
    home.last_sequences["d9"] = 3
    if why_not == "silent host":
        world.silent.add("h2")
    elif why_not == "its table":
        world.drivers["h2"]["d9"] = DriverState(driver="d9")
        world.drivers["h2"]["d9"].entries.add(driver="d9", function="vf1", host="h2", virtual_address=1 << 45)
    kind = DifferenceKind.DIFFERENCE_KIND_DETACHED_DRIVER
    found = [each for each in world.findings() if each.difference.kind == kind]
    assert [each.repair is not None for each in found] == {"": [True], "silent host": [False], "its table": []}[why_not]
    if why_not:
        return
    repair = found[0].repair
    assert isinstance(repair, Call)
    assert isinstance(repair.request, ForgetDriverRequest)
    session = repair.request.session
    assert (repair.host, repair.request.driver, repair.request.generation) == ("h1", "d9", home.generation)
    assert (session.fleet_generation, session.revision) == (1, world.snapshot.revision), "nothing of a later attachment"


def test_drivers_that_only_one_side_knows_are_made_or_deleted(world: World) -> None:
    world.etcd.put(keys.driver_key("d8"), Driver(name="d8", host="h2", main_memory_bytes=4096))
    made = world.one("DRIVER_UNKNOWN_TO_HOST").repair
    assert isinstance(made, Call)
    assert made.request.main_memory_bytes == 4096
    del world.etcd.items[keys.driver_key("d8")]
    world.drivers["h2"]["d9"] = DriverState(driver="d9")
    deleted = world.one("DRIVER_UNKNOWN_TO_FLEET").repair
    assert isinstance(deleted, Call)
    assert deleted.request.driver == "d9"


def test_a_base_that_is_not_its_places_is_said(world: World) -> None:
    function = world.function("vf2")
    function.base += 1 << 32
    world.etcd.put(keys.function_key("vf2"), function)
    assert world.one("WRONG_BASE").repair is None


def test_two_functions_in_one_slot_are_said(world: World) -> None:
    world.etcd.put(keys.slot_key("h1/nic0", 2), Slot(function="vf1"))
    assert [(f.difference.function, f.difference.repairable) for f in world.findings()] == [
        ("vf1", True),
        ("vf2", False),
    ]


def test_a_migration_that_nobody_drives_is_said(world: World) -> None:
    world.lock("vf2", "m1")
    del world.etcd.items[keys.owner_key("m1")]
    assert world.one("MIGRATION_WITHOUT_OWNER").repair is None


def test_repairs_compare_what_was_read(world: World) -> None:
    """Whatever changes between reading and repairing makes the repair fail."""
    del world.etcd.items[keys.slot_key("h1/nic0", 2)]
    repair = world.one("FUNCTION_WITHOUT_SLOT").repair
    world.lock("vf2", "m1")
    with pytest.raises(AssertionError):
        world.carry_out(repair)
