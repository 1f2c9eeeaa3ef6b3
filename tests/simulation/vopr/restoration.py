"""etcd is lost in the middle of a run and restored from a backup; then its operator does as docs/operations.md says.

    backup -> more happens -> restored -> the fleet generation is raised -> doctor --repair until nothing is left

From the loss to the repair etcd's word is no measure: what counts is that no host gives up a home, that no coordinator
begins anything on what etcd says, and that drivers see nothing of it all.
"""

import asyncio
from typing import TYPE_CHECKING

from simulation.vopr.etcd import Etcd
from simulation.vopr.history import OVER
from simulation.vopr.operators import GUEST, GUESTS_DRIVER, Asker

from vfleet.errors import VfleetError
from vfleet.etcd import keys
from vfleet.etcd.records import decode
from vfleet.v1.fleet_service_pb2 import (
    BumpGenerationRequest,
    CheckFleetRequest,
    DeleteFunctionRequest,
    DetachDriverRequest,
    DifferenceKind,
)
from vfleet.v1.fleet_service_pb2_grpc import FleetServiceStub
from vfleet.v1.records_pb2 import Migration, Phase
from vfleet.v1.types_pb2 import DEVICE_STATE_STOP_COPY

if TYPE_CHECKING:
    from simulation.vopr.world import World

AIMED = 0.5  # of the losses come between the COMMIT of a migration, which they undo, and its FINISH
# So soon that hosts have not written yet what they have done: scrubbed a source, or begun to fetch from one.
_AIMS = ("hostd.destroy.after", "hostd.arrive")
SOON_S = 5.0
LOOKS = 20
COMMITTED = (Phase.PHASE_COMMITTED, Phase.PHASE_DONE)
REPAIR_S = 60.0
GIVE_UP_GUEST_S = 30.0


async def lose_and_restore(world: "World") -> None:
    """Do it all, at times that the seed has."""
    random, etcd = world.random, world.etcd
    await asyncio.sleep(random.uniform(2.0, 15.0))
    is_aimed = random.random() < AIMED
    if is_aimed:
        await world.until_reached("coordinator.commit.before", SOON_S)
    backup = etcd.state.copy()
    if is_aimed:
        if not await world.until_reached(random.choice(_AIMS), SOON_S):
            backup = etcd.state.copy()
    else:
        await asyncio.sleep(random.choice((0.5, 3.0, 12.0)) * random.random())
    for _ in range(LOOKS if not is_aimed else 0):
        if not _may_run_twice(world, backup):
            break
        await asyncio.sleep(0.1)
    if _may_run_twice(world, backup):
        backup = etcd.state.copy()
    world.trace("etcd is restored", etcd.state.revision, backup.revision)
    world.end_faults()
    world.history.forget(backup)
    etcd.restore(backup, random.uniform(0.1, 5.0))
    for process in world.coordinators.values() if random.random() < 0.5 else ():
        # One that is started on the restored etcd does not know that it is.
        world.kill(process, random.uniform(0.1, 5.0))
    # What is written meanwhile, or some foreigner's writes, may bring it past what was seen before.
    for _ in range(random.choice((0, 0, 5, 200))):
        etcd.write_foreign()
    await asyncio.sleep(random.uniform(0.0, 12.0))
    await _repair(world)


def _may_run_twice(world: "World", backup: Etcd) -> bool:
    """Return whether a source may run again beside its target: what decision 12 does not promise to see.

    The backup lacks a COMMIT, not the BEGIN, and has all that the host of the source has witnessed. One that is gone,
    or was fetched from, runs by nobody's word.
    """
    for record, _ in world.history.migrations.values():
        stored = backup.keys.get(keys.migration_key(record.name))
        if stored is None or record.phase not in COMMITTED or decode(Migration, stored).phase in COMMITTED:
            continue
        for move in record.moves:
            witness, process = keys.witness_key(move.source.host), world.hosts[move.source.host]
            now, before = world.etcd.state.keys.get(witness), backup.keys.get(witness)
            if now is not None and before is not None and now.value != before.value:
                continue
            if process.host is None or not process.life.is_alive:
                return True
            if any(
                instance.about.generation == move.source.generation and not instance.about.fetched
                for instance in process.host.functions.instances()
                if instance.about.function == move.function and instance.state == DEVICE_STATE_STOP_COPY
            ):
                return True
    return False


async def _repair(world: "World") -> None:
    asker, began_s, left = Asker(world), world.loop.time(), "the fleet generation is not raised"
    is_raised = is_guest_given_up = False
    while world.loop.time() < began_s + REPAIR_S and not world.history.violations:
        # What a migration holds is passed over, so it is looked at again when that has ended.
        is_under_way = any(record.phase not in OVER for record, _ in world.history.migrations.values())
        try:
            if not is_raised:
                await asker.ask(FleetServiceStub, "BumpGeneration", BumpGenerationRequest())
                is_raised = True
            check = CheckFleetRequest(repair=True)
            answer = await asker.ask(FleetServiceStub, "CheckFleet", check, timeout_s=20.0)
        except VfleetError as error:
            world.trace("not repaired", error.reason)
            left = error.message
        else:
            kept = [each for each in answer.differences if each.kind != DifferenceKind.DIFFERENCE_KIND_LOST_FUNCTION]
            left = "a migration is under way" if is_under_way else " ".join(str(kept).split())
            if not kept and not is_under_way:
                world.history.repaired()
                return
        if world.loop.time() > began_s + GIVE_UP_GUEST_S and is_raised and not is_guest_given_up:
            is_guest_given_up = True
            await _give_up_guest(world, asker)
        await asyncio.sleep(1.0)
    world.history.violate(8, f"not repaired after {REPAIR_S:.0f} s: {left}")


async def _give_up_guest(world: "World", asker: Asker) -> None:
    """Delete the one function that was made and deleted meanwhile, where it is in the way of what doctor repairs.

    Made anew in the restored etcd before its generation was raised, it may have another's slot, or its own from before.
    """
    world.trace("gives up", GUEST)
    assert world.history.forgotten is not None
    world.history.forgotten.pop(GUEST, None)
    for method, request in (
        ("DetachDriver", DetachDriverRequest(function=GUEST, driver=GUESTS_DRIVER)),
        ("DeleteFunction", DeleteFunctionRequest(function=GUEST)),
    ):
        try:
            await asker.ask(FleetServiceStub, method, request)
        except VfleetError as error:
            world.trace("not done", method, error.reason)
