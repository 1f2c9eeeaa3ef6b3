"""What happened to other systems does not happen here: each row of "Failures that others had" in design.md, by name.

Real processes and a real etcd; whoever has to die, freeze or fail does so at a failpoint.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from pathlib import Path

import pytest
from support.failpoints import Failpoints, go_on
from support.local_cluster import (
    Cluster,
    assert_nothing_left,
    eventually,
    over_in_etcd,
    refusal,
    running,
    when_possible,
)

from vfleet.client import FleetClient, move_request
from vfleet.driver import DriverClient
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.v1.function_service_pb2 import CreateFunctionRequest, DestroyFunctionRequest, FunctionInstance
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.migration_service_pb2 import MoveProgress, MoveState
from vfleet.v1.records_pb2 import Migration, Phase
from vfleet.v1.types_pb2 import DECISION_ABORTED, DECISION_COMMITTED, Decision, DeviceState

LEASE_TTL_S = 2
DONE, ABORTED = Phase.PHASE_DONE, Phase.PHASE_ABORTED
RUNNING, STOP_COPY = DeviceState.DEVICE_STATE_RUNNING, DeviceState.DEVICE_STATE_STOP_COPY
MEMORY_OFFSET = 1 << 20


@pytest.fixture
def failpoints(tmp_path: Path) -> Failpoints:
    return Failpoints(tmp_path / "failpoints")


@pytest.fixture
async def cluster(tmp_path: Path, failpoints: Failpoints, request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    lease_ttl_s = getattr(request, "param", LEASE_TTL_S)
    async with running(tmp_path, coordinators=2, lease_ttl_s=lease_ttl_s, failpoints=failpoints.directory) as cluster:
        yield cluster


@pytest.fixture
async def at_c1(cluster: Cluster) -> AsyncIterator[FleetClient]:
    async with FleetClient([cluster.local.coordinators["c1"].address]) as client:
        yield client


@pytest.fixture
async def at_c2(cluster: Cluster) -> AsyncIterator[FleetClient]:
    async with FleetClient([cluster.local.coordinators["c2"].address]) as client:
        yield client


async def with_driver(cluster: Cluster, device: str = "h1/nic0") -> None:
    await cluster.fleet.create_function("vf1", device)
    await cluster.work("d1", "vf1", "h3", accesses_per_second=200)


async def instances(cluster: Cluster, host: str) -> list[FunctionInstance]:
    return await cluster.hosts[host].list_functions()


async def destroy_late(
    cluster: Cluster, migration: Migration, host: str, generation: int, decision: Decision.ValueType
) -> Reason | None:
    """Send a clean-up of a migration that is over, as if it were late; return why it is refused."""
    request = DestroyFunctionRequest(
        attempt=migration.attempt, function="vf1", generation=generation, decision=decision
    )
    try:
        await cluster.hosts[host].caller.call(lambda channel: FunctionServiceStub(channel).DestroyFunction, request)
    except VfleetError as error:
        return error.reason
    return None


async def slots_taken(client: FleetClient) -> dict[str, int]:
    """Return how many slots of each device are used or reserved."""
    return {use.device.name: use.used_slots + use.reserved_slots for use in await client.list_devices()}


async def finish(cluster: Cluster) -> None:
    """Check that the drivers run on, have seen nothing wrong, and that nothing is left."""
    for name in cluster.local.hosts:
        await cluster.until_registered(name)
    await cluster.until_working()
    await assert_nothing_left(cluster)
    await cluster.stop_workloads()


async def test_kubevirt_13112_a_clean_up_with_a_stale_view_does_not_destroy_the_live_target(
    cluster: Cluster, failpoints: Failpoints, at_c1: FleetClient, at_c2: FleetClient
) -> None:
    """Also omicron's instance migration. A coordinator freezes in a clean-up; meanwhile the next attempt succeeds."""
    await with_driver(cluster)
    failpoints.arm("c1", "coordinator.commit.before", "error")
    failpoints.arm("c1", "coordinator.discard.before", "stop")
    await at_c1.create_migration([move_request("vf1", "h2/nic0", 1)], name="m1")
    await failpoints.reached("c1", "coordinator.discard.before")
    aborted = await over_in_etcd(cluster, "m1")  # by the other coordinator
    assert aborted.phase == ABORTED
    await when_possible(lambda: at_c2.create_migration([move_request("vf1", "h2/nic0", 1)], name="m2"))
    assert (await over_in_etcd(cluster, "m2")).phase == DONE
    await go_on(cluster.local.coordinators["c1"])
    await cluster.until_working()
    assert await destroy_late(cluster, aborted, "h2", 2, DECISION_ABORTED) is Reason.STALE_ATTEMPT
    assert [(i.function, i.generation) for i in await instances(cluster, "h2")] == [("vf1", 2)]
    await finish(cluster)


