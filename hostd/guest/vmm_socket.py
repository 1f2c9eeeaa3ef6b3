"""The holder's end of a VMM's connection: messages, whole, with the descriptors that came with them.

A descriptor that is neither memory nor an eventfd is closed here, whose file system may be the VMM's own.
"""

import os
import socket
from dataclasses import dataclass, field

from hostd.guest.descriptors import is_eventfd, is_memory, received
from hostd.guest.frames import HEADER, MAX_DESCRIPTORS, MAX_MESSAGE_BYTES

SEND_TIMEOUT_S = 5.0
SEND_BYTES = 1 << 20
"""Asked of the kernel, so that a VMM that stands still for a while keeps the holder from nothing."""


class VmmGoneError(Exception):
    """The VMM has closed its socket, or has said what can't be understood."""


@dataclass(slots=True)
class Received:
    """A message of the VMM, and how many of its descriptors were refused. The others belong to whoever takes it."""

    data: bytes = b""
    descriptors: list[int] = field(default_factory=list)
    refused: int = 0

    def close(self) -> None:
        """Close the descriptors."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


class VmmSocket:
    """A connection that was accepted. Its methods raise VmmGoneError."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
        self.socket = connection
        self._partial = Received()

    def read(self) -> Received | None:
        """Read what there is of one message, and return the message once it is whole."""
        partial = self._partial
        if not self._has(HEADER.size):
            return None
        identifier, command, length, _, _ = HEADER.unpack_from(partial.data)
        if not HEADER.size <= length <= MAX_MESSAGE_BYTES:
            raise VmmGoneError(f"message {identifier} (command {command}) of {length} bytes")
        if not self._has(length):
            return None
        self._partial = Received()
        return partial

    def send(self, message: bytes) -> None:
        """Send a message whole, which may take up to 5 s."""
        try:
            self.socket.settimeout(SEND_TIMEOUT_S)
            self.socket.sendall(message)
            self.socket.settimeout(0)
        except OSError as error:
            raise VmmGoneError from error

    def close(self) -> None:
        """Close it, and what came with a message that wasn't whole."""
        self._partial.close()
        self.socket.close()

    def _has(self, length: int) -> bool:
        """Read on, if need be, and return whether so many bytes of the message are there."""
        partial = self._partial
        missing = length - len(partial.data)
        if missing <= 0:
            return True
        try:
            data, ancillary, flags, _ = self.socket.recvmsg(missing, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS))
        except BlockingIOError:
            return False
        except OSError as error:
            raise VmmGoneError from error
        self._take(received(ancillary))
        partial.data += data
        if not data or flags & socket.MSG_CTRUNC or len(partial.descriptors) + partial.refused > MAX_DESCRIPTORS:
            raise VmmGoneError
        return len(data) == missing

    def _take(self, descriptors: list[int]) -> None:
        for descriptor in descriptors:
            if is_eventfd(descriptor) or is_memory(descriptor):
                self._partial.descriptors.append(descriptor)
            else:
                os.close(descriptor)
                self._partial.refused += 1
