"""The "virtio-net" workload: two drivers, each of a function of its own, send numbered frames to each other.

    HELLO, to all, until somebody answers          after `stop`, or the peer's END:
    <- HELLO or WELCOME, by which a peer is known   no more DATA; when all is acknowledged: END
    WELCOME, if it was HELLO; DATA, ACKNOWLEDGE ... <- ENDED, and the peer's END

Each frame is verified: its number is the next one, its content follows from that, its checksum is right. Every frame
tells up to which number the other's frames have come; no more than `window` are on their way. A driver has ended when
its own frames are acknowledged, and it has all that the peer says to have sent: sent equals received, or it counts.

What must be remembered are words in main memory, each one store (the table below); an exchange begins with new sessions
on both sides, so both workloads are to be started.
"""

import zlib
from collections import deque
from enum import IntEnum
from struct import Struct
from typing import Final

from hostd.models.base import MAX_FRAME_BYTES
from hostd.workloads.port import Port, Tally
from hostd.workloads.virtio_queues import RECEIVE_VECTOR, SIZE, VirtioQueues
from vfleet.errors import invalid_field
from vfleet.v1.driver_service_pb2 import WorkloadOptions

DEFAULT_WINDOW: Final = 16
MAX_WINDOW: Final = 64
RESEND_S: Final = 0.1
SILENCE_S: Final = 10.0

# Words of main memory.
SESSION: Final = 0  # of this driver, 1 to 65535: another one at each start
PEER: Final = 1  # MAC address << 16 | session; 0 while there is none
SENDING: Final = 2  # own DATA so far << 17 | whether the last is one << 16 | what the transmit ring's index is with it
RECEIVED: Final = 3  # DATA received << 16 | entries of the receive ring that are done, mod 2**16
ACKNOWLEDGED: Final = 4  # own DATA that the peer has
PEER_TOTAL: Final = 5  # 1 + what the peer says to have sent in all; 0 before its END
ENDED: Final = 6  # whether the peer has answered the END
_WORDS = 7

_ETHERTYPE = b"\x88\xb5"  # IEEE 802: for local experiments
_BROADCAST = b"\xff" * 6
_HEAD = Struct(">BxHQQ")  # kind, session, number, acknowledged
_CHECKSUM = Struct(">I")
_HEADER_BYTES = 14 + _HEAD.size
_MAX_BODY = MAX_FRAME_BYTES - _HEADER_BYTES - _CHECKSUM.size


class Kind(IntEnum):
    """What a frame is. `number` is DATA's own, and END's is the total."""

    HELLO = 1
    WELCOME = 2
    DATA = 3
    ACKNOWLEDGE = 4
    END = 5
    ENDED = 6


