"""A VMM's end of a vfio-user socket, for tests: what QEMU says, and whatever else a test wants to say."""

import array
import errno
import fcntl
import mmap
import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

HEADER = struct.Struct("<HHIII")
VERSION, DMA_MAP, DMA_UNMAP, DEVICE_INFO, REGION_INFO, INTERRUPT_INFO = 1, 2, 3, 4, 5, 7
SET_INTERRUPTS, REGION_READ, REGION_WRITE, RESET = 8, 9, 10, 13
CONFIGURATION = 7
POSTED = 1 << 4
TIMEOUT_S = 30.0


@dataclass
class Reply:
    identifier: int
    command: int
    flags: int
    error: int
    body: bytes


class Vmm:
    """A connection, made as soon as somebody listens. Every question waits for its answer."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(TIMEOUT_S)
        give_up_s = time.monotonic() + TIMEOUT_S
        while (error := self.socket.connect_ex(str(path))) in (errno.ECONNREFUSED, errno.ENOENT):
            assert time.monotonic() < give_up_s, f"nobody listens at {path}"
            time.sleep(0.02)
        assert not error, os.strerror(error)
        self._identifier = 0

    def close(self) -> None:
        self.socket.close()

    def send(self, command: int, body: bytes = b"", descriptors: tuple[int, ...] = (), flags: int = 0) -> int:
        """Send a message and return its identifier."""
        self._identifier = (self._identifier + 1) % 0x10000
        message = HEADER.pack(self._identifier, command, HEADER.size + len(body), flags, 0) + body
        self.send_raw(message, descriptors)
        return self._identifier

    def send_raw(self, data: bytes, descriptors: tuple[int, ...] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        sent = self.socket.sendmsg([data], rights)
        if sent < len(data):
            self.socket.sendall(data[sent:])

    def receive(self) -> Reply:
        """Take the next message. Raise EOFError if there is none any more."""
        identifier, command, length, flags, error = HEADER.unpack(self._take(HEADER.size))
        return Reply(identifier, command, flags, error, self._take(length - HEADER.size))

    def ask(self, command: int, body: bytes = b"", descriptors: tuple[int, ...] = ()) -> Reply:
        """Send a message and return its answer, which is not a refusal."""
        reply = self.try_to_ask(command, body, descriptors)
        assert not reply.error, reply
        return reply

    def try_to_ask(self, command: int, body: bytes = b"", descriptors: tuple[int, ...] = ()) -> Reply:
        identifier = self.send(command, body, descriptors)
        reply = self.receive()
        assert (reply.identifier, reply.command, reply.flags & 1) == (identifier, command, 1)
        return reply

    def begin(self) -> None:
        self.ask(VERSION, struct.pack("<HH", 0, 1) + b'{"capabilities":{"max_msg_fds":8}}\0')

    def read(self, region: int, offset: int, length: int) -> bytes:
        reply = self.ask(REGION_READ, struct.pack("<QII", offset, region, length))
        assert struct.unpack_from("<QII", reply.body) == (offset, region, length)
        return reply.body[16:]

    def write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        body = struct.pack("<QII", offset, region, len(data)) + data
        if posted:
            self.send(REGION_WRITE, body, flags=POSTED)
        else:
            self.ask(REGION_WRITE, body)

    def map(self, memory: "SharedMemory", address: int, offset: int = 0, length: int | None = None) -> Reply:
        size = memory.size - offset if length is None else length
        body = struct.pack("<IIQQQ", 32, 3, offset, address, size)
        return self.try_to_ask(DMA_MAP, body, (memory.descriptor,))

    def set_eventfds(self, first: int, eventfds: tuple[int, ...]) -> Reply:
        body = struct.pack("<IIIII", 20, 1 << 2 | 1 << 5, 2, first, len(eventfds))
        return self.try_to_ask(SET_INTERRUPTS, body, eventfds)

    def _take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            part = self.socket.recv(length - len(data))
            if not part:
                raise EOFError
            data += part
        return data


class SharedMemory:
    """A memfd, sealed against shrinking as QEMU's are, and its content."""

    def __init__(self, size: int, *, is_sealed: bool = True) -> None:
        self.size = size
        self.descriptor = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, size)
        if is_sealed:
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.content = mmap.mmap(self.descriptor, size)

    def close(self) -> None:
        self.content.close()
        os.close(self.descriptor)
