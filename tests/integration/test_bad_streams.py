"""A message that can't be decoded, to each streaming method of both daemons: one clear error ends that call alone."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from support.certs import make_certs
from support.local_cluster import Cluster, running

from coordinator.daemon import SERVICE_NAMES as COORDINATORS
from hostd.service import SERVICE_NAMES as HOSTDS
from vfleet.errors import Reason, VfleetError, from_rpc_error
from vfleet.principal import server_name
from vfleet.roles import ROLES, Role
from vfleet.rpc import Channels
from vfleet.tls import Tls
from vfleet.v1.access_pb2 import ACCESS_STATUS_OK, AccessKind
from vfleet.v1.driver_service_pb2 import StreamAccessesRequest, StreamAccessesResponse

BAD = b"\xff\xff\xff\xff"
FOLDERS = {
    Role.OPERATOR: "operator-local",
    Role.VIEWER: "viewer-local",
    Role.COORDINATOR: "coordinator-c1",
    Role.HOST: "host-h2",
}
POOL = health_pb2.DESCRIPTOR.pool
SHARED = [each.full_name for file in (health_pb2, reflection_pb2) for each in file.DESCRIPTOR.services_by_name.values()]


def streaming(services: tuple[str, ...]) -> dict[str, MethodDescriptor]:
    """Return the streaming methods of services, by path."""
    return {
        f"/{name}/{method.name}": method
        for name in (*services, *SHARED)
        for method in POOL.FindServiceByName(name).methods
        if method.server_streaming or method.client_streaming
    }


async def until_end(call: grpc.aio.Call) -> None:
    """Wait until a call ends, which answers nothing more."""
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


class Clients:
    """Whoever may call a method, at each daemon. Each has one connection there, for all that it asks."""

    def __init__(self, cluster: Cluster, certs: Path | None) -> None:
        self._certs = certs
        self._channels: dict[Role, Channels] = {}
        self._addresses = {
            Role.COORDINATOR: (cluster.local.coordinator_addresses[0], server_name(Role.COORDINATOR)),
            Role.HOST: (cluster.local.hosts["h1"].address, server_name(Role.HOST, "h1")),
        }

    def channel(self, daemon: Role, path: str) -> grpc.aio.Channel:
        """Return the connection of a client that may call this to the coordinator, or to h1."""
        client = Role.OPERATOR if Role.OPERATOR in ROLES[path] else sorted(ROLES[path])[0]
        if client not in self._channels:
            self._channels[client] = Channels(tls=Tls(self._certs / FOLDERS[client]) if self._certs else None)
        return self._channels[client].to(*self._addresses[daemon])

    async def close(self) -> None:
        for channels in self._channels.values():
            await channels.close()

    async def refusal(self, daemon: Role, path: str, method: MethodDescriptor) -> VfleetError:
        """Return how a request is refused that is none."""
        channel = self.channel(daemon, path)
        assert method.server_streaming
        kind = channel.stream_stream if method.client_streaming else channel.unary_stream
        call = kind(path, request_serializer=None, response_deserializer=None)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await until_end(call(iter([BAD]) if method.client_streaming else BAD, timeout=20))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, path
        return from_rpc_error(caught.value, "")


@pytest.fixture(params=["plaintext", "secured"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Cluster, Clients]]:
    certs = make_certs(tmp_path / "certs") if request.param == "secured" else None
    async with running(tmp_path, certs=certs) as cluster:
        clients = Clients(cluster, certs)
        yield cluster, clients
        await clients.close()


class Accesses:
    """A stream of a driver's accesses, over the connection of those who may have one."""

    def __init__(self, clients: Clients, virtual_address: int) -> None:
        path = "/vfleet.v1.DriverService/StreamAccesses"
        method = clients.channel(Role.HOST, path).stream_stream(path, None, None)
        self._virtual_address = virtual_address
        self._count = 0
        self.call = method(timeout=60)

    async def write(self) -> None:
        """Write something, and see it done."""
        self._count += 1
        request = StreamAccessesRequest(
            driver="d1",
            tag=self._count,
            kind=AccessKind.ACCESS_KIND_WRITE,
            virtual_address=self._virtual_address,
            data=self._count.to_bytes(8, "little"),
        )
        await self.call.write(request.SerializeToString())
        answer = await self.call.read()
        assert answer is not grpc.aio.EOF, await self.call.details()
        response = StreamAccessesResponse.FromString(answer)
        assert (response.tag, response.status) == (self._count, ACCESS_STATUS_OK)


async def test_what_can_not_be_decoded_ends_its_own_call_alone(world: tuple[Cluster, Clients]):
    cluster, clients = world
    await cluster.fleet.create_function("vf1", "h1/nic0")
    entry = await cluster.fleet.attach_driver("vf1", "d1", host="h1")
    kept = Accesses(clients, entry.virtual_address)
    await kept.write()
    async with aclosing(cluster.fleet.watch_events()) as events:
        await anext(events)
        for daemon, services in ((Role.COORDINATOR, COORDINATORS), (Role.HOST, HOSTDS)):
            methods = streaming(services)
            assert len(methods) > len(streaming(()))
            for path, method in methods.items():
                error = await clients.refusal(daemon, path, method)
                assert error.reason is Reason.INVALID_FIELD, path
                assert error.message.startswith("the request can't be decoded: "), path
                assert "\n" not in error.message, path
                await kept.write()
        # Also in the middle of a stream that was well until then.
        other = Accesses(clients, entry.virtual_address)
        await other.write()
        await other.call.write(BAD)
        with pytest.raises(grpc.aio.AioRpcError, match="the request can't be decoded") as caught:
            await until_end(other.call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await kept.write()
        await cluster.fleet.create_function("vf2", "h2/nic0")
        async for event in events:
            if event.name == "vf2":
                break
    kept.call.cancel()
    for daemon in cluster.local.daemons:
        assert "Traceback" not in daemon.log.read_text()
