"""What a daemon that is killed at any instruction leaves of a function's image."""

import mmap
from collections.abc import Callable

from support import kills
from support.kills import torn

import hostd.direct
import hostd.image
import hostd.plain_redo
import hostd.sequencer
from hostd.image import FunctionImage, image_bytes

MEMORY_BYTES = 2 * 4096
__all__ = ["content_of", "new_image", "snapshots_during", "torn"]

_TRACED = tuple(module.__file__ for module in (hostd.direct, hostd.image, hostd.plain_redo, hostd.sequencer))


def new_image(content: bytes = b"", memory_bytes: int = MEMORY_BYTES, engine_start: int | None = None) -> FunctionImage:
    mapped = mmap.mmap(-1, image_bytes(memory_bytes))
    mapped[: len(content)] = content
    return FunctionImage(mapped, engine_start)


def content_of(image: FunctionImage) -> bytes:
    """Return the file's bytes as the next process finds them."""
    # The memory is the end of the one buffer that all views are of.
    return bytes(image.memory.obj)


def snapshots_during(image: FunctionImage, work: Callable[[], object]) -> list[bytes]:
    """Return the file as it is between any two of the interpreter's instructions in `work`, each state once."""
    return kills.snapshots_during(_TRACED, lambda: content_of(image), work)
