"""What a function knows of its drivers' accesses: how far each got, and the answers that it may ask for again.

in the image:  | bytes of the driver's name, name, last sequence, session | 64 answers, each with its sequence |
"""

import struct
from typing import Final, Protocol

from hostd.plain_redo import PLAIN_REDO_END, PLAIN_REDO_NAME
from vfleet.address import MAX_ACCESS_BYTES, PAGE_BYTES
from vfleet.limits import MAX_DRIVERS, WINDOW
from vfleet.v1.access_pb2 import AccessStatus, Answer, Session
from vfleet.v1.transfer_service_pb2 import DriverSequence

_NAME_BYTES = 64
_ANSWERS_OFFSET = PAGE_BYTES
_ANSWER_HEAD = struct.Struct("<QII")  # sequence, bytes of data, status
_ANSWER_BYTES = _ANSWER_HEAD.size + MAX_ACCESS_BYTES
_SEQUENCER_BYTES: Final = _ANSWERS_OFFSET + -(-WINDOW * _ANSWER_BYTES // PAGE_BYTES) * PAGE_BYTES

# Where the sequencers of all drivers lie in the image.
SEQUENCERS_START: Final = PLAIN_REDO_END
SEQUENCERS_END: Final = SEQUENCERS_START + MAX_DRIVERS * _SEQUENCER_BYTES

Result = tuple[AccessStatus.ValueType, bytes]
"""What an access is answered with: its status, and the data of a read."""

SessionOrder = tuple[int, int, int]
"""What sessions are compared by: fleet generation, revision, start."""


def order_of(session: Session) -> SessionOrder:
    """Return what a session is compared by."""
    return session.fleet_generation, session.revision, session.start


class Leave(Protocol):
    """A driver's leave to access memory directly (hostd/grant.py), as far as its sequencer has to do with it."""

    def revoke(self) -> None:
        """End it."""


class Sequencer:
    """What a function knows of one driver's accesses: the last sequence applied, and the answers kept.

    Words are stored through a view of 64-bit integers, because that is one machine store each: nothing is ever seen
    half written, also not by the process that comes after a kill.
    """

    __slots__ = (
        "_answers",
        "_base",
        "_bytes",
        "_session_word",
        "_words",
        "acknowledged",
        "driver",
        "grant",
        "index",
        "is_blank",
        "last",
        "last_word",
        "session",
    )

    def __init__(self, memory: memoryview, words: memoryview, index: int, *, is_blank: bool = False) -> None:
        """Take one of the sequencers of an image; `is_blank` says that all of it is zero, and spares looking."""
        self.is_blank = is_blank
        self._bytes = memory
        self._words = words
        self._base = SEQUENCERS_START + index * _SEQUENCER_BYTES
        self._answers = self._base + _ANSWERS_OFFSET
        self.index = index
        self.last_word = (self._base + 8 + _NAME_BYTES) // 8
        self._session_word = self.last_word + 1
        self.last: int
        self.session: SessionOrder
        self.grant: Leave | None = None
        self.acknowledged = 0
        if is_blank:
            self.driver, self.last, self.session = "", 0, (0, 0, 0)
            return
        # Its length stands before the name: 0 where there is no driver.
        name_bytes = words[self._base // 8]
        start = self._base + 8
        self.driver = bytes(memory[start : start + name_bytes]).decode()
        self.last = words[self.last_word]
        start, revision, fleet_generation = words[self._session_word : self._session_word + 3]
        self.session = (fleet_generation, revision, start)

    def take(self, driver: str) -> None:
        """Make this the sequencer of a driver that has none; it has seen nothing yet."""
        name = driver.encode()
        self.revoke()
        if not self.is_blank:
            # What it says of this sequencer is another driver's writes, and done.
            self._words[PLAIN_REDO_NAME] = 0
            self._bytes[self._base : self._base + _SEQUENCER_BYTES] = bytes(_SEQUENCER_BYTES)
        self.is_blank = False
        self._bytes[self._base + 8 : self._base + 8 + len(name)] = name
        self._words[self._base // 8] = len(name)
        self.driver, self.last, self.session, self.acknowledged = driver, 0, (0, 0, 0), 0

    def free(self) -> None:
        """Forget the driver."""
        self.revoke()
        self._words[self._base // 8] = 0
        self.driver = ""

    def set_session(self, session: SessionOrder) -> None:
        """Refuse earlier sessions from now on."""
        # What counts least goes first: a kill in between leaves none that is later than this one.
        for index, part in enumerate(reversed(session)):
            self._words[self._session_word + index] = part
        self.session = session

    def advance(self, sequence: int, status: AccessStatus.ValueType, data: bytes) -> None:
        """Keep an answer, and only then count its access as applied."""
        start = self._answers + sequence % WINDOW * _ANSWER_BYTES
        _ANSWER_HEAD.pack_into(self._bytes, start, sequence, len(data), status)
        if data:
            start += _ANSWER_HEAD.size
            self._bytes[start : start + len(data)] = data
        self._words[self.last_word] = self.last = sequence

    def skip_to(self, sequence: int) -> None:
        """Count accesses as applied whose answers nobody will ask for."""
        self._words[self.last_word] = sequence
        self.last = sequence

    def revoke(self) -> None:
        """End the driver's leave to access memory directly."""
        if self.grant is not None:
            self.grant.revoke()
            self.grant = None

    def answer(self, sequence: int) -> Result | None:
        """Return the answer that an access got, or None once it is forgotten (more than 64 accesses ago)."""
        start = self._answers + sequence % WINDOW * _ANSWER_BYTES
        kept, length, status = _ANSWER_HEAD.unpack_from(self._bytes, start)
        if sequence > self.last or kept != sequence:
            return None
        start += _ANSWER_HEAD.size
        return AccessStatus.ValueType(status), bytes(self._bytes[start : start + length])

    def export(self) -> DriverSequence:
        """Return the sequencer as it moves with the function's state."""
        fleet_generation, revision, start = self.session
        session = Session(fleet_generation=fleet_generation, revision=revision, start=start)
        exported = DriverSequence(driver=self.driver, last_sequence=self.last, session=session)
        for sequence in range(max(self.acknowledged, self.last - WINDOW) + 1, self.last + 1):
            kept = self.answer(sequence)
            if kept is not None:
                exported.answers.append(Answer(sequence=sequence, status=kept[0], data=kept[1]))
        return exported

    def load(self, exported: DriverSequence) -> None:
        """Become what another instance's sequencer was."""
        # One that was just taken has nothing that would have to be zeroed.
        if self.driver != exported.driver or self.last or any(self.session):
            self.take(exported.driver)
        for answer in exported.answers:
            self.advance(answer.sequence, answer.status, answer.data)
        self.skip_to(exported.last_sequence)
        self.set_session(order_of(exported.session))
