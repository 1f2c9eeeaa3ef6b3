"""A driver in a virtual machine, whose VMM is the test itself: attached, moved, restarted behind, lost, detached."""

import asyncio
import os
import select
import signal
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import pytest
from support.guest import attach_guest
from support.local_cluster import Cluster, assert_nothing_left, eventually, refusal, running
from support.nvme_guest import CC, PAGE, VS, NvmeGuest, runs
from support.vmm import CONFIGURATION, DEVICE_INFO, INTERRUPT_INFO, REGION_INFO, RESET

from hostd.guest import holder_link
from hostd.guest.holder_link import HolderGoneError, HolderLink
from vfleet.cli.main import run
from vfleet.driver import DriverClient
from vfleet.errors import Reason
from vfleet.rpc import Channels, call
from vfleet.v1.function_service_pb2 import FaultKind, InjectFaultRequest
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.records_pb2 import Phase
from vfleet.v1.types_pb2 import GUEST_STATE_CONNECTED, GUEST_STATE_LOST, GUEST_STATE_WAITING, Guest, GuestState

TOPOLOGY = Path(__file__).parents[1] / "guests" / "fleet.yaml"
RESETS: Mapping[str, Callable[[NvmeGuest], object]] = {
    "FLR": lambda driver: driver.vmm.write(CONFIGURATION, 0x48, b"\0\x80"),
    "VFIO": lambda driver: driver.vmm.ask(RESET),
    "CC.EN": lambda driver: driver.vmm.write(0, CC, bytes(4)),
}
FATAL = 3
NOWHERE = 1 << 31


async def do(work: Callable[[], object]) -> None:
    """Let the driver work while the cluster does."""
    async with asyncio.timeout(30):
        await asyncio.to_thread(work)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running(tmp_path, topology=TOPOLOGY) as cluster:
        await cluster.fleet.create_function("vf1", "h1/nvme0")
        yield cluster


@pytest.fixture
async def driver(cluster: Cluster, tmp_path: Path) -> AsyncIterator[NvmeGuest]:
    found = NvmeGuest(await attach_guest(cluster, "vf1", "g1", "h1", tmp_path))
    await do(found.begin)
    yield found
    found.close()


async def break_function(cluster: Cluster, home: str, generation: int) -> None:
    """Let the function at its home take a device fault."""
    channels, address = Channels(), cluster.local.hosts[home].address
    request = InjectFaultRequest(function="vf1", generation=generation, kind=FaultKind.FAULT_KIND_DEVICE)
    try:
        await call(FunctionServiceStub(channels.to(address)).InjectFault, request, address=address, timeout_s=10.0)
    finally:
        await channels.close()


async def until_state(cluster: Cluster, state: GuestState.ValueType) -> None:
    """Wait until the fleet says what has become of the guest."""

    async def is_said() -> bool:
        return (await cluster.fleet.get_driver("g1")).guest_state == state

    await eventually(is_said)


async def until_gone(link: HolderLink) -> None:
    async with asyncio.timeout(30):
        while True:
            await link.receive()


def holder_of(tmp_path: Path, host: str = "h1", driver: str = "g1") -> int:
    return int((tmp_path / "cluster" / host / "guests" / f"{driver}.pid").read_text())


async def test_a_vmm_is_told_what_the_function_is(driver: NvmeGuest):
    vmm = driver.vmm
    _, flags, regions, kinds = struct.unpack("<IIII", vmm.ask(DEVICE_INFO, bytes(16)).body)
    assert (flags, regions, kinds) == (3, 9, 5)
    sizes = {}
    for index in range(regions):
        body = vmm.ask(REGION_INFO, struct.pack("<IIIIQQ", 32, 0, index, 0, 0, 0)).body
        sizes[index] = struct.unpack("<IIIIQQ", body)[4]
    assert {index: size for index, size in sizes.items() if size} == {0: 16 << 10, 7: PAGE}
    interrupts = [
        struct.unpack("<IIII", vmm.ask(INTERRUPT_INFO, struct.pack("<IIII", 16, 0, kind, 0)).body)[3]
        for kind in range(kinds)
    ]
    assert interrupts == [0, 0, 9, 0, 0]
    assert vmm.read(CONFIGURATION, 0, 4) == bytes.fromhex("f41ac510")
    assert vmm.read(0, VS, 4) == (0x00010400).to_bytes(4, "little")


