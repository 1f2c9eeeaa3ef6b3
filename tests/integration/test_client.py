"""The clients, over real gRPC: failover, what is sent again and what is not, and a driver's accesses."""
# ruff: noqa: N802  # servicers have the methods of the protos

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest

from vfleet import rpc
from vfleet.client import FleetClient, move_request
from vfleet.driver import DriverClient, Read, Write
from vfleet.errors import Reason, VfleetError, not_found
from vfleet.host_client import HostClient
from vfleet.rpc import Server
from vfleet.v1 import driver_service_pb2 as driver_pb2
from vfleet.v1 import fleet_service_pb2 as fleet_pb2
from vfleet.v1 import migration_service_pb2 as migration_pb2
from vfleet.v1.access_pb2 import AccessStatus
from vfleet.v1.driver_service_pb2_grpc import DriverServiceServicer, add_DriverServiceServicer_to_server
from vfleet.v1.fleet_service_pb2_grpc import FleetServiceServicer, add_FleetServiceServicer_to_server
from vfleet.v1.migration_service_pb2_grpc import MigrationServiceServicer, add_MigrationServiceServicer_to_server
from vfleet.v1.records_pb2 import Function, Migration, Phase
from vfleet.v1.types_pb2 import TableEntry

NOBODY = "127.0.0.1:1"
VIRTUAL_ADDRESS = 0x1000_0000
MEMORY_ADDRESS = 0x2000_0000


@dataclass
class FakeFleet(FleetServiceServicer, MigrationServiceServicer):
    """A coordinator that loses its first `silences` answers, after it has acted."""

    silences: int = 0
    refusals: int = 0  # for the time being, because it is called too often
    requests: list[object] = field(default_factory=list)
    has_lost_etcd: bool = False
    go_on: asyncio.Event | None = None  # what it waits for before it answers

    async def act(self, request: object, context: grpc.aio.ServicerContext) -> None:
        if self.refusals:
            self.refusals -= 1
            raise VfleetError(Reason.LIMIT_EXCEEDED, "too many calls", retry_after_s=0.01)
        self.requests.append(request)
        if self.has_lost_etcd:
            raise VfleetError(Reason.STORE_UNAVAILABLE, "etcd does not answer")
        if self.go_on is not None:
            await self.go_on.wait()
        if self.silences:
            self.silences -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")

    async def CreateFunction(self, request, context):
        await self.act(request, context)
        return fleet_pb2.FleetServiceCreateFunctionResponse(function=Function(name=request.function))

    async def DeleteFunction(self, request, context):
        await self.act(request, context)
        return fleet_pb2.DeleteFunctionResponse()

    async def ListFunctions(self, request, context):
        raise VfleetError(Reason.UNREACHABLE, "no answer from 10.0.0.1:5", metadata={"address": "10.0.0.1:5"})

    async def CreateMigration(self, request, context):
        await self.act(request, context)
        return migration_pb2.CreateMigrationResponse(migration=Migration(name=request.request_id))

    async def WatchEvents(self, request, context):
        for revision in range(request.after_revision + 1, 5):
            yield fleet_pb2.WatchEventsResponse(events=[fleet_pb2.FleetEvent(revision=revision)])
            if revision == 2:
                await self.act(request, context)

    async def WatchMigration(self, request, context):
        yield migration_pb2.WatchMigrationResponse(migration=Migration(phase=Phase.PHASE_PREPARING))
        await self.act(request, context)
        yield migration_pb2.WatchMigrationResponse(migration=Migration(phase=Phase.PHASE_DONE))


