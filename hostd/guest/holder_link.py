"""hostd's end of the connection to a holder (hostd/guest/holder.py): frames with descriptors, and its process."""

import asyncio
import contextlib
import os
import signal
import socket
import struct
import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hostd
from hostd.guest import holder
from hostd.guest.descriptors import given, received
from hostd.guest.frames import FRAME, MAX_DESCRIPTORS, MAX_FRAME_BYTES, Kind
from hostd.memory import MemoryBusyError
from vfleet.clock import Clock
from vfleet.errors import Reason, VfleetError

START_TIMEOUT_S = 10.0
QUIT_TIMEOUT_S = 5.0
REAP_TIMEOUT_S = 2.0
_ASK_AGAIN_S = 0.02
_FRAMES_AT_ONCE = 32
_CREDENTIALS = struct.Struct("iII")  # process, user, group


class HolderGoneError(Exception):
    """The connection to the holder is broken; the holder may have ended."""


@dataclass(slots=True)
class Frame:
    """A frame from the holder. Its descriptors belong to whoever takes it."""

    kind: int
    number: int
    position: int
    key: bytes
    data: bytes
    descriptors: list[int]

    def close(self) -> None:
        """Close the descriptors that nobody has taken."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()


class HolderLink:
    """A connection to a holder. Frames are to be taken all the time; what is sent waits in order if it has to.

    `said` is how many messages were said to VMMs, also before.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._outbox: deque[tuple[bytes, int]] = deque()
        self._ringing: set[bytes] = set()
        self.said = 0
        self._loop = asyncio.get_running_loop()
        self._readable = asyncio.Event()
        self._is_reading = False

    async def receive(self) -> list[Frame]:
        """Wait for frames, and return those that are there, up to 32. Raise HolderGoneError."""
        while not (frames := self.take()):
            await self.readable()
        return frames

    async def readable(self) -> None:
        """Wait until there may be frames."""
        self._readable.clear()
        if not self._is_reading:
            self._loop.add_reader(self._socket.fileno(), self._on_readable)
            self._is_reading = True
        await self._readable.wait()

    def _on_readable(self) -> None:
        if self._readable.is_set():
            # Frames may lie there until there is room for them: nobody is to be told of that again and again.
            self._loop.remove_reader(self._socket.fileno())
            self._is_reading = False
        self._readable.set()

    def answer(self, number: int, message: bytes) -> None:
        """Answer a message of the VMM."""
        self._send(FRAME.pack(Kind.ANSWER, 0, number, 0) + message)

    def done(self, number: int, position: int) -> None:
        """Say that all messages up to a number are done; a successor is given the position."""
        self._send(FRAME.pack(Kind.DONE, 0, number, position))

    def keep(self, key: bytes, data: bytes, descriptor: int = -1) -> None:
        """Let the holder keep something for whoever comes after this hostd. The descriptor stays the caller's."""
        self._send(FRAME.pack(Kind.KEEP, len(key), 0, 0) + key + data, descriptor)

    def drop(self, key: bytes) -> None:
        """Let the holder keep something no longer."""
        self._send(FRAME.pack(Kind.DROP, len(key), 0, 0) + key)

    def ring(self, key: bytes) -> None:
        """Let the holder tell of an interrupt by the eventfd that it keeps by a key. Those that wait become one."""
        if key not in self._ringing:
            self._send(FRAME.pack(Kind.RING, len(key), 0, 0) + key)
            if self._outbox:
                self._ringing.add(key)

    def say(self, vmm_number: int, message: bytes, write: int = 0) -> int:
        """Say something to the VMM that has connected by a number, once; return its own, of which it gets 16 bits.

        `write` is the sequence of a DMA write that is said with it. Raise MemoryBusyError if the holder can't take it.
        """
        number = (self.said + 1) & 0xFFFF
        frame = FRAME.pack(Kind.SAY, 0, vmm_number, write) + number.to_bytes(2, "little") + message[2:]
        try:
            # It must not wait here: what the function is told to have been written, no kill may take back.
            if self._outbox:
                raise MemoryBusyError
            self._socket.sendmsg([frame])
        except OSError:
            raise MemoryBusyError from None
        self.said += 1
        return self.said

    async def quit(self) -> None:
        """Let the holder end, and end it if it doesn't: its VMM may keep it from all work."""
        self._send(FRAME.pack(Kind.QUIT, 0, 0, 0))
        try:
            async with asyncio.timeout(QUIT_TIMEOUT_S):
                while True:
                    for frame in await self.receive():
                        frame.close()
        except HolderGoneError:
            pass
        except TimeoutError:
            # It has listened for this connection, so the number is its own as long as the connection is there.
            credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            os.kill(_CREDENTIALS.unpack(credentials)[0], signal.SIGKILL)
        finally:
            self.close()

    def close(self) -> None:
        """Leave the holder to whoever comes next."""
        if self._socket.fileno() >= 0:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            for _, descriptor in self._outbox:
                _close(descriptor)
            self._outbox.clear()
            self._socket.close()

    def take(self) -> list[Frame]:
        """Return the frames that are there, up to 32. Raise HolderGoneError."""
        frames: list[Frame] = []
        while len(frames) < _FRAMES_AT_ONCE:
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    MAX_FRAME_BYTES, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except OSError:
                data, ancillary, flags = b"", [], 0
            if not data:
                if frames:
                    break
                raise HolderGoneError
            kind, key_bytes, number, position = FRAME.unpack_from(data)
            start = FRAME.size + key_bytes
            frames.append(Frame(kind, number, position, data[FRAME.size : start], data[start:], received(ancillary)))
            if flags & socket.MSG_CTRUNC:
                for each in frames:
                    each.close()
                raise VfleetError(Reason.LIMIT_EXCEEDED, "this process has no room for a guest's descriptors")
        return frames

    def _send(self, frame: bytes, descriptor: int = -1) -> None:
        if self._outbox or not self._try_to_send(frame, descriptor):
            self._outbox.append((frame, os.dup(descriptor) if descriptor >= 0 else -1))
            self._loop.add_writer(self._socket, self._flush)

    def _try_to_send(self, frame: bytes, descriptor: int) -> bool:
        try:
            self._socket.sendmsg([frame], given([descriptor] if descriptor >= 0 else []))
        except BlockingIOError:
            return False
        except OSError:
            # What is lost is said again on the next connection: let `take` say that this one is over.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        return True

    def _flush(self) -> None:
        while self._outbox and self._try_to_send(*self._outbox[0]):
            frame, descriptor = self._outbox.popleft()
            _close(descriptor)
            # An interrupt that comes from now on has to be told by another. (Of other frames too many are forgotten.)
            self._ringing.discard(frame[FRAME.size :])
        if not self._outbox:
            self._loop.remove_writer(self._socket)


