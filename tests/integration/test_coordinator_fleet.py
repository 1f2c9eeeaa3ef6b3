"""Functions, drivers and attachments, over a real etcd and fake hosts."""

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise

import pytest
from support.cluster import FakeCluster, eventually, refused
from support.fake_host import offset_is_right

from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.limits import MAX_DRIVERS
from vfleet.v1 import fleet_service_pb2 as fleet_pb
from vfleet.v1.records_pb2 import FunctionStatus

ACTIVE = FunctionStatus.FUNCTION_STATUS_ACTIVE


@pytest.fixture
async def cluster(store) -> AsyncIterator[FakeCluster]:
    cluster = FakeCluster(store)
    await cluster.start()
    yield cluster
    await cluster.stop()


def injected() -> VfleetError:
    return VfleetError(Reason.LIMIT_EXCEEDED, "no more memory")


async def test_functions_get_the_lowest_free_slots_even_if_made_at_once(cluster):
    functions = await asyncio.gather(*(cluster.create(f"vf{n}", "h1/nic1") for n in range(1, 17)))
    assert sorted(function.vf_index for function in functions) == list(range(1, 17))
    assert len({function.identity for function in functions}) == 16
    assert {function.status for function in functions} == {ACTIVE}
    error = await refused(cluster.create("vf17", "h1/nic1"))
    assert error.reason is Reason.NO_FREE_SLOT


async def test_making_a_function_again_goes_on_where_the_first_try_stopped(cluster):
    cluster.hosts["h1"].fail["CreateFunction"] = injected()
    error = await refused(cluster.create("vf1", "h1/nic0"))
    assert "host 'h1', CreateFunction: no more memory" in error.message
    cluster.hosts["h1"].fail.clear()
    function = await cluster.create("vf1", "h1/nic0")
    assert function.status == ACTIVE
    assert await cluster.create("vf1", "h1/nic0") == function
    assert (await refused(cluster.create("vf1", "h1/nic1"))).reason is Reason.ALREADY_EXISTS


@pytest.mark.parametrize(
    ("device", "vf_index", "reason"),
    [
        ("h1/nope", 0, Reason.NOT_FOUND),
        ("h9/nic0", 0, Reason.NOT_FOUND),
        ("h1/nic0", 5, Reason.INVALID_FIELD),
        ("h1/nic0", 1, Reason.SLOT_TAKEN),
        ("nic0", 0, Reason.INVALID_FIELD),
    ],
)
async def test_a_function_that_can_not_be_made_changes_nothing(cluster, device, vf_index, reason):
    await cluster.create("vf1", "h1/nic0")
    assert (await refused(cluster.create("vf2", device, vf_index))).reason is reason
    assert await cluster.keys(keys.FUNCTIONS) == ["vf1"]


async def test_deleting_frees_the_slot_and_can_be_repeated(cluster):
    await cluster.create("vf1", "h1/nic0")
    delete = fleet_pb.DeleteFunctionRequest(function="vf1")
    cluster.hosts["h1"].fail["DestroyFunction"] = injected()
    await refused(cluster.ask(cluster.fleet().DeleteFunction, delete))
    assert (await cluster.function("vf1")).status == FunctionStatus.FUNCTION_STATUS_DELETING
    cluster.hosts["h1"].fail.clear()
    await cluster.ask(cluster.fleet().DeleteFunction, delete)
    assert await cluster.keys(keys.FUNCTIONS) == await cluster.keys(keys.SLOTS) == []
    assert cluster.hosts["h1"].instances == {}
    assert (await refused(cluster.ask(cluster.fleet().DeleteFunction, delete))).reason is Reason.NOT_FOUND


# In a restored etcd a function may be in creation or deletion of which the host has seen the end, and more.


def stale() -> VfleetError:
    return VfleetError(Reason.STALE_ATTEMPT, "the host has seen a later attempt")


async def test_a_deletion_of_before_the_raise_is_begun_anew_in_the_new_generation(cluster):
    await cluster.create("vf1", "h1/nic0")
    host = cluster.hosts["h1"]
    host.fail["DestroyFunction"] = stale()
    assert (await refused(cluster.delete("vf1"))).reason is Reason.STALE_ATTEMPT
    await cluster.ask(cluster.fleet().BumpGeneration, fleet_pb.BumpGenerationRequest())
    host.fail.clear()

    async def gone() -> bool:
        return await cluster.keys(keys.FUNCTIONS) == []

    await eventually(gone)
    destroyed = [request for method, request in zip(host.calls, host.requests, strict=True) if "Destroy" in method]
    assert [request.attempt.fleet_generation for request in destroyed][:: len(destroyed) - 1] == [1, 2]
    await cluster.assert_nothing_left({})


async def test_a_creation_of_before_the_raise_that_its_host_is_past_counts_as_done(cluster):
    cluster.hosts["h1"].fail["CreateFunction"] = stale()
    assert (await refused(cluster.create("vf1", "h1/nic0"))).reason is Reason.STALE_ATTEMPT
    assert (await refused(cluster.create("vf1", "h1/nic0"))).reason is Reason.STALE_ATTEMPT
    await cluster.ask(cluster.fleet().BumpGeneration, fleet_pb.BumpGenerationRequest())

    async def active() -> bool:
        return (await cluster.function("vf1")).status == ACTIVE

    await eventually(active)


async def test_a_function_whose_machine_is_gone_can_be_deleted(cluster):
    await cluster.create("vf1", "h1/nic0")
    await cluster.hosts["h1"].reboot()
    await cluster.ask(cluster.fleet().DeleteFunction, fleet_pb.DeleteFunctionRequest(function="vf1"))
    assert "DestroyFunction" not in cluster.hosts["h1"].calls
    assert await cluster.keys(keys.SLOTS) == []


