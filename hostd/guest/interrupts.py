"""A guest's interrupts: an eventfd a vector, which the VMM (or KVM) waits for and the holder keeps and writes to."""

from collections.abc import Callable


class Interrupts:
    """Which of `vectors` vectors have an eventfd. An interrupt of one that has none is told once it has one."""

    def __init__(self, vectors: int, ring: Callable[[int], None]) -> None:
        """`ring` is called with the vector of an interrupt to be told."""
        self._vectors = vectors
        self._ring = ring
        self._set: set[int] = set()
        self._missed: set[int] = set()

    def set(self, vector: int) -> None:
        """Let interrupts of a vector be told by its eventfd, which the holder has been given."""
        self._set.add(vector)
        if vector in self._missed:
            self._missed.discard(vector)
            self._ring(vector)

    def unset(self, vector: int) -> None:
        """Let interrupts of a vector be told to nobody."""
        self._set.discard(vector)

    def clear(self) -> list[int]:
        """Let none be told any more, and forget those that weren't. Return the vectors that had an eventfd."""
        vectors = sorted(self._set)
        self._set.clear()
        self._missed.clear()
        return vectors

    def raise_(self, vector: int) -> None:
        """Tell of an interrupt."""
        if vector in self._set:
            self._ring(vector)
        elif vector < self._vectors:
            self._missed.add(vector)

    def raise_all(self) -> None:
        """Tell of one of each: a hostd that was killed may not have told of the last."""
        for vector in range(self._vectors):
            self.raise_(vector)
