"""Those who ask for migrations, all the time: single functions and groups, there and back, asked twice, cancelled."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Sequence
from random import Random

from vfleet.client import FleetClient, move_request, request_id
from vfleet.errors import Reason, VfleetError
from vfleet.v1.migration_service_pb2 import MigrationOptions
from vfleet.v1.records_pb2 import Migration, Phase

PAUSE_S = 0.4
CANCEL_WITHIN_S = 0.12
# How long to wait for one migration before asking for others. That it ends, sooner or later, is checked at the end.
PATIENCE_S = 20.0
OPTIONS = MigrationOptions(prepare_timeout_ms=8_000, hold_timeout_ms=2_000)

# What a coordinator may say while others migrate the same functions and everything fails.
_EXPECTED = frozenset(
    {
        Reason.IN_MIGRATION,
        Reason.TARGET_IS_SOURCE,
        Reason.HOST_UNAVAILABLE,
        Reason.CONFLICT,
        Reason.STORE_UNAVAILABLE,
        Reason.OUTCOME_UNKNOWN,
        Reason.UNREACHABLE,
    }
)


class Load:
    """Asks for migrations of `functions` to `devices`, through clients that each ask another coordinator first."""

    def __init__(
        self, clients: Sequence[FleetClient], functions: Sequence[str], devices: Sequence[str], seed: int
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.failures: list[str] = []
        self._clients = clients
        self._functions = functions
        self._devices = devices
        self._seed = seed
        self._stopping = False

    def stop(self) -> None:
        """Ask for nothing new."""
        self._stopping = True

    async def run(self, number: int) -> None:
        """Ask for one thing after the other until stopped. `number` tells askers apart."""
        random = Random(f"{self._seed} load {number}")
        while not self._stopping:
            await asyncio.sleep(random.uniform(0, PAUSE_S))
            await self._ask(random)

    async def _ask(self, random: Random) -> None:
        size = random.choice((1, 1, 1, 2, 3))
        moves = {function: random.choice(self._devices) for function in random.sample(self._functions, size)}
        migration = await self._migrate(random, moves)
        if migration is None or migration.phase != Phase.PHASE_DONE:
            return
        if size > 1:
            self.counts["groups"] += 1
        if random.random() < 0.4:
            back = {move.function: move.source.device for move in migration.moves}
            migration = await self._migrate(random, back)
            self.counts["there and back"] += migration is not None and migration.phase == Phase.PHASE_DONE

    async def _migrate(self, random: Random, moves: dict[str, str]) -> Migration | None:
        """Ask for a migration, perhaps twice, perhaps cancel it, and return it once it is over."""
        name = request_id()
        clients = random.sample(self._clients, 2 if random.random() < 0.1 else 1)
        cancel_after_s = random.uniform(0, CANCEL_WITHIN_S) if random.random() < 0.15 else None
        requests = [move_request(function, device) for function, device in moves.items()]
        creations = [client.create_migration(requests, name=name, options=OPTIONS) for client in clients]
        begun = [migration for migration in await asyncio.gather(*map(self._tolerant, creations)) if migration]
        if not begun:
            self.counts["refused"] += 1
            return None
        if len(begun) > 1:
            self.counts["asked twice"] += 1
            if begun[0].attempt != begun[1].attempt:
                self.failures.append(f"migration {name} was begun twice")
        if cancel_after_s is not None:
            await asyncio.sleep(cancel_after_s)
            await self._cancel(clients[-1], name)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._tolerant(clients[0].wait_migration(name))
        except TimeoutError:
            self.counts["slow"] += 1
            return None

    async def _cancel(self, client: FleetClient, name: str) -> None:
        try:
            await client.cancel_migration(name)
        except VfleetError as error:
            if error.reason is Reason.TOO_LATE:
                self.counts["cancelled too late"] += 1
            else:
                self._note(error)
        else:
            self.counts["cancelled"] += 1

    async def _tolerant(self, asking: Awaitable[Migration]) -> Migration | None:
        try:
            return await asking
        except VfleetError as error:
            self._note(error)
            return None

    def _note(self, error: VfleetError) -> None:
        if error.reason not in _EXPECTED:
            self.failures.append(f"{error.reason}: {error.message}")