async def test_attaching_puts_the_entry_and_repeating_it_changes_nothing(cluster):
    function = await cluster.create("vf1", "h1/nic0")
    entry = await cluster.attach("vf1", "d1", "h2", main_memory_bytes=8192)
    assert offset_is_right(entry, function.base)
    assert entry.virtual_address == 0x1000_0000_0000
    told = cluster.hosts["h2"].table["d1", "vf1"]
    assert told.revision == (await cluster.store.get(keys.entry_key("h2", "d1", "vf1"))).mod_revision
    told.ClearField("revision")
    assert told == entry
    revision = (await cluster.store.list(keys.PREFIX)).revision
    assert await cluster.attach("vf1", "d1") == entry
    assert (await cluster.store.list(keys.PREFIX)).revision == revision
    assert (await cluster.function("vf1")).drivers == ["d1"]
    for difference in ({"host": "h1"}, {"virtual_address": 1 << 40}, {"main_memory_bytes": 4096}):
        assert (await refused(cluster.attach("vf1", "d1", **difference))).reason is Reason.ALREADY_EXISTS


async def test_functions_attached_at_once_get_places_of_their_own(cluster):
    names = [f"vf{n}" for n in range(1, 9)]
    for name in names:
        await cluster.create(name, "h1/nic1")
    entries = await asyncio.gather(*(cluster.attach(name, "d1", "h1") for name in names))
    entries = sorted(entries, key=lambda entry: entry.virtual_address)
    assert all(a.virtual_address + a.length_bytes <= b.virtual_address for a, b in pairwise(entries))
    drivers = await cluster.ask(cluster.fleet().ListDrivers, fleet_pb.FleetServiceListDriversRequest())
    assert list(drivers.drivers[0].entries) == entries


async def test_detaching_and_deleting_a_driver(cluster):
    await cluster.create("vf1", "h1/nic0")
    await cluster.attach("vf1", "d1", "h1")
    delete_driver = fleet_pb.FleetServiceDeleteDriverRequest(driver="d1")
    for method, request in (
        (cluster.fleet().DeleteDriver, delete_driver),
        (cluster.fleet().DeleteFunction, fleet_pb.DeleteFunctionRequest(function="vf1")),
    ):
        assert (await refused(cluster.ask(method, request))).reason is Reason.IN_USE
    detach = fleet_pb.DetachDriverRequest(function="vf1", driver="d1")
    cluster.hosts["h1"].fail["DetachFunction"] = injected()
    await refused(cluster.ask(cluster.fleet().DetachDriver, detach))
    cluster.hosts["h1"].fail.clear()
    await cluster.ask(cluster.fleet().DetachDriver, detach)
    assert cluster.hosts["h1"].table == {}
    assert not (await cluster.function("vf1")).drivers
    await cluster.ask(cluster.fleet().DeleteDriver, delete_driver)
    assert await cluster.keys(keys.DRIVERS) == []
    assert cluster.hosts["h1"].drivers == set()
    assert (await refused(cluster.ask(cluster.fleet().DeleteDriver, delete_driver))).reason is Reason.NOT_FOUND


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ({"virtual_address": 4097}, "virtual_address"),
        ({"virtual_address": 1 << 32, "main_memory_bytes": 4096}, "virtual_address"),
        ({"virtual_address": (1 << 64) - 4096}, "virtual_address"),
        ({"main_memory_bytes": 1}, "main_memory_bytes"),
        ({"main_memory_bytes": (1 << 30) + 4096}, "main_memory_bytes"),
        ({"host": ""}, "host"),
        ({"host": "H1"}, "host"),
    ],
)
async def test_a_bad_attachment_names_the_field_and_changes_nothing(cluster, more, field):
    await cluster.create("vf1", "h1/nic0")
    error = await refused(cluster.attach("vf1", "d1", **{"host": "h1", **more}))
    assert error.metadata["field"] == field
    assert await cluster.keys(keys.DRIVERS) == []


async def test_hosts_and_devices_are_shown(cluster):
    await cluster.create("vf1", "h2/nic0")
    await cluster.hosts["h3"].unregister()
    hosts = await cluster.ask(cluster.fleet().ListHosts, fleet_pb.ListHostsRequest())
    assert [(host.name, host.segment, len(host.devices)) for host in hosts.hosts] == [
        ("h1", 1, 0), ("h2", 2, 0), ("h3", 3, 0)
    ]  # fmt: skip
    first = await cluster.ask(cluster.fleet().ListDevices, fleet_pb.ListDevicesRequest(page_size=3))
    assert [(use.device.name, use.used_slots) for use in first.devices] == [
        ("h1/nic0", 0), ("h1/nic1", 0), ("h2/nic0", 1)
    ]  # fmt: skip
    rest = fleet_pb.ListDevicesRequest(page_size=3, page_token=first.next_page_token)
    rest = await cluster.ask(cluster.fleet().ListDevices, rest)
    assert [use.device.name for use in rest.devices] == ["h2/nic1", "h3/nic0", "h3/nic1"]
    assert rest.next_page_token == ""
    too_many = cluster.ask(cluster.fleet().ListHosts, fleet_pb.ListHostsRequest(page_size=1001))
    assert (await refused(too_many)).metadata["field"] == "page_size"


async def test_a_function_has_sixteen_drivers_at_most(cluster):
    await cluster.create("vf1", "h1/nic0")
    for number in range(MAX_DRIVERS):
        await cluster.attach("vf1", f"d{number}", "h1")
    error = await refused(cluster.attach("vf1", "more", "h1"))
    assert error.reason is Reason.LIMIT_EXCEEDED
    assert "expected no more than 16, the most drivers that a function of model 'checker' can have" in error.message
    assert len(await cluster.keys(keys.DRIVERS)) == MAX_DRIVERS
