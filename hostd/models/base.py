"""The contract between a simulated device and the engine that runs it.

A model is pure: it sees its memory and returns stores, and the engine makes the stores durable together with the
access's sequence before it puts them into memory. So a model knows nothing of drivers, hosts, migrations or files.

    function's image:  0                          bar_span(bars)            + private_bytes
                       | BARs, as in the window   | the model's own memory  |
"""

from collections.abc import Sequence
from typing import Protocol

Store = tuple[int, bytes]
"""An offset in the function's image, and the bytes to put there."""


class DeviceModel(Protocol):
    """One function of a simulated device.

    The engine has checked each access: a power of two from 1 to 4096 bytes, naturally aligned. `offset` is that in the
    function's window, where the BARs lie as `vfleet.address.bar_layout` says. `memory` is the whole image. No access
    makes a model raise.
    """

    name: str
    private_bytes: int
    """Memory of the model's own, after the BARs in the image: a multiple of 4096."""

    def reset(self) -> Sequence[Store]:
        """Return the stores that give the registers their initial values, over zeroed memory (FLR)."""

    def read(self, memory: memoryview, offset: int, length: int) -> tuple[bytes, Sequence[Store]] | None:
        """Return `length` bytes and the read's side effects; None if no BAR claims the offset."""

    def write(self, memory: memoryview, offset: int, data: bytes) -> Sequence[Store] | None:
        """Return what the write changes; None if no BAR claims the offset."""