async def test_sriov_cni_219_a_late_clean_up_does_not_reset_a_slot_that_another_function_has_by_now(
    cluster: Cluster, failpoints: Failpoints
) -> None:
    await with_driver(cluster)
    failpoints.arm("c1", "coordinator.commit.before", "error")
    failpoints.arm("c2", "coordinator.commit.before", "error")
    aborted = await cluster.move("m1", {"vf1": "h2/nic0"})
    assert aborted.phase == ABORTED
    slot = aborted.moves[0].target.vf_index
    await cluster.fleet.create_function("vf2", "h2/nic0", vf_index=slot)
    await cluster.work("d2", "vf2", "h3", accesses_per_second=200)
    assert await destroy_late(cluster, aborted, "h2", 2, DECISION_ABORTED) is None  # done again: nothing is left of it
    left = await cluster.move("m2", {"vf1": "h1/nic1"})
    await cluster.fleet.create_function("vf3", "h1/nic0", vf_index=left.moves[0].source.vf_index)
    assert await destroy_late(cluster, left, "h1", 1, DECISION_COMMITTED) is None
    assert [(i.function, i.vf_index) for i in await instances(cluster, "h2")] == [("vf2", slot)]
    assert sorted(i.function for i in await instances(cluster, "h1")) == ["vf1", "vf3"]
    await finish(cluster)


async def test_kubevirt_5922_an_aborted_migration_gives_the_driver_its_function_back(
    cluster: Cluster, failpoints: Failpoints
) -> None:
    """Even if the source's host dies just as it is to let the function run again, and the target's with it."""
    await with_driver(cluster)
    for coordinator in ("c1", "c2"):
        failpoints.arm(coordinator, "coordinator.commit.before", "error")
    failpoints.arm("h1", "hostd.resume.before", "kill")
    failpoints.arm("h2", "hostd.destroy.before", "kill")
    await cluster.begin("m1", {"vf1": "h2/nic0"})
    for host, point in (("h1", "hostd.resume.before"), ("h2", "hostd.destroy.before")):
        await failpoints.reached(host, point)
        await cluster.local.hosts[host].restart()
    assert (await over_in_etcd(cluster, "m1")).phase == ABORTED
    (instance,) = await instances(cluster, "h1")
    assert (instance.generation, instance.state) == (1, RUNNING)
    await finish(cluster)


async def test_opennebula_3582_a_move_that_stops_half_way_is_active_on_one_side_only(
    cluster: Cluster, failpoints: Failpoints
) -> None:
    """Also pacemaker 2739. All coordinators end right after COMMIT: the target runs, the source stays stopped."""
    await with_driver(cluster)
    for coordinator in ("c1", "c2"):
        failpoints.arm(coordinator, "coordinator.commit.after", "kill")
        failpoints.arm(coordinator, "coordinator.lift.before", "kill")
    await cluster.begin("m1", {"vf1": "h2/nic0"})
    await failpoints.reached_by_any(("c1", "c2"), "coordinator.commit.after")
    await failpoints.reached_by_any(("c1", "c2"), "coordinator.lift.before")
    await cluster.until_working()  # the drivers' hosts have seen the COMMIT in etcd
    (source,), (target,) = await instances(cluster, "h1"), await instances(cluster, "h2")
    assert (source.generation, source.state) == (1, STOP_COPY)
    assert (target.generation, target.state) == (2, RUNNING)
    for daemon in cluster.local.coordinators.values():
        await daemon.restart()
    assert (await over_in_etcd(cluster, "m1")).phase == DONE
    await finish(cluster)


