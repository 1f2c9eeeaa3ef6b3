"""Those who ask for things: functions and attachments at the start, then migrations, cancels, and a deletion."""

import asyncio
from typing import TYPE_CHECKING, Any

from simulation.vopr import accelerator
from simulation.vopr.drivers import DriverClient, UnnumberedClient

from vfleet.errors import Reason, VfleetError
from vfleet.rpc import Channels, call
from vfleet.v1.fleet_service_pb2 import (
    AttachDriverRequest,
    DeleteFunctionRequest,
    DetachDriverRequest,
    FleetServiceCreateFunctionRequest,
)
from vfleet.v1.fleet_service_pb2_grpc import FleetServiceStub
from vfleet.v1.migration_service_pb2 import (
    CancelMigrationRequest,
    CreateMigrationRequest,
    MigrationOptions,
    MoveRequest,
)
from vfleet.v1.migration_service_pb2_grpc import MigrationServiceStub
from vfleet.v1.records_pb2 import Phase
from vfleet.v1.types_pb2 import TransferMode

if TYPE_CHECKING:
    from simulation.vopr.world import World

DEVICES = ("h1/nic0", "h1/nic1", "h2/nic0", "h3/nic0")
# vf5 has no driver: nothing but etcd, and the hosts' care, keeps it.
FUNCTIONS = {"vf1": "h1/nic0", "vf2": "h1/nic0", "vf3": "h2/nic0", "vf5": "h3/nic0"}
ATTACHMENTS = (
    ("d1", "h1", "vf1"),
    ("d1", "h1", "vf2"),
    ("d2", "h3", "vf2"),
    ("d2", "h3", "vf3"),
    ("d3", "h2", "vf1"),
    ("d5", "h1", "vf3"),
)
UNNUMBERED = {"d3": "vf1", "d5": "vf3"}
GUEST, GUESTS_DRIVER = "vf4", "d4"
MIGRATIONS = 16
_TRY_AGAIN = (Reason.UNREACHABLE, Reason.STORE_UNAVAILABLE, Reason.OUTCOME_UNKNOWN, Reason.CONFLICT)