async def test_commands_complete_wherever_the_function_lives(cluster: Cluster, driver: NvmeGuest):
    for number, home in enumerate(("h2/nvme0", "h3/nvme0", "h1/nvme0")):
        await do(driver.identify)
        await do(driver.submit)
        migration = await cluster.move(f"m{number}", {"vf1": home})
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
        await do(driver.completed)
        await do(driver.identify)
    assert (await cluster.fleet.get_driver("g1")).guest_state == GUEST_STATE_CONNECTED


@pytest.mark.parametrize("home", ["h1", "h2"])
async def test_hostd_is_killed_behind_the_guest(cluster: Cluster, driver: NvmeGuest, home: str):
    if home != "h1":
        await cluster.move("m0", {"vf1": f"{home}/nvme0"})
    for _ in range(3):
        await do(driver.identify)
        await cluster.local.hosts["h1"].kill()
        # A posted write finds nobody, and waits.
        await do(driver.submit)
        await cluster.local.hosts["h1"].start()
        await do(driver.completed)
        await do(lambda: driver.vmm.read(CONFIGURATION, 0, 4))
        assert driver.status() == 1
    await until_state(cluster, GUEST_STATE_CONNECTED)


async def test_what_was_written_to_configuration_space_outlives_hostd(cluster: Cluster, driver: NvmeGuest):
    driver.vmm.write(CONFIGURATION, 0x04, b"\x06\x04")
    await cluster.local.hosts["h1"].restart()
    found: list[bytes] = []
    await do(lambda: found.append(driver.vmm.read(CONFIGURATION, 0x04, 2)))
    assert found == [b"\x06\x04"]


@pytest.mark.parametrize("home", ["h1", "h2"])
async def test_a_reset_ends_what_was_under_way(cluster: Cluster, driver: NvmeGuest, home: str):
    if home != "h1":
        await cluster.move("m0", {"vf1": f"{home}/nvme0"})
    for reset in RESETS.values():
        await do(driver.submit)
        await do(lambda reset=reset: reset(driver))
        assert driver.status() == 0
        # Nothing reaches the guest's memory any more once it has been told that the function is reset.
        before = driver.memory.content[:]
        await cluster.fleet.list_hosts()
        assert driver.memory.content[:] == before
        if select.select([driver.eventfd], [], [], 0)[0]:
            os.eventfd_read(driver.eventfd)
        await do(driver.enable)
        await do(driver.identify)


async def until_status(driver: NvmeGuest, status: int) -> None:
    """Wait until the controller says what has become of it, which no read waits for."""
    async with asyncio.timeout(30):
        while await asyncio.to_thread(driver.status) != status:
            pass


@pytest.mark.parametrize("home", ["h1", "h2"])
@pytest.mark.parametrize("reset", RESETS.values(), ids=RESETS)
async def test_a_reset_ends_a_fatal_status(
    cluster: Cluster, driver: NvmeGuest, home: str, reset: Callable[[NvmeGuest], object]
):
    await do(lambda: reset(driver))
    await do(lambda: driver.enable(submissions=NOWHERE))
    await do(driver.submit)
    await until_status(driver, FATAL)
    if home != "h1":
        await cluster.move("m0", {"vf1": f"{home}/nvme0"})
    # As Linux's driver does when it is unbound and bound, or finds the status itself.
    assert driver.status() == FATAL
    await do(lambda: reset(driver))
    await do(driver.enable)
    await do(driver.identify)


