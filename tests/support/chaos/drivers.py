"""A driver of chaos' own: it writes values that nobody else writes, reads its own and others', and logs every access.

It judges nothing: the checker does, from the logs of all drivers. An access that fails is logged as unanswered; what
comes after it shows, by its sequence, whether it took effect.
"""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from random import Random

from support.chaos.history import WORD_BYTES, Access, Log

from vfleet.clock import SystemClock
from vfleet.driver import DriverClient, Read, Write
from vfleet.errors import Reason, VfleetError

# The window of a function in topology.yaml: registers, then local memory (docs/device-model.md).
IDENTITY = 0x08
LOCAL_MEMORY = 0x10000
CLIENT_MEMORY = LOCAL_MEMORY + 0x8000
PLACES = 48
MOST_ACCESSES_A_BATCH = 24
PAUSE_S = 0.03
# What a driver must be ready for; any other failure is a defect.
_EXPECTED = frozenset({Reason.HOLD_TIMEOUT, Reason.UNREACHABLE, Reason.HOST_UNAVAILABLE})


def channel(number: int) -> int:
    """Return the offset of a channel's registers."""
    return 0x100 + 0x40 * number


def place(index: int, number: int) -> int:
    """Return the offset of word `number` of the function's client driver `index`."""
    return CLIENT_MEMORY + (index * PLACES + number) * WORD_BYTES


@dataclass(slots=True)
class Use:
    """A function as this driver uses it. Of the function's `sharers` (client drivers), it has number `index`."""

    function: str
    virtual_address: int
    index: int
    sharers: int
    next_ring: int = 1  # 0: to be read from the device

    @property
    def doorbell(self) -> int:
        """The offset of the doorbell that is this driver's own; channel 0 is a workload's."""
        return channel(1 + self.index)


class ChaosDriver:
    """One driver and its functions. `number` makes its values its own."""

    def __init__(self, number: int, name: str, client: DriverClient, uses: Sequence[Use], log: Log, seed: int) -> None:
        self.name = name
        self.accesses = 0
        self.longest_gap_s = 0.0
        self.failures: list[str] = []
        self._client = client
        self._uses = uses
        self._log = log
        self._random = Random(f"{seed} {name}")
        self._clock = SystemClock()
        self._values = number << 48
        self._stopping = False

    def stop(self) -> None:
        """Begin nothing new; `run` returns after the batch under way."""
        self._stopping = True

    async def run(self) -> None:
        """Do batches of accesses until stopped, and then one read of each function, which settles what is open."""
        try:
            while not self._stopping:
                batch = [self._choose() for _ in range(self._random.randint(1, MOST_ACCESSES_A_BATCH))]
                await self._carry_out(batch)
                await asyncio.sleep(self._random.uniform(0, PAUSE_S))
            await self._carry_out([(use, IDENTITY, None) for use in self._uses])
        finally:
            self._log.close()

    async def listen(self) -> None:
        """Be told of holds, and acknowledge them, for ever."""
        while True:
            try:
                async with aclosing(self._client.notifications()) as notifications:
                    async for _ in notifications:
                        pass
            except VfleetError as error:
                self._note(error)

    def _choose(self) -> tuple[Use, int, int | None]:
        """Return an access: where, and what to write (None: read)."""
        use = self._random.choice(self._uses)
        what = self._random.random()
        if not use.next_ring:
            return use, use.doorbell + WORD_BYTES, None
        if what < 0.1:
            use.next_ring += 1
            return use, use.doorbell, use.next_ring - 1
        if what < 0.5:
            self._values += 1
            return use, place(use.index, self._random.randrange(PLACES)), self._values
        if what < 0.95:
            return use, place(self._random.randrange(use.sharers), self._random.randrange(PLACES)), None
        return use, IDENTITY, None

    async def _carry_out(self, batch: Sequence[tuple[Use, int, int | None]]) -> None:
        accesses = [
            Read(use.virtual_address + offset, WORD_BYTES)
            if value is None
            else Write(use.virtual_address + offset, value.to_bytes(WORD_BYTES, "little"))
            for use, offset, value in batch
        ]
        answered, start_s = 0, self._clock.monotonic()
        last_s = start_s
        try:
            async with aclosing(self._client.stream(accesses)) as answers:
                async for answer in answers:
                    now_s = self._clock.monotonic()
                    self.longest_gap_s, last_s = max(self.longest_gap_s, now_s - last_s), now_s
                    use, offset, value = batch[answered]
                    read = int.from_bytes(answer.data, "little")
                    self._write_down(batch[answered], read, answer.sequence, start_s, now_s, is_ok=answer.status == 1)
                    if value is None and offset == use.doorbell + WORD_BYTES:
                        use.next_ring = read + 1
                    answered += 1
                    self.accesses += 1
        except VfleetError as error:
            self._note(error)
            self.longest_gap_s = max(self.longest_gap_s, self._clock.monotonic() - last_s)
            for use, offset, value in batch[answered:]:
                self._write_down((use, offset, value), 0, 0, start_s, 0.0, is_ok=False)
                use.next_ring = 0

    def _write_down(
        self,
        access: tuple[Use, int, int | None],
        read: int,
        sequence: int,
        start_s: float,
        end_s: float,
        *,
        is_ok: bool,
    ) -> None:
        use, offset, value = access
        is_read = value is None
        written = read if value is None else value
        self._log.add(Access(self.name, use.function, is_read, offset, written, sequence, start_s, end_s, is_ok))

    def _note(self, error: VfleetError) -> None:
        if error.reason not in _EXPECTED:
            self.failures.append(f"driver {self.name}: {error.reason}: {error.message}")
