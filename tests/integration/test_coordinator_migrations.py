"""Migrations as a coordinator runs them, over a real etcd and fake hosts that can fail at every step."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import pytest
from support.cluster import FakeCluster, eventually, refused
from support.fake_host import RUNNING, leads_to

from vfleet.errors import Reason, VfleetError
from vfleet.rpc import stream
from vfleet.v1 import migration_service_pb2 as migration_pb
from vfleet.v1.records_pb2 import Phase, Step


@pytest.fixture
async def cluster(store) -> AsyncIterator[FakeCluster]:
    cluster = FakeCluster(store)
    await cluster.start()
    yield cluster
    await cluster.stop()


def injected() -> VfleetError:
    return VfleetError(Reason.LIMIT_EXCEEDED, "no more memory")


async def with_driver(cluster: FakeCluster) -> None:
    await cluster.create("vf1", "h1/nic0")
    await cluster.attach("vf1", "d1", "h1", main_memory_bytes=1 << 20)


async def test_a_function_moves_in_three_transactions_and_seven_calls(cluster):
    await with_driver(cluster)
    before = cluster.hosts["h1"].table["d1", "vf1"]
    for host in cluster.hosts.values():
        host.calls.clear()
    revision = (await cluster.store.list("/vfleet/")).revision
    migration = await cluster.move("m1", {"vf1": "h2/nic0"})
    assert migration.phase == Phase.PHASE_DONE
    assert (await cluster.store.list("/vfleet/")).revision == revision + 3
    calls = sum((host.count() for host in cluster.hosts.values()), Counter())
    del calls["ImportState end"]
    assert calls == Counter(
        ["CreateFunction", "ImportState", "ExportState", "PlaceHold", "ChangeState", "UpdateTable", "DestroyFunction"]
    )
    after = cluster.hosts["h1"].table["d1", "vf1"]
    assert after.virtual_address == before.virtual_address
    assert leads_to(after) == migration.moves[0].target.base
    assert (await cluster.function("vf1")).generation == 2
    await cluster.assert_nothing_left({"vf1": "h2/nic0"})
    steps = [step.step for step in migration.steps]
    assert steps == [
        Step.STEP_BEGIN, Step.STEP_CREATE, Step.STEP_COPY, Step.STEP_HOLD, Step.STEP_COMMIT, Step.STEP_LIFT,
        Step.STEP_SCRUB,
    ]  # fmt: skip


async def test_who_only_waits_for_the_end_is_told_of_nothing_else(cluster):
    await with_driver(cluster)
    await cluster.migrate("m1", {"vf1": "h2/nic0"})
    request = migration_pb.WatchMigrationRequest(name="m1", until_over=True)
    for _ in ("while it runs", "when it is over"):
        watch = stream(cluster.migrations("c1").WatchMigration, request, address="coordinator", timeout_s=30)
        assert [update.migration.phase async for update in watch] == [Phase.PHASE_DONE]


async def test_a_function_moves_away_and_back(cluster):
    await with_driver(cluster)
    for name, device in (("m1", "h2/nic0"), ("m2", "h3/nic1"), ("m3", "h1/nic0")):
        assert (await cluster.move(name, {"vf1": device})).phase == Phase.PHASE_DONE
    assert (await cluster.function("vf1")).generation == 4
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


FAILURES = [
    ("h2", "CreateFunction", Step.STEP_CREATE),
    ("h2", "ImportState", Step.STEP_COPY),
    ("h1", "ExportState", Step.STEP_COPY),
    ("h1", "PlaceHold", Step.STEP_HOLD),
    ("h1", "ChangeState", Step.STEP_HOLD),
    ("h2", "ImportState end", Step.STEP_HOLD),
]


@pytest.mark.parametrize(("host", "method", "step"), FAILURES)
async def test_whatever_fails_before_commit_puts_everything_back(cluster, host, method, step):
    await with_driver(cluster)
    before = cluster.hosts["h1"].table["d1", "vf1"]
    cluster.hosts[host].fail[method] = injected()
    migrating = asyncio.create_task(cluster.move("m1", {"vf1": "h2/nic0"}))
    if method == "ChangeState":  # the undo needs the same method
        await eventually(lambda: cluster.hosts["h1"].count()["ChangeState"] >= 2)
        cluster.hosts[host].fail.clear()
    migration = await migrating
    assert migration.phase == Phase.PHASE_ABORTED
    assert migration.abort_step == step
    assert "no more memory" in migration.abort_reason or method == "ExportState"
    assert cluster.hosts["h1"].table["d1", "vf1"] == before
    assert cluster.hosts["h1"].instances["vf1", 1] == RUNNING
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


@pytest.mark.parametrize(("host", "method"), [("h2", "CreateFunction"), ("h1", "PlaceHold"), ("h1", "ChangeState")])
async def test_a_step_whose_answer_is_lost_is_undone(cluster, host, method):
    await with_driver(cluster)
    cluster.hosts[host].fail_after[method] = injected()
    assert (await cluster.move("m1", {"vf1": "h2/nic0"})).phase == Phase.PHASE_ABORTED
    assert cluster.hosts["h1"].instances["vf1", 1] == RUNNING
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


@pytest.mark.parametrize(("host", "method"), [("h1", "UpdateTable"), ("h1", "DestroyFunction")])
async def test_after_commit_a_failing_host_is_asked_again_until_it_answers(cluster, host, method):
    await with_driver(cluster)
    cluster.hosts[host].fail[method] = injected()
    await cluster.migrate("m1", {"vf1": "h2/nic0"})
    await eventually(lambda: cluster.hosts[host].count()[method] >= 3)
    cluster.hosts[host].fail.clear()
    assert (await cluster.ended("m1")).phase == Phase.PHASE_DONE
    await cluster.assert_nothing_left({"vf1": "h2/nic0"})


async def test_a_copy_that_never_gets_ready_ends_with_the_prepare_timeout(cluster):
    await with_driver(cluster)
    cluster.hosts["h1"].block["ExportState"] = asyncio.Event()
    migration = await cluster.move("m1", {"vf1": "h2/nic0"}, prepare_timeout_ms=200)
    assert (migration.phase, migration.abort_step) == (Phase.PHASE_ABORTED, Step.STEP_COPY)
    assert "200 ms" in migration.abort_reason
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


async def test_a_hold_that_takes_too_long_ends_with_the_hold_timeout(cluster):
    await with_driver(cluster)
    cluster.hosts["h2"].block["ImportState end"] = asyncio.Event()
    migration = await cluster.move("m1", {"vf1": "h2/nic0"}, hold_timeout_ms=200)
    assert (migration.phase, migration.abort_step) == (Phase.PHASE_ABORTED, Step.STEP_HOLD)
    assert cluster.hosts["h1"].instances["vf1", 1] == RUNNING
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


@pytest.mark.parametrize(
    ("host", "method"), [("h2", "CreateFunction"), ("h1", "ExportState"), ("h2", "ImportState end")]
)
@pytest.mark.parametrize("asked", ["c1", "c2"])
async def test_a_migration_can_be_cancelled_at_any_coordinator(cluster, host, method, asked):
    await with_driver(cluster)
    await cluster.start_coordinator("c2")
    cluster.hosts[host].block[method] = asyncio.Event()
    await cluster.migrate("m1", {"vf1": "h2/nic0"})
    await eventually(lambda: method in cluster.hosts[host].calls)
    await cluster.ask(cluster.migrations(asked).CancelMigration, migration_pb.CancelMigrationRequest(name="m1"))
    migration = await cluster.ended("m1")
    assert migration.phase == Phase.PHASE_ABORTED
    assert f"{asked!r}" in migration.abort_reason
    again = migration_pb.CancelMigrationRequest(name="m1")
    answer = await cluster.ask(cluster.migrations(asked).CancelMigration, again)
    assert answer.migration.phase == Phase.PHASE_ABORTED
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


async def test_a_committed_migration_can_not_be_cancelled(cluster):
    await with_driver(cluster)
    await cluster.move("m1", {"vf1": "h2/nic0"})
    cancel = cluster.ask(cluster.migrations().CancelMigration, migration_pb.CancelMigrationRequest(name="m1"))
    assert (await refused(cancel)).reason is Reason.TOO_LATE


async def test_a_target_that_is_gone_before_commit_aborts_the_migration(cluster):
    await with_driver(cluster)
    gate = cluster.hosts["h2"].block["ImportState end"] = asyncio.Event()
    await cluster.migrate("m1", {"vf1": "h2/nic0"})
    await eventually(lambda: "ImportState end" in cluster.hosts["h2"].calls)
    # The old machine's daemon still answers: only COMMIT's comparison can tell.
    cluster.hosts["h2"].incarnation = "boot-2"
    await cluster.hosts["h2"].register()
    gate.set()
    migration = await cluster.ended("m1")
    assert migration.phase == Phase.PHASE_ABORTED
    assert "registrations/h2" in migration.abort_reason
    cluster.hosts["h2"].instances.clear()
    await cluster.assert_nothing_left({"vf1": "h1/nic0"})


async def test_a_source_started_anew_after_commit_needs_no_scrub(cluster):
    await with_driver(cluster)
    cluster.hosts["h1"].fail["DestroyFunction"] = injected()
    await cluster.migrate("m1", {"vf1": "h2/nic0"})
    await eventually(lambda: "DestroyFunction" in cluster.hosts["h1"].calls)
    await cluster.hosts["h1"].reboot()
    assert (await cluster.ended("m1")).phase == Phase.PHASE_DONE


async def test_a_group_moves_as_one(cluster):
    await group(cluster)
    migration = await cluster.move("m1", {"vf1": "h2/nic0", "vf2": "h3/nic0", "vf3": "h2/nic0"})
    assert migration.phase == Phase.PHASE_DONE
    await cluster.assert_nothing_left({"vf1": "h2/nic0", "vf2": "h3/nic0", "vf3": "h2/nic0"})


@pytest.mark.parametrize("method", ["CreateFunction", "ImportState", "ImportState end"])
async def test_a_group_with_one_target_unable_stays(cluster, method):
    await group(cluster)
    cluster.hosts["h3"].fail[method] = injected()
    migration = await cluster.move("m1", {"vf1": "h2/nic0", "vf2": "h3/nic0", "vf3": "h2/nic0"})
    assert migration.phase == Phase.PHASE_ABORTED
    assert "'h3'" in migration.abort_reason
    await cluster.assert_nothing_left({"vf1": "h1/nic0", "vf2": "h1/nic0", "vf3": "h1/nic1"})


async def group(cluster: FakeCluster) -> None:
    for function, device, driver, host in (
        ("vf1", "h1/nic0", "d1", "h1"), ("vf2", "h1/nic0", "d1", "h1"), ("vf3", "h1/nic1", "d2", "h3"),
    ):  # fmt: skip
        await cluster.create(function, device)
        await cluster.attach(function, driver, host)


async def test_of_more_migrations_at_once_than_there_are_slots_as_many_begin_as_there_are(cluster):
    names = [f"vf{number}" for number in range(6)]
    for name in names:
        await cluster.create(name, "h1/nic1")
    moves = (cluster.move(f"m-{name}", {name: "h2/nic0"}) for name in names)
    results = await asyncio.gather(*moves, return_exceptions=True)
    refusals = [result.reason for result in results if isinstance(result, VfleetError)]
    assert refusals == [Reason.NO_FREE_SLOT] * 2
    assert sum(not isinstance(result, VfleetError) for result in results) == 4


async def test_migrations_that_name_their_device_and_such_that_do_not_begin_at_once(cluster):
    names = [f"vf{number}" for number in range(8)]
    for name in names:
        await cluster.create(name, "h1/nic1")
    devices = ["h2/nic0" if number % 2 else "" for number in range(8)]
    moves = (cluster.move(f"m-{name}", {name: device}) for name, device in zip(names, devices, strict=True))
    done = await asyncio.gather(*moves)
    assert [migration.phase for migration in done] == [Phase.PHASE_DONE] * 8
    targets = [migration.moves[0].target for migration in done]
    assert len({(target.device, target.vf_index) for target in targets}) == 8


async def test_sixteen_migrations_at_once(cluster):
    names = [f"vf{n}" for n in range(1, 17)]
    for name in names:
        await cluster.create(name, "h1/nic1")
        await cluster.attach(name, "d1", "h3")
    done = await asyncio.gather(*(cluster.move(f"m-{name}", {name: "h2/nic1"}) for name in names))
    assert [migration.phase for migration in done] == [Phase.PHASE_DONE] * 16
    await cluster.assert_nothing_left(dict.fromkeys(names, "h2/nic1"))


async def test_of_two_migrations_of_one_function_the_second_names_the_first(cluster):
    await with_driver(cluster)
    await cluster.start_coordinator("c2")
    gate = cluster.hosts["h1"].block["ExportState"] = asyncio.Event()
    results = await asyncio.gather(
        cluster.migrate("m1", {"vf1": "h2/nic0"}),
        cluster.migrate("m2", {"vf1": "h3/nic0"}, "c2"),
        return_exceptions=True,
    )
    (error,) = (result for result in results if isinstance(result, VfleetError))
    (first,) = (result for result in results if not isinstance(result, VfleetError))
    assert error.reason is Reason.IN_MIGRATION
    assert error.metadata["migration"] == first.name
    assert repr(first.name) in error.message
    gate.set()
    assert (await cluster.ended(first.name)).phase == Phase.PHASE_DONE


async def test_the_same_request_gets_the_same_migration(cluster):
    await with_driver(cluster)
    first, second = await asyncio.gather(*(cluster.migrate("m1", {"vf1": "h2/nic0"}) for _ in range(2)))
    assert first.attempt == second.attempt
    await cluster.ended("m1")
    assert (await cluster.migrate("m1", {"vf1": "h2/nic0"})).phase == Phase.PHASE_DONE
    error = await refused(cluster.migrate("m1", {"vf1": "h3/nic0"}))
    assert error.reason is Reason.ALREADY_EXISTS


async def test_migrations_are_listed_newest_first_and_in_pages(cluster):
    await cluster.create("vf1", "h1/nic0")
    for name, device in (("m1", "h2/nic0"), ("m2", "h3/nic0"), ("m3", "h1/nic0")):
        await cluster.move(name, {"vf1": device})
    first = await cluster.ask(cluster.migrations().ListMigrations, migration_pb.ListMigrationsRequest(page_size=2))
    rest = await cluster.ask(
        cluster.migrations().ListMigrations,
        migration_pb.ListMigrationsRequest(page_size=2, page_token=first.next_page_token),
    )
    assert [m.name for m in (*first.migrations, *rest.migrations)] == ["m3", "m2", "m1"]
    assert rest.next_page_token == ""


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (migration_pb.CreateMigrationRequest(), "moves"),
        (migration_pb.CreateMigrationRequest(request_id="A b"), "request_id"),
        (migration_pb.CreateMigrationRequest(moves=[migration_pb.MoveRequest(function="-")]), "moves[0].function"),
        (
            migration_pb.CreateMigrationRequest(moves=[migration_pb.MoveRequest(function="f", target_device="h1")]),
            "moves[0].target_device",
        ),
        (
            migration_pb.CreateMigrationRequest(
                moves=[migration_pb.MoveRequest(function="f", target_device="h1/nic0")],
                options=migration_pb.MigrationOptions(max_rounds=1001),
            ),
            "options.max_rounds",
        ),
        *(
            (
                migration_pb.CreateMigrationRequest(
                    moves=[migration_pb.MoveRequest(function="f", target_device="h1/nic0")],
                    options=migration_pb.MigrationOptions(**{name: value}),
                ),
                f"options.{name}",
            )
            for name, value in (
                ("mode", 3),
                ("limit_policy", 3),
                ("downtime_limit_ms", 600_001),
                ("bandwidth_mib_per_s", (1 << 20) + 1),
            )
        ),
    ],
)
async def test_a_bad_request_names_the_field(cluster, request_, field):
    error = await refused(cluster.ask(cluster.migrations().CreateMigration, request_))
    assert error.reason is Reason.INVALID_FIELD
    assert [violation.field for violation in error.violations] == [field]
