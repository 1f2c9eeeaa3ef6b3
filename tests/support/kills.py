"""What a kill leaves of a mapped file: its content between any two instructions, and in the middle of one copy."""

import sys
from collections.abc import Callable, Iterator
from random import Random
from types import FrameType


def snapshots_during(source: str, content_of: Callable[[], bytes], work: Callable[[], object]) -> list[bytes]:
    """Return the file as it is between any two instructions of the code in `source` during `work`, each state once."""
    found = [content_of()]

    def trace(frame: FrameType, event: str, argument: object):
        if frame.f_code.co_filename != source:
            return None
        frame.f_trace_opcodes = True
        content = content_of()
        if content != found[-1]:
            found.append(content)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return [*found, content_of()]


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
