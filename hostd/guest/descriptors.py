"""Descriptors that come through a socket: how they are taken and given, and what they are. Nothing of vfleet's."""

import array
import fcntl
import os
import socket
from collections.abc import Sequence

Ancillary = list[tuple[int, int, "array.array[int]"]]


def received(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    """Return the descriptors that came with what `recvmsg` has returned. They belong to the caller."""
    found = array.array("i")
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


def given(descriptors: Sequence[int]) -> Ancillary:
    """Return what `sendmsg` is to be given to send descriptors, which stay the caller's."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []


def is_eventfd(descriptor: int) -> bool:
    """Whether a descriptor is an eventfd."""
    return os.readlink(f"/proc/self/fd/{descriptor}").startswith("anon_inode:[eventfd]")  # noqa: PTH115


def is_memory(descriptor: int) -> bool:
    """Whether a descriptor is of memory: only that can have seals."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True
