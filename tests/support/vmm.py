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
SET_INTERRUPTS, REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, RESET = 8, 9, 10, 11, 12, 13
CONFIGURATION = 7
COMMAND, REPLY, POSTED, FAILED = 0, 1, 1 << 4, 1 << 5
TIMEOUT_S = 30.0


@dataclass
class Reply:
    identifier: int
    command: int
    flags: int
    error: int
    body: bytes


class Vmm:
    """A connection, made as soon as somebody listens. Every question waits for its answer.

    While it waits it answers what it is asked about `content`, which isn't mapped: as the specification says,
    or with the shorter count of QEMU 10.1 (`is_short`), or not at all (`is_silent`).
    """

    def __init__(self, path: Path) -> None:
        self.content: mmap.mmap | None = None
        self.is_short = self.is_silent = False
        self.dma: list[tuple[int, int, int]] = []  # command, address, bytes
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
        """Take the next answer. Raise EOFError if there is none any more."""
        while not (message := self.receive_any()).flags & REPLY:
            self.serve(message)
        return message

    def receive_any(self) -> Reply:
        """Take the next message. Raise EOFError if there is none any more."""
        identifier, command, length, flags, error = HEADER.unpack(self._take(HEADER.size))
        return Reply(identifier, command, flags, error, self._take(length - HEADER.size))

    def serve(self, request: Reply) -> None:
        """Read or write the content, as asked."""
        layout = struct.Struct("<QI" if self.is_short else "<QQ")
        address, count = layout.unpack_from(request.body)
        self.dma.append((request.command, address, count))
        if self.is_silent:
            return
        if self.content is None or address + count > len(self.content):
            self.reply(request, error=errno.E2BIG)
        elif request.command == DMA_READ:
            filling = bytes(16 - layout.size)
            self.reply(request, request.body[: layout.size] + self.content[address : address + count] + filling)
        else:
            assert request.command == DMA_WRITE
            data = request.body[layout.size :]
            assert len(data) == count + 16 - layout.size
            self.content[address : address + count] = data[:count]
            self.reply(request)

    def reply(self, request: Reply, body: bytes = b"", *, error: int = 0) -> None:
        flags = REPLY | (FAILED if error else 0)
        header = HEADER.pack(request.identifier, request.command, HEADER.size + len(body), flags, error)
        self.send_raw(header + body)

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

    def map_for_messages(self, memory: "SharedMemory", address: int = 0) -> Reply:
        """Offer memory without its descriptor."""
        self.content = memory.content
        return self.try_to_ask(DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, address, memory.size))

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