class Asker:
    """A client of the coordinators: asks any of them until one answers."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._channels = Channels(world.network.connect(world.client))

    async def ask(self, stub: type, method: str, request: Any, *, timeout_s: float = 3.0) -> Any:
        """Return the answer. Raise what is not to be asked again."""
        world, last = self._world, None
        while not world.history.violations:
            address = world.random.choice(("c1:1", "c2:1"))
            try:
                bound = getattr(stub(self._channels.to(address)), method)
                return await call(bound, request, address=address, timeout_s=timeout_s)
            except VfleetError as error:
                last = error
                if error.reason not in _TRY_AGAIN:
                    raise
            await asyncio.sleep(world.random.uniform(0.05, 0.5))
        raise last or VfleetError(Reason.INTERNAL, "the run is over")


async def set_up(world: "World") -> None:
    """Make functions, drivers and attachments, all in peace."""
    asker = Asker(world)
    while len(world.etcd.state.list("/vfleet/registrations/").items) < len(world.hosts):
        await asyncio.sleep(0.05)
    functions = dict(FUNCTIONS)
    if world.is_accelerated:
        functions[accelerator.FUNCTION] = accelerator.ACCELERATORS[0]
    for function, device in functions.items():
        request = FleetServiceCreateFunctionRequest(function=function, device=device)
        while True:
            try:
                await asker.ask(FleetServiceStub, "CreateFunction", request)
                break
            except VfleetError as error:
                if error.reason not in (Reason.NOT_FOUND, Reason.HOST_UNAVAILABLE):
                    raise
                await asyncio.sleep(0.05)
    places: dict[str, tuple[str, dict[str, int]]] = {}
    for driver, host, function in ATTACHMENTS:
        response = await asker.ask(
            FleetServiceStub, "AttachDriver", AttachDriverRequest(function=function, driver=driver, host=host)
        )
        places.setdefault(driver, (host, {}))[1][function] = response.entry.virtual_address
    for number, (driver, (host, own)) in enumerate(places.items()):
        if driver in UNNUMBERED:
            world.drivers.append(UnnumberedClient(world, driver, host, number, own[UNNUMBERED[driver]]))
        else:
            world.drivers.append(DriverClient(world, driver, host, number, own))
    if world.is_accelerated:
        request = AttachDriverRequest(
            function=accelerator.FUNCTION,
            driver=accelerator.DRIVER,
            host=accelerator.HOST,
            main_memory_bytes=accelerator.MAIN_MEMORY_BYTES,
        )
        await asker.ask(FleetServiceStub, "AttachDriver", request)
        world.drivers.append(accelerator.AcceleratorClient(world))


class Operator:
    """Asks for migrations, one after the other; two operators do so at once."""

    def __init__(self, world: "World", number: int) -> None:
        self._world = world
        self._number = number
        self._asker = Asker(world)

    async def run(self) -> None:
        """Ask until there is peace, and once more then."""
        world, random = self._world, self._world.random
        for turn in range(MIGRATIONS):
            await world.repaired()
            if world.is_at_peace or world.history.violations:
                break
            await asyncio.sleep(random.uniform(0.0, 1.0))
            await self._migrate(f"m{self._number}-{turn}")

    async def _migrate(self, name: str) -> None:
        world, random = self._world, self._world.random
        functions = random.sample(sorted(world.history.functions), random.choice((1, 1, 1, 2, 3)))
        request = CreateMigrationRequest(
            request_id=name,
            moves=[MoveRequest(function=f, target_device=self._target(f)) for f in functions],
            options=MigrationOptions(
                prepare_timeout_ms=random.choice((2_000, 10_000)),
                hold_timeout_ms=world.chaos.hold_timeout_ms,
                acknowledge_timeout_ms=50,
                mode=random.choice((TransferMode.TRANSFER_MODE_PRE_COPY, TransferMode.TRANSFER_MODE_POST_COPY)),
                max_rounds=random.choice((0, 2)),
                downtime_limit_ms=random.choice((0, 0, 0, 0, 0, 0, 0, 200)),
                bandwidth_mib_per_s=random.choice((0, 0, 1)),
            ),
        )
        try:
            await self._asker.ask(MigrationServiceStub, "CreateMigration", request)
        except VfleetError as error:
            world.trace("refused", name, error.reason)
            await asyncio.sleep(0.2)
            return
        cancel_s = world.loop.time() + random.expovariate(5.0) if random.random() < 0.25 else None
        give_up_s = world.loop.time() + random.uniform(2.0, 10.0)
        while world.loop.time() < give_up_s and not world.history.violations:
            record, _ = world.history.migrations.get(name, (None, 0))
            if record is None or record.phase in (Phase.PHASE_DONE, Phase.PHASE_ABORTED):
                return
            if cancel_s is not None and world.loop.time() > cancel_s:
                cancel_s = None
                await cancel(world, name)
            await asyncio.sleep(0.05)

    def _target(self, function: str) -> str:
        """Return a device, mostly another than the function's home."""
        home = self._world.history.functions[function].device
        devices = accelerator.ACCELERATORS if function == accelerator.FUNCTION else DEVICES
        return self._world.random.choice([device for device in devices if device != home])


async def cancel(world: "World", name: str) -> None:
    """Cancel a migration, or be told why not."""
    try:
        await Asker(world).ask(
            MigrationServiceStub, "CancelMigration", CancelMigrationRequest(name=name), timeout_s=1.0
        )
    except VfleetError as error:
        world.trace("not cancelled", name, error.reason)


class Guest:
    """Makes a function, attaches a driver to it, detaches it and deletes the function, again and again."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._asker = Asker(world)

    async def run(self) -> None:
        """Go on until there is peace, and leave nothing behind."""
        world, random = self._world, self._world.random
        while not world.is_at_peace and not world.history.violations:
            await world.repaired()
            create = FleetServiceCreateFunctionRequest(function=GUEST, device=random.choice(DEVICES))
            attach = AttachDriverRequest(function=GUEST, driver=GUESTS_DRIVER, host="h2")
            for method, request in (("CreateFunction", create), ("AttachDriver", attach)):
                await self._try(method, request)
            await asyncio.sleep(random.uniform(0.0, 6.0))
            await self._leave()
        await self._leave()

    async def _leave(self) -> None:
        detach = DetachDriverRequest(function=GUEST, driver=GUESTS_DRIVER)
        delete = DeleteFunctionRequest(function=GUEST)
        while GUEST in self._world.history.functions and not self._world.history.violations:
            await self._world.repaired()
            await self._try("DetachDriver", detach)
            await self._try("DeleteFunction", delete)
            await asyncio.sleep(0.2)

    async def _try(self, method: str, request: Any) -> None:
        try:
            await self._asker.ask(FleetServiceStub, method, request)
        except VfleetError as error:
            self._world.trace("not done", method, error.reason)
