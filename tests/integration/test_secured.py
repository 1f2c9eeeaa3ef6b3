"""A cluster whose every connection is secured: it does all that one in plaintext does, and speaks no older TLS."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from random import Random

import grpc
import pytest
from google.protobuf.message import Message
from support.certs import LOOPBACK, make_certs
from support.failpoints import Failpoints, go_on
from support.local_cluster import Cluster, running

from vfleet.certificates import issue, make_ca
from vfleet.cli.main import run
from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError, from_rpc_error
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.server import EtcdServer
from vfleet.local import Daemon
from vfleet.principal import server_name
from vfleet.roles import Role
from vfleet.rpc import Channels
from vfleet.tls import Tls
from vfleet.v1.access_pb2 import Access, AccessKind, Session
from vfleet.v1.fabric_service_pb2 import (
    REFUSAL_NOT_SERVING,
    ExchangeDmaRequest,
    ExchangeRequest,
    ForgetDriverRequest,
    GetSequenceRequest,
)
from vfleet.v1.fabric_service_pb2_grpc import FabricServiceStub
from vfleet.v1.records_pb2 import Phase
from vfleet.v1.transfer_service_pb2 import CopyOptions, ExportStateRequest, FetchStateRequest
from vfleet.v1.transfer_service_pb2_grpc import TransferServiceStub
from vfleet.v1.types_pb2 import Attempt, TransferMode

MODES = (TransferMode.TRANSFER_MODE_PRE_COPY, TransferMode.TRANSFER_MODE_POST_COPY)
SHOW = Path(__file__).parents[2] / "vfleet" / "topologies" / "show.yaml"


@pytest.fixture
def certs(tmp_path: Path) -> Path:
    return make_certs(tmp_path / "certs")


@pytest.fixture
def failpoints(tmp_path: Path) -> Failpoints:
    return Failpoints(tmp_path / "failpoints")


@pytest.fixture
async def cluster(tmp_path: Path, certs: Path, failpoints: Failpoints) -> AsyncIterator[Cluster]:
    async with running(tmp_path, topology=SHOW, certs=certs, failpoints=failpoints.directory) as cluster:
        yield cluster


async def test_a_function_with_memory_moves_in_both_modes_under_load(cluster: Cluster) -> None:
    await cluster.fleet.create_function("vf1", "h1/mem0")
    await cluster.work("d1", "vf1", "h1", memory_bytes=1 << 20)
    for number, (device, mode) in enumerate(zip(("h2/mem0", "h3/mem0"), MODES, strict=True)):
        migration = await cluster.move(f"m{number}", {"vf1": device}, mode=mode)
        assert migration.phase == Phase.PHASE_DONE, migration.abort_reason
        await cluster.until_working()
    await cluster.stop_workloads()
    assert not (await cluster.fleet.check_fleet()).differences


async def test_the_command_shows_a_certificate_and_is_let_do_what_its_role_may(
    cluster: Cluster,
    certs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def vfleet(*arguments: str) -> tuple[int, str, str]:
        code = await asyncio.to_thread(run, arguments)
        return code, *capsys.readouterr()

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    at = ("--coordinator", ",".join(cluster.local.coordinator_addresses))
    operator, viewer = (str(certs / f"{role}-local") for role in ("operator", "viewer"))
    code, out, err = await vfleet("--tls", operator, "create", "function", "vf1", "--on", "h1/nic0", *at)
    assert code == 0, err
    code, out, err = await vfleet("--tls", viewer, "get", "functions", "-o", "json", *at)
    assert (code, [function["name"] for function in json.loads(out)["functions"]]) == (0, ["vf1"]), err
    code, _, err = await vfleet("--tls", viewer, "delete", "function", "vf1", *at)
    assert (code, err.count("\n")) == (1, 1)
    assert "is for operator; the certificate is that of viewer 'local'" in err
    code, _, err = await vfleet("get", "functions", *at)
    assert (code, err.count("\n")) == (2, 1)
    assert "--tls DIR" in err
    assert "--insecure" in err
    # By a context, to etcd, which takes daemons alone; and by another, to the coordinator and the host of a driver.
    (tmp_path / "vfleet").mkdir()
    by_etcd = {"etcd": cluster.local.etcd[0], "tls": operator, "etcd-tls": str(certs / "coordinator-c1")}
    contexts = {"by-etcd": by_etcd, "lab": {"coordinator": at[1], "tls": operator}}
    (tmp_path / "vfleet" / "config.yaml").write_text(json.dumps({"contexts": contexts}))
    assert (await vfleet("--context", "by-etcd", "get", "hosts"))[0] == 0
    for command in ("attach vf1 --driver d1 --host h2", "workload start d1 vf1", "workload stop d1 vf1"):
        code, _, err = await vfleet("--context", "lab", *command.split())
        assert code == 0, err


async def test_no_daemon_speaks_an_older_tls(cluster: Cluster, certs: Path) -> None:
    own = certs / "operator-local"
    for address in [*cluster.local.coordinator_addresses, cluster.local.hosts["h1"].address]:
        for version, expected in (("-tls1_3", True), ("-tls1_2", False)):
            process = await asyncio.create_subprocess_exec(
                *("openssl", "s_client", version, "-alpn", "h2", "-connect", address, "-brief", "-verify_return_error"),
                *("-CAfile", str(own / "ca.crt"), "-cert", str(own / "tls.crt"), "-key", str(own / "tls.key")),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            output, _ = await process.communicate()
            assert (b"CONNECTION ESTABLISHED" in output) is expected, output.decode(errors="replace")


async def test_etcd_takes_daemons_and_nobody_else(tmp_path: Path, certs: Path) -> None:
    make_ca(tmp_path / "other")
    issue(tmp_path / "other", tmp_path / "other" / "host-h1", "host", "h1")
    clock, random = SystemClock(), Random()
    async with EtcdServer(tmp_path / "etcd", clock, random, certs=certs / "etcd-local") as etcd:
        for right in ("host-h1", "coordinator-c1"):
            async with await EtcdStore.connect([etcd.endpoint], clock, random, tls=Tls(certs / right)) as store:
                assert await store.get("/a") is None
        wrong = [None, Tls(certs / "viewer-local"), Tls(certs / "operator-local"), Tls(tmp_path / "other" / "host-h1")]
        for tls in wrong:
            with pytest.raises(VfleetError) as refused:
                await EtcdStore.connect([etcd.endpoint], clock, random, timeout_s=0.5, tls=tls)
            assert refused.value.reason is Reason.STORE_UNAVAILABLE


@pytest.mark.parametrize(
    ("arguments", "folder", "words"),
    [
        (
            ("coordinator", "--name", "c1"),
            "host-h1",
            "tls.crt can't be used: it is for host 'h1', not a coordinator",
        ),
        (("hostd", "--host", "h1"), "host-h2", "tls.crt can't be used: it is for host 'h2', not for host 'h1'"),
        (("hostd", "--host", "h1"), "viewer-local", "it is for viewer 'local', not for host 'h1'"),
        (("hostd", "--host", "h1"), "nowhere", "ca.crt can't be used: No such file or directory"),
    ],
)
async def test_a_daemon_with_the_certificate_of_another_ends_with_one_line_and_may_be_started_again(
    tmp_path: Path, certs: Path, arguments: tuple[str, ...], folder: str, words: str
) -> None:
    module, *own = arguments
    if module == "hostd":
        own += ["--topology", str(SHOW), "--data-dir", str(tmp_path / "data")]
    own += ["--tls", str(certs / folder), "--etcd", f"{LOOPBACK[0]}:1"]
    with pytest.raises(VfleetError) as refused:
        await Daemon(module, module, own, log=tmp_path / "log", random=Random()).start()
    assert refused.value.reason is Reason.UNREACHABLE
    assert "exit code 1" in refused.value.message
    assert words in refused.value.message
    assert (tmp_path / "log").read_text().count("\n") == 1


async def test_a_host_speaks_for_its_own_drivers_functions_and_migrations_alone(
    cluster: Cluster, certs: Path, failpoints: Failpoints
) -> None:
    function = await cluster.fleet.create_function("vf1", "h2/mem0")
    entry = await cluster.work("d1", "vf1", "h1", memory_bytes=1 << 20)
    session = Session(fleet_generation=1, revision=1 << 40, start=1)
    named = {"driver": "d1", "function": "vf1", "generation": 1}
    write = Access(
        sequence=1, kind=AccessKind.ACCESS_KIND_WRITE, address=function.base, length_bytes=8, data=b"mischief"
    )
    attempt = Attempt(fleet_generation=1, revision=entry.revision)
    h3, h1 = (Impostor(cluster, Tls(certs / f"host-{name}")) for name in ("h3", "h1"))
    async with aclosing(h3), aclosing(h1):
        # Who isn't the driver's host, nor the function's home.
        for stub, method, request, host in (
            (FabricServiceStub, "Exchange", ExchangeRequest(**named, session=session, accesses=[write]), "h2"),
            (FabricServiceStub, "GetSequence", GetSequenceRequest(**named, session=session), "h2"),
            (FabricServiceStub, "ForgetDriver", ForgetDriverRequest(**named, session=session), "h2"),
            (FabricServiceStub, "ExchangeDma", ExchangeDmaRequest(**named), "h1"),
            (
                TransferServiceStub,
                "ExportState",
                ExportStateRequest(function="vf1", generation=1, attempt=attempt),
                "h2",
            ),
            (TransferServiceStub, "FetchState", FetchStateRequest(function="vf1", generation=1, attempt=attempt), "h2"),
        ):
            assert await h3.asks(host, stub, method, request) is Reason.PERMISSION_DENIED, method
        # A driver that nobody has.
        unknown = {**named, "driver": "d9"}
        refused = await h3.asks("h2", FabricServiceStub, "Exchange", ExchangeRequest(**unknown, accesses=[write]))
        assert refused.refusal == REFUSAL_NOT_SERVING
        asked = await h3.asks("h2", FabricServiceStub, "GetSequence", GetSequenceRequest(**unknown, session=session))
        assert asked is Reason.ILLEGAL_STATE
        # Who isn't the target of the migration under way.
        failpoints.arm("c1", "coordinator.import.before", "stop")
        begun = await cluster.begin("m1", {"vf1": "h3/mem0"})
        await failpoints.reached("c1", "coordinator.import.before")
        export = ExportStateRequest(
            function="vf1", generation=1, attempt=begun.attempt, options=CopyOptions(max_rounds=9)
        )
        assert await h1.asks("h2", TransferServiceStub, "ExportState", export) is Reason.PERMISSION_DENIED
        await go_on(cluster.local.coordinators["c1"])
        assert (await cluster.over("m1")).phase == Phase.PHASE_DONE
    await cluster.until_working()
    await cluster.stop_workloads()


class Impostor:
    """Calls hosts with the certificate of another, as that other's hostd would."""

    def __init__(self, cluster: Cluster, tls: Tls) -> None:
        self._cluster = cluster
        self._channels = Channels(tls=tls)

    async def asks(self, host: str, stub: type, method: str, request: Message) -> Message | Reason:
        """Return the first answer of a host, or why it refused."""
        address = self._cluster.local.hosts[host].address
        call = getattr(stub(self._channels.to(address, server_name(Role.HOST, host))), method)
        try:
            answer = call(iter([request]) if method.startswith("Exchange") else request, timeout=10)
            return await (answer.read() if hasattr(answer, "read") else answer)
        except grpc.aio.AioRpcError as error:
            return from_rpc_error(error, address).reason

    async def aclose(self) -> None:
        await self._channels.close()
