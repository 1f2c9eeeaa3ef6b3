"""What a daemon that is killed at any instruction leaves of a function's image."""

import mmap
import sys
from collections.abc import Callable, Iterator
from random import Random
from types import FrameType

import hostd.direct
import hostd.image
from hostd.image import FunctionImage, image_bytes

MEMORY_BYTES = 2 * 4096
_TRACED = (hostd.image.__file__, hostd.direct.__file__)


def new_image(content: bytes = b"", memory_bytes: int = MEMORY_BYTES) -> FunctionImage:
    mapped = mmap.mmap(-1, image_bytes(memory_bytes))
    mapped[: len(content)] = content
    return FunctionImage(mapped)


def content_of(image: FunctionImage) -> bytes:
    """Return the file's bytes as the next process finds them."""
    # The memory is the end of the one buffer that all views are of.
    return bytes(image.memory.obj)


def snapshots_during(image: FunctionImage, work: Callable[[], object]) -> list[bytes]:
    """Return the file as it is between any two of the interpreter's instructions in `work`, each state once."""
    found = [content_of(image)]

    def trace(frame: FrameType, event: str, argument: object):
        if frame.f_code.co_filename not in _TRACED:
            return None
        frame.f_trace_opcodes = True
        content = content_of(image)
        if content != found[-1]:
            found.append(content)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return [*found, content_of(image)]


def torn(before: bytes, after: bytes, random: Random) -> Iterator[bytes]:
    """Yield what a kill in the middle of one copy of bytes may leave. A store of one aligned word is never torn."""
    changed = [index for index in range(0, len(before), 8) if before[index : index + 8] != after[index : index + 8]]
    if len(changed) < 2:
        return
    cuts = {1, len(changed) // 2, len(changed) - 1}
    orders = [changed, changed[::-1], random.sample(changed, len(changed))]
    for order in orders:
        for cut in sorted(cuts):
            content = bytearray(before)
            for index in order[:cut]:
                content[index : index + 8] = after[index : index + 8]
            yield bytes(content)
