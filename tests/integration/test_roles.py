"""Every RPC for every role, and for who has none, has an expired certificate or another CA's: over real connections.

The RPCs are those of the services' own descriptions, so that a new one without a row in the table fails here.
"""

import importlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.empty_pb2 import Empty
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from support.certs import make_certs
from support.manual_clock import ManualClock
from support.role_table import documented, text

import vfleet.v1
from coordinator.daemon import SERVICE_NAMES as COORDINATORS
from hostd.service import SERVICE_NAMES as HOSTDS
from vfleet.certificates import issue, make_ca
from vfleet.errors import Reason, from_rpc_error
from vfleet.principal import server_name
from vfleet.roles import FIELD_RULES, ROLES, Role
from vfleet.rpc import Server
from vfleet.tls import Tls

MODULES = sorted(path.stem for path in Path(vfleet.v1.__file__).parent.glob("*_service_pb2.py"))
FILES = [*(importlib.import_module(f"vfleet.v1.{name}").DESCRIPTOR for name in MODULES), health_pb2.DESCRIPTOR]
SERVICES: list[ServiceDescriptor] = [
    service for file in (*FILES, reflection_pb2.DESCRIPTOR) for service in file.services_by_name.values()
]
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method for service in SERVICES for method in service.methods
}
OWN = [service for service in SERVICES if service.full_name.startswith("vfleet.")]
ALLOWED, DENIED, NOT_CONNECTED, NOT_SENT = "allowed", "denied", "not connected", "request not sent"
CALLS = 10
DAY_S = 86_400
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE
# Health's own methods are the real ones: of no service, and one that gRPC's Python hasn't written.
OUTCOMES = {
    ("/grpc.health.v1.Health/Check", grpc.StatusCode.NOT_FOUND): ALLOWED,
    ("/grpc.health.v1.Health/List", grpc.StatusCode.UNIMPLEMENTED): ALLOWED,
}
STRANGERS = ("etcd", "nobody", "expired", "other")


def test_every_rpc_has_a_row_and_no_row_is_of_anything_else() -> None:
    assert ROLES.keys() == METHODS.keys()
    assert all(ROLES.values())
    for path, rule in FIELD_RULES.items():
        assert rule.field in METHODS[path].input_type.fields_by_name


def test_the_daemons_serve_what_the_table_has() -> None:
    assert sorted([*COORDINATORS, *HOSTDS]) == sorted(service.full_name for service in OWN)


def test_the_documented_table_is_that_of_the_code() -> None:
    assert documented() == text(), "write it anew: PYTHONPATH=.:tests python -m support.role_table"


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    folder = make_certs(tmp_path / "certs")
    issue(folder, folder / "expired", "operator", "late", days=1, clock=ManualClock(time.time() - 2 * DAY_S))
    make_ca(tmp_path / "other")
    issue(tmp_path / "other", folder / "other", "operator", "local")
    return folder


@pytest.fixture
async def address(certs: Path) -> AsyncIterator[str]:
    """A server of all services of both daemons, whose own methods do nothing: what lets callers in is the real one."""
    server = Server([service.full_name for service in OWN], tls=Tls(certs / "host-h1"))
    for service in OWN:
        handlers = {method.name: nothing(method) for method in service.methods}
        server.grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, handlers),))
    port = server.listen("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


def nothing(method: MethodDescriptor) -> grpc.RpcMethodHandler:
    """Return a handler that takes anything and does nothing."""

    async def once(request, context):
        return Empty()

    async def stream(request, context):
        yield Empty()

    if not method.server_streaming:
        assert not method.client_streaming
        return grpc.unary_unary_rpc_method_handler(once, importable(method).FromString, Empty.SerializeToString)
    make = grpc.stream_stream_rpc_method_handler if method.client_streaming else grpc.unary_stream_rpc_method_handler
    return make(stream, importable(method).FromString, Empty.SerializeToString)


def importable(method: MethodDescriptor):
    """Return the class of a method's request."""
    return method.input_type._concrete_class


def credentials(certs: Path, client: str) -> grpc.ChannelCredentials:
    """Return what a client connects with: a role, or one of the strangers."""
    ca = (certs / "host-h1" / "ca.crt").read_bytes()
    if client == "nobody":
        return grpc.ssl_channel_credentials(ca)
    folders = {"host": "host-h2", "coordinator": "coordinator-c1", "other": "other", "expired": "expired"}
    folder = certs / folders.get(client, f"{client}-local")
    return grpc.ssl_channel_credentials(ca, (folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes())


async def outcome(channel: grpc.aio.Channel, path: str, **fields: bool) -> str:
    """Call a method and return what comes of it."""
    # Where a stream is refused before its first request is on its way, gRPC's client may say that it can't send it,
    # and not what the server has said: nothing that the server could help.
    for _ in range(CALLS):
        answer = await outcome_once(channel, path, **fields)
        if answer != NOT_SENT:
            break
    return answer


async def outcome_once(channel: grpc.aio.Channel, path: str, **fields: bool) -> str:
    method = METHODS[path]
    request = importable(method)(**fields)
    kind = ("stream" if method.client_streaming else "unary", "stream" if method.server_streaming else "unary")
    call = getattr(channel, "_".join(kind))(path, importable(method).SerializeToString, bytes)
    try:
        answer = call(iter([request]) if method.client_streaming else request, timeout=20)
        if method.server_streaming:
            await answer.read()
            answer.cancel()
        else:
            await answer
    except grpc.aio.AioRpcError as error:
        if error.code() is grpc.StatusCode.PERMISSION_DENIED:
            return DENIED if from_rpc_error(error, "").reason is Reason.PERMISSION_DENIED else "denied by gRPC"
        if error.code() is grpc.StatusCode.INTERNAL and "SendMessageOperation" in (error.debug_error_string() or ""):
            return NOT_SENT
        return OUTCOMES.get((path, error.code()), NOT_CONNECTED if error.code() is UNAVAILABLE else repr(error))
    return ALLOWED


def expected(client: str) -> dict[str, str]:
    if client in ("nobody", "expired", "other"):
        return dict.fromkeys(METHODS, NOT_CONNECTED)
    if client == "etcd":  # a certificate of this CA, and no role
        return dict.fromkeys(METHODS, DENIED)
    return {path: ALLOWED if Role(client) in ROLES[path] else DENIED for path in METHODS}


@pytest.mark.parametrize("client", [*Role, *STRANGERS])
async def test_every_rpc_is_for_whom_the_table_says(address: str, certs: Path, client: str) -> None:
    options = [("grpc.ssl_target_name_override", server_name(Role.HOST, "h1"))]
    async with grpc.aio.secure_channel(address, credentials(certs, client), options=options) as channel:
        assert {path: await outcome(channel, path) for path in METHODS} == expected(client)
        for path, rule in FIELD_RULES.items():
            found = await outcome(channel, path, **{rule.field: True})
            allowed = client in rule.roles
            assert found == (ALLOWED if allowed else expected(client)[path].replace(ALLOWED, DENIED)), path


@pytest.mark.parametrize("name", [server_name(Role.HOST, "h2"), server_name(Role.COORDINATOR), "127.0.0.1", "h1"])
async def test_a_server_that_is_not_whom_it_should_be_is_asked_nothing(address: str, certs: Path, name: str) -> None:
    options = [("grpc.ssl_target_name_override", name)]
    async with grpc.aio.secure_channel(address, credentials(certs, "operator"), options=options) as channel:
        assert await outcome(channel, "/grpc.health.v1.Health/Check") == NOT_CONNECTED