def body(session: int, number: int) -> bytes:
    """Return what a DATA frame carries: of another length, and with other content, for each number."""
    length = number * 89 % (_MAX_BODY + 1)
    pattern = (session << 48 | number).to_bytes(8, "big")
    return (pattern * (length // 8 + 1))[:length]


class VirtioNetDriver:
    """The driver. Options: `window`, frames without an acknowledgement; `accesses_per_second`, DATA frames."""

    def __init__(self, port: Port, tally: Tally, options: WorkloadOptions) -> None:
        if options.window > MAX_WINDOW:
            raise invalid_field("options.window", options.window, f"at most {MAX_WINDOW}")
        self._queues = VirtioQueues(port)
        self._port = port
        self._tally = tally
        self._window = options.window or DEFAULT_WINDOW
        self._rate = options.accesses_per_second
        self._words = port.memory.cast("Q")
        self._mac = b""
        self._submitted: deque[float] = deque()
        self._answer: Kind | None = None
        self._resend_at = self._heard_at = self._began_at = 0.0
        self._began_with = 0

    async def start(self) -> None:
        """Set up device and memory from nothing, in a new session. Raise ILLEGAL_STATE if it is no virtio-net."""
        session = self._words[SESSION] % 0xFFFF + 1
        for word in range(_WORDS):
            self._words[word] = 0
        self._words[SESSION] = session
        await self._queues.start()

    async def run(self) -> None:
        """Exchange frames until asked to stop and all is told. Raise ILLEGAL_STATE if the device breaks down."""
        self._mac = await self._queues.mac_address()
        self._began_at = self._heard_at = now = self._port.now()
        self._began_with = self._sent
        self._submitted.extend([now] * (self._sent - self._words[ACKNOWLEDGED]))
        self._tally.resumed(self._words[ACKNOWLEDGED])
        self._queues.resume()
        # What was taken in last may not have been answered: DATA, or the peer's HELLO or END.
        answer = Kind.ENDED if self._words[PEER_TOTAL] else Kind.WELCOME
        self._answer = answer if self._words[PEER] else None
        while not self._is_over():
            took, sent = self._take(), self._send()
            if took or sent:
                await self._port.pause(0)
            else:
                await self._port.interrupt(RECEIVE_VECTOR, self._patience_s())
                await self._queues.check()

    @property
    def _sent(self) -> int:
        """DATA frames that were given to the device. The ring's index says whether the last one was."""
        word = self._words[SENDING]
        return (word >> 17) - (word >> 16 & 1 if word & 0xFFFF != self._queues.sent else 0)

    @property
    def _expected(self) -> int:
        """The number of the peer's next DATA frame."""
        return self._words[RECEIVED] >> 16

    @property
    def _is_ending(self) -> bool:
        return self._port.is_stopping or bool(self._words[PEER_TOTAL])

    def _is_over(self) -> bool:
        if not self._port.is_stopping or self._answer is not None or self._queues.room < SIZE:
            return False
        if not self._words[PEER] or (self._words[ENDED] and self._words[PEER_TOTAL]):
            return True
        if self._port.now() < self._heard_at + SILENCE_S:
            return False
        unknown = self._sent - self._words[ACKNOWLEDGED]
        self._tally.error(f"the peer has said nothing for {SILENCE_S:g} s; {unknown} frames have no acknowledgement")
        return True

    def _patience_s(self) -> float:
        """Return how long to wait for an interrupt: until something is to be sent unasked."""
        due = [self._resend_at - self._port.now()] if not self._words[PEER] or self._is_ending else [RESEND_S]
        if self._rate and not self._is_ending:
            ahead = self._sent - self._began_with + 1
            due.append(self._began_at + ahead / self._rate - self._port.now())
        return max(min(*due, RESEND_S), 0.001)

    # Receiving.

    def _take(self) -> bool:
        """Take in all that has come. A frame is done, with all that follows from it, when RECEIVED is stored."""
        done = self._words[RECEIVED] & 0xFFFF
        began = done
        for frame in self._queues.received(done):
            done = done + 1 & 0xFFFF
            expected = self._take_frame(frame)
            self._words[RECEIVED] = expected << 16 | done
        self._queues.give_back(done)
        return done != began

    def _take_frame(self, frame: bytes) -> int:
        """Take in a frame, and return the number of DATA that is expected then."""
        expected = self._expected
        source, content = frame[6:12], frame[14 : -_CHECKSUM.size]
        if len(frame) < _HEADER_BYTES + _CHECKSUM.size or _CHECKSUM.pack(zlib.crc32(content)) != frame[-4:]:
            self._tally.mismatch(f"a frame of {len(frame)} bytes with a wrong header or checksum")
            return expected
        kind, session, number, acknowledged = _HEAD.unpack_from(content)
        if kind in (Kind.HELLO, Kind.WELCOME) and not self._words[PEER]:
            self._words[PEER] = int.from_bytes(source, "big") << 16 | session
        if self._words[PEER] != int.from_bytes(source, "big") << 16 | session:
            return expected
        self._heard_at = self._port.now()
        self._take_acknowledgement(acknowledged)
        if kind == Kind.HELLO:
            self._answer = Kind.WELCOME
        elif kind == Kind.DATA:
            self._answer = self._answer or Kind.ACKNOWLEDGE
            return self._take_data(expected, session, number, content[_HEAD.size :])
        elif kind == Kind.END:
            for missing in range(expected, min(number, expected + MAX_WINDOW)):
                self._tally.lost(f"frame {missing} of {number}")
            self._words[PEER_TOTAL] = number + 1
            self._answer = Kind.ENDED
        elif kind == Kind.ENDED:
            self._words[ENDED] = 1
        return expected

    def _take_data(self, expected: int, session: int, number: int, content: bytes) -> int:
        if content != body(session, number):
            self._tally.mismatch(f"frame {number} has another content than its number says")
        if number < expected:
            self._tally.repeated(f"frame {number} came when {expected} was expected")
            return expected
        for missing in range(expected, min(number, expected + MAX_WINDOW)):
            self._tally.lost(f"frame {missing}: {number} came in its place")
        return number + 1

    def _take_acknowledgement(self, acknowledged: int) -> None:
        if acknowledged > self._sent:
            self._tally.mismatch(f"the peer acknowledges {acknowledged} frames of {self._sent}")
            return
        for _ in range(self._words[ACKNOWLEDGED], acknowledged):
            self._tally.completed(self._submitted.popleft())
        self._words[ACKNOWLEDGED] = max(self._words[ACKNOWLEDGED], acknowledged)

    # Sending.

    def _send(self) -> bool:
        """Send what may be sent now; return whether that was anything."""
        before = self._queues.sent
        now = self._port.now()
        if self._answer == Kind.WELCOME and self._put(Kind.WELCOME):
            # Before any DATA: by this the peer learns whose that is, and what is nobody's it does not take.
            self._answer = None
        if not self._words[PEER]:
            if now >= self._resend_at and not self._port.is_stopping:
                self._resend_at = now + RESEND_S
                self._put(Kind.HELLO)
        elif not self._is_ending:
            while self._may_send_data() and self._put(Kind.DATA, self._sent):
                self._answer = None if self._answer == Kind.ACKNOWLEDGE else self._answer
        elif self._words[ACKNOWLEDGED] == self._sent and not self._words[ENDED] and now >= self._resend_at:
            self._resend_at = now + RESEND_S
            self._put(Kind.END, self._sent)
        if self._answer is not None and self._put(self._answer):
            self._answer = None
        if self._queues.sent == before:
            return False
        self._queues.kick()
        return True

    def _may_send_data(self) -> bool:
        if self._sent - self._words[ACKNOWLEDGED] >= self._window:
            return False
        allowed = (self._port.now() - self._began_at) * self._rate
        return not self._rate or self._sent - self._began_with < allowed

    def _put(self, kind: Kind, number: int = 0) -> bool:
        """Give a frame to the device; return False if there is no room for it."""
        if not self._queues.room:
            return False
        own, peer = self._words[SESSION], self._words[PEER]
        content = _HEAD.pack(kind, own, number, self._expected)
        if kind == Kind.DATA:
            content += body(own, number)
            self._submitted.append(self._port.now())
        destination = (peer >> 16).to_bytes(6, "big") if peer else _BROADCAST
        checksum = _CHECKSUM.pack(zlib.crc32(content))
        self._queues.prepare(destination + self._mac + _ETHERTYPE + content + checksum)
        is_data = kind == Kind.DATA
        index = self._queues.sent + 1 & 0xFFFF
        self._words[SENDING] = (self._sent + is_data) << 17 | is_data << 16 | index
        self._queues.send()
        return True