async def test_kubevirt_18087_state_belongs_to_the_attempt_and_a_failed_one_is_not_retried_behind_ones_back(
    cluster: Cluster, failpoints: Failpoints
) -> None:
    await with_driver(cluster)
    for number in range(3):
        failpoints.arm("h2", "hostd.create.before", "error")
        failed = await cluster.move(f"m{number}", {"vf1": "h2/nic0"})
        assert failed.phase == ABORTED
        assert "hostd.create.before" in failed.abort_reason
        # Had it been tried once more, this one would have been reached.
        failpoints.arm("h2", "hostd.create.before", "error")
        assert await cluster.fleet.list_migrations(active_only=True) == []
        assert failpoints.disarm("h2", "hostd.create.before")
    assert (await cluster.move("m3", {"vf1": "h2/nic0"})).phase == DONE
    migrations = {migration.name: migration for migration in await cluster.fleet.list_migrations()}
    assert {name: migration.phase for name, migration in migrations.items()} == {
        "m0": ABORTED,
        "m1": ABORTED,
        "m2": ABORTED,
        "m3": DONE,
    }
    assert len({migration.attempt.revision for migration in migrations.values()}) == 4
    await finish(cluster)


async def test_kubevirt_17317_an_agent_that_freezes_is_not_awaited_for_ever(
    cluster: Cluster, failpoints: Failpoints
) -> None:
    await with_driver(cluster)
    failpoints.arm("h2", "hostd.import.round", "stop")
    await cluster.begin("m1", {"vf1": "h2/nic0"}, prepare_timeout_ms=500)
    await failpoints.reached("h2", "hostd.import.round")

    async def undecided() -> bool:
        return (await cluster.fleet.get_migration("m1")).phase == Phase.PHASE_PREPARING

    async with asyncio.timeout(5):
        while await undecided():
            await asyncio.sleep(0.02)
    await cluster.until_working()  # although the target's host still does not answer
    await go_on(cluster.local.hosts["h2"])
    over = await over_in_etcd(cluster, "m1")
    assert over.phase == ABORTED
    await finish(cluster)


async def test_kubevirt_18946_a_target_that_is_the_source_is_refused_at_once(cluster: Cluster) -> None:
    await with_driver(cluster)
    async with asyncio.timeout(2):
        error = await refusal(cluster.begin("m1", {"vf1": "h1/nic0"}))
    assert error.reason is Reason.TARGET_IS_SOURCE
    assert await cluster.fleet.list_migrations() == []
    await finish(cluster)


@pytest.mark.parametrize("point", ["begin.after", "create.before", "import.before", "hold.before", "commit.before"])
async def test_kubevirt_2228_a_cancel_has_an_answer_at_every_step(
    cluster: Cluster, failpoints: Failpoints, at_c1: FleetClient, at_c2: FleetClient, point: str
) -> None:
    """Also kubevirt 7599. The coordinator that runs the migration stands still; the other answers."""
    await with_driver(cluster)
    failpoints.arm("c1", f"coordinator.{point}", "stop")
    beginning = asyncio.create_task(at_c1.create_migration([move_request("vf1", "h2/nic0")], name="m1"))
    await failpoints.reached("c1", f"coordinator.{point}")
    async with asyncio.timeout(5):
        cancelled = await at_c2.cancel_migration("m1")
    assert cancelled.phase in (Phase.PHASE_ABORTING, ABORTED)
    await go_on(cluster.local.coordinators["c1"])
    await beginning
    assert (await over_in_etcd(cluster, "m1")).phase == ABORTED
    assert (await at_c2.cancel_migration("m1")).phase == ABORTED
    assert (await cluster.move("m2", {"vf1": "h2/nic0"})).phase == DONE
    assert (await refusal(at_c2.cancel_migration("m2"))).reason is Reason.TOO_LATE
    await finish(cluster)


