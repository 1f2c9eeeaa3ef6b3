"""Cells of the kill matrix in containers: whoever dies, freezes or is cut off is a machine with an address of its own.

Everything but the fault itself is the matrix's own: the migration, the drivers, and what is checked afterwards.
"""

import asyncio
from random import Random

from support.containers.container import Container
from support.failpoints import until_stopped
from support.kill_matrix.cells import LEASE_TTL_S, Cell, Course, Fault, Participant
from support.kill_matrix.stage import FREEZE_S, Scene
from support.local_cluster import PATIENCE_S, when_possible

from vfleet.client import move_request
from vfleet.clock import SystemClock
from vfleet.errors import Reason
from vfleet.etcd.client import EtcdStore
from vfleet.failure import abort_cause
from vfleet.v1.records_pb2 import Migration, Phase

STEPS = ("begin", "create", "import", "hold", "stop", "commit", "lift", "scrub", "finish")
PARTS = tuple(Participant)


def cells() -> list[Cell]:
    """Return a kill and a partition at every step, by each part in turn, and each part's freezing and restart."""
    faults = [
        *((f"coordinator.{step}.before", PARTS[n % len(PARTS)], Fault.KILL) for n, step in enumerate(STEPS)),
        *((f"coordinator.{step}.after", PARTS[(n + 2) % len(PARTS)], Fault.CUT) for n, step in enumerate(STEPS)),
        *(("coordinator.hold.after", part, Fault.PAUSE) for part in PARTS),
        *(("coordinator.stop.after", part, Fault.RESTART) for part in PARTS),
        ("coordinator.import.before", Participant.SOURCE, Fault.CUT_FABRIC),
        ("coordinator.stop.before", Participant.TARGET, Fault.CUT_FABRIC),
        ("coordinator.lift.before", Participant.DRIVER_HOST, Fault.CUT_FABRIC),
    ]
    return [Cell(Course.COMMIT, point, part, fault) for point, part, fault in faults]


class ContainerScene(Scene):
    """A cell in which the fault is a container's."""

    async def _let_it_happen(self) -> None:
        if self.cell.participant is Participant.ETCD:
            self.victims = [await self._leader()]
        elif self.cell.fault is Fault.KILL:
            await self._death()
            return
        (victim,) = self.victims
        coordinator = self.stage.daemon("c1")
        await until_stopped(coordinator)
        if self.cell.fault is Fault.RESTART:
            coordinator.resume()
            await victim.restart()
        elif self.cell.fault is Fault.KILL:
            await victim.kill()
            coordinator.resume()
            await victim.start()
        else:
            await self._harm(victim)
            coordinator.resume()  # one that is frozen itself goes on when it thaws
            await asyncio.sleep(FREEZE_S)
            await self._heal(victim)

    async def _harm(self, victim: Container) -> None:
        if self.cell.fault is Fault.PAUSE:
            await victim.freeze()
        else:
            await victim.cut(*self._networks())

    async def _heal(self, victim: Container) -> None:
        if self.cell.fault is Fault.PAUSE:
            await victim.thaw()
        else:
            await victim.mend(*self._networks())

    def _networks(self) -> tuple[str, ...]:
        return (self.stage.cluster.local.fabric,) if self.cell.fault is Fault.CUT_FABRIC else ()

    async def _leader(self) -> Container:
        fleet = self.stage.cluster.local
        for member in fleet.members.values():
            async with EtcdStore.open((member.address,), SystemClock(), Random(), tls=fleet.keys().etcd) as store:
                status = await store.status()
            if status.member == status.leader:
                return member
        raise AssertionError("etcd has no leader")

    async def _sessions_settled(self, before: dict[str, int]) -> None:
        if self.cell.participant is Participant.ETCD:
            for member in self.victims:
                await member.until_ready()
        # Three members may keep a lease that isn't renewed for longer than one: it is lost by now, or lives on.
        if self.cell.participant is Participant.ETCD or self.cell.fault in (Fault.PAUSE, Fault.CUT):
            await asyncio.sleep(LEASE_TTL_S + 1.0)
        # A connection of before a cut may say nothing for seconds, and then that it is broken. That is found by moves
        # of which each may fail for it, as operators find it: one to each of the two hosts.
        for target in (self.source, self.target):
            await self._move_to(target)

    async def _move_to(self, target: str) -> None:
        fleet, device = self.stage.cluster.fleet, f"{target}/{self.stage.device}"

        async def is_there() -> bool:
            return (await fleet.get_function("vf1")).device == device

        async def moved() -> Migration:
            name = (await fleet.create_migration([move_request("vf1", device)])).name
            return await self.stage.cluster.over(name)

        async with asyncio.timeout(PATIENCE_S):
            while not await when_possible(is_there):
                migration = await when_possible(moved)
                assert migration.phase == Phase.PHASE_DONE or abort_cause(migration) is Reason.UNREACHABLE, migration
