"""A verifying driver of the accelerator: each command completes once, in order, with the right content.

Commands are numbered from 0 and go in rounds of six, each on a buffer of its own in main memory (a lane) and a place of
its own in local memory: read a pattern that only this round has, copy it, fill what it came from, check the copy's sum,
check the sum of the oldest copy that must still be there, write the copy back. What a command is, and what is right
after it, follows from its number; so main memory remembers but how many were submitted and how many are verified.
"""

import hashlib
import zlib
from typing import Final

from hostd.models.accelerator import (
    CHECKSUM,
    COMMAND,
    COMPLETION,
    COMPLETION_RING,
    CONSUMED,
    CONTROL,
    COPY,
    ENTRIES,
    ERRORS,
    FILL,
    IDENTIFICATION,
    LOCAL_MEMORY_BYTES,
    MAGIC,
    MSIX_TABLE,
    OK,
    READ,
    SUBMISSION_RING,
    SUBMITTED,
    VECTOR,
    WRITE,
    Command,
)
from hostd.workloads.port import Port, Tally
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.v1.driver_service_pb2 import WorkloadOptions

DEFAULT_WINDOW: Final = 16
ROUND: Final = 6
RING_ENTRIES: Final = 128
BUFFER_BYTES: Final = 16 << 10
LENGTHS: Final = (4096, 64, BUFFER_BYTES, 1000, 9000)  # of the rounds, by turns
INTERRUPT: Final = 3  # the vector, and its data
LAST_INTERRUPT_TIMEOUT_S: Final = 5.0

# In main memory. Words of the head: whether it is set up, submitted, verified, interrupts before the first command.
_READY, _SUBMITTED, _VERIFIED, _INTERRUPTS_BEFORE, _LOCAL_BYTES = range(5)
_IS_READY = 0x7265616479
_SUBMISSIONS = 4096
_COMPLETIONS = _SUBMISSIONS + RING_ENTRIES * COMMAND.size
_LANES = _COMPLETIONS + RING_ENTRIES * COMPLETION.size
_SOURCE = 0
_DESTINATION = BUFFER_BYTES
_SUMS = 2 * BUFFER_BYTES
_LANE_BYTES = _SUMS + 64
_LOCAL_STRIDE = 2 * BUFFER_BYTES