async def test_mig_controller_865_a_cancel_leaks_nothing(cluster: Cluster, failpoints: Failpoints) -> None:
    """Also sriov-network-operator 429 and 225, of which this tests what exists without the operation `drain`.

    Many cancels, each at another moment; then nothing is left anywhere, and no host or slot is out of use.
    """
    await with_driver(cluster)
    before = await slots_taken(cluster.fleet)
    for number in range(12):
        await cluster.begin(f"m{number}", {"vf1": "h2/nic0"})
        await asyncio.sleep(number * 0.004)
        try:
            await cluster.fleet.cancel_migration(f"m{number}")
        except VfleetError as error:
            late = error.reason
        else:
            late = None
        assert late in (None, Reason.TOO_LATE)
        if (await over_in_etcd(cluster, f"m{number}")).phase == DONE:
            assert (await cluster.move(f"back{number}", {"vf1": "h1/nic0"})).phase == DONE
        await assert_nothing_left(cluster)
    assert await slots_taken(cluster.fleet) == before
    await finish(cluster)


async def test_sriov_network_device_plugin_714_a_slot_is_zero_before_another_function_uses_it(
    cluster: Cluster, failpoints: Failpoints
) -> None:
    """Even if the host dies in the middle of the scrub."""
    await cluster.fleet.create_function("vf1", "h1/nic0", vf_index=3)
    entry = await cluster.fleet.attach_driver("vf1", "d1", host="h3")
    driver = DriverClient(cluster.hosts["h3"], "d1")
    secret = b"\xa5" * 4096
    await driver.write(entry.virtual_address + MEMORY_OFFSET, secret)
    failpoints.arm("h1", "hostd.remove.halfway", "kill")
    await cluster.begin("m1", {"vf1": "h2/nic0"})
    await failpoints.reached("h1", "hostd.remove.halfway")
    await cluster.local.hosts["h1"].restart()
    assert (await over_in_etcd(cluster, "m1")).phase == DONE
    await cluster.fleet.create_function("vf2", "h1/nic0", vf_index=3)
    other = await cluster.fleet.attach_driver("vf2", "d2", host="h1")
    page = await DriverClient(cluster.hosts["h1"], "d2").read(other.virtual_address + MEMORY_OFFSET, 4096)
    assert page == bytes(4096)
    assert await driver.read(entry.virtual_address + MEMORY_OFFSET, 4096) == secret
    await finish(cluster)


# A lease that ends under the coordinator that stands still would be another test.
@pytest.mark.parametrize("cluster", [12], indirect=True)
async def test_sriov_network_device_plugin_565_a_restart_changes_no_capacity(
    cluster: Cluster, failpoints: Failpoints, at_c1: FleetClient, at_c2: FleetClient
) -> None:
    """Slots are counted in etcd, with the reservation of a migration under way, whoever is started again meanwhile."""
    await with_driver(cluster)
    failpoints.arm("c1", "coordinator.create.before", "stop")
    before = await slots_taken(at_c2)
    beginning = asyncio.create_task(at_c1.create_migration([move_request("vf1", "h2/nic0")], name="m1"))
    await failpoints.reached("c1", "coordinator.create.before")
    with_reservation = {**before, "h2/nic0": 1}
    assert await slots_taken(at_c2) == with_reservation
    await cluster.local.hosts["h2"].restart()
    assert await slots_taken(at_c2) == with_reservation
    await go_on(cluster.local.coordinators["c1"])
    await beginning
    over = await over_in_etcd(cluster, "m1")
    await asyncio.gather(*(daemon.restart() for daemon in cluster.local.daemons))
    assert await slots_taken(cluster.fleet) == (
        {**before, "h1/nic0": 0, "h2/nic0": 1} if over.phase == DONE else before
    )
    await finish(cluster)


