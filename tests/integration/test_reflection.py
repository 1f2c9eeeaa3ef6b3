"""What a stranger's client can do: all by gRPC reflection, without a line of generated code of ours."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from support.local_cluster import Cluster, running

TIMEOUT_S = 20.0
HEALTH = "grpc.health.v1.Health"


class Stranger:
    """A client that knows an address, and learns all else from the server: descriptors into a pool of its own."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address)
        self._database = ProtoReflectionDescriptorDatabase(self._channel)
        self._pool = DescriptorPool(self._database)

    def close(self) -> None:
        self._channel.close()

    def services(self) -> list[str]:
        return sorted(self._database.get_services())

    def call(self, service: str, method: str, /, **fields: object) -> Message:
        return self._method(self._channel.unary_unary, service, method)(fields)

    def stream(self, service: str, method: str, /, **fields: object) -> Iterator[Message]:
        return self._method(self._channel.unary_stream, service, method)(fields)

    def _method(
        self, kind: Callable[..., Callable], service: str, method: str
    ) -> Callable[[dict[str, object]], object]:
        descriptor = self._pool.FindServiceByName(service).methods_by_name[method]
        request_type, response_type = GetMessageClass(descriptor.input_type), GetMessageClass(descriptor.output_type)
        send = kind(
            f"/{service}/{method}",
            request_serializer=request_type.SerializeToString,
            response_deserializer=response_type.FromString,
        )
        return lambda fields: send(request_type(**fields), timeout=TIMEOUT_S)


@pytest.fixture
async def addresses(tmp_path: Path) -> AsyncIterator[tuple[str, str]]:
    """Where a coordinator and the hostd of h1 are."""
    async with running(tmp_path) as cluster:
        yield _addresses(cluster)


def _addresses(cluster: Cluster) -> tuple[str, str]:
    return cluster.local.coordinators["c1"].address, cluster.local.hosts["h1"].address


def ours(*names: str) -> list[str]:
    return sorted([*(f"vfleet.v1.{name}Service" for name in names), HEALTH, "grpc.reflection.v1alpha.ServerReflection"])


async def test_both_daemons_say_what_they_serve_and_that_they_are_well(addresses: tuple[str, str]) -> None:
    def look(address: str, expected: list[str]) -> None:
        with closing(Stranger(address)) as stranger:
            assert stranger.services() == expected
            for service in ("", *expected):
                status = stranger.call(HEALTH, "Check", service=service).status
                assert status == 1, service  # SERVING

    coordinator, host = addresses
    await asyncio.to_thread(look, coordinator, ours("Fleet", "Migration"))
    await asyncio.to_thread(look, host, ours("Driver", "Fabric", "Function", "Hold", "Transfer", "Translation"))


async def test_a_migration_through_reflection_alone(addresses: tuple[str, str]) -> None:
    await asyncio.to_thread(_migrate, *addresses)


def _migrate(coordinator: str, host: str) -> None:
    fleet, migration = "vfleet.v1.FleetService", "vfleet.v1.MigrationService"
    with closing(Stranger(coordinator)) as stranger, closing(Stranger(host)) as driver:
        made = stranger.call(fleet, "CreateFunction", function="vf1", device="h1/nic0").function
        entry = stranger.call(fleet, "AttachDriver", function="vf1", driver="d1", host="h1").entry
        memory = entry.virtual_address + made.bars[1].size_bytes  # BAR 2 at its natural alignment
        access = {"driver": "d1", "virtual_address": memory}
        driver.call("vfleet.v1.DriverService", "Write", **access, data=b"a letter")
        moves = [{"function": "vf1", "target_device": "h2/nic0"}]
        begun = stranger.call(migration, "CreateMigration", request_id="m1", moves=moves).migration
        assert begun.name == "m1"
        *_, last = stranger.stream(migration, "WatchMigration", name="m1")
        phases = last.migration.DESCRIPTOR.fields_by_name["phase"].enum_type.values_by_number
        assert phases[last.migration.phase].name == "PHASE_DONE"
        (moved,) = stranger.call(fleet, "ListFunctions").functions
        assert (moved.device, moved.generation) == ("h2/nic0", 2)
        assert driver.call("vfleet.v1.DriverService", "Read", **access, length_bytes=8).data == b"a letter"
        (table,) = driver.call("vfleet.v1.TranslationService", "GetTable", driver="d1").entries
        assert table.virtual_address == entry.virtual_address
        assert table.offset == (moved.base - table.virtual_address) % 2**64 != entry.offset
        with pytest.raises(grpc.RpcError) as refused:
            stranger.call(migration, "CreateMigration", moves=moves)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "vf1" in refused.value.details()