class AcceleratorDriver:
    """The driver. Its options: window, memory_bytes and memory_offset_bytes, seed, accesses_per_second (commands)."""

    def __init__(self, port: Port, tally: Tally, options: WorkloadOptions) -> None:
        self._port = port
        self._tally = tally
        self._options = options
        self._window = options.window or DEFAULT_WINDOW
        # A lane is used again when all of its round is verified.
        self._lanes = -(-self._window // ROUND) + 1
        needed = _LANES + self._lanes * _LANE_BYTES
        if len(port.memory) < needed:
            raise invalid_field("main_memory_bytes", len(port.memory), f"at least {needed} for window {self._window}")
        self._words = port.memory[:4096].cast("Q")
        self._submitted_at: dict[int, float] = {}

    async def start(self) -> None:
        """Find out whether it is an accelerator, and set up the rings and one interrupt."""
        port = self._port
        identification = await self._register(IDENTIFICATION)
        if identification & 0xFFFFFFFF != MAGIC:
            raise VfleetError(
                Reason.ILLEGAL_STATE,
                f"the function identifies itself as {identification:#x}; expected an accelerator, for which this"
                " workload is made",
            )
        self._words[_READY] = 0
        self._put(CONTROL, 0)
        local_bytes = await self._register(LOCAL_MEMORY_BYTES)
        self._words[_LOCAL_BYTES] = local_bytes
        self._places()
        port.memory[_SUBMISSIONS:_LANES] = bytes(_LANES - _SUBMISSIONS)
        for lane in range(self._lanes):
            start = _LANES + lane * _LANE_BYTES
            port.memory[start : start + _LANE_BYTES] = bytes(_LANE_BYTES)
        self._put(SUBMISSION_RING, port.memory_address + _SUBMISSIONS)
        self._put(COMPLETION_RING, port.memory_address + _COMPLETIONS)
        self._put(ENTRIES, RING_ENTRIES)
        self._put(VECTOR, INTERRUPT)
        self._put(MSIX_TABLE + INTERRUPT * 16, port.interrupt_address)
        self._put(MSIX_TABLE + INTERRUPT * 16 + 8, INTERRUPT)
        self._put(CONTROL, 1)
        if await self._register(CONTROL) != 1:
            raise VfleetError(Reason.ILLEGAL_STATE, "the accelerator does not take its rings")
        self._words[_SUBMITTED] = self._words[_VERIFIED] = 0
        self._words[_INTERRUPTS_BEFORE] = port.interrupts(INTERRUPT)
        self._words[_READY] = _IS_READY

    async def run(self) -> None:
        """Submit and verify until the port is stopping and all is verified."""
        if self._words[_READY] != _IS_READY:
            raise VfleetError(Reason.ILLEGAL_STATE, "main memory does not say that the accelerator is set up")
        port, words = self._port, self._words
        began, began_at = port.now(), words[_VERIFIED]
        self._tally.resumed(began_at)
        self._ring()
        while True:
            verified = self._verify()
            submitted = 0
            if not port.is_stopping:
                submitted = self._submit(self._allowed(port.now() - began) + began_at)
            if verified or submitted:
                self._ring()
            if words[_SUBMITTED] > words[_VERIFIED]:
                await port.interrupt(INTERRUPT)
            elif port.is_stopping:
                break
            elif not submitted:
                await port.pause(1 / self._options.accesses_per_second)
        await self._check_end()

    def _allowed(self, seconds: float) -> int:
        rate = self._options.accesses_per_second
        return int(seconds * rate) + 1 if rate else 1 << 62

    # Submission

    def _submit(self, limit: int) -> int:
        """Submit what the window, and the rate, leave room for. Return how many."""
        words = self._words
        first = words[_SUBMITTED]
        end = min(words[_VERIFIED] + self._window, limit)
        for number in range(first, end):
            if number % ROUND == 0:
                self._prepare(number // ROUND)
            slot = _SUBMISSIONS + number % RING_ENTRIES * COMMAND.size
            self._port.memory[slot : slot + COMMAND.size] = self._command(number).pack()
            # Only now: a kill before this submits it again.
            words[_SUBMITTED] = number + 1
            self._submitted_at[number] = self._port.now()
        return max(end - first, 0)

    def _prepare(self, index: int) -> None:
        """Look whether a lane is as the round before left it, and put this round's pattern there."""
        memory, lane = self._port.memory, self._lane(index)
        before = self._pattern(index - self._lanes) if index >= self._lanes else b""
        place = bytes(memory[lane + _DESTINATION : lane + _DESTINATION + len(before)])
        # All zero if a kill came after the next lines.
        if place not in (before, bytes(len(before))):
            self._tally.mismatch(f"round {index - self._lanes}'s buffer was written again after the round")
        memory[lane + _DESTINATION : lane + _LANE_BYTES] = bytes(_LANE_BYTES - _DESTINATION)
        pattern = self._pattern(index)
        memory[lane + _SOURCE : lane + _SOURCE + len(pattern)] = pattern

    def _command(self, number: int) -> Command:
        index, part = divmod(number, ROUND)
        length = LENGTHS[index % len(LENGTHS)]
        main, first, second = self._port.memory_address + self._lane(index), self._place(index), self._copy(index)
        if part == 0:
            return Command(READ, number, main + _SOURCE, first, 0, length, 0)
        if part == 1:
            return Command(COPY, number, 0, second, first, length, 0)
        if part == 2:  # parts are counted
            return Command(FILL, number, 0, first, 0, length, number)
        if part == 3:
            return Command(CHECKSUM, number, main + _SUMS, second, 0, length, 0)
        if part == 4:
            oldest = self._oldest(index)
            return Command(CHECKSUM, number, main + _SUMS + 8, self._copy(oldest), 0, _length(oldest), 0)
        return Command(WRITE, number, main + _DESTINATION, second, 0, length, 0)

    def _ring(self) -> None:
        self._put(CONSUMED, self._words[_VERIFIED])
        self._put(SUBMITTED, self._words[_SUBMITTED])

    # Verification

    def _verify(self) -> int:
        """Verify what has completed, in order. Return how many."""
        words = self._words
        first = number = words[_VERIFIED]
        while number < words[_SUBMITTED]:
            slot = _COMPLETIONS + number % RING_ENTRIES * COMPLETION.size
            identifier, checksum, status, _, came = COMPLETION.unpack_from(self._port.memory, slot)
            if came <= max(number + 1 - RING_ENTRIES, 0):
                break
            self._verify_order(number, identifier, came)
            if status != OK:
                self._tally.error(f"command {number} ended with status {status}")
            elif not self._is_right(number, checksum):
                self._tally.mismatch(f"command {number} has left something else than it should")
            number += 1
            words[_VERIFIED] = number
            self._tally.completed(self._submitted_at.pop(number - 1, self._port.now()))
        return number - first

    def _verify_order(self, number: int, identifier: int, came: int) -> None:
        if identifier < number:
            self._tally.repeated(f"command {identifier} completed again, in the place of {number}")
        elif identifier > number:
            self._tally.reordered(f"command {identifier} completed in the place of {number}")
        if came > number + 1:
            self._tally.lost(f"completion {number + 1} was overwritten by {came}")
        elif came < number + 1:
            self._tally.repeated(f"completion {came} was written where {number + 1} belongs")

    def _is_right(self, number: int, checksum: int) -> bool:
        index, part = divmod(number, ROUND)
        memory, lane = self._port.memory, self._lane(index)
        if part in (3, 4):
            expected = zlib.crc32(self._pattern(index if part == 3 else self._oldest(index)))
            at = lane + _SUMS + (0 if part == 3 else 8)
            return checksum == expected == int.from_bytes(memory[at : at + 8], "little")
        if part == ROUND - 1:
            pattern = self._pattern(index)
            return bytes(memory[lane + _DESTINATION : lane + _DESTINATION + len(pattern)]) == pattern
        return True

    async def _check_end(self) -> None:
        """Compare the device's own counts with the driver's: interrupts, one a command, and bad accesses, none."""
        port, verified = self._port, self._words[_VERIFIED]
        while (came := port.interrupts(INTERRUPT) - self._words[_INTERRUPTS_BEFORE]) < verified:
            # The last completion may be seen before its interrupt.
            if not await port.interrupt(INTERRUPT, LAST_INTERRUPT_TIMEOUT_S):
                self._tally.lost(f"{verified - came} of {verified} interrupts never came")
                break
        if came > verified:
            self._tally.repeated(f"{came} interrupts came for {verified} commands")
        if errors := await self._register(ERRORS):
            self._tally.error(f"the accelerator counts {errors} bad accesses")

    # Places and contents, by round

    def _lane(self, index: int) -> int:
        return _LANES + index % self._lanes * _LANE_BYTES

    def _places(self) -> int:
        """Return how many rounds have a place in local memory at once. Raise INVALID_FIELD if it is too small."""
        options, local_bytes = self._options, self._words[_LOCAL_BYTES]
        size = options.memory_bytes or local_bytes - options.memory_offset_bytes
        least = self._lanes * _LOCAL_STRIDE
        if options.memory_offset_bytes % 8 or options.memory_offset_bytes + size > local_bytes or size < least:
            at = f"{size} bytes at {options.memory_offset_bytes}"
            raise invalid_field("options.memory_bytes", at, f"at least {least} bytes within {local_bytes}")
        return size // _LOCAL_STRIDE

    def _place(self, index: int) -> int:
        return self._options.memory_offset_bytes + index % self._places() * _LOCAL_STRIDE

    def _copy(self, index: int) -> int:
        return self._place(index) + BUFFER_BYTES

    def _oldest(self, index: int) -> int:
        """Return the oldest round whose copy is still there when a round is carried out."""
        return max(index - self._places() + 1, 0)

    def _pattern(self, index: int) -> bytes:
        """Return bytes that no other round, and no other seed, has."""
        return hashlib.shake_128(b"%d/%d" % (self._options.seed, index)).digest(_length(index))

    # Registers

    def _put(self, register: int, value: int) -> None:
        self._port.write(register, value.to_bytes(8, "little"))

    async def _register(self, register: int) -> int:
        return int.from_bytes(await self._port.read(register, 8), "little")


def _length(index: int) -> int:
    return LENGTHS[index % len(LENGTHS)]
