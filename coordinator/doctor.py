"""The check of the fleet: etcd and every host are read, compared, and, if asked for, what etcd proves is repaired.

The fleet goes on meanwhile. What is under way is told from what is wrong by looking again: a difference counts only if
it stands against etcd as read before the hosts and after them, and stands so, word for word, at several looks in a row,
by the same hosts. A host that said nothing at the last look is told of in any case: nobody knows what it has.
"""

import asyncio
import logging

from coordinator.context import Context
from coordinator.findings import Call, Finding, HostState, View
from coordinator.host_differences import host_findings
from coordinator.record_differences import record_findings
from coordinator.snapshot import Snapshot
from vfleet.errors import VfleetError
from vfleet.etcd.keys import PREFIX
from vfleet.etcd.store import Transaction
from vfleet.v1.fleet_service_pb2 import Difference, DifferenceKind

LOOKS = 3
MAX_LOOKS = 12  # while hosts that said nothing begin to answer, or something new is found
LOOK_AGAIN_S = 0.5
MAX_ROUNDS = 6  # of repairs, since one may bring the next to light

_log = logging.getLogger(__name__)


class Doctor:
    """Checks and repairs the fleet of `context`."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def check(self) -> list[Difference]:
        """Return what is wrong. Raise STORE_UNAVAILABLE if etcd can't be read."""
        return [found.difference for found in await self._stand()]

    async def repair(self) -> tuple[list[Difference], list[Difference]]:
        """Repair what can be repaired. Return what is wrong still, and what was and is no more. Raise as `check`."""
        tried: list[Difference] = []
        found = await self._stand()
        for _ in range(MAX_ROUNDS):
            repairs = [each for each in found if each.repair is not None]
            if not repairs:
                break
            for each in repairs:
                if each.difference not in tried:
                    tried.append(each.difference)
                await self._carry_out(each)
            found = await self._stand()
        left = [each.difference for each in found]
        return left, [difference for difference in tried if difference not in left]

    async def _stand(self) -> list[Finding]:
        """Return what is found at several looks in a row; repairs are by the last."""
        seen, silent = await self._look()
        found, before, looks = seen, seen, 1
        for _ in range(MAX_LOOKS - 1):
            if not seen or looks == LOOKS:
                return found
            await self._context.clock.sleep(LOOK_AGAIN_S)
            before, was_silent = seen, silent
            seen, silent = await self._look()
            if was_silent <= silent and len(_standing(seen, before)) == len(seen):
                found, looks = _standing(seen, found), looks + 1
            else:
                # What is new, or of hosts that answer only now, has to stand as long.
                found, looks = seen, 1
        return _standing(found, before)

    async def _look(self) -> tuple[list[Finding], set[str]]:
        """Return what is found, and the hosts that didn't answer."""
        store = self._context.store
        before = Snapshot(await store.list(PREFIX))
        names = sorted(before.hosts)
        answers = await asyncio.gather(*(self._ask(name) for name in names))
        hosts = {name: answer for name, answer in zip(names, answers, strict=True) if isinstance(answer, HostState)}
        silent = {name: answer for name, answer in zip(names, answers, strict=True) if isinstance(answer, str)}
        earlier = _compare(View(before, hosts, silent))
        after = View(Snapshot(await store.list(PREFIX)), hosts, silent)
        return _standing(_compare(after), earlier), set(silent)

    async def _ask(self, host: str) -> HostState | str:
        try:
            return await self._context.hosts.state(host)
        except VfleetError as error:
            return error.message

    async def _carry_out(self, found: Finding) -> None:
        difference, repair = found.difference, found.repair
        about = {field: getattr(difference, field) for field in ("host", "function", "driver", "migration")}
        try:
            if isinstance(repair, Transaction):
                await self._context.store.commit(repair)
            elif isinstance(repair, Call):
                await self._context.hosts.send(repair.host, repair.request)
            _log.warning("doctor: %s", " ".join(str(difference).split()), extra=about)
        except VfleetError as error:
            # It stands at the next look, and is told of then.
            _log.warning("doctor: %s: %s", difference.remedy, error.message, extra=about)


def _compare(view: View) -> list[Finding]:
    return [*record_findings(view), *host_findings(view)]


def _standing(found: list[Finding], earlier: list[Finding]) -> list[Finding]:
    """Return what was found earlier, too; and each host that can't be asked: why, and for how long, is no matter."""
    known = [each.difference for each in earlier]
    unreachable = DifferenceKind.DIFFERENCE_KIND_HOST_UNREACHABLE
    return [each for each in found if each.difference in known or each.difference.kind == unreachable]
