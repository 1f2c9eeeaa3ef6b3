"""Guest memory that came without a descriptor: its VMM is asked to read and write it. Pure but for its port.

    write ──► DMA_WRITE ──► done once it is said: whatever is said after it, the VMM gets after it
    read  ──► DMA_READ ──► the answer; none in time is a DMA fault
    interrupt ──► once all writes that were said before it are answered

A write must not wait for its answer: a VMM gives none while it waits for a region read, and that waits for the writes
before it. An interrupt must: it takes a faster way than messages, and the guest would look into memory too early.

The specification has a count of 64 bits in these two messages (QEMU 11.1.3 too), QEMU 10.1 has one of 32, and data four
bytes earlier. A read of 2**32 bytes tells which: who takes the count for 0 has nothing to refuse.
"""

from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Final, Protocol

from hostd.guest.frames import HEADER, MAX_MESSAGE_BYTES
from hostd.guest.vfio_user import MAX_DATA_BYTES, Command, Message
from hostd.memory import MemoryBusyError

MAX_UNANSWERED: Final = 32
"""Messages without an answer, past which nothing more is said: the VMM's socket has room for so many."""

WHOLE, SHORT = Struct("<QQ"), Struct("<QI")  # address, bytes; then the data
_FILLED: Final = WHOLE.size - SHORT.size
"""The shorter messages are as long as the others, with what the count leaves at their end."""
_LAYOUTS: Final = (None, WHOLE, SHORT)
_STATE = Struct("<IB")  # bytes in one message, layout

Answered = Callable[[bytes | None], None]
"""Called with what was read (of a write: nothing); None if the VMM has refused, or hasn't answered in time."""


class DmaPort(Protocol):
    """What messages reach the world by."""

    def say(self, message: bytes, *, completes: bool) -> int:
        """Send a message to the VMM and return its number; `completes` if it is the last of a DMA write.

        Numbers are ascending, and the message gets the low 16 bits of its own as its identifier. Raise MemoryBusyError.
        """

    def ring(self, key: bytes) -> None:
        """Tell of an interrupt by the eventfd that is kept by a key."""

    def write_failed(self) -> None:
        """Learn that a DMA write had no effect."""

    def learned(self, state: bytes) -> None:
        """Let the holder keep what is known of the VMM."""


@dataclass(slots=True)
class _Asked:
    """A message that has no answer yet."""

    number: int
    command: int
    length: int
    until_s: float
    answered: Answered


