"""The format of a function's state on its way: parts, each with a checksum, and an end that says what must have come.

    header -> pages ... round end -> pages ... round end -> ... -> pages ... -> end, with the last pages

Every page belongs to a section of the model's; what lies in none is zero and isn't sent. A receiver takes all or
nothing: whatever is missing, repeated, damaged or meant for another function, model, version or layout is refused.
"""

import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain

from hostd.instance import Instance
from hostd.models.base import Section
from vfleet.address import PAGE_BYTES
from vfleet.errors import Reason, VfleetError
from vfleet.v1.transfer_service_pb2 import (
    DriverSequence,
    ExportStateResponse,
    RoundEnd,
    SectionCheck,
    StateEnd,
    StateHeader,
    StatePages,
    StateSection,
)
from vfleet.v1.types_pb2 import TRANSFER_MODE_POST_COPY, TransferMode

FORMAT_VERSION = 5
CHUNK_PAGES = 64  # 256 KiB: as fast as larger ones, and an access waits for no more than one

BYTES_WITH_END = CHUNK_PAGES * PAGE_BYTES

_ZEROS = bytes(CHUNK_PAGES * PAGE_BYTES)
_CRC = struct.Struct("<I")
_PLACE = struct.Struct("<QQ")

PageRun = tuple[int, int, int]
"""The index of a section; the first page, counted in the image; how many pages, at most a chunk."""


def runs(sections: Sequence[Section], pages: Iterable[int]) -> Iterator[PageRun]:
    """Yield runs of consecutive pages, given in ascending order, none across the end of a section."""
    index, section = -1, Section("", 0, 0)
    first = count = 0
    for page in pages:
        if page * PAGE_BYTES >= section.start + section.length:
            if count:
                yield index, first, count
            count = 0
            while page * PAGE_BYTES >= section.start + section.length:
                index += 1
                section = sections[index]
        if count and page == first + count and count < CHUNK_PAGES:
            count += 1
            continue
        if count:
            yield index, first, count
        first, count = page, 1
    if count:
        yield index, first, count


