"""What a coordinator counts: migrations by how they ended, and the fleet at the moment of a scrape."""

import pytest
from prometheus_client import CollectorRegistry
from support.fake_host import device
from support.fleet_values import FleetValues
from support.manual_clock import ManualClock

from coordinator.inventory import Inventory
from coordinator.metrics import Ended, fleet_metrics
from vfleet.etcd import keys
from vfleet.metrics import ReadAtScrape
from vfleet.v1.migration_service_pb2 import CreateMigrationRequest, QueuedMigration
from vfleet.v1.records_pb2 import EntryChange, FunctionStatus, Migration, Move, Phase, Step, StepDuration
from vfleet.v1.types_pb2 import ErrorReason, TransferMode

STEPS = {
    Step.STEP_BEGIN: 0.002,
    Step.STEP_CREATE: 0.003,
    Step.STEP_COPY: 1.0,
    Step.STEP_HOLD: 0.004,
    Step.STEP_COMMIT: 0.001,
    Step.STEP_LIFT: 0.002,
    Step.STEP_SCRUB: 0.01,
}


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def over(steps: dict[Step.ValueType, float] = STEPS, **fields: object) -> Migration:
    migration = Migration(
        **{
            "name": "m-1",
            "moves": [Move(function="vf1", entries=[EntryChange(driver="d1")])],
            "phase": Phase.PHASE_DONE,
            "mode": TransferMode.TRANSFER_MODE_PRE_COPY,
            **fields,
        }
    )
    migration.begin_time.FromNanoseconds(10**18)
    migration.finish_time.FromNanoseconds(10**18 + 1_500_000_000)
    for step, seconds in steps.items():
        duration = StepDuration(step=step)
        duration.duration.FromNanoseconds(round(seconds * 1e9))
        migration.steps.append(duration)
    return migration


def test_a_migration_that_is_done(registry):
    ended = Ended(registry)
    ended(over())
    get = registry.get_sample_value
    assert get("vfleet_migrations_total", {"outcome": "done", "step": "", "cause": ""}) == 1
    assert get("vfleet_migration_duration_seconds_sum", {"outcome": "done"}) == pytest.approx(1.5)
    for step, seconds in STEPS.items():
        label = {"step": Step.Name(step).removeprefix("STEP_").lower()}
        assert get("vfleet_migration_step_duration_seconds_sum", label) == pytest.approx(seconds)
    blackout = {"outcome": "done", "mode": "pre_copy"}
    assert get("vfleet_migration_blackout_seconds_sum", blackout) == pytest.approx(0.007)


def test_one_that_was_aborted_says_where_and_why(registry):
    steps = {Step.STEP_BEGIN: 0.1, Step.STEP_CREATE: 0.2, Step.STEP_UNDO: 0.3}
    aborted = over(
        steps,
        phase=Phase.PHASE_ABORTED,
        abort_step=Step.STEP_CREATE,
        abort_cause=ErrorReason.ERROR_REASON_UNREACHABLE,
    )
    Ended(registry)(aborted)
    labels = {"outcome": "aborted", "step": "create", "cause": "unreachable"}
    assert registry.get_sample_value("vfleet_migrations_total", labels) == 1
    assert registry.get_sample_value("vfleet_migrations_total", {"outcome": "done", "step": "", "cause": ""}) == 0


@pytest.mark.parametrize(
    "migration",
    [over({Step.STEP_LIFT: 0.1}), over(moves=[Move(function="vf1")])],
    ids=["adopted: what was before is not known", "nobody was on hold"],
)
def test_a_blackout_that_is_none_or_not_known_is_not_counted(registry, migration):
    Ended(registry)(migration)
    found = [s for family in registry.collect() for s in family.samples if s.name.endswith("blackout_seconds_count")]
    assert found == []


def test_clocks_that_disagree_make_no_negative_duration(registry):
    migration = over()
    migration.finish_time.FromNanoseconds(10**18 - 1)
    Ended(registry)(migration)
    assert registry.get_sample_value("vfleet_migration_duration_seconds_sum", {"outcome": "done"}) == 0


def fleet() -> FleetValues:
    values = FleetValues()
    values.host("h1", 1, device("h1/nic0"))
    values.host("h2", 2, device("h2/nic0"), registered=False)
    values.function("vf1", device("h1/nic0"), 1, 1, "d1@h1")
    values.function("vf2", device("h1/nic0"), 1, 2, status=FunctionStatus.FUNCTION_STATUS_LOST)
    values.function("vf3", device("h1/nic0"), 1, 3, status=FunctionStatus.FUNCTION_STATUS_CREATING)
    for name, phase in (("m1", Phase.PHASE_PREPARING), ("m2", Phase.PHASE_COMMITTED), ("m3", Phase.PHASE_DONE)):
        migration = Migration(name=name, phase=phase)
        migration.begin_time.FromSeconds(1_000_000 - 60)
        values.put(keys.migration_key(name), migration)
    values.put(keys.owner_key("m1"), "c1")
    values.put(keys.queue_key("m9"), QueuedMigration(request=CreateMigrationRequest(request_id="m9")))
    return values


def scraped(values: FleetValues) -> dict[tuple[str, str], float]:
    inventory = Inventory()
    inventory.snapshot = values.snapshot()
    registry = CollectorRegistry()
    registry.register(ReadAtScrape(lambda: fleet_metrics(inventory, ManualClock(), lambda: None)))
    return {
        (sample.name, ",".join(sample.labels.values())): sample.value
        for family in registry.collect()
        for sample in family.samples
    }


def test_the_fleet_is_told_as_the_inventory_has_it():
    assert scraped(fleet()) == {
        ("vfleet_coordinator_active", ""): 0,
        ("vfleet_etcd_restored", ""): 0,
        ("vfleet_migrations_active", "preparing"): 1,
        ("vfleet_migrations_active", "committed"): 1,
        ("vfleet_migrations_active", "aborting"): 0,
        ("vfleet_migrations_owned", ""): 0,
        ("vfleet_migrations_orphaned", ""): 1,
        ("vfleet_migrations_queued", ""): 1,
        ("vfleet_migration_oldest_age_seconds", ""): 60,
        ("vfleet_hosts", "true"): 1,
        ("vfleet_hosts", "false"): 1,
        ("vfleet_functions", "active"): 1,
        ("vfleet_functions", "unfinished"): 1,
        ("vfleet_functions", "lost"): 1,
        ("vfleet_drivers", ""): 1,
    }


def test_a_function_that_is_no_more_is_not_lost_any_more():
    values = fleet()
    inventory = Inventory()
    inventory.snapshot = values.snapshot()
    assert inventory.snapshot.lost_functions == {"vf2"}
    del values.items[keys.function_key("vf2")]
    assert scraped(values)["vfleet_functions", "lost"] == 0