@dataclass
class FakeHost(DriverServiceServicer):
    """A host with one driver, which does an access once whatever is lost; loses its first `silences` answers."""

    silences: int = 0
    refuse: VfleetError | None = None
    memory: dict[int, bytes] = field(default_factory=dict)
    last_sequence: int = 5
    done: list[int] = field(default_factory=list)
    acknowledged: list[str] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    async def access(self, request, data: bytes, context) -> bytes:
        if self.refuse is not None:
            refuse, self.refuse = self.refuse, None
            raise refuse
        if request.sequence > self.last_sequence + 1:
            raise VfleetError(Reason.SEQUENCE_GAP, f"got {request.sequence} after {self.last_sequence}")
        if request.sequence in (0, self.last_sequence + 1):
            self.last_sequence = max(self.last_sequence, request.sequence)
            self.done.append(request.sequence)
            if data:
                self.memory[request.virtual_address] = data
        if self.silences:
            self.silences -= 1
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection broke")
        return self.memory.get(request.virtual_address, b"\xff")

    async def GetDriver(self, request, context):
        if request.driver != "d1":
            raise not_found("driver", request.driver)
        entries = [
            TableEntry(function="vf1", virtual_address=VIRTUAL_ADDRESS, length_bytes=4096, generation=1),
            TableEntry(virtual_address=MEMORY_ADDRESS, length_bytes=4096),
        ]
        state = driver_pb2.DriverState(driver="d1", entries=entries, last_sequences={"vf1": self.last_sequence})
        return driver_pb2.GetDriverResponse(state=state)

    async def Read(self, request, context):
        return driver_pb2.ReadResponse(data=await self.access(request, b"", context), sequence=request.sequence)

    async def Write(self, request, context):
        await self.access(request, request.data, context)
        return driver_pb2.WriteResponse(sequence=request.sequence)

    async def AccessMany(self, request, context):
        self.batches.append(len(request.accesses))
        answers = []
        for access in request.accesses:
            data = await self.access(access, access.data, context)
            answers.append(driver_pb2.BatchedAnswer(data=data, sequence=access.sequence))
        return driver_pb2.AccessManyResponse(answers=answers)

    async def StreamAccesses(self, requests, context):
        async for request in requests:
            data = await self.access(request, request.data, context)
            yield driver_pb2.StreamAccessesResponse(
                tag=request.tag, data=data, sequence=request.sequence, status=AccessStatus.ACCESS_STATUS_OK
            )

    async def WatchNotifications(self, request, context):
        for kind in (driver_pb2.NOTIFICATION_KIND_LISTENING, driver_pb2.NOTIFICATION_KIND_HELD):
            yield driver_pb2.WatchNotificationsResponse(kind=kind, function="vf1")
        while not self.acknowledged:
            await asyncio.sleep(0.001)
        yield driver_pb2.WatchNotificationsResponse(kind=driver_pb2.NOTIFICATION_KIND_LIFTED, function="vf1")

    async def AcknowledgeHold(self, request, context):
        self.acknowledged.append(request.function)
        return driver_pb2.AcknowledgeHoldResponse()


