"""vfleet doctor: what it finds, what it repairs, and that a healthy fleet at work has no difference."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from support.local_cluster import Cluster, assert_nothing_left, eventually, running

from vfleet.etcd import keys
from vfleet.etcd.records import decode, encode
from vfleet.etcd.store import Delete, Put, Transaction
from vfleet.v1.fleet_service_pb2 import Difference, DifferenceKind
from vfleet.v1.function_service_pb2 import CreateFunctionRequest
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.records_pb2 import Function, FunctionStatus, Migration, Phase, Slot
from vfleet.v1.types_pb2 import Attempt, TableEntry

PREFIX = "DIFFERENCE_KIND_"


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path) as cluster:
        yield cluster


def kinds(differences: list[Difference]) -> list[str]:
    return sorted(DifferenceKind.Name(each.kind).removeprefix(PREFIX) for each in differences)


async def write(cluster: Cluster, *writes: Put | Delete) -> None:
    assert (await cluster.store.commit(Transaction((), writes))).succeeded


async def record(cluster: Cluster, name: str) -> Function:
    stored = await cluster.store.get(keys.function_key(name))
    assert stored is not None
    return decode(Function, stored)


async def found(cluster: Cluster) -> list[Difference]:
    return list((await cluster.fleet.check_fleet()).differences)


async def repaired(cluster: Cluster) -> list[str]:
    """Repair, expect nothing to be left, and return what was wrong."""
    checked = await cluster.fleet.check_fleet(repair=True)
    assert list(checked.differences) == []
    await assert_nothing_left(cluster)
    return kinds(checked.repaired)


async def test_a_fleet_at_work_has_no_difference_during_thirty_migrations(cluster: Cluster) -> None:
    for function in ("vf1", "vf2", "vf3"):
        await cluster.fleet.create_function(function, "h1/nic0")
    await cluster.work("d1", "vf1", "h1", accesses_per_second=400)
    await cluster.work("d2", "vf2", "h2", accesses_per_second=400)
    moved = asyncio.Event()

    async def check() -> int:
        checks = 0
        while not moved.is_set():
            assert await found(cluster) == []
            checks += 1
        return checks

    async def move(function: str) -> None:
        for number in range(10):
            target = ("h2/nic0", "h3/nic0", "h1/nic1")[number % 3]
            migration = await cluster.move(f"{function}-{number}", {function: target})
            assert migration.phase == Phase.PHASE_DONE, migration.abort_reason

    checking = asyncio.create_task(check())
    await asyncio.gather(*(move(function) for function in ("vf1", "vf2", "vf3")))
    moved.set()
    assert await checking > 3
    await cluster.stop_workloads()
    await assert_nothing_left(cluster)


async def test_what_is_left_in_etcd_is_named_and_taken_away(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.fleet.attach_driver("vf1", "d1", host="h2")
    await cluster.fleet.create_function("vf2", "h1/nic1")
    over = Migration(name="over", phase=Phase.PHASE_DONE)
    unlisted = await record(cluster, "vf1")
    unlisted.drivers[:] = ["d9"]
    await write(
        cluster,
        Put(keys.migration_key("over"), encode(over)),
        Put(keys.lock_key("vf2"), b"over"),
        Put(keys.owner_key("never"), b"c1"),
        Put(keys.slot_key("h2/nic0", 1), encode(Slot(function="vf9", migration="over"))),
        Put(keys.slot_key("h2/nic0", 2), encode(Slot(function="vf1"))),
        Put(keys.slot_key("h1/nic1", 1), encode(Slot(function="vf2", migration="over"))),
        Delete(keys.slot_key("h1/nic0", 1)),
        Put(keys.function_key("vf1"), encode(unlisted)),
    )
    expected = [
        "FUNCTION_WITHOUT_SLOT",
        "LOCK_WITHOUT_MIGRATION",
        "OWNER_WITHOUT_MIGRATION",
        "RESERVED_SLOT",
        "RESERVED_SLOT",
        "SLOT_WITHOUT_FUNCTION",
        "WRONG_ATTACHMENT",
        "WRONG_ATTACHMENT",
    ]
    assert kinds(await found(cluster)) == expected
    assert await repaired(cluster) == expected
    assert list((await record(cluster, "vf1")).drivers) == ["d1"]
    migration = await cluster.move("again", {"vf1": "h2/nic0", "vf2": "h2/nic1"})
    assert migration.phase == Phase.PHASE_DONE


async def test_a_wrong_entry_is_written_anew_and_reaches_its_host(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    entry = await cluster.fleet.attach_driver("vf1", "d1", host="h2")
    wrong = TableEntry()
    wrong.CopyFrom(entry)
    wrong.offset = (entry.offset + 4096) % 2**64
    wrong.ClearField("revision")
    await write(cluster, Put(keys.entry_key("h2", "d1", "vf1"), encode(wrong)))
    (difference,) = await found(cluster)
    assert (difference.kind, difference.function, difference.driver) == (
        DifferenceKind.DIFFERENCE_KIND_WRONG_OFFSET,
        "vf1",
        "d1",
    )
    assert f"{entry.offset:#018x}" in difference.etcd_says
    assert await repaired(cluster) == ["WRONG_OFFSET"]
    (after,) = await cluster.hosts["h2"].get_table("d1")
    assert after.offset == entry.offset


async def test_an_orphan_is_destroyed_and_a_function_that_lives_is_not(cluster: Cluster) -> None:
    """Of a generation that is over, of a function that was deleted, of a migration that never was."""
    first = await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.work("d1", "vf1", "h1")
    await cluster.move("there", {"vf1": "h2/nic0"})
    for function, generation, host in (("vf1", 1, "h3"), ("vf9", 1, "h3"), ("vf1", 9, "h1")):
        await make(cluster, host, function, generation, first, fresh=generation != 9)
    differences = await found(cluster)
    assert kinds(differences) == ["ORPHAN_INSTANCE"] * 3
    assert {(each.host, each.function) for each in differences} == {("h3", "vf1"), ("h3", "vf9"), ("h1", "vf1")}
    assert all(each.repairable for each in differences)
    assert await repaired(cluster) == ["ORPHAN_INSTANCE"] * 3
    await cluster.until_working()
    await cluster.stop_workloads()


async def make(cluster: Cluster, host: str, function: str, generation: int, like: Function, *, fresh: bool) -> None:
    """Make an instance behind the fleet's back."""
    request = CreateFunctionRequest(
        attempt=Attempt(fleet_generation=1, revision=(await cluster.store.list(keys.PREFIX)).revision),
        migration="" if fresh else "never",
        function=function,
        generation=generation,
        device=f"{host}/nic1",
        vf_index=1 if function == "vf1" else 2,
        bars=like.bars,
        identity=like.identity,
        model=like.model,
        fresh=fresh,
        resolve_after_ms=0 if fresh else 60_000,
    )
    client = cluster.hosts[host]
    await client.caller.call(lambda channel: FunctionServiceStub(channel).CreateFunction, request)


