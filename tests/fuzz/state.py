"""A function's state as it arrives: damaged in any way, it is refused, or it was not damaged."""

import asyncio
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from atheris import FuzzedDataProvider
from fuzz.messages import fill
from google.protobuf.message import DecodeError
from support.transfer_pair import Pair, Parts, exported

from hostd.state_stream import Receiver
from vfleet.errors import VfleetError
from vfleet.v1.transfer_service_pb2 import ExportStateResponse
from vfleet.v1.types_pb2 import TRANSFER_MODE_POST_COPY, TRANSFER_MODE_PRE_COPY

MODELS = ("checker", "nvme")
CHANGES = 4


@cache
def pair(model: str) -> tuple[Pair, list[bytes]]:
    """Return a source and a target, and the source's stream."""
    found = Pair(Path(mkdtemp(prefix="vfleet-fuzz-")), None if model == "checker" else {0: 16384, 2: 1 << 20}, model)
    parts = asyncio.run(found.parts())
    return found, [part.SerializeToString() for part in parts]


def target(given: bytes) -> None:
    """Change a stream here and there, and let a target take it."""
    data = FuzzedDataProvider(given)
    both, stream = pair(data.PickValueInList(list(MODELS)))
    parts = _changed([ExportStateResponse.FromString(part) for part in stream], data)
    is_changed = [part.SerializeToString() for part in parts] != stream
    image = both.target.image
    image.clear()
    mode = data.PickValueInList([TRANSFER_MODE_PRE_COPY] * 3 + [TRANSFER_MODE_POST_COPY])
    receiver = Receiver(both.target, mode, lambda offset, piece: image.store([(offset, piece)]))
    try:
        for part in parts:
            receiver.take(part)
        receiver.check_complete()
    except VfleetError:
        if is_changed or mode == TRANSFER_MODE_POST_COPY:
            return
        raise
    # What was taken is what the source has, whatever was changed on the way.
    assert image.memory == both.source.image.memory
    assert exported(image) == exported(both.source.image)


def _changed(parts: Parts, data: FuzzedDataProvider) -> Parts:
    for _ in range(data.ConsumeIntInRange(0, CHANGES)):
        index = data.ConsumeIntInRange(0, max(len(parts) - 1, 0))
        kind = data.ConsumeIntInRange(0, 5)
        if not parts:
            break
        if kind == 0:
            del parts[index]
        elif kind == 1:
            parts.insert(index, parts[data.ConsumeIntInRange(0, len(parts) - 1)])
        elif kind == 2:
            parts.insert(index, _random(data))
        elif kind == 3:
            # Some fields of one that is otherwise as it was.
            changed = ExportStateResponse.FromString(parts[index].SerializeToString())
            changed.MergeFrom(_random(data))
            parts[index] = changed
        else:
            content = bytearray(parts[index].SerializeToString())
            if content:
                content[data.ConsumeIntInRange(0, len(content) - 1)] ^= 1 << data.ConsumeIntInRange(0, 7)
            try:
                parts[index] = ExportStateResponse.FromString(bytes(content))
            except DecodeError:
                del parts[index]
    return parts


def _random(data: FuzzedDataProvider) -> ExportStateResponse:
    message = ExportStateResponse()
    fill(message, data)
    return message
