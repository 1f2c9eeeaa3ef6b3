"""What a verifying driver of the "checker" device does: its accesses as a function of their number.

Access a is of round i = a // 4: ring the doorbell with i + 1; write a value that only i has to local memory; read back
what an earlier round wrote last to some place; read one of the registers that tell of misrouted, lost, repeated or
reordered accesses. Nothing needs to be remembered: a driver that was killed goes on from the number it had reached.
"""

from dataclasses import dataclass
from typing import Final

from hostd.models import checker
from vfleet.errors import invalid_field
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE, AccessKind
from vfleet.v1.driver_service_pb2 import WorkloadOptions

STEPS_A_ROUND: Final = 4
WORD_BYTES: Final = 8

_MASK = (1 << 64) - 1
_STRIDE = 7919  # a prime, so that the places that are read back are spread


@dataclass(frozen=True, slots=True)
class Step:
    """One access: `offset` is that from the function's first virtual address. A read has an `expected` value."""

    kind: AccessKind.ValueType
    offset: int
    value: int
    counter: str = ""
    """The field of the report that an unexpected value counts in; empty for `mismatches`."""

    @property
    def data(self) -> bytes:
        """What a write writes."""
        return self.value.to_bytes(WORD_BYTES, "little") if self.kind == ACCESS_KIND_WRITE else b""


class CheckerScript:
    """The accesses for one function. Raise INVALID_FIELD for options that don't fit it."""

    def __init__(self, identity: int, span_bytes: int, memory_bytes: int, options: WorkloadOptions) -> None:
        """Take what the function's registers tell (its identity, its local memory), and the span of its BARs."""
        if options.channel >= checker.CHANNELS:
            raise invalid_field("options.channel", options.channel, f"0 to {checker.CHANNELS - 1}")
        start, size = options.memory_offset_bytes, options.memory_bytes
        if start % WORD_BYTES or start > memory_bytes:
            raise invalid_field("options.memory_offset_bytes", start, f"a multiple of 8, at most {memory_bytes}")
        if size % WORD_BYTES or start + size > memory_bytes:
            raise invalid_field("options.memory_bytes", size, f"a multiple of 8, at most {memory_bytes - start}")
        self._identity = identity
        self._seed = options.seed
        self._channel = checker.channel_offset(options.channel)
        self._clear = 1 << options.channel
        size = size or memory_bytes - start
        # Without local memory, the scratch register is a memory of one word.
        self._words = max(size // WORD_BYTES, 1)
        self._start = span_bytes - memory_bytes + start if size else checker.SCRATCH

    def first(self) -> Step:
        """Return the access before all others: it clears the channel's counters."""
        return Step(ACCESS_KIND_WRITE, checker.CONTROL, self._clear)

    def step(self, number: int) -> Step:
        """Return access `number`, from 0."""
        index, part = divmod(number, STEPS_A_ROUND)
        if part == 0:
            return Step(ACCESS_KIND_WRITE, self._channel + checker.DOORBELL, index + 1)
        if part == 1:
            return Step(ACCESS_KIND_WRITE, self._place(index % self._words), self._value(index))
        if part == 2:  # parts are counted
            word = index * _STRIDE % min(self._words, index + 1)
            writer = index - (index - word) % self._words
            return Step(ACCESS_KIND_READ, self._place(word), self._value(writer))
        registers = (
            Step(ACCESS_KIND_READ, checker.IDENTITY, self._identity, "misrouted"),
            Step(ACCESS_KIND_READ, self._channel + checker.LAST, index + 1),
            Step(ACCESS_KIND_READ, self._channel + checker.LOST, 0, "lost"),
            Step(ACCESS_KIND_READ, self._channel + checker.REPEATED, 0, "repeated"),
            Step(ACCESS_KIND_READ, self._channel + checker.REORDERED, 0, "reordered"),
        )
        return registers[index % len(registers)]

    def _place(self, word: int) -> int:
        return self._start + word * WORD_BYTES

    def _value(self, index: int) -> int:
        """Return a value that this function's round alone writes: a mixed counter (SplitMix64's finalizer)."""
        value = (self._seed + self._identity + index * 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
        return value ^ value >> 31