async def test_a_host_that_is_away_is_named_and_nothing_is_guessed(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    await cluster.local.hosts["h1"].kill()

    async def away() -> bool:
        return not (await cluster.fleet.get_host("h1")).registered

    await eventually(away)
    (difference,) = await found(cluster)
    assert (difference.kind, difference.host) == (DifferenceKind.DIFFERENCE_KIND_HOST_UNREACHABLE, "h1")
    assert not difference.repairable
    assert kinds(list((await cluster.fleet.check_fleet(repair=True)).differences)) == ["HOST_UNREACHABLE"]
    await cluster.local.hosts["h1"].start()
    await cluster.until_registered("h1")
    assert await found(cluster) == []


async def test_a_driver_that_its_function_was_not_told_to_forget_is_found_and_may_come_back_elsewhere(
    cluster: Cluster,
) -> None:
    await cluster.fleet.create_function("vf1", "h2/nic0")
    await cluster.work("d1", "vf1", "h1")
    await cluster.stop_workloads()
    away = [cluster.local.hosts[host] for host in ("h2", "h1")]
    await away[0].kill()
    await cluster.fleet.detach_driver("vf1", "d1")
    await away[1].kill()
    for daemon in away:
        await daemon.start()

    async def is_left() -> bool:
        return kinds(await found(cluster)) == ["DETACHED_DRIVER"]

    await eventually(is_left)
    await cluster.fleet.delete_driver("d1")
    await cluster.work("d1", "vf1", "h3")
    await cluster.stop_workloads()
    assert await found(cluster) == []
    await cluster.fleet.detach_driver("vf1", "d1")
    assert await found(cluster) == []


async def test_a_function_that_no_host_has_is_lost(cluster: Cluster) -> None:
    made = await cluster.fleet.create_function("vf1", "h1/nic0")
    ghost = Function()
    ghost.CopyFrom(made)
    ghost.name, ghost.vf_index = "vf2", 2
    ghost.base += 1 << 32
    await write(
        cluster,
        Put(keys.function_key("vf2"), encode(ghost)),
        Put(keys.slot_key("h1/nic0", 2), encode(Slot(function="vf2"))),
    )
    assert "MISSING_INSTANCE" in kinds(await found(cluster))
    checked = await cluster.fleet.check_fleet(repair=True)
    assert "MISSING_INSTANCE" in kinds(list(checked.repaired))
    assert "LOST_FUNCTION" in kinds(list(checked.differences))
    assert (await record(cluster, "vf2")).status == FunctionStatus.FUNCTION_STATUS_LOST
    await cluster.fleet.delete_function("vf2")
    assert await found(cluster) == []


async def test_the_command_prints_what_it_finds_and_exits_by_it(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/nic0")
    coordinator = ",".join(cluster.local.coordinator_addresses)
    code, output = await vfleet("doctor", "--coordinator", coordinator)
    assert (code, output.strip()) == (0, "etcd and all hosts agree")
    await write(cluster, Put(keys.owner_key("never"), b"c1"))
    code, output = await vfleet("doctor", "--coordinator", coordinator)
    assert code == 1
    assert "owner without migration" in output
    assert "delete the owner key" in output
    code, output = await vfleet("doctor", "--repair", "-o", "json", "--coordinator", coordinator)
    assert code == 0
    assert '"DIFFERENCE_KIND_OWNER_WITHOUT_MIGRATION"' in output


async def vfleet(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vfleet.cli.main", "--insecure", *arguments, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_the_fleet_commands_say_what_they_did_and_exit_by_it(cluster: Cluster) -> None:
    coordinator = ",".join(cluster.local.coordinator_addresses)
    code, output = await vfleet("fleet", "bump-generation", "--coordinator", coordinator)
    assert (code, output.partition(";")[0]) == (0, "the fleet generation is 2")
    assert (await vfleet("fleet", "forget-host", "h9", "--coordinator", coordinator))[0] == 2
    assert (await vfleet("fleet", "forget-host", "h3", "--coordinator", coordinator))[0] == 1
    await cluster.local.hosts["h3"].kill()

    async def away() -> bool:
        return not (await cluster.fleet.get_host("h3")).registered

    await eventually(away)
    code, output = await vfleet("fleet", "forget-host", "h3", "--coordinator", coordinator)
    assert (code, output.strip()) == (0, "h3 is forgotten")
    migrated = await cluster.fleet.create_function("vf1", "h1/nic0")
    assert migrated.attempt.fleet_generation == 2
