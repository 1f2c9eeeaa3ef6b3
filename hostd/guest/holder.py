"""The holder of one guest's socket: a process of its own, which outlives hostd. It imports nothing of vfleet.

A VMM never connects again. So whoever holds its socket must not be restarted; and the descriptors that came through it
(guest memory, eventfds) are lost with it. This process holds them, and nothing else: what messages mean, hostd knows.

    VMM ──── vfio-user ────► holder ──── frames, descriptors ────► hostd
                             │ queue: what hostd has not said to be done
                             │ kept: descriptors and notes that hostd has asked to keep, by key

- Each message of the VMM gets a number and is queued until hostd says that it is done. A hostd that comes anew is told
  what is kept and how far its predecessor was, and then gets everything else again, in order.
- Posted messages wait in the queue as long as need be. While it is full nothing more is read from the VMM.
- What a hostile VMM can make wait for ever is done here, not in hostd: to close a file, whose file system may be the
  VMM's (none gets further that is neither memory nor an eventfd), and to write to an eventfd, which the VMM can fill.
- A VMM stands still while it waits for an answer, and gives the device up after a time. Before that,
  `--answer-within-ms` after the question, the holder answers by itself: all ones to a read, as if nobody were there.
- It ends when hostd says so, or after a minute without VMM and hostd.
"""

import argparse
import array
import contextlib
import errno
import fcntl
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

# vfio-user: identifier, command, bytes of the message, flags, error.
HEADER = struct.Struct("<HHIII")
MAX_MESSAGE_BYTES = 1 << 13
_MAX_DESCRIPTORS = 16
_TYPE, _REPLY, _NO_REPLY, _FAILED = 0xF, 1, 1 << 4, 1 << 5
_REGION_READ, _REGION_WRITE = 9, 10
_REGION_ACCESS = struct.Struct("<QII")  # offset, region, bytes

# A frame to or from hostd: kind, bytes of the key, number, position; then key and data.
FRAME = struct.Struct("<IIQQ")
MAX_FRAME_BYTES = FRAME.size + 256 + MAX_MESSAGE_BYTES
HELLO = 1  # how far the predecessor was: the last message that was done, and its position; the last that is queued
KEPT = 2  # a key, what was kept by it, and its descriptor if there is one
READY = 3  # that was all that is kept
CONNECTED = 4  # a VMM has connected; numbered, as messages are
MESSAGE = 5  # a message of the VMM, with its descriptors; the position is how many others came with it
GONE = 6  # the VMM has closed its socket
ANSWER = 16  # the answer to a message, by its number
DONE = 17  # all messages up to a number are done; the position is given back by HELLO
KEEP = 18  # keep this, with the descriptor that comes with it, in the place of what the key had
DROP = 19  # keep it no longer
QUIT = 20  # end
RING = 21  # tell of an interrupt by the eventfd that is kept by a key

# Past one of these nothing more is read from a VMM.
MAX_QUEUED = 4096
MAX_QUEUED_BYTES = 1 << 20
MAX_QUEUED_DESCRIPTORS = 64
# Between two VMMs, as the fleet is told of each.
_NEXT_VMM_S = 0.5
_ORPHANED_S = 60.0
_SEND_TIMEOUT_S = 5.0


class _Item:
    """A message of the VMM, or that one came or went, until it is done."""

    __slots__ = ("answer_by_s", "data", "descriptors", "kind", "number", "refused")

    def __init__(
        self, number: int, kind: int, data: bytes, descriptors: Sequence[int], refused: int, answer_by_s: float
    ) -> None:
        self.number = number
        self.kind = kind
        self.data = data
        self.descriptors = descriptors
        self.refused = refused
        self.answer_by_s = answer_by_s


