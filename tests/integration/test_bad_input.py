"""Bad input at the real daemons: each gets one clear error, by code, reason and words, and changes nothing."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random

import grpc
import pytest
from support.local_cluster import Cluster, refusal, running

from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError, from_rpc_error
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.keys import PREFIX, WITNESSES
from vfleet.process import ChildProcess
from vfleet.rpc import Channels, call
from vfleet.v1 import driver_service_pb2 as driver_pb2
from vfleet.v1 import fleet_service_pb2 as fleet_pb2
from vfleet.v1 import function_service_pb2 as function_pb2
from vfleet.v1 import hold_service_pb2 as hold_pb2
from vfleet.v1 import migration_service_pb2 as migration_pb2
from vfleet.v1.driver_service_pb2_grpc import DriverServiceStub
from vfleet.v1.fleet_service_pb2_grpc import FleetServiceStub
from vfleet.v1.function_service_pb2_grpc import FunctionServiceStub
from vfleet.v1.hold_service_pb2_grpc import HoldServiceStub
from vfleet.v1.migration_service_pb2_grpc import MigrationServiceStub
from vfleet.v1.types_pb2 import Attempt

GROUP = 50
TOPOLOGY = """
hosts:
  - name: h1
    segment: 1
    bridges:
      - {name: rp0, secondary: 1, subordinate: 2, devices: [
          {name: nic0, bus: 1, model: checker, manufacturer: {vendor_id: 0x1af4, device_id: 1}, io_type: network,
           power_domain: a, total_vfs: 63, first_vf_offset: 16, vf_stride: 1, bars: {0: 4KiB, 2: 16KiB}}]}
  - name: h2
    segment: 2
    bridges:
      - {name: rp0, secondary: 4, subordinate: 9, devices: [
          {name: nic0, bus: 4, model: checker, manufacturer: {vendor_id: 0x1af4, device_id: 1}, io_type: network,
           power_domain: a, total_vfs: 63, first_vf_offset: 32, vf_stride: 2, bars: {0: 4KiB, 2: 16KiB}},
          {name: full, bus: 5, model: checker, manufacturer: {vendor_id: 0x1af4, device_id: 1}, io_type: network,
           power_domain: a, total_vfs: 1, first_vf_offset: 1, vf_stride: 1, bars: {0: 4KiB, 2: 16KiB}},
          {name: small, bus: 6, model: checker, manufacturer: {vendor_id: 0x1af4, device_id: 1}, io_type: network,
           power_domain: a, total_vfs: 4, first_vf_offset: 1, vf_stride: 1, bars: {0: 4KiB, 2: 8KiB}},
          {name: other, bus: 7, model: checker, manufacturer: {vendor_id: 0x8086, device_id: 1}, io_type: network,
           power_domain: a, total_vfs: 4, first_vf_offset: 1, vf_stride: 1, bars: {0: 4KiB, 2: 16KiB}}]}
