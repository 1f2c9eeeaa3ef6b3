"""The holder of one guest's socket: a process of its own, which outlives hostd.

A VMM never connects again. So whoever holds its socket must not be restarted; and the descriptors that came through it
(guest memory, eventfds) are lost with it. This process holds them, and nothing else: what messages mean, hostd knows.
Its parts (vmm_socket.py, message_queue.py, frames.py, descriptors.py) import nothing of vfleet's.

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
import contextlib
import errno
import os
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from hostd.guest.descriptors import given, received
from hostd.guest.frames import (
    FAILED,
    FRAME,
    HEADER,
    HELLO_DATA,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    NO_REPLY,
    REGION_ACCESS,
    REGION_READ,
    REGION_WRITE,
    REPLY,
    SAID,
    TYPE,
    VERSION,
    Kind,
)
from hostd.guest.message_queue import Item, MessageQueue
from hostd.guest.vmm_socket import Received, VmmGoneError, VmmSocket

# Between two VMMs, as the fleet is told of each.
_NEXT_VMM_S = 0.5
_ORPHANED_S = 60.0
# Connections of hostds that were killed wait here while a VMM keeps the holder from work.
_BACKLOG = 128


class Holder:
    """Serve a VMM at `listener` and hostd at `control`, by a clock that never goes back."""

    def __init__(
        self, listener: socket.socket, control: socket.socket, answer_within_s: float, clock: Callable[[], float]
    ) -> None:
        self._clock = clock
        self._answer_within_s = answer_within_s
        self._selector = selectors.DefaultSelector()
        self._listener, self._control = listener, control
        self._vmm: VmmSocket | None = None
        self._hostd: socket.socket | None = None
        self._number = self._done = self._position = 0
        self._vmm_number = self._said = self._written = 0
        self._queue = MessageQueue()
        self._unanswered: dict[int, Item] = {}  # by number, and so by the time of their answers
        self._outbox: deque[tuple[bytes, Sequence[int]]] = deque()
        self._kept: dict[bytes, tuple[bytes, int]] = {}
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
        elif self._vmm is not None and ready is self._vmm.socket:
            self._read_vmm(self._vmm)
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
        if self._vmm is None and self._clock() < self._next_vmm_s:
            return  # the one before it has gone at the same moment
        connection, _ = self._listener.accept()
        if self._vmm is not None:
            connection.close()  # a device has one VMM
            return
        self._vmm = VmmSocket(connection)
        self._put(Kind.CONNECTED, Received())
        self._vmm_number = self._number

    def _read_vmm(self, vmm: VmmSocket) -> None:
        try:
            message = vmm.read()
        except VmmGoneError as error:
            if str(error):
                self._not_understood += 1
                _say_seldom(self._not_understood, f"{error}: the VMM is disconnected")
            self._close_vmm(vmm)
            return
        if message is not None:
            _, _, _, flags, _ = HEADER.unpack_from(message.data)
            self._put(Kind.MESSAGE, message, wants_answer=not flags & (TYPE | NO_REPLY))

    def _put(self, kind: Kind, message: Received, *, wants_answer: bool = False) -> None:
        """Queue a message that has been read, or that a VMM came or went."""
        self._number += 1
        item = Item(self._number, kind, message, self._clock() + self._answer_within_s)
        self._queue.put(item)
        if wants_answer:
            self._unanswered[item.number] = item
        self._send_item(item)

    def _answer(self, number: int, data: bytes) -> None:
        """Answer a message, unless it has its answer, or its VMM is gone."""
        if self._unanswered.pop(number, None) is None or self._vmm is None:
            return
        self._tell(self._vmm, data)

    def _say(self, vmm_number: int, position: int, data: bytes) -> None:
        """Say something to a VMM, unless it is gone. Counted in any case: it is done, once and for all."""
        self._said += 1
        self._written = position or self._written
        if self._vmm is not None and vmm_number == self._vmm_number:
            self._tell(self._vmm, data)

    def _tell(self, vmm: VmmSocket, data: bytes) -> None:
        try:
            vmm.send(data)
        except VmmGoneError:
            self._close_vmm(vmm)

    def _answer_late(self, now: float) -> None:
        while self._unanswered:
            item = next(iter(self._unanswered.values()))
            if item.answer_by_s > now:
                return
            self._late += 1
            _say_seldom(self._late, f"no answer for {self._answer_within_s:g} s: answered as if nobody were there")
            self._answer(item.number, _own_answer(item.message.data))

    def _close_vmm(self, vmm: VmmSocket) -> None:
        """Forget the VMM: it has gone, or has said what can't be understood."""
        self._unwatch(vmm.socket)
        vmm.close()
        self._vmm = None
        self._next_vmm_s = self._clock() + _NEXT_VMM_S
        self._unanswered.clear()
        self._put(Kind.GONE, Received())

    # hostd

    def _accept_hostd(self) -> None:
        connection, _ = self._control.accept()
        if self._hostd is not None:
            self._close_hostd()
        connection.settimeout(0)
        self._hostd = connection
        said, data = SAID.pack(self._said, self._written), HELLO_DATA.pack(self._number, VERSION)
        self._send(Kind.HELLO, self._done, self._position, key=said, data=data)
        # Of copies: if it ends meanwhile, what it has said before its end is done at once, and changes both.
        for key, (data, descriptor) in list(self._kept.items()):
            self._send(Kind.KEPT, key=key, data=data, descriptors=() if descriptor < 0 else (descriptor,))
        self._send(Kind.READY)
        for item in list(self._queue):
            self._send_item(item)

    def _send_item(self, item: Item) -> None:
        message = item.message
        self._send(item.kind, item.number, message.refused, data=message.data, descriptors=message.descriptors)

    def _send(
        self,
        kind: Kind,
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
            try:
                self._hostd.sendmsg([frame], given(descriptors))
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
        if kind == Kind.ANSWER:
            self._answer(number, data)
        elif kind == Kind.DONE:
            self._finish(number, position)
        elif kind in (Kind.KEEP, Kind.DROP):
            self._drop(key)
            if kind == Kind.KEEP:
                self._kept[key] = (data, next(iter(received(ancillary)), -1))
        elif kind == Kind.RING:
            self._ring(key)
        elif kind == Kind.SAY:
            self._say(number, position, data)
        elif kind == Kind.QUIT:
            self._is_ending = True
        return True

    def _finish(self, number: int, position: int) -> None:
        self._queue.finish(number)
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
        if self._hostd is not None:
            # Whatever hostd can send still is taken; what it can't, it knows of.
            with contextlib.suppress(OSError):
                self._hostd.shutdown(socket.SHUT_RD)
        while self._take_frame():
            pass
        if self._hostd is not None:
            self._unwatch(self._hostd)
            self._hostd.close()
            self._hostd = None
        self._outbox.clear()

    def _watch(self, now: float) -> None:
        """Wait for what there is to do: messages while there is room for them, room for frames while there are any."""
        has_room = self._queue.has_room
        accepts_vmm = self._vmm is not None or (has_room and now >= self._next_vmm_s)
        self._wait_for(self._listener, selectors.EVENT_READ if accepts_vmm else 0)
        self._wait_for(self._control, selectors.EVENT_READ)
        if self._vmm is not None:
            self._wait_for(self._vmm.socket, selectors.EVENT_READ if has_room else 0)
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

    def _unwatch(self, connection: socket.socket) -> None:
        self._wait_for(connection, 0)
        self._watched.pop(connection, None)


def _own_answer(message: bytes) -> bytes:
    """Return what a message is answered if nobody else does: as by a device that isn't there."""
    identifier, command, _, _, _ = HEADER.unpack_from(message)
    body = message[HEADER.size :]
    if command in (REGION_READ, REGION_WRITE) and len(body) >= REGION_ACCESS.size:
        count = min(REGION_ACCESS.unpack_from(body)[2], MAX_MESSAGE_BYTES - HEADER.size - REGION_ACCESS.size)
        reply = body[: REGION_ACCESS.size] + (b"\xff" * count if command == REGION_READ else b"")
        return HEADER.pack(identifier, command, HEADER.size + len(reply), REPLY, 0) + reply
    return HEADER.pack(identifier, command, HEADER.size, REPLY | FAILED, errno.EIO)


def _say_seldom(times: int, what: str) -> None:
    """Say what has happened so many times already, each time that this has doubled: a VMM can't fill the log."""
    if not times & (times - 1):
        sys.stderr.write(f"holder {os.getpid()}: {what} ({times} times so far)\n")
        sys.stderr.flush()


def is_listened_at(path: Path) -> bool:
    """Whether somebody listens at a socket, or may do so."""
    # Of another kind than listeners are, so that it asks without being a connection.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)


def discard(path: Path) -> None:
    """Delete a socket that nobody listens at any more; nothing else."""
    if path.is_socket() and not is_listened_at(path):
        path.unlink()


def _listen(path: Path, kind: socket.SocketKind, backlog: int) -> socket.socket:
    """Listen at a path, in the place of a socket that nobody listens at any more. Raise OSError."""
    discard(path)
    listener = socket.socket(socket.AF_UNIX, kind)
    listener.bind(str(path))
    listener.listen(backlog)
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
        listener = _listen(options.socket, socket.SOCK_STREAM, 1)
    except OSError as error:
        sys.exit(f"can't listen at {options.socket}: {error}")
    control = _listen(options.control, socket.SOCK_SEQPACKET, _BACKLOG)
    try:
        Holder(listener, control, options.answer_within_ms / 1000, time.monotonic).run()
    finally:
        options.socket.unlink(missing_ok=True)
        options.control.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