def connect(directory: Path, name: str) -> HolderLink | None:
    """Connect to the holder of this name; None if there is none, or it has ended.

    Raise HOST_UNAVAILABLE if it lives and has no time: its VMM keeps it from all work, and many have tried before.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(0)
    try:
        with _address(directory, name) as address:
            connection.connect(address)
    except (ConnectionRefusedError, FileNotFoundError):
        connection.close()
        return None
    except BlockingIOError:
        connection.close()
        raise VfleetError(Reason.HOST_UNAVAILABLE, f"the holder of guest {name!r} takes no connection") from None
    return HolderLink(connection)


def is_there(directory: Path, name: str) -> bool:
    """Whether the holder of this name lives."""
    with _address(directory, name) as address:
        return holder.is_listened_at(Path(address))


@contextlib.contextmanager
def _address(directory: Path, name: str) -> Iterator[str]:
    """Lend the address of a holder's socket: by way of a descriptor, since an address has no more than 107 bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    at = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{at}/{name}.control"
    finally:
        os.close(at)


async def start(directory: Path, name: str, path: str, answer_within_ms: int, clock: Clock) -> HolderLink:
    """Start a holder for the socket at `path`, and connect to it. Raise HOST_UNAVAILABLE if it doesn't start.

    It outlives this process. Its process ID is in the directory, for whoever wants to see that none is left.
    """
    pid = _spawn(directory, name, path, answer_within_ms)
    try:
        return await _listening(directory, name, pid, clock)
    except BaseException:
        # It may listen yet, when nobody knows of it any more.
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        await until_reaped(directory, name, clock)
        raise


async def _listening(directory: Path, name: str, pid: int, clock: Clock) -> HolderLink:
    give_up_s = clock.monotonic() + START_TIMEOUT_S
    while (link := connect(directory, name)) is None:
        if reap(pid) or clock.monotonic() >= give_up_s:
            said = _last_line(directory / f"{name}.log")
            raise VfleetError(Reason.HOST_UNAVAILABLE, f"guest {name!r}'s holder doesn't start: {said}")
        await clock.sleep(_ASK_AGAIN_S)
    return link


def reap(pid: int) -> bool:
    """Return whether a child of this process has ended. Of another process it isn't known."""
    try:
        return _has_ended(pid)
    except ChildProcessError:
        return False


async def until_reaped(directory: Path, name: str, clock: Clock) -> None:
    """Wait, a moment at most, until a holder that is about to end has ended; no zombie stays if it is a child."""
    give_up_s = clock.monotonic() + REAP_TIMEOUT_S
    # Another process's child, or one whose number isn't known, is not waited for.
    with contextlib.suppress(OSError, ValueError):
        pid = int((directory / f"{name}.pid").read_text())
        while not _has_ended(pid) and clock.monotonic() < give_up_s:
            await clock.sleep(_ASK_AGAIN_S)


def forget(directory: Path, name: str, path: str) -> None:
    """Delete what was left by a holder that has ended: its socket too, if it was killed and that may be deleted."""
    # The path is what somebody wrote in a request: it may lie where this process may not even look.
    with contextlib.suppress(OSError):
        holder.discard(Path(path))
    for suffix in ("log", "pid", "control"):
        (directory / f"{name}.{suffix}").unlink(missing_ok=True)


def _spawn(directory: Path, name: str, path: str, answer_within_ms: int) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-P",
        "-m",
        holder.__name__,
        "--directory",
        str(directory),
        "--control",
        f"{name}.control",
    ]
    command += ["--socket", path, "--answer-within-ms", str(answer_within_ms)]
    log = str(directory / f"{name}.log")
    # Without a parent's hand on it, as it outlives this process: it has a session of its own, and nobody waits for it.
    pid = os.posix_spawn(
        sys.executable,
        command,
        {**os.environ, "PYTHONPATH": str(Path(hostd.__file__).parents[1])},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    (directory / f"{name}.pid").write_text(str(pid))
    return pid


def _has_ended(child: int) -> bool:
    """Return whether a child of this process has ended. Raise ChildProcessError of another process."""
    return os.waitpid(child, os.WNOHANG)[0] == child


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it says nothing"


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        os.close(descriptor)