@pytest.mark.parametrize("home", ["h1", "h2"])
async def test_a_broken_function_is_found_broken_at_once_and_comes_back_with_a_reset(
    cluster: Cluster, driver: NvmeGuest, home: str
):
    if home != "h1":
        await cluster.move("m0", {"vf1": f"{home}/nvme0"})
    await cluster.local.hosts[home].restart("--allow-faults")
    await do(driver.identify)
    await break_function(cluster, home, generation=1 if home == "h1" else 2)
    assert driver.status() == 0xFFFFFFFF
    await do(driver.submit)
    # Whoever begins anew finds it as it is.
    await cluster.local.hosts["h1"].restart("--allow-faults")
    for reset in list(RESETS.values())[:2]:
        assert driver.status() == 0xFFFFFFFF
        await do(lambda reset=reset: reset(driver))
        await do(driver.enable)
        await do(driver.identify)
        await break_function(cluster, home, generation=1 if home == "h1" else 2)


async def test_a_guest_that_was_powered_off_begins_anew(cluster: Cluster, driver: NvmeGuest, tmp_path: Path):
    await do(driver.submit)
    driver.vmm.close()
    await until_state(cluster, GUEST_STATE_WAITING)
    again = NvmeGuest(tmp_path / "g1.sock")
    try:
        await do(again.begin)
        await do(again.identify)
        await until_state(cluster, GUEST_STATE_CONNECTED)
    finally:
        again.close()


async def test_a_holder_that_ends_under_its_vmm_is_lost_and_the_fleet_says_so(
    cluster: Cluster, driver: NvmeGuest, tmp_path: Path
):
    await until_state(cluster, GUEST_STATE_CONNECTED)
    os.kill(holder_of(tmp_path), signal.SIGKILL)
    with pytest.raises((EOFError, ConnectionResetError, BrokenPipeError)):
        await do(driver.status)
    await until_state(cluster, GUEST_STATE_LOST)
    await cluster.local.hosts["h1"].restart()
    await until_state(cluster, GUEST_STATE_LOST)
    # The function itself is well: attached anew it works.
    await cluster.fleet.detach_driver("vf1", "g1")
    await cluster.fleet.delete_driver("g1")
    again = NvmeGuest(await attach_guest(cluster, "vf1", "g1", "h1", tmp_path))
    try:
        await do(again.begin)
        await do(again.identify)
    finally:
        again.close()


async def test_a_guest_that_is_detached_and_attached_while_another_ends_begins_anew(
    cluster: Cluster, driver: NvmeGuest, tmp_path: Path
):
    """Its driver stays, and the other's holder hangs."""
    await until_state(cluster, GUEST_STATE_CONNECTED)
    await cluster.fleet.create_function("vf2", "h1/nvme0")
    await attach_guest(cluster, "vf2", "g2", "h1", tmp_path)
    os.kill(holder_of(tmp_path), signal.SIGKILL)
    await until_state(cluster, GUEST_STATE_LOST)
    os.kill(holder_of(tmp_path, driver="g2"), signal.SIGSTOP)
    await cluster.fleet.detach_driver("vf2", "g2")
    await cluster.fleet.detach_driver("vf1", "g1")
    again = NvmeGuest(await attach_guest(cluster, "vf1", "g1", "h1", tmp_path))
    try:
        await do(again.begin)
        await until_state(cluster, GUEST_STATE_CONNECTED)
        os.kill(holder_of(tmp_path), signal.SIGKILL)
        await until_state(cluster, GUEST_STATE_LOST)
    finally:
        again.close()