class DmaMessages:
    """The messages to one VMM, each of which is answered within `timeout_s`, or has failed."""

    def __init__(self, port: DmaPort, timeout_s: float, now: Callable[[], float]) -> None:
        self._port = port
        self._timeout_s = timeout_s
        self._now = now
        self._transfer_bytes = MAX_DATA_BYTES
        self._layout: Struct | None = None
        self._asked: dict[int, _Asked] = {}  # by identifier, the oldest first
        self._rings: dict[bytes, tuple[int, int]] = {}  # by key: the last write before its first and last interrupt
        self._is_probing = False

    @property
    def expires_s(self) -> float | None:
        """When the oldest message without an answer has failed; None if there is none."""
        return next((asked.until_s for asked in self._asked.values()), None)

    def expire(self) -> None:
        """Give up what had no answer in time."""
        now = self._now()
        for identifier, asked in list(self._asked.items()):
            if asked.until_s > now:
                break
            del self._asked[identifier]
            self._settle(asked, None)

    def begin(self, transfer_bytes: int) -> None:
        """Begin with a VMM that takes so many bytes in a message."""
        self._transfer_bytes = min(transfer_bytes, MAX_DATA_BYTES)
        self._learn()

    def restore(self, state: bytes) -> None:
        """Take over what `learned` was told."""
        self._transfer_bytes, layout = _STATE.unpack(state)
        self._layout = _LAYOUTS[layout]

    def end(self) -> None:
        """Forget the VMM: what it was asked for it doesn't answer any more."""
        asked, self._asked = self._asked, {}
        self._rings.clear()
        self._transfer_bytes, self._layout, self._is_probing = MAX_DATA_BYTES, None, False
        for each in asked.values():
            each.answered(None)

    def read(self, address: int, length: int, answered: Answered) -> None:
        """Read bytes, and call `answered` with them. Raise MemoryBusyError, and then it isn't called."""
        layout = self._known(address)
        missing = -(-length // self._transfer_bytes)
        found: dict[int, bytes | None] = {}

        def part(at: int) -> Answered:
            def collect(data: bytes | None) -> None:
                found[at] = data
                if len(found) == missing:
                    parts = [found[each] for each in sorted(found)]
                    answered(None if None in parts else b"".join(each for each in parts if each))

            return collect

        for at in range(0, length, self._transfer_bytes):
            count = min(self._transfer_bytes, length - at)
            self._ask(Command.DMA_READ, layout.pack(address + at, count) + self._filling(layout), count, part(at))

    def write(self, address: int, data: bytes, *, completes: bool) -> None:
        """Write bytes. `completes` says that with them a DMA write is whole. Raise MemoryBusyError: then it isn't."""
        layout = self._known(address)
        for at in range(0, len(data), self._transfer_bytes):
            part = data[at : at + self._transfer_bytes]
            body = layout.pack(address + at, len(part)) + part + self._filling(layout)
            is_last = at + len(part) == len(data)
            self._ask(Command.DMA_WRITE, body, 0, self._written, completes=completes and is_last)

    def ring(self, key: bytes) -> None:
        """Tell of an interrupt once the writes before it are in memory."""
        last = max((asked.number for asked in self._asked.values() if asked.command == Command.DMA_WRITE), default=0)
        if last:
            first, _ = self._rings.get(key, (last, last))
            self._rings[key] = first, last
        else:
            self._port.ring(key)

    def answered(self, message: Message) -> bool:
        """Take a VMM's answer. Return False for one to nothing that was asked."""
        asked = self._asked.get(message.identifier)
        if asked is None or asked.command != message.command:
            return False
        del self._asked[message.identifier]
        self._settle(asked, None if message.has_failed else self._content(asked, message.body))
        return True

    def _known(self, address: int) -> Struct:
        """Return the layout. Raise MemoryBusyError if it isn't known yet, or too much has no answer."""
        if self._layout is None and not self._is_probing:
            self._ask(Command.DMA_READ, WHOLE.pack(address, 1 << 32), 0, self._probed)
            self._is_probing = True
        if self._layout is None or len(self._asked) >= MAX_UNANSWERED:
            raise MemoryBusyError
        return self._layout

    def _ask(self, command: Command, body: bytes, length: int, answered: Answered, *, completes: bool = False) -> None:
        # The port puts the identifier there.
        header = HEADER.pack(0, command, HEADER.size + len(body), 0, 0)
        number = self._port.say(header + body, completes=completes)
        identifier = number & 0xFFFF
        # Who has answered 65,535 others since won't answer this one: the next answer is the new one's.
        forgotten = self._asked.pop(identifier, None)
        self._asked[identifier] = _Asked(number, command, length, self._now() + self._timeout_s, answered)
        if forgotten is not None:
            self._settle(forgotten, None)

    def _content(self, asked: _Asked, body: bytes) -> bytes | None:
        if asked.command != Command.DMA_READ:
            return b""
        start = (self._layout or WHOLE).size
        data = body[start : start + asked.length]
        return data if len(data) == asked.length else None

    def _settle(self, asked: _Asked, data: bytes | None) -> None:
        asked.answered(data)
        if asked.command == Command.DMA_WRITE and self._rings:
            writes = [each.number for each in self._asked.values() if each.command == Command.DMA_WRITE]
            for key, (first, last) in list(self._rings.items()):
                if writes and first >= min(writes):
                    continue
                if writes and last >= min(writes):
                    self._rings[key] = last, last
                else:
                    del self._rings[key]
                self._port.ring(key)

    def _probed(self, data: bytes | None) -> None:
        if self._is_probing:
            self._is_probing = False
            self._layout = WHOLE if data is None else SHORT
            self._learn()

    def _written(self, data: bytes | None) -> None:
        if data is None:
            self._port.write_failed()

    def _learn(self) -> None:
        self._port.learned(_STATE.pack(self._transfer_bytes, _LAYOUTS.index(self._layout)))

    @staticmethod
    def _filling(layout: Struct) -> bytes:
        return bytes(_FILLED if layout is SHORT else 0)


assert HEADER.size + WHOLE.size + MAX_DATA_BYTES <= MAX_MESSAGE_BYTES  # noqa: S101  # two files agree