async def test_nova_1986838_a_slot_is_never_booked_twice(
    cluster: Cluster, at_c1: FleetClient, at_c2: FleetClient
) -> None:
    """Also nova 2098496: two coordinators are asked for more than there is, all at once."""
    names = [f"vf{number}" for number in range(6)]
    for name in names:
        await cluster.fleet.create_function(name, "h1/nic0")
    results = await asyncio.gather(
        *(
            client.create_migration([move_request(name, "h2/nic0", 1 + number % 3)], name=f"m-{name}")
            for number, name in enumerate(names)
            for client in ((at_c1, at_c2)[number % 2],)
        ),
        return_exceptions=True,
    )
    begun = [result for result in results if isinstance(result, Migration)]
    refused = [result.reason for result in results if isinstance(result, VfleetError)]
    assert (len(begun), refused) == (3, [Reason.SLOT_TAKEN] * 3), results
    assert {(await over_in_etcd(cluster, migration.name)).phase for migration in begun} == {DONE}
    assert sorted(instance.vf_index for instance in await instances(cluster, "h2")) == [1, 2, 3]
    await finish(cluster)


@pytest.mark.parametrize("how", ["outlived by its holder", "ended under its holder"])
async def test_etcd_11456_a_lease_proves_nothing(
    cluster: Cluster, failpoints: Failpoints, at_c1: FleetClient, how: str
) -> None:
    """Also etcd 10811, 9395, 15247, 17470 and Jepsen's report on 3.4.3: locks of two, leases too short or too long.

    The owner freezes just before COMMIT until its lease has expired, or its lease is revoked under it. Another aborts;
    the owner's COMMIT then fails by comparison, and the driver never sees the target. A keepalive that outlives its
    worker is tested with the session (test_etcd_server.py, test_etcd_session.py).
    """
    await with_driver(cluster)
    failpoints.arm("c1", "coordinator.commit.before", "stop")
    await at_c1.create_migration([move_request("vf1", "h2/nic0")], name="m1")
    await failpoints.reached("c1", "coordinator.commit.before")
    if how == "ended under its holder":
        owner = await cluster.store.get(keys.owner_key("m1"))
        assert owner is not None
        await cluster.store.revoke_lease(owner.lease)
    over = await over_in_etcd(cluster, "m1")
    assert (over.phase, over.finished_by) == (ABORTED, "c2")
    await go_on(cluster.local.coordinators["c1"])

    async def is_back() -> bool:
        stored = await cluster.store.get(keys.coordinator_key("c1"))
        return stored is not None and stored.mod_revision > over.attempt.revision

    await eventually(is_back)
    assert await cluster.homes() == {"vf1": "h1/nic0"}
    assert (await cluster.fleet.get_function("vf1")).generation == 1
    await finish(cluster)


async def test_a_late_create_of_a_function_that_has_moved_on_makes_no_ghost(cluster: Cluster) -> None:
    """Found in the model: a target that committed, moved on and was scrubbed, and then gets its old create again."""
    await with_driver(cluster)
    there = await cluster.move("m1", {"vf1": "h2/nic0"})
    back = await cluster.move("m2", {"vf1": "h1/nic0"})
    assert (there.phase, back.phase) == (DONE, DONE)
    await cluster.until_working()  # its first access ends the attempt at the home, too
    for migration in (there, back):
        (move,) = migration.moves
        request = CreateFunctionRequest(
            attempt=migration.attempt,
            migration=migration.name,
            function="vf1",
            generation=move.target.generation,
            device=move.target.device,
            vf_index=move.target.vf_index,
            bars=move.bars,
            identity=move.identity,
            model=move.model,
            resolve_after_ms=60_000,
        )
        late = cluster.hosts[move.target.host].caller.call(
            lambda channel: FunctionServiceStub(channel).CreateFunction, request
        )
        assert (await refusal(late)).reason is Reason.STALE_ATTEMPT
    assert await instances(cluster, "h2") == []
    await finish(cluster)