class Holder:
    """Serve a VMM at `listener` and hostd at `control`, by a clock that never goes back."""

    def __init__(
        self, listener: socket.socket, control: socket.socket, answer_within_s: float, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._answer_within_s = answer_within_s
        self._selector = selectors.DefaultSelector()
        self._listener, self._control = listener, control
        self._vmm: socket.socket | None = None
        self._hostd: socket.socket | None = None
        self._number = self._done = self._position = 0
        self._queue: deque[_Item] = deque()
        self._queued_bytes = self._queued_descriptors = 0
        self._unanswered: dict[int, _Item] = {}  # by number, and so by the time of their answers
        self._outbox: deque[tuple[bytes, Sequence[int]]] = deque()
        self._kept: dict[bytes, tuple[bytes, int]] = {}
        self._partial = b""
        self._partial_descriptors: list[int] = []
        self._partial_refused = 0
        self._is_ending = False
        self._next_vmm_s = 0.0
        self._watched: dict[socket.socket, int] = {}
        self._late = self._not_understood = 0
        for server in (listener, control):
            server.settimeout(0)

    def run(self) -> None:
        """Serve until told to end, or left alone."""
        alone_since = self._clock()
        while not self._is_ending:
            now = self._clock()
            if self._vmm is not None or self._hostd is not None:
                alone_since = now
            elif now - alone_since > _ORPHANED_S:
                return
            self._answer_late(now)
            self._watch(now)
            for key, events in self._selector.select(self._pause_s(now)):
                self._serve(key.fileobj, events)

    def _serve(self, ready: object, events: int) -> None:
        if ready is self._listener:
            self._accept_vmm()
        elif ready is self._control:
            self._accept_hostd()
        elif ready is self._vmm:
            self._read_vmm()
        elif ready is self._hostd:
            if events & selectors.EVENT_WRITE:
                self._flush()
            if events & selectors.EVENT_READ and ready is self._hostd:
                self._read_hostd()

    def _pause_s(self, now: float) -> float:
        times = [now + _ORPHANED_S]
        times += [item.answer_by_s for item in [*self._unanswered.values()][:1]]
        times += [self._next_vmm_s] if self._next_vmm_s > now else []
        return max(min(times) - now, 0.0)

    # The VMM

    def _accept_vmm(self) -> None:
        connection, _ = self._listener.accept()
        if self._vmm is not None:
            connection.close()  # a device has one VMM
            return
        connection.settimeout(_SEND_TIMEOUT_S)
        self._vmm = connection
        self._put(CONNECTED)

    def _read_vmm(self) -> None:
        """Read what there is of one message: its header, with which its descriptors come, or what is left of it."""
        assert self._vmm is not None  # noqa: S101
        length = HEADER.unpack(self._partial[: HEADER.size])[2] if len(self._partial) >= HEADER.size else HEADER.size
        try:
            data, ancillary, flags, _ = self._vmm.recvmsg(
                length - len(self._partial), socket.CMSG_SPACE(4 * _MAX_DESCRIPTORS), socket.MSG_DONTWAIT
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary, flags = b"", [], 0
        self._take_descriptors(_descriptors(ancillary))
        self._partial += data
        count = len(self._partial_descriptors) + self._partial_refused
        if not data or flags & socket.MSG_CTRUNC or count > _MAX_DESCRIPTORS:
            self._close_vmm()
        elif len(self._partial) >= HEADER.size:
            identifier, command, length, message_flags, _ = HEADER.unpack_from(self._partial)
            if not HEADER.size <= length <= MAX_MESSAGE_BYTES:
                self._not_understood += 1
                told = f"message {identifier} (command {command}) of {length} bytes: the VMM is disconnected"
                _say_seldom(self._not_understood, told)
                self._close_vmm()
            elif len(self._partial) == length:
                self._put(MESSAGE, wants_answer=not message_flags & (_TYPE | _NO_REPLY))

    def _take_descriptors(self, descriptors: Sequence[int]) -> None:
        for descriptor in descriptors:
            if is_eventfd(descriptor) or _is_memory(descriptor):
                self._partial_descriptors.append(descriptor)
            else:
                os.close(descriptor)
                self._partial_refused += 1

    def _put(self, kind: int, *, wants_answer: bool = False) -> None:
        """Queue the message that has been read, or that a VMM came or went."""
        self._number += 1
        answer_by_s = self._clock() + self._answer_within_s
        item = _Item(self._number, kind, self._partial, self._partial_descriptors, self._partial_refused, answer_by_s)
        self._partial, self._partial_descriptors, self._partial_refused = b"", [], 0
        self._queue.append(item)
        self._queued_bytes += len(item.data)
        self._queued_descriptors += len(item.descriptors)
        if wants_answer:
            self._unanswered[item.number] = item
        self._send_item(item)

    def _has_room(self) -> bool:
        return (
            len(self._queue) < MAX_QUEUED
            and self._queued_bytes < MAX_QUEUED_BYTES
            and self._queued_descriptors < MAX_QUEUED_DESCRIPTORS
        )

    def _answer(self, number: int, data: bytes) -> None:
        """Answer a message, unless it has its answer, or its VMM is gone."""
        if self._unanswered.pop(number, None) is None or self._vmm is None:
            return
        try:
            self._vmm.sendall(data)
        except OSError:
            self._close_vmm()

    def _answer_late(self, now: float) -> None:
        while self._unanswered:
            item = next(iter(self._unanswered.values()))
            if item.answer_by_s > now:
                return
            self._late += 1
            _say_seldom(self._late, f"no answer for {self._answer_within_s:g} s: answered as if nobody were there")
            self._answer(item.number, _own_answer(item.data))

    def _close_vmm(self) -> None:
        """Forget the VMM: it has gone, or has said what can't be understood."""
        assert self._vmm is not None  # noqa: S101
        self._close(self._vmm)
        self._vmm = None
        self._next_vmm_s = self._clock() + _NEXT_VMM_S
        for descriptor in self._partial_descriptors:
            os.close(descriptor)
        self._partial, self._partial_descriptors, self._partial_refused = b"", [], 0
        self._unanswered.clear()
        self._put(GONE)

    # hostd

    def _accept_hostd(self) -> None:
        connection, _ = self._control.accept()
        if self._hostd is not None:
            self._close_hostd()
        connection.settimeout(0)
        self._hostd = connection
        self._send(HELLO, self._done, self._position, data=self._number.to_bytes(8, "little"))
        for key, (data, descriptor) in self._kept.items():
            self._send(KEPT, key=key, data=data, descriptors=() if descriptor < 0 else (descriptor,))
        self._send(READY)
        for item in self._queue:
            self._send_item(item)

    def _send_item(self, item: _Item) -> None:
        self._send(item.kind, item.number, item.refused, data=item.data, descriptors=item.descriptors)

    def _send(
        self,
        kind: int,
        number: int = 0,
        position: int = 0,
        *,
        key: bytes = b"",
        data: bytes = b"",
        descriptors: Sequence[int] = (),
    ) -> None:
        if self._hostd is None:
            return
        self._outbox.append((FRAME.pack(kind, len(key), number, position) + key + data, descriptors))
        if len(self._outbox) == 1:
            self._flush()

    def _flush(self) -> None:
        while self._outbox and self._hostd is not None:
            frame, descriptors = self._outbox[0]
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
            try:
                self._hostd.sendmsg([frame], rights)
            except BlockingIOError:
                break
            except OSError:
                self._close_hostd()
                return
            self._outbox.popleft()

    def _read_hostd(self) -> None:
        if self._take_frame() is False:
            self._close_hostd()

    def _take_frame(self) -> bool | None:
        """Do what one frame says. Return None if there is none, False if there will be none."""
        if self._hostd is None:
            return None
        try:
            frame, ancillary, _, _ = self._hostd.recvmsg(MAX_FRAME_BYTES, socket.CMSG_SPACE(4))
        except BlockingIOError:
            return None
        except OSError:
            return False
        if not frame:
            return False
        kind, key_bytes, number, position = FRAME.unpack_from(frame)
        key, data = frame[FRAME.size : FRAME.size + key_bytes], frame[FRAME.size + key_bytes :]
        if kind == ANSWER:
            self._answer(number, data)
        elif kind == DONE:
            self._finish(number, position)
        elif kind in (KEEP, DROP):
            self._drop(key)
            if kind == KEEP:
                self._kept[key] = (data, next(iter(_descriptors(ancillary)), -1))
        elif kind == RING:
            self._ring(key)
        elif kind == QUIT:
            self._is_ending = True
        return True

    def _finish(self, number: int, position: int) -> None:
        while self._queue and self._queue[0].number <= number:
            item = self._queue.popleft()
            self._queued_bytes -= len(item.data)
            self._queued_descriptors -= len(item.descriptors)
            for descriptor in item.descriptors:
                os.close(descriptor)
        self._done, self._position = number, position

    def _ring(self, key: bytes) -> None:
        _, descriptor = self._kept.get(key, (b"", -1))
        if descriptor >= 0:
            # One that is full has been told more than often enough.
            with contextlib.suppress(OSError):
                os.eventfd_write(descriptor, 1)

    def _drop(self, key: bytes) -> None:
        _, descriptor = self._kept.pop(key, (b"", -1))
        if descriptor >= 0:
            os.close(descriptor)

    def _close_hostd(self) -> None:
        """Forget hostd, which has ended, or another has come. What it has said last counts."""
        self._outbox.clear()
        while self._take_frame():
            pass
        if self._hostd is not None:
            self._close(self._hostd)
            self._hostd = None

    def _watch(self, now: float) -> None:
        """Wait for what there is to do: messages while there is room for them, room for frames while there are any."""
        has_room = self._has_room()
        accepts_vmm = self._vmm is not None or (has_room and now >= self._next_vmm_s)
        self._wait_for(self._listener, selectors.EVENT_READ if accepts_vmm else 0)
        self._wait_for(self._control, selectors.EVENT_READ)
        if self._vmm is not None:
            self._wait_for(self._vmm, selectors.EVENT_READ if has_room else 0)
        if self._hostd is not None:
            self._wait_for(self._hostd, selectors.EVENT_READ | (selectors.EVENT_WRITE if self._outbox else 0))

    def _wait_for(self, connection: socket.socket, events: int) -> None:
        watched = self._watched.get(connection, 0)
        if watched == events:
            return
        if not events:
            self._selector.unregister(connection)
        elif watched:
            self._selector.modify(connection, events)
        else:
            self._selector.register(connection, events)
        self._watched[connection] = events

    def _close(self, connection: socket.socket) -> None:
        self._wait_for(connection, 0)
        self._watched.pop(connection, None)
        connection.close()


def is_eventfd(descriptor: int) -> bool:
    """Whether a descriptor is an eventfd."""
    return os.readlink(f"/proc/self/fd/{descriptor}").startswith("anon_inode:[eventfd]")  # noqa: PTH115


def _is_memory(descriptor: int) -> bool:
    """Whether a descriptor is of memory: only that can have seals."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def _own_answer(message: bytes) -> bytes:
    """Return what a message is answered if nobody else does: as by a device that isn't there."""
    identifier, command, _, _, _ = HEADER.unpack_from(message)
    body = message[HEADER.size :]
    if command in (_REGION_READ, _REGION_WRITE) and len(body) >= _REGION_ACCESS.size:
        count = min(_REGION_ACCESS.unpack_from(body)[2], MAX_MESSAGE_BYTES - HEADER.size - _REGION_ACCESS.size)
        reply = body[: _REGION_ACCESS.size] + (b"\xff" * count if command == _REGION_READ else b"")
        return HEADER.pack(identifier, command, HEADER.size + len(reply), _REPLY, 0) + reply
    return HEADER.pack(identifier, command, HEADER.size, _REPLY | _FAILED, errno.EIO)


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def _say_seldom(times: int, what: str) -> None:
    """Say what has happened so many times already, each time that this has doubled: a VMM can't fill the log."""
    if not times & (times - 1):
        sys.stderr.write(f"holder {os.getpid()}: {what} ({times} times so far)\n")
        sys.stderr.flush()


def discard(path: Path) -> None:
    """Delete a socket that nobody listens at any more; nothing else."""
    # Of another kind than listeners are, so that it asks without being a connection.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        if path.is_socket() and probe.connect_ex(str(path)) == errno.ECONNREFUSED:
            path.unlink()


def _listen(path: Path, kind: socket.SocketKind) -> socket.socket:
    """Listen at a path, in the place of a socket that nobody listens at any more. Raise OSError."""
    discard(path)
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(str(path))
    listener.listen(1)
    return listener


def main() -> None:
    """Hold a socket until hostd says that it is over."""
    parser = argparse.ArgumentParser(
        description="Holds a guest's vfio-user socket and descriptors while hostd restarts."
    )
    parser.add_argument("--socket", type=Path, required=True, help="where the VMM connects")
    parser.add_argument("--directory", type=Path, required=True, help="where it runs")
    parser.add_argument("--control", type=Path, required=True, help="where hostd connects")
    parser.add_argument("--answer-within-ms", type=int, required=True, help="when the holder answers by itself")
    options = parser.parse_args()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    os.chdir(options.directory)
    try:
        listener = _listen(options.socket, socket.SOCK_STREAM)
    except OSError as error:
        sys.exit(f"can't listen at {options.socket}: {error}")
    control = _listen(options.control, socket.SOCK_SEQPACKET)
    try:
        Holder(listener, control, options.answer_within_ms / 1000, time.monotonic).run()
    finally:
        options.socket.unlink(missing_ok=True)
        options.control.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