def moving_pages(instance: Instance, mode: TransferMode.ValueType) -> list[range]:
    """Return the pages that move before COMMIT, in ascending order: all, or in post-copy all but the local memory."""
    local = local_pages(instance) if mode == TRANSFER_MODE_POST_COPY else range(0)
    pages = []
    for section in instance.sections:
        own = range(section.start // PAGE_BYTES, (section.start + section.length) // PAGE_BYTES)
        if not local or own.stop <= local.start or own.start >= local.stop:
            pages.append(own)
    return pages


def local_pages(instance: Instance) -> range:
    """Return the pages of the local memory, which post-copy leaves for later."""
    local = instance.model.local_memory
    return range(local.start // PAGE_BYTES, local.stop // PAGE_BYTES)


class Writer:
    """Makes the parts of one stream, and keeps count of them."""

    def __init__(self, instance: Instance, mode: TransferMode.ValueType) -> None:
        self._instance = instance
        self.mode = mode
        self._checks = [SectionCheck() for _ in instance.sections]
        self._order_crc = 0

    def header(self) -> ExportStateResponse:
        """Return the first part."""
        about, model = self._instance.about, self._instance.model
        return ExportStateResponse(
            header=StateHeader(
                format_version=FORMAT_VERSION,
                model=about.model,
                model_version=model.version,
                bars=about.bars,
                identity=about.identity,
                image_bytes=len(self._instance.image.memory),
                sections=_shown(self._instance.sections),
                mode=self.mode,
            )
        )

    def pages(self, pages: Iterable[int], *, skip_zero: bool = False) -> Iterator[ExportStateResponse | None]:
        """Yield the pages given, in ascending order, as they are when their part is made; None for zeros left out."""
        memory = self._instance.image.memory
        for index, first, count in runs(self._instance.sections, pages):
            check_exists(self._instance)
            offset = first * PAGE_BYTES
            data = bytes(memory[offset : offset + count * PAGE_BYTES])
            if skip_zero and is_zero(data):
                yield None
                continue
            part = ExportStateResponse()
            # Filled in place: a message that is handed over is copied.
            filled = part.pages
            filled.image_offset, filled.data, filled.crc = offset, data, pages_crc(offset, data)
            self._order_crc = _count(self._checks[index], filled.crc, self._order_crc)
            yield part

    def round_end(self, end: RoundEnd) -> ExportStateResponse:
        """Return the part that ends a round."""
        end.crc = round_crc(end)
        return ExportStateResponse(round_end=end)

    def rest(self, pages: Iterable[int], early: Iterable[int] = ()) -> Iterator[ExportStateResponse]:
        """Yield the last pages, in ascending order, and the end, which takes as many of them along as it may.

        `early` are pages of local memory in post-copy, in ascending order, fewer than the end may take along.
        """
        kept: deque[StatePages] = deque()
        kept_bytes = 0
        for part in chain(self.pages(pages), self.pages(early)):
            if part is None:
                continue
            kept.append(part.pages)
            kept_bytes += len(part.pages.data)
            while kept_bytes > BYTES_WITH_END:
                first = kept.popleft()
                kept_bytes -= len(first.data)
                yield ExportStateResponse(pages=first)
        yield self.end(kept)

    def end(self, pages: Iterable[StatePages] = ()) -> ExportStateResponse:
        """Return the last part, with the last `pages`, which were counted before. The function is stopped."""
        check_exists(self._instance)
        sequences = [sequencer.export() for sequencer in self._instance.image.sequencers()]
        end = StateEnd(sequences=sequences, sections=self._checks, pages=pages)
        end.crc = end_crc(end.sequences, end.sections, self._order_crc)
        return ExportStateResponse(end=end)


class Receiver:
    """Takes the parts of a stream in and checks each; complete only after the end. `store` takes offset and bytes.

    `early` are the pages of local memory, by their offsets, that came with the end in post-copy; nobody stored them.
    """

    def __init__(self, instance: Instance, mode: TransferMode.ValueType, store: Callable[[int, bytes], None]) -> None:
        self._instance = instance
        self._store = store
        self._mode = mode
        self._sections = instance.sections
        self._checks = [SectionCheck() for _ in self._sections]
        self._order_crc = 0
        self._rounds = 0
        self._has_header = False
        self._ended = False
        self.received_bytes = 0
        self.early: list[tuple[int, bytes]] = []

    def take(self, part: ExportStateResponse) -> None:
        """Take one part in. Raise BAD_STATE."""
        kind = part.WhichOneof("part")
        if self._ended or (kind == "header") is self._has_header:
            raise bad_state(self._instance, f"a part ({kind}) comes out of order")
        if kind == "pages":
            self._store(*self._checked_pages(part.pages))
        elif kind == "header":
            self._check_header(part.header)
            self._has_header = True
        elif kind == "round_end":
            self._check_round(part.round_end)
        elif kind == "end":
            self._take_end(part.end)
        else:
            raise bad_state(self._instance, "a part is of a kind that this version does not know")

    def check_complete(self) -> None:
        """Raise BAD_STATE if the stream ended before its end."""
        if not self._ended:
            raise bad_state(self._instance, "the stream broke off before its end")

    def _check_header(self, header: StateHeader) -> None:
        about, model = self._instance.about, self._instance.model
        for field, came, expected in (
            ("format version", header.format_version, FORMAT_VERSION),
            ("model", header.model, about.model),
            ("model's version", header.model_version, model.version),
            ("BARs", _texts(header.bars), _texts(about.bars)),
            ("identity", header.identity, about.identity),
            ("image bytes", header.image_bytes, len(self._instance.image.memory)),
            ("sections", _texts(header.sections), _texts(_shown(self._instance.sections))),
            ("mode", header.mode, self._mode),
        ):
            if came != expected:
                raise bad_state(self._instance, f"the {field} of the state is {came!r}; expected {expected!r}")

    def _checked_pages(self, pages: StatePages, *, is_end: bool = False) -> tuple[int, bytes]:
        """Count pages, and return where they lie and their bytes."""
        offset, data = pages.image_offset, pages.data
        check_pages(self._instance, pages)
        end = offset + len(data)
        index = next((i for i, s in enumerate(self._sections) if s.start <= offset and end <= s.start + s.length), None)
        if index is None or not data:
            raise bad_state(self._instance, f"pages at {offset:#x}+{len(data):#x} lie in no section")
        if self._is_rest(offset) and not is_end:
            raise bad_state(self._instance, f"pages at {offset:#x} are of local memory, which follows after COMMIT")
        self._order_crc = _count(self._checks[index], pages.crc, self._order_crc)
        self.received_bytes += len(data)
        return offset, data

    def _is_rest(self, offset: int) -> bool:
        return self._mode == TRANSFER_MODE_POST_COPY and offset in self._instance.model.local_memory

    def _check_round(self, end: RoundEnd) -> None:
        self._rounds += 1
        if end.round != self._rounds or end.crc != round_crc(end):
            raise bad_state(self._instance, f"the end of round {end.round} is damaged, or not that of {self._rounds}")

    def _take_end(self, end: StateEnd) -> None:
        for pages in end.pages:
            offset, data = self._checked_pages(pages, is_end=True)
            if self._is_rest(offset):
                self.early.append((offset, data))
            else:
                self._store(offset, data)
        if len(end.sections) != len(self._sections):
            raise bad_state(self._instance, f"{len(end.sections)} sections came; expected {len(self._sections)}")
        for section, came, sent in zip(self._sections, self._checks, end.sections, strict=True):
            if came != sent:
                message = f"{came.page_messages} page messages came of section {section.name!r}; the source sent"
                raise bad_state(self._instance, f"{message} {sent.page_messages}, or others")
        if end.crc != end_crc(end.sequences, end.sections, self._order_crc):
            raise bad_state(self._instance, "the checksum of the end is wrong")
        for sequence in end.sequences:
            self._instance.image.sequencer(sequence.driver).load(sequence)
        self._ended = True


def is_zero(data: bytes) -> bool:
    """Return whether all bytes, at most a chunk, are zero."""
    return data == (_ZEROS if len(data) == len(_ZEROS) else _ZEROS[: len(data)])


def check_pages(instance: Instance, pages: StatePages) -> None:
    """Raise BAD_STATE unless pages are whole, within the image, and as they were sent."""
    offset, data = pages.image_offset, pages.data
    if offset % PAGE_BYTES or len(data) % PAGE_BYTES or offset + len(data) > len(instance.image.memory):
        raise bad_state(instance, f"pages at {offset:#x}+{len(data):#x} are not of this image")
    if pages_crc(offset, data, pages.zero_bytes) != pages.crc:
        raise bad_state(instance, f"the checksum of the pages at {offset:#x} is wrong")


def pages_crc(offset: int, data: bytes, zero_bytes: int = 0) -> int:
    """Return the checksum of pages and of their place."""
    return zlib.crc32(data, zlib.crc32(_PLACE.pack(offset, zero_bytes)))


def round_crc(end: RoundEnd) -> int:
    """Return the checksum of all other fields of a round's end."""
    others = RoundEnd()
    others.CopyFrom(end)
    others.ClearField("crc")
    return zlib.crc32(others.SerializeToString(deterministic=True))


def end_crc(sequences: Iterable[DriverSequence], sections: Iterable[SectionCheck], order_crc: int) -> int:
    """Return the checksum of what the end of a stream says, in the order given, after that of all pages in theirs."""
    crc = order_crc
    for message in (*sequences, *sections):
        crc = zlib.crc32(message.SerializeToString(deterministic=True), crc)
    return crc


def check_exists(instance: Instance) -> None:
    """Raise ILLEGAL_STATE if the source was destroyed meanwhile."""
    if instance.is_closed:
        raise not_stopped(instance)


def not_stopped(instance: Instance) -> VfleetError:
    """Return the refusal of the last state of a function that is not, or no more, stopped by who asks."""
    return VfleetError(
        Reason.ILLEGAL_STATE,
        f"function {instance.about.function!r} was destroyed, or stopped by another attempt: its state is not its last",
        metadata={"function": instance.about.function},
    )


def bad_state(instance: Instance, why: str) -> VfleetError:
    """Return the refusal of a state."""
    return VfleetError(
        Reason.BAD_STATE,
        f"the state of function {instance.about.function!r} is refused: {why}",
        metadata={"function": instance.about.function},
    )


def _count(check: SectionCheck, crc: int, order_crc: int) -> int:
    packed = _CRC.pack(crc)
    check.page_messages += 1
    check.crc = zlib.crc32(packed, check.crc)
    return zlib.crc32(packed, order_crc)


def _shown(sections: Sequence[Section]) -> list[StateSection]:
    return [StateSection(name=s.name, image_offset=s.start, length_bytes=s.length) for s in sections]


def _texts(messages: Iterable[object]) -> list[str]:
    return [str(message).replace("\n", " ").strip() for message in messages]
