"""Whatever state a function of any model is in moves as it is, in either mode, or is refused as a whole."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bench import attempt
from support.transfer_pair import Pair, exported, receive

from hostd import transfer
from hostd.arrival import Arrival
from hostd.instance import Instance
from hostd.models import MODELS
from hostd.rounds import FEW_DIRTY_BYTES
from hostd.state_stream import local_pages
from vfleet.address import PAGE_BYTES, bar_span
from vfleet.errors import Reason, VfleetError
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE
from vfleet.v1.transfer_service_pb2 import ExportStateResponse, FetchStateRequest
from vfleet.v1.types_pb2 import TRANSFER_MODE_POST_COPY, TRANSFER_MODE_PRE_COPY, TransferMode

MODES = (TRANSFER_MODE_PRE_COPY, TRANSFER_MODE_POST_COPY)
# A new model needs a line here.
BARS = {
    "accelerator": {0: 8192, 2: 1 << 20},
    "checker": {0: 4096, 2: 1 << 20},
    "nvme": {0: 16384, 2: 1 << 20},
    "virtio-net": {0: 32768},
}


@dataclass
class Driver:
    """Accesses at random, of any size and place that the engine lets through; more of them to registers."""

    instance: Instance
    random: Random
    writes: int = field(default=0)

    def act(self) -> None:
        instance, random = self.instance, self.random
        length = 1 << random.choice((0, 1, 2, 3, 3, 3, 3, 12))
        section = random.choice([s for s in instance.sections if s.start < self.window_end()])
        end = min(section.length, 1024 if random.random() < 0.5 else section.length)
        offset = section.start + random.randrange(max(end // length, 1)) * length
        sequencer = instance.image.sequencer(random.choice(("d1", "d2")))
        kind = random.choice((ACCESS_KIND_READ, ACCESS_KIND_WRITE))
        data = random.choice((random.randbytes(length), random.randrange(1, 9).to_bytes(length, "little")))
        address = instance.about.base + offset
        instance.access(
            sequencer, sequencer.last + 1, kind, address, length, data if kind == ACCESS_KIND_WRITE else b""
        )

    def window_end(self) -> int:
        return bar_span({bar.index: bar.size_bytes for bar in self.instance.about.bars})


def snapshots(instance: Instance) -> list[bytes]:
    memory = instance.image.memory
    return [bytes(memory[start : start + PAGE_BYTES]) for start in range(0, len(memory), PAGE_BYTES)]


@pytest.mark.parametrize("model", sorted(MODELS))
@given(seed=st.integers(0, 1 << 32), actions=st.integers(1, 200))
@settings(max_examples=25, deadline=None)
def test_tracking_never_misses_a_page(model: str, seed: int, actions: int):
    with a_pair(model) as pair:
        driver = Driver(pair.source, Random(seed))
        before = snapshots(pair.source)
        dirty = pair.source.image.track()
        for _ in range(actions):
            driver.act()
        if seed % 5 == 0:
            pair.source.reset()
        after = snapshots(pair.source)
        changed = {page for page, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}
        assert changed <= dirty
        assert pair.source.image.untrack(dirty)
        in_sections = {
            page
            for s in pair.source.sections
            for page in range(s.start // PAGE_BYTES, (s.start + s.length) // PAGE_BYTES)
        }
        assert all(page in in_sections or not any(data) for page, data in enumerate(after))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", sorted(MODELS))
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=15, deadline=None)
def test_any_state_comes_out_as_it_went_in(model: str, mode: TransferMode.ValueType, seed: int):
    """The driver writes during all rounds."""

    async def move() -> None:
        random = Random(seed)
        driver = Driver(pair.source, random)
        for _ in range(random.randrange(200)):
            driver.act()
        parts = []
        async with aclosing(pair.export(max_rounds=random.randrange(1, 5), mode=mode)) as export:
            async for part in export:
                parts.append(part)
                if not pair.source.is_serving:
                    continue
                for _ in range(random.choice((0, 3, 2 * FEW_DIRTY_BYTES // PAGE_BYTES))):
                    driver.act()
                if part.round_end.last_before_stop or random.random() < 0.02:
                    pair.h1.stop(1, 10)
        receiver = receive(pair.target, parts, mode)
        if mode == TRANSFER_MODE_POST_COPY:
            await fetch_rest(pair, receiver.early)
        assert pair.target.image.memory == pair.source.image.memory
        assert exported(pair.target.image) == exported(pair.source.image)

    with a_pair(model) as pair:
        asyncio.run(move())


async def fetch_rest(pair: Pair, early: list[tuple[int, bytes]]) -> None:
    """Fetch what did not come early."""
    local = local_pages(pair.source)
    if not local:
        return
    arrival = Arrival(pair.target.image, pair.target.model.local_memory, is_new=True)
    for offset, data in early:
        arrival.take(offset // PAGE_BYTES, data)
    request = FetchStateRequest(
        attempt=attempt(10),
        function="vf1",
        generation=1,
        image_offset=local.start * PAGE_BYTES,
        length_bytes=len(local) * PAGE_BYTES,
        arrived=arrival.as_bits(local),
    )
    async for response in transfer.fetch_state(pair.h1.functions, pair.h1.clock, request):
        pages = response.pages
        arrival.take(pages.image_offset // PAGE_BYTES, pages.data, pages.zero_bytes // PAGE_BYTES)
    assert arrival.missing_pages == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", sorted(MODELS))
def test_no_flip_of_any_bit_lets_another_state_in(model: str, mode: TransferMode.ValueType):
    """Each part of the stream, its pages of each section, round ends and the end: damaged anywhere, it is refused.

    A flip that leaves the message's meaning as it was (it may hit what no reader looks at) is no damage.
    """

    async def parts_of() -> list[ExportStateResponse]:
        driver = Driver(pair.source, Random(1))
        for _ in range(100):
            driver.act()
        found = []
        async with aclosing(pair.export(mode=mode)) as export:
            async for part in export:
                found.append(part)
                if part.round_end.last_before_stop:
                    driver.act()
                    pair.h1.stop(1, 10)
        return found

    random = Random(2)
    refused = 0
    with a_pair(model) as pair:
        parts = asyncio.run(parts_of())
        kinds = {part.WhichOneof("part") for part in parts}
        assert kinds == {"header", "pages", "round_end", "end"}
        for index, part in enumerate(parts):
            data = part.SerializeToString()
            bits = range(len(data) * 8) if len(data) < 64 else sorted(random.sample(range(len(data) * 8), 64))
            for bit in bits:
                flipped = bytearray(data)
                flipped[bit // 8] ^= 1 << bit % 8
                refused += is_refused(pair, mode, parts, index, bytes(flipped))
    assert refused > 100


def is_refused(
    pair: Pair, mode: TransferMode.ValueType, parts: list[ExportStateResponse], index: int, data: bytes
) -> bool:
    """Return whether the stream with other bytes in the place of one part is refused; else it means the same."""
    try:
        damaged = ExportStateResponse.FromString(data)
    except DecodeError:
        return True
    pair.target.image.clear()
    try:
        receive(pair.target, [*parts[:index], damaged, *parts[index + 1 :]], mode)
    except VfleetError as error:
        if error.reason is not Reason.BAD_STATE:
            raise
        return True
    came = ExportStateResponse()
    came.CopyFrom(damaged)
    came.DiscardUnknownFields()
    assert came == parts[index]
    return False


class a_pair:  # noqa: N801  # used like a function
    """A source and a target of a model, in a directory that goes with them."""

    def __init__(self, model: str) -> None:
        self._model = model

    def __enter__(self) -> Pair:
        self._directory = TemporaryDirectory()
        self._pair = Pair(Path(self._directory.name), bars=BARS.get(self._model), model=self._model)
        return self._pair

    def __exit__(self, *_: object) -> None:
        self._pair.close()
        self._directory.cleanup()