async def drained(client: FleetClient, kind: str, name: str) -> dict[str, str]:
    """Drain a part of the fleet and return how it ended for each function."""
    functions: Mapping[str, MoveProgress] = {}
    async with aclosing(client.drain(kind, name)) as pictures:
        async for picture in pictures:
            functions = picture
    return {name: MoveState.Name(each.state).removeprefix("MOVE_STATE_") for name, each in functions.items()}


async def test_sriov_network_operator_429_a_drain_that_fails_is_taken_back_by_uncordon(cluster: Cluster) -> None:
    """There the node stayed cordoned for good. Here the cordon is a record of its own: it goes, and none with it."""
    await with_driver(cluster)
    for host in ("h2", "h3"):
        await cluster.fleet.cordon("host", host, reason="mine")
    assert await drained(cluster.fleet, "host", "h1") == {"vf1": "STUCK"}
    assert (await refusal(cluster.fleet.create_function("vf2", "h1/nic0"))).reason is Reason.HOST_CORDONED
    await cluster.fleet.uncordon("host", "h1")
    await cluster.fleet.create_function("vf2", "h1/nic0")
    cordons = [(host.name, cordon.reason) for host in await cluster.fleet.list_hosts() for cordon in host.cordons]
    assert cordons == [("h2", "mine"), ("h3", "mine")]
    await cluster.fleet.uncordon("host", "h2")
    assert await drained(cluster.fleet, "host", "h1") == {"vf1": "MOVED", "vf2": "MOVED"}
    await cluster.fleet.uncordon("host", "h1")
    assert (await cluster.move("back", {"vf1": "h1/nic0"})).phase == DONE
    await finish(cluster)


async def test_sriov_network_operator_429_a_drain_whose_coordinator_dies_holds_nothing(
    cluster: Cluster, failpoints: Failpoints, at_c1: FleetClient, at_c2: FleetClient
) -> None:
    await with_driver(cluster)
    failpoints.arm("c1", "coordinator.hold.after", "kill")
    draining = asyncio.create_task(drained(at_c1, "host", "h1"))
    await failpoints.reached("c1", "coordinator.hold.after")
    draining.cancel()
    await asyncio.gather(draining, return_exceptions=True)
    await when_possible(lambda: at_c2.uncordon("host", "h1"))
    await cluster.local.coordinators["c1"].restart()

    async def is_free() -> bool:
        return not (await at_c2.get_function("vf1")).migration

    await eventually(is_free)
    await at_c2.create_function("vf2", "h1/nic0")
    await finish(cluster)


async def test_sriov_network_operator_225_a_drain_moves_what_is_there_and_nothing_else(cluster: Cluster) -> None:
    """There pods were evicted that had no VF of the device. Here neighbours, drivers and guests stay as they are."""
    await with_driver(cluster)
    await cluster.fleet.create_function("beside", "h1/nic1")
    await cluster.work("d2", "beside", "h1", accesses_per_second=200)
    await cluster.fleet.create_function("elsewhere", "h2/nic0")
    others = ("beside", "elsewhere")
    before = [await cluster.fleet.get_function(name) for name in others]
    hosts = {driver.name: driver.host for driver in await cluster.fleet.list_drivers()}
    assert await drained(cluster.fleet, "device", "h1/nic0") == {"vf1": "MOVED"}
    assert [await cluster.fleet.get_function(name) for name in others] == before
    assert {driver.name: driver.host for driver in await cluster.fleet.list_drivers()} == hosts
    migrations = await cluster.fleet.list_migrations()
    assert [move.function for migration in migrations for move in migration.moves] == ["vf1"]
    assert await drained(cluster.fleet, "device", "h1/nic0") == {}  # again: there is nothing to do
    await cluster.fleet.create_function("more", "h1/nic1")  # what isn't the device's is in use
    await finish(cluster)