Serve = Callable[[FakeFleet | FakeHost], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    """Start a server for a fake and return its address."""
    servers = []

    async def start(fake: FakeFleet | FakeHost) -> str:
        server = Server([])
        if isinstance(fake, FakeFleet):
            add_FleetServiceServicer_to_server(fake, server.grpc)
            add_MigrationServiceServicer_to_server(fake, server.grpc)
        else:
            add_DriverServiceServicer_to_server(fake, server.grpc)
        port = server.listen("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        await server.stop(0)


async def test_the_next_coordinator_is_asked_when_one_is_down(serve: Serve) -> None:
    fake = FakeFleet()
    async with FleetClient([NOBODY, await serve(fake)], patience_s=0) as fleet:
        assert (await fleet.create_function("vf1", "h1/nic0")).name == "vf1"
        await fleet.delete_function("vf1")
    assert len(fake.requests) == 2


async def test_the_next_coordinator_is_asked_when_one_has_lost_etcd(serve: Serve) -> None:
    lost, other = FakeFleet(has_lost_etcd=True), FakeFleet()
    async with FleetClient([await serve(lost), await serve(other)]) as fleet:
        for name in ("vf1", "vf2"):
            assert (await fleet.create_function(name, "h1/nic0")).name == name
    assert (len(lost.requests), len(other.requests)) == (1, 2)


@pytest.mark.parametrize("is_other_there", [True, False])
async def test_that_etcd_is_lost_to_all_is_an_answer(serve: Serve, *, is_other_there: bool) -> None:
    other = await serve(FakeFleet(has_lost_etcd=True)) if is_other_there else NOBODY
    async with FleetClient([await serve(FakeFleet(has_lost_etcd=True)), other]) as fleet:
        with pytest.raises(VfleetError, match=r"^etcd does not answer$") as caught:
            await fleet.create_function("vf1", "h1/nic0")
    assert caught.value.reason is Reason.STORE_UNAVAILABLE


async def test_what_can_not_be_repeated_is_not_asked_of_another_that_may_have_etcd(serve: Serve) -> None:
    lost, other = FakeFleet(has_lost_etcd=True), FakeFleet()
    async with FleetClient([await serve(lost), await serve(other)]) as fleet:
        with pytest.raises(VfleetError, match="etcd does not answer"):
            await fleet.delete_function("vf1")
    assert other.requests == []


async def test_who_calls_too_often_comes_again_when_told_whatever_the_call(serve: Serve) -> None:
    fake = FakeFleet(refusals=2)
    async with FleetClient([await serve(fake)]) as fleet:
        await fleet.delete_function("vf1")
        assert (fake.refusals, len(fake.requests)) == (0, 1)
    fake.refusals = 1000
    async with FleetClient([await serve(fake)], patience_s=0) as fleet:
        with pytest.raises(VfleetError, match="too many calls") as refused:
            await fleet.create_function("vf1", "h1/nic0")
    assert refused.value.reason is Reason.LIMIT_EXCEEDED
    assert refused.value.retry_after_s == pytest.approx(0.01)


async def test_a_coordinator_that_is_slow_is_waited_for(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfleet.caller.PROBE_AFTER_S", 0.01)
    slow, other, probed = FakeFleet(go_on=asyncio.Event()), FakeFleet(), 0
    call = rpc.call

    async def counted(method, request, **more):
        nonlocal probed
        response = await call(method, request, **more)
        if isinstance(request, HealthCheckRequest):
            probed += 1
            if probed == 3:
                slow.go_on.set()
        return response

    monkeypatch.setattr(rpc, "call", counted)
    async with FleetClient([await serve(slow), await serve(other)]) as fleet:
        assert (await fleet.create_function("vf1", "h1/nic0")).name == "vf1"
        slow.go_on.clear()
        probed = 0
        phases = [update.migration.phase async for update in fleet.watch_migration("m-1")]
    assert phases == [Phase.PHASE_PREPARING, Phase.PHASE_DONE]
    assert (len(slow.requests), other.requests) == (2, [])


@pytest.fixture
def freeze(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Let the one coordinator at an address answer no health checks from now on."""
    frozen, call = "", rpc.call

    async def answered(method, request, *, address: str, **more):
        if isinstance(request, HealthCheckRequest) and address == frozen:
            raise VfleetError(Reason.UNREACHABLE, "no answer in time", metadata={"address": address})
        return await call(method, request, address=address, **more)

    def freeze(address: str) -> None:
        nonlocal frozen
        frozen = address

    monkeypatch.setattr("vfleet.caller.PROBE_AFTER_S", 0.01)
    monkeypatch.setattr(rpc, "call", answered)
    return freeze


async def test_a_frozen_coordinator_is_left_by_calls_and_watches(serve: Serve, freeze: Callable[[str], None]) -> None:
    frozen, other = FakeFleet(go_on=asyncio.Event()), FakeFleet()
    addresses = [await serve(frozen), await serve(other)]
    async with FleetClient(addresses) as fleet:
        freeze(addresses[0])
        assert (await fleet.create_function("vf1", "h1/nic0")).name == "vf1"
        assert fleet.caller.address == addresses[1]
        frozen.go_on.set()
        other.go_on = asyncio.Event()
        freeze(addresses[1])
        phases = [update.migration.phase async for update in fleet.watch_migration("m-1")]
        assert fleet.caller.address == addresses[0]
    assert phases[-2:] == [Phase.PHASE_PREPARING, Phase.PHASE_DONE]


async def test_what_can_not_be_repeated_waits_for_a_frozen_coordinator(
    serve: Serve, freeze: Callable[[str], None]
) -> None:
    frozen, other = FakeFleet(go_on=asyncio.Event()), FakeFleet()
    addresses = [await serve(frozen), await serve(other)]
    async with FleetClient(addresses) as fleet:
        freeze(addresses[0])
        deleting = asyncio.create_task(fleet.delete_function("vf1"))
        while not frozen.requests:
            await asyncio.sleep(0.01)
        frozen.go_on.set()
        await deleting
    assert (len(frozen.requests), other.requests) == (1, [])


async def test_what_can_be_repeated_is_sent_again(serve: Serve) -> None:
    fake = FakeFleet(silences=2)
    async with FleetClient([await serve(fake)]) as fleet:
        migration = await fleet.create_migration([move_request("vf1", "h2/nic0")])
    assert [request.request_id for request in fake.requests] == [migration.name] * 3


async def test_what_can_not_be_repeated_is_sent_once(serve: Serve) -> None:
    fake = FakeFleet(silences=1)
    async with FleetClient([await serve(fake)]) as fleet:
        with pytest.raises(VfleetError, match="may or may not have been done") as caught:
            await fleet.delete_function("vf1")
    assert caught.value.reason is Reason.UNREACHABLE
    assert len(fake.requests) == 1


@pytest.mark.parametrize("repeatable", [True, False])
async def test_nobody_there_names_all_addresses_and_the_time(*, repeatable: bool) -> None:
    async with FleetClient([NOBODY, "127.0.0.1:2"], patience_s=0.1) as fleet:
        with pytest.raises(VfleetError, match=r"at 127.0.0.1:1, 127.0.0.1:2, tried for 0\.\d s") as caught:
            await (fleet.list_hosts() if repeatable else fleet.delete_driver("d1"))
    assert caught.value.reason is Reason.UNREACHABLE


async def test_that_another_daemon_is_out_of_reach_is_an_answer(serve: Serve) -> None:
    async with FleetClient([await serve(FakeFleet())]) as fleet:
        with pytest.raises(VfleetError, match=r"^no answer from 10\.0\.0\.1:5$"):
            await fleet.list_functions()


async def test_a_watch_goes_on_when_its_stream_breaks(serve: Serve) -> None:
    fake = FakeFleet(silences=1)
    async with FleetClient([await serve(fake)]) as fleet:
        phases = [update.migration.phase async for update in fleet.watch_migration("m-1")]
    assert phases == [Phase.PHASE_PREPARING, Phase.PHASE_PREPARING, Phase.PHASE_DONE]


async def test_events_are_told_once_though_their_stream_breaks(serve: Serve) -> None:
    broken, other = FakeFleet(silences=1), FakeFleet()
    async with FleetClient([await serve(broken), await serve(other)]) as fleet:
        assert [event.revision async for event in fleet.watch_events()] == [1, 2, 3, 4]
    assert len(broken.requests) == 1


@pytest.mark.parametrize("addresses", [[], [""], ["h1"], ["h1:"], [":1"], ["h1:65536"], ["h1:1", "h2"], ["h\xe9:1"]])
def test_addresses_that_are_none_are_refused(addresses: list[str]) -> None:
    with pytest.raises(VfleetError) as caught:
        FleetClient(addresses)
    assert caught.value.reason is Reason.INVALID_FIELD


async def test_a_driver_reads_what_it_wrote(serve: Serve) -> None:
    fake = FakeHost()
    async with HostClient(await serve(fake)) as host:
        driver = DriverClient(host, "d1")
        await driver.write(VIRTUAL_ADDRESS, b"abcd")
        assert await driver.read(VIRTUAL_ADDRESS, 4) == b"abcd"
    assert fake.done == [6, 7]


async def test_an_access_whose_answer_is_lost_is_done_once(serve: Serve) -> None:
    fake = FakeHost(silences=2)
    async with HostClient(await serve(fake)) as host:
        await DriverClient(host, "d1").write(VIRTUAL_ADDRESS, b"abcd")
    assert fake.done == [6]


async def test_main_memory_has_no_sequence(serve: Serve) -> None:
    fake = FakeHost()
    async with HostClient(await serve(fake)) as host:
        await DriverClient(host, "d1").write(MEMORY_ADDRESS, b"abcd")
    assert fake.done == [0]


async def test_a_refused_access_leaves_no_gap(serve: Serve) -> None:
    fake = FakeHost(refuse=VfleetError(Reason.HOLD_TIMEOUT, "held for too long"))
    async with HostClient(await serve(fake)) as host:
        driver = DriverClient(host, "d1")
        with pytest.raises(VfleetError, match="held for too long"):
            await driver.write(VIRTUAL_ADDRESS, b"abcd")
        await driver.write(VIRTUAL_ADDRESS, b"abcd")
    assert fake.done == [6]


async def test_accesses_at_once_keep_their_order(serve: Serve) -> None:
    fake = FakeHost()
    async with HostClient(await serve(fake)) as host:
        driver = DriverClient(host, "d1")
        await asyncio.gather(*(driver.write(VIRTUAL_ADDRESS, bytes([n])) for n in range(20)))
    assert fake.done == list(range(6, 26))
    assert fake.memory[VIRTUAL_ADDRESS] == bytes([19])


async def test_a_stream_that_breaks_does_each_access_once(serve: Serve) -> None:
    fake = FakeHost(silences=3)
    accesses = [Write(VIRTUAL_ADDRESS + n, bytes([n])) for n in range(200)] + [Read(VIRTUAL_ADDRESS + 7, 1)]
    async with HostClient(await serve(fake)) as host:
        answers = [answer async for answer in DriverClient(host, "d1").stream(accesses)]
    assert [answer.tag for answer in answers] == list(range(201))
    assert fake.done == list(range(6, 207))
    assert answers[-1].data == b"\x07"


async def test_a_batch_whose_answers_are_lost_does_each_access_once(serve: Serve) -> None:
    fake = FakeHost(silences=3)
    accesses = [Write(VIRTUAL_ADDRESS + n, bytes([n])) for n in range(150)] + [Read(VIRTUAL_ADDRESS + 7, 1)]
    async with HostClient(await serve(fake)) as host:
        driver = DriverClient(host, "d1")
        answers = await driver.access_many(accesses)
        assert await driver.access_many([]) == []
    assert len(answers) == 151
    assert answers[-1] == b"\x07"
    assert fake.done == list(range(6, 157))
    assert max(fake.batches) == 64


async def test_a_batch_ends_with_the_refusal(serve: Serve) -> None:
    fake = FakeHost(refuse=VfleetError(Reason.TRANSLATION_FAULT, "nothing is mapped at 0x30000000"))
    async with HostClient(await serve(fake)) as host:
        with pytest.raises(VfleetError, match="nothing is mapped"):
            await DriverClient(host, "d1").access_many([Read(0x3000_0000, 4)])


async def test_a_stream_that_is_left_early_leaves_no_gap(serve: Serve) -> None:
    fake = FakeHost()
    async with HostClient(await serve(fake)) as host:
        driver = DriverClient(host, "d1")
        async with aclosing(driver.stream([Read(VIRTUAL_ADDRESS, 1)] * 10)) as answers:
            await anext(answers)
        await driver.read(VIRTUAL_ADDRESS, 1)
    assert fake.done == list(range(6, 6 + len(fake.done)))


async def test_a_stream_ends_with_the_refusal(serve: Serve) -> None:
    fake = FakeHost(refuse=VfleetError(Reason.TRANSLATION_FAULT, "nothing is mapped at 0x30000000"))
    async with HostClient(await serve(fake)) as host:
        with pytest.raises(VfleetError, match="nothing is mapped"):
            _ = [answer async for answer in DriverClient(host, "d1").stream([Read(0x3000_0000, 4)])]


async def test_a_hold_is_acknowledged_when_the_driver_has_dealt_with_it(serve: Serve) -> None:
    fake = FakeHost()
    kinds = []
    async with HostClient(await serve(fake)) as host:
        async for notification in DriverClient(host, "d1").notifications():
            kinds.append(driver_pb2.NotificationKind.Name(notification.kind).rpartition("_")[2])
            assert bool(fake.acknowledged) == (kinds[-1] == "LIFTED")
    assert kinds == ["LISTENING", "HELD", "LIFTED"]


@pytest.mark.parametrize(("virtual_address", "length"), [(0, 0), (0, 3), (2, 4), (0, 8192), (0, -1)])
def test_an_access_that_can_not_be_is_refused(virtual_address: int, length: int) -> None:
    with pytest.raises(VfleetError) as caught:
        Read(virtual_address, length)
    assert caught.value.reason is Reason.INVALID_FIELD
