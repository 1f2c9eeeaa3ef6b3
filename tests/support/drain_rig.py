"""A drain over a fleet of values: migrations begin, and end as the test says."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from random import Random

from support.fake_host import device
from support.fleet_store import FleetStore
from support.fleet_values import LIMITS, FleetValues
from support.manual_clock import ManualClock, settle

from coordinator import transaction
from coordinator.context import Context
from coordinator.drain import Drain
from coordinator.inventory import Inventory
from coordinator.many_moves import ManyMoves
from coordinator.planner import parts_of_targets, plan
from coordinator.rearranging import Rearranging
from coordinator.snapshot import Stored
from vfleet.decision import abort_transaction
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.parts import part_key, part_of
from vfleet.v1.migration_service_pb2 import MoveProgress, MoveRequest, MoveState, Rearrangement
from vfleet.v1.placement_pb2 import Constraints
from vfleet.v1.records_pb2 import Cordon, Function, Migration, Phase, Step, StepDuration


class DrainRig:
    """h1 with nic0 and nic1, h2 and h3 with nic0, four VFs each; vf1 to vf3 are on h1/nic0, vf4 on h1/nic1.

    Each has a driver, on a host that has no devices.
    """

    def __init__(self) -> None:
        self.fleet = FleetValues()
        self.nics = {name: device(name, bus=1 + (name == "h1/nic1")) for name in ("h1/nic0", "h1/nic1")}
        self.fleet.host("h1", 1, *self.nics.values())
        for segment, host in ((2, "h2"), (3, "h3")):
            self.fleet.host(host, segment, device(f"{host}/nic0"))
        for index, name in enumerate(("vf1", "vf2", "vf3"), start=1):
            self.fleet.function(name, self.nics["h1/nic0"], 1, index, f"d-{name}@far")
        self.fleet.function("vf4", self.nics["h1/nic1"], 1, 1, "d-vf4@far")
        self.fleet.host("far", 9)
        self.clock, self.inventory = ManualClock(), Inventory()
        store = FleetStore(self.fleet, self.look)
        self.context = Context("c1", store, self.inventory, None, self.clock, Random(7))
        self.refusals: list[VfleetError] = []
        self.begun: list[tuple[float, dict[str, str]]] = []
        self.told: dict[str, MoveProgress] = {}
        self.look()

    def look(self) -> None:
        """Let the inventory see what the store has."""
        self.inventory.snapshot = self.fleet.snapshot()
        self.inventory.notify()

    async def begin(self, name: str, moves: Sequence[MoveRequest]) -> Stored[Migration]:
        self.begun.append((self.clock.now, {move.function: move.target_device for move in moves}))
        if self.refusals:
            raise self.refusals.pop(0)
        snapshot = self.inventory.snapshot
        migration = plan(snapshot, moves, name=name, coordinator="c1", limits=LIMITS)
        parts = parts_of_targets(snapshot, migration)
        assert self.fleet.commit(transaction.begin(migration, 5, snapshot.fleet_generation_is_this, parts))
        self.look()
        return self.inventory.snapshot.migrations[name]

    async def start(
        self, kind: str, name: str, parallel: int = 2, constraints: Constraints | None = None
    ) -> asyncio.Task[None]:
        """Cordon a part and drain it, until something else has to happen."""
        return await self.follow(self.drain(kind, name, parallel, constraints))

    def drain(self, kind: str, name: str, parallel: int = 2, constraints: Constraints | None = None) -> Drain:
        """Cordon a part, and return the drain of it that is yet to run."""
        part = part_of(kind, name)
        self.fleet.put(keys.cordon_key(part_key(part)), Cordon(part=part))
        self.look()
        return Drain(self.context, self.begin, part, parallel, constraints or Constraints())

    async def rearrange(self, plan: Rearrangement, parallel: int = 2) -> asyncio.Task[None]:
        """Do the moves of a plan, until something else has to happen."""
        return await self.follow(Rearranging(self.context, self.begin, plan, parallel))

    async def follow(self, moves: ManyMoves) -> asyncio.Task[None]:
        async def follow() -> None:
            async with aclosing(moves.run()) as responses:
                async for response in responses:
                    self.told.update({each.function: each for each in response.functions})

        task = asyncio.create_task(follow())
        await settle()
        return task

    @property
    def moving(self) -> dict[str, str]:
        """Functions in a migration, and its name."""
        return {name: lock.record for name, lock in self.inventory.snapshot.locks.items()}

    def states(self) -> dict[str, str]:
        """How far the drain says that it is with each function."""
        return {name: MoveState.Name(each.state).removeprefix("MOVE_STATE_") for name, each in self.told.items()}

    def home(self, function: str) -> str:
        return self.inventory.snapshot.functions[function].record.device

    async def done(self, *functions: str) -> None:
        """Let the migrations of these functions succeed."""
        for name in {self.moving[function] for function in functions}:
            stored = self.inventory.snapshot.migrations[name]
            assert self.fleet.commit(transaction.commit(stored.record, stored.mod_revision, 0))
            steps = [StepDuration(step=step) for step in (Step.STEP_HOLD, Step.STEP_COMMIT, Step.STEP_LIFT)]
            for step in steps:
                step.duration.FromMilliseconds(2)
            self._finish(name, *steps)
        await settle()

    async def fail(self, function: str, cause: Reason | None, reason: str = "h2 is gone", host: str = "") -> None:
        """Let the migration of a function abort, by what a host has done or left undone."""
        name = self.moving[function]
        stored = self.inventory.snapshot.migrations[name]
        abort = abort_transaction(stored.record, stored.mod_revision, reason, Step.STEP_HOLD, 0, None, cause, host)
        assert self.fleet.commit(abort)
        self._finish(name)
        await settle()

    async def until_over(self, task: asyncio.Task[None]) -> None:
        """Let every migration succeed until the drain is over."""
        while not task.done():
            if self.moving:
                await self.done(*self.moving)
            await self.clock.advance(1)
        await task

    def _finish(self, name: str, *steps: StepDuration) -> None:
        self.look()
        stored = self.inventory.snapshot.migrations[name]
        finish = transaction.finish(stored.record, stored.mod_revision, finished_by="c1", now=0, steps=steps)
        assert self.fleet.commit(finish)
        self.look()
        assert self.inventory.snapshot.migrations[name].record.phase in (Phase.PHASE_DONE, Phase.PHASE_ABORTED)

    def functions(self) -> dict[str, Function]:
        return {name: stored.record for name, stored in self.inventory.snapshot.functions.items()}
