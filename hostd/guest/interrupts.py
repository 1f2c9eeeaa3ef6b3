"""A guest's interrupts: an eventfd a vector, which the VMM (or KVM) waits for."""

import contextlib
import os
from pathlib import Path

from hostd.guest.vfio_user import ProtocolError

_EVENTFD = "anon_inode:[eventfd]"


class Interrupts:
    """The eventfds of `vectors` vectors. An interrupt that comes while its vector has none is told once it has one."""

    def __init__(self, vectors: int) -> None:
        self._vectors = vectors
        self._eventfds: dict[int, int] = {}
        self._missed: set[int] = set()

    def set(self, vector: int, descriptor: int) -> None:
        """Let interrupts of a vector be told by an eventfd, which is owned from now on.

        Raise ProtocolError for a descriptor of another kind: to write to it could block.
        """
        if not str(Path(f"/proc/self/fd/{descriptor}").readlink()).startswith(_EVENTFD):
            os.close(descriptor)
            raise ProtocolError("a descriptor that is no eventfd")
        os.set_blocking(descriptor, False)
        self.unset(vector)
        self._eventfds[vector] = descriptor
        if vector in self._missed:
            self._missed.discard(vector)
            self.raise_(vector)

    def unset(self, vector: int) -> bool:
        """Let interrupts of a vector be told to nobody. Return whether they were."""
        descriptor = self._eventfds.pop(vector, None)
        if descriptor is not None:
            os.close(descriptor)
        return descriptor is not None

    def clear(self) -> list[int]:
        """Let none be told any more, and forget those that weren't. Return the vectors that had an eventfd."""
        vectors = list(self._eventfds)
        for vector in vectors:
            self.unset(vector)
        self._missed.clear()
        return vectors

    def raise_(self, vector: int) -> None:
        """Tell of an interrupt."""
        descriptor = self._eventfds.get(vector)
        if descriptor is not None:
            # One that is full has been told more than often enough.
            with contextlib.suppress(BlockingIOError):
                os.eventfd_write(descriptor, 1)
        elif vector < self._vectors:
            self._missed.add(vector)

    def raise_all(self) -> None:
        """Tell of one of each: a hostd that was killed may not have told of the last."""
        for vector in list(self._eventfds):
            self.raise_(vector)