"""


@dataclass
class Ask:
    """A cluster in which vf1 is on h1/nic0 with driver d1, and h2/full is full."""

    cluster: Cluster
    channels: Channels
    virtual_address: int

    async def fleet(self, method: str, request: object) -> object:
        return await self._ask(FleetServiceStub, self.cluster.local.coordinator_addresses[0], method, request)

    async def migrate(self, *moves: tuple[str, str], **fields: object) -> object:
        request = migration_pb2.CreateMigrationRequest(
            moves=[migration_pb2.MoveRequest(function=function, target_device=device) for function, device in moves],
            **fields,
        )
        return await self._ask(
            MigrationServiceStub, self.cluster.local.coordinator_addresses[0], "CreateMigration", request
        )

    async def list_migrations(self, **fields: object) -> object:
        request = migration_pb2.ListMigrationsRequest(**fields)
        address = self.cluster.local.coordinator_addresses[0]
        return await self._ask(MigrationServiceStub, address, "ListMigrations", request)

    async def host(self, stub: type, method: str, request: object) -> object:
        return await self._ask(stub, self.cluster.local.hosts["h1"].address, method, request)

    async def read(self, offset: int, length: int, **fields: object) -> object:
        request = driver_pb2.ReadRequest(
            driver="d1", virtual_address=self.virtual_address + offset, length_bytes=length, **fields
        )
        return await self.host(DriverServiceStub, "Read", request)

    async def raw(self, path: str, data: bytes) -> object:
        """Send bytes as a request to the coordinator."""
        address = self.cluster.local.coordinator_addresses[0]
        method = self.channels.to(address).unary_unary(path, request_serializer=None, response_deserializer=None)
        try:
            return await method(data, timeout=10)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, address) from None

    async def state(self) -> object:
        """All that etcd and the hosts have, but for what time changes."""
        listing = await self.cluster.store.list(PREFIX)
        records = {item.key: item.value for item in listing.items if not item.key.startswith(WITNESSES)}
        hosts = {name: await host.list_functions() for name, host in self.cluster.hosts.items()}
        tables = {name: [d.entries for d in await host.list_drivers()] for name, host in self.cluster.hosts.items()}
        return records, str(hosts), str(tables)

    async def _ask(self, stub: type, address: str, method: str, request: object) -> object:
        return await call(getattr(stub(self.channels.to(address)), method), request, address=address, timeout_s=10)


@pytest.fixture
async def ask(tmp_path: Path) -> AsyncIterator[Ask]:
    topology = tmp_path / "fleet.yaml"
    topology.write_text(TOPOLOGY)
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(running(tmp_path, topology=topology))
        channels = Channels()
        stack.push_async_callback(channels.close)
        await cluster.fleet.create_function("vf1", "h1/nic0")
        await cluster.fleet.create_function("filler", "h2/full")
        entry = await cluster.fleet.attach_driver("vf1", "d1", host="h1", main_memory_bytes=8192)
        yield Ask(cluster, channels, entry.virtual_address)


async def start_hostd(tmp_path: Path, topology: Path, host: str, etcd: str, *more: str) -> ChildProcess:
    command = [
        sys.executable,
        "-m",
        "hostd",
        "--topology",
        str(topology),
        "--host",
        host,
        "--etcd",
        etcd,
        "--insecure",
        *more,
    ]
    return await ChildProcess.start(host, [*command, "--data-dir", str(tmp_path / host)], log=tmp_path / f"{host}.log")


Case = tuple[Callable[[Ask], Awaitable[object]], Reason, grpc.StatusCode, str]

_INVALID = (Reason.INVALID_FIELD, grpc.StatusCode.INVALID_ARGUMENT)
_NOT_FOUND = (Reason.NOT_FOUND, grpc.StatusCode.NOT_FOUND)
_PLAN: dict[str, Case] = {
    "unknown function": (lambda a: a.migrate(("nope", "h2/nic0")), *_NOT_FOUND, "no function named 'nope'"),
    "unknown device": (lambda a: a.migrate(("vf1", "h2/nope")), *_NOT_FOUND, "no device named 'h2/nope'"),
    "unknown host": (lambda a: a.migrate(("vf1", "h9/nic0")), *_NOT_FOUND, "no host named 'h9'"),
    "no moves": (lambda a: a.migrate(), *_INVALID, "moves"),
    "a function twice": (
        lambda a: a.migrate(("vf1", "h2/nic0"), ("vf1", "h2/nic0")),
        *_INVALID,
        "moves[1].function is 'vf1'; expected each function once",
    ),
    "target equal to source": (
        lambda a: a.migrate(("vf1", "h1/nic0")),
        Reason.TARGET_IS_SOURCE,
        grpc.StatusCode.INVALID_ARGUMENT,
        "function 'vf1' is on device h1/nic0 at VF 1 already",
    ),
    "no free slot": (
        lambda a: a.migrate(("vf1", "h2/full")),
        Reason.NO_FREE_SLOT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "device h2/full has no free slot",
    ),
    "smaller BARs": (
        lambda a: a.migrate(("vf1", "h2/small")),
        Reason.INCOMPATIBLE_DEVICE,
        grpc.StatusCode.FAILED_PRECONDITION,
        "bars: BAR 2 of 8192 bytes; expected at least 16384",
    ),
    "other manufacturer": (
        lambda a: a.migrate(("vf1", "h2/other")),
        Reason.INCOMPATIBLE_DEVICE,
        grpc.StatusCode.FAILED_PRECONDITION,
        "manufacturer: 8086:0001; expected 1af4:0001",
    ),
    "oversize function name": (lambda a: a.migrate(("a" * 64, "h2/nic0")), *_INVALID, "moves[0].function is 'aaa"),
    "oversize request ID": (
        lambda a: a.migrate(("vf1", "h2/nic0"), request_id="m" * 100),
        *_INVALID,
        "request_id is 'mmm",
    ),
    "name with a slash": (lambda a: a.migrate(("vf/1", "h2/nic0")), *_INVALID, "moves[0].function is 'vf/1'"),
    "device without a host": (lambda a: a.migrate(("vf1", "nic0")), *_INVALID, "HOST/DEVICE"),
    "rounds out of range": (
        lambda a: a.migrate(("vf1", "h2/nic0"), options=migration_pb2.MigrationOptions(max_rounds=1001)),
        *_INVALID,
        "max_rounds is 1001",
    ),
    "not UTF-8": (
        lambda a: a.raw("/vfleet.v1.MigrationService/GetMigration", b"\x0a\x02\xff\xfe"),
        *_INVALID,
        "the request can't be decoded",
    ),
    "not protobuf": (
        lambda a: a.raw("/vfleet.v1.FleetService/ListHosts", b"\xff\xff\xff\xff"),
        *_INVALID,
        "the request can't be decoded",
    ),
    "a page token that is none": (
        lambda a: a.list_migrations(page_token="x"),
        *_INVALID,
        "page_token is 'x'",
    ),
    "function of that name elsewhere": (
        lambda a: a.fleet(
            "CreateFunction", fleet_pb2.FleetServiceCreateFunctionRequest(function="vf1", device="h2/nic0")
        ),
        Reason.ALREADY_EXISTS,
        grpc.StatusCode.ALREADY_EXISTS,
        "function 'vf1' exists, on device h1/nic0",
    ),
    "VF that the device has not": (
        lambda a: a.fleet(
            "CreateFunction",
            fleet_pb2.FleetServiceCreateFunctionRequest(function="vf2", device="h2/nic0", vf_index=64),
        ),
        *_INVALID,
        "vf_index is 64; expected 1 to 63",
    ),
    "a function that has drivers": (
        lambda a: a.fleet("DeleteFunction", fleet_pb2.DeleteFunctionRequest(function="vf1")),
        Reason.IN_USE,
        grpc.StatusCode.FAILED_PRECONDITION,
        "function 'vf1' has drivers: d1",
    ),
    "overlapping virtual addresses": (
        lambda a: a.fleet(
            "AttachDriver",
            fleet_pb2.AttachDriverRequest(function="filler", driver="d1", virtual_address=a.virtual_address),
        ),
        *_INVALID,
        "clear of function 'vf1'",
    ),
}
_ACCESS: dict[str, Case] = {
    "unaligned": (lambda a: a.read(4, 8), *_INVALID, "is not aligned to its length of 8 bytes"),
    "of zero size": (lambda a: a.read(0, 0), *_INVALID, "length is 0 bytes"),
    "of 3 bytes": (lambda a: a.read(0, 3), *_INVALID, "expected a power of two from 1 to 4096"),
    "across the end of a BAR": (lambda a: a.read(4092, 8), *_INVALID, "is not aligned"),
    "too long": (lambda a: a.read(0, 8192), *_INVALID, "expected a power of two from 1 to 4096"),
    "past the last BAR": (
        lambda a: a.read(1 << 20, 8),
        Reason.TRANSLATION_FAULT,
        grpc.StatusCode.OUT_OF_RANGE,
        "driver 'd1' has nothing at virtual address",
    ),
    "ahead of its turn": (
        lambda a: a.read(0, 8, sequence=1000),
        Reason.SEQUENCE_GAP,
        grpc.StatusCode.FAILED_PRECONDITION,
        "sequence is 1000; expected at most 1",
    ),
    "of an unknown driver": (
        lambda a: a.host(DriverServiceStub, "Read", driver_pb2.ReadRequest(driver="nobody", length_bytes=8)),
        *_NOT_FOUND,
        "no driver named 'nobody'",
    ),
}
_HOST: dict[str, Case] = {
    "a request without an attempt": (
        lambda a: a.host(
            FunctionServiceStub,
            "DestroyFunction",
            function_pb2.DestroyFunctionRequest(function="vf1", generation=1, decision=1),
        ),
        *_INVALID,
        "attempt is '0.0'",
    ),
    "a destroy without a decision": (
        lambda a: a.host(
            FunctionServiceStub,
            "DestroyFunction",
            function_pb2.DestroyFunctionRequest(
                function="vf1", generation=1, attempt=Attempt(fleet_generation=1, revision=10**9)
            ),
        ),
        *_INVALID,
        "decision is 0",
    ),
    "a hold of a low attempt": (
        lambda a: a.host(
            HoldServiceStub,
            "PlaceHold",
            hold_pb2.PlaceHoldRequest(
                attempt=Attempt(fleet_generation=1, revision=1),
                migration="m1",
                entries=[hold_pb2.EntryName(driver="d1", function="vf1", generation=1)],
                resolve_after_ms=1000,
            ),
        ),
        Reason.STALE_ATTEMPT,
        grpc.StatusCode.FAILED_PRECONDITION,
        "is lower than",
    ),
    "a hold without a deadline": (
        lambda a: a.host(
            HoldServiceStub,
            "PlaceHold",
            hold_pb2.PlaceHoldRequest(
                attempt=Attempt(fleet_generation=1, revision=10**9),
                migration="m1",
                entries=[hold_pb2.EntryName(driver="d1", function="vf1", generation=1)],
            ),
        ),
        *_INVALID,
        "resolve_after_ms is 0",
    ),
}


async def test_each_has_one_clear_error_and_changes_nothing(ask: Ask) -> None:
    before = await ask.state()
    for name, (work, reason, code, words) in {**_PLAN, **_ACCESS, **_HOST}.items():
        error = await refusal(work(ask))
        assert (error.reason, error.code) == (reason, code), f"{name}: {error.message}"
        assert words in error.message, name
        assert "\n" not in error.message, name
        if error.reason is Reason.INVALID_FIELD and "decoded" not in words:
            assert error.violations, name
    assert await ask.state() == before


async def test_a_group_too_large_for_a_transaction_says_how_many_would_fit(ask: Ask) -> None:
    names = [f"g{number}" for number in range(GROUP)]
    for name in names:
        await ask.cluster.fleet.create_function(name, "h1/nic0")
    before = await ask.state()
    with pytest.raises(
        VfleetError, match=r"50 moves don't fit into one etcd transaction; the first \d+ would"
    ) as error:
        await ask.migrate(*((name, "h2/nic0") for name in names))
    assert error.value.reason is Reason.GROUP_TOO_LARGE
    assert await ask.state() == before
    fitting = int(error.value.metadata["fitting"])
    await ask.cluster.move("group", dict.fromkeys(names[:fitting], "h2/nic0"))
    homes = await ask.cluster.homes()
    assert [homes[name] for name in names[:fitting]] == ["h2/nic0"] * fitting


async def test_the_segment_of_another_host_is_refused(ask: Ask, tmp_path: Path) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(TOPOLOGY.replace("name: h1", "name: h7"))
    process = await start_hostd(tmp_path, other, "h7", ",".join(ask.cluster.local.etcd))
    assert await process.wait() == 2
    assert process.last_words() == "vfleet-hostd: segment 1 of host 'h7' is claimed by host 'h1'"
    assert "h7" not in {host.name for host in await ask.cluster.fleet.list_hosts()}


async def test_a_second_machine_of_the_same_name_ends_and_the_first_serves_on(ask: Ask, tmp_path: Path) -> None:
    before = await ask.state()
    topology = tmp_path / "fleet.yaml"
    process = await start_hostd(tmp_path, topology, "h1", ",".join(ask.cluster.local.etcd), "--lease-ttl-s", "1")
    assert await process.wait() == 1
    assert (
        process.last_words() == "vfleet-hostd: another machine is registered as host 'h1'; expected none, or this one"
    )
    assert await ask.state() == before
    await ask.read(0, 8)


async def test_a_first_start_without_etcd_names_the_address_and_the_time(tmp_path: Path) -> None:
    topology = tmp_path / "fleet.yaml"
    topology.write_text(TOPOLOGY)
    process = await start_hostd(tmp_path, topology, "h1", "127.0.0.1:1")
    assert await process.wait() == 1
    assert "127.0.0.1:1" in process.last_words()
    with pytest.raises(VfleetError, match=r"127\.0\.0\.1:1.*s"):
        await EtcdStore.connect(["127.0.0.1:1"], SystemClock(), Random(), timeout_s=0.2)