async def test_the_command_ends_when_the_socket_is_there_or_says_that_it_is_not(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    address = ",".join(cluster.local.coordinator_addresses)
    attach = ["--insecure", "attach", "vf1", "--guest", str(tmp_path / "g1.sock"), "--driver", "g1"]
    attach += ["--host", "h1", "--coordinator", address]
    assert await asyncio.to_thread(run, attach) == 0
    driver = NvmeGuest(tmp_path / "g1.sock")
    try:
        await do(driver.begin)
        await until_state(cluster, GUEST_STATE_CONNECTED)
        assert await asyncio.to_thread(run, attach) == 0  # asked again
        os.kill(holder_of(tmp_path), signal.SIGKILL)
        await until_state(cluster, GUEST_STATE_LOST)
        assert await asyncio.to_thread(run, attach) == 1
        assert "the guest's socket is lost after 10 s" in capsys.readouterr().err
    finally:
        driver.close()


async def test_a_connection_to_the_holder_that_breaks_is_made_again(
    cluster: Cluster, driver: NvmeGuest, tmp_path: Path
):
    await until_state(cluster, GUEST_STATE_CONNECTED)
    for _ in range(3):
        await do(driver.submit)
        # The holder serves one hostd: whoever comes takes the other's place.
        other = holder_link.connect(tmp_path / "cluster" / "h1" / "guests", "g1")
        assert other is not None
        with pytest.raises(HolderGoneError):
            await until_gone(other)
        other.close()
        await do(driver.completed)
        await do(driver.identify)
    assert (await cluster.fleet.get_driver("g1")).guest_state == GUEST_STATE_CONNECTED


async def test_a_holder_that_ends_without_a_vmm_is_started_anew(cluster: Cluster, tmp_path: Path):
    socket = await attach_guest(cluster, "vf1", "g1", "h1", tmp_path)
    await until_state(cluster, GUEST_STATE_WAITING)
    first = holder_of(tmp_path)
    os.kill(first, signal.SIGKILL)

    async def is_new() -> bool:
        return holder_of(tmp_path) != first

    await eventually(is_new)
    found: list[NvmeGuest] = []
    await do(lambda: found.append(NvmeGuest(socket)))
    await do(found[0].begin)
    found[0].close()


async def test_detaching_ends_the_holder_and_leaves_nothing(cluster: Cluster, driver: NvmeGuest, tmp_path: Path):
    pid = holder_of(tmp_path)
    await cluster.fleet.detach_driver("vf1", "g1")

    async def has_ended() -> bool:
        return not runs(pid)

    await eventually(has_ended)
    assert not (tmp_path / "g1.sock").exists()
    await cluster.fleet.delete_driver("g1")
    await assert_nothing_left(cluster)


async def test_its_accesses_come_from_the_virtual_machine_alone(cluster: Cluster, driver: NvmeGuest):
    entry = (await cluster.fleet.get_driver("g1")).entries[0]
    error = await refusal(DriverClient(cluster.hosts["h1"], "g1").read(entry.virtual_address, 4))
    assert error.reason is Reason.IN_USE


@pytest.mark.parametrize(
    ("guest", "field"),
    [
        (Guest(socket="relative.sock"), "guest.socket"),
        (Guest(socket="/" + "x" * 107), "guest.socket"),
        (Guest(socket="/tmp/a.sock", longest_hold_ms=3000), "guest.message_timeout_ms"),
        (Guest(socket="/tmp/a.sock", message_timeout_ms=4499), "guest.message_timeout_ms"),
    ],
)
async def test_what_can_not_be_kept_is_refused(cluster: Cluster, guest: Guest, field: str):
    error = await refusal(cluster.fleet.attach_driver("vf1", "g1", host="h1", guest=guest))
    assert (error.reason, error.metadata.get("field", field)) == (Reason.INVALID_FIELD, field)
    assert field in error.message


async def test_a_migration_that_may_hold_a_guest_for_too_long_is_not_begun(cluster: Cluster, driver: NvmeGuest):
    error = await refusal(cluster.begin("m1", {"vf1": "h2/nvme0"}, hold_timeout_ms=2001))
    assert error.reason is Reason.INVALID_FIELD
    assert "at most 2000" in error.message
    assert (await cluster.move("m2", {"vf1": "h2/nvme0"}, hold_timeout_ms=2000)).phase == Phase.PHASE_DONE


async def test_a_guests_driver_has_one_function(cluster: Cluster, driver: NvmeGuest, tmp_path: Path):
    await cluster.fleet.create_function("vf2", "h1/nvme0")
    own = Guest(socket=str(tmp_path / "g1.sock"))
    assert (await refusal(cluster.fleet.attach_driver("vf2", "g1", guest=own))).reason is Reason.LIMIT_EXCEEDED
    assert (await refusal(cluster.fleet.attach_driver("vf1", "g1"))).reason is Reason.ALREADY_EXISTS
    await cluster.fleet.attach_driver("vf1", "g1", guest=own)
