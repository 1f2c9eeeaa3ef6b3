"""Accesses that a driver on the function's own host has done at once: no queue, no future, no model in between.

A `DirectAccess` is a driver's lookaside: it keeps what the last translation found, a `Grant` for the plain memory of
one function. A grant is revoked, and then maps nothing, by whatever could make it wrong: a swap of the table, a change
of the instance's state, dirty tracking, an access that waits in the queue, the end of the driver at the function.

Writes have a redo record (hostd/plain_redo.py). Answers are not kept: the driver, in this very process, has each before
anything else can happen. Other drivers' plain writes have the same record, one at a time, and their answers are kept.
"""

import struct
from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from typing import Final, Protocol, cast

from hostd.grant import Grant
from hostd.plain_redo import (
    COUNT_SHIFT,
    OFFSETS,
    PLAIN_REDO_BODY,
    PLAIN_REDO_END,
    PLAIN_REDO_NAME,
    SEQUENCE_SHIFT,
    WORD_BYTES,
)
from hostd.sequencer import Result
from vfleet.errors import VfleetError, invalid_field
from vfleet.limits import WINDOW
from vfleet.v1.access_pb2 import ACCESS_KIND_READ, ACCESS_KIND_WRITE, ACCESS_STATUS_OK, AccessKind

Access = tuple[int, int | bytes]
"""A virtual address, and the length of a read or the data of a write."""

_DONE: Final = (ACCESS_STATUS_OK, b"")


class Place(Protocol):
    """Who knows where a driver's accesses go: the driver itself."""

    def grant(self, virtual_address: int, length: int) -> Grant | None:
        """Return leave to access what lies there directly, or None. Raise as `Driver.find` does."""

    def access(self, kind: AccessKind.ValueType, virtual_address: int, length: int, data: bytes) -> Result | None:
        """Carry out an access of any kind at once, or return None. Raise as `Driver.find` does."""


class DirectAccess:
    """A driver's accesses, done at once where that is possible. What isn't possible is to be submitted to the queue.

    Every access takes effect once, in order, and its sequence is durable with its effect. All methods raise VfleetError
    INVALID_FIELD for what is no access, TRANSLATION_FAULT for what isn't mapped.
    """

    __slots__ = ("_grant", "_place")

    def __init__(self, place: Place) -> None:
        self._place = place
        self._grant: Grant | None = None

    def forget(self) -> None:
        """Forget the last translation, because there is another table."""
        if self._grant is not None:
            self._grant.revoke()
            self._grant = None

    def read(self, virtual_address: int, length: int) -> bytes | None:
        """Return the bytes there, all ones if nobody claims them; None if the read has to be submitted instead."""
        grant = self._grant
        if grant is not None:
            offset = virtual_address - grant.base
            if length == grant.length and offset & grant.select == grant.low:
                data: bytes = grant.unpack(grant.memory, offset)[0]
                sequencer = grant.sequencer
                sequencer.last = grant.words[grant.last_word] = sequencer.last + 1
                return data
        if self._find(virtual_address, length):
            return self.read(virtual_address, length)
        result = self._place.access(ACCESS_KIND_READ, virtual_address, length, b"")
        return None if result is None else result[1]

    def write(self, virtual_address: int, data: bytes) -> bool:
        """Write the bytes there, to nobody if nobody claims them; False if the write has to be submitted instead."""
        grant = self._grant
        length = len(data)
        if grant is not None:
            offset = virtual_address - grant.base
            if length == grant.length and offset & grant.select == grant.low:
                words, sequencer = grant.words, grant.sequencer
                sequence = sequencer.last + 1
                grant.pack_redo(grant.bytes, PLAIN_REDO_BODY, offset, data)
                words[PLAIN_REDO_NAME] = sequence << SEQUENCE_SHIFT | grant.tag
                grant.pack(grant.memory, offset, data)
                sequencer.last = words[grant.last_word] = sequence
                return True
        if self._find(virtual_address, length):
            return self.write(virtual_address, data)
        return self._place.access(ACCESS_KIND_WRITE, virtual_address, length, data) is not None

    def access_many(self, accesses: Sequence[Access]) -> list[Result]:
        """Carry out up to 64 accesses in order and return the results of those before the first that can't be done.

        That one, if it raises nothing when it comes first, and what follows it is to be submitted. Writes of one length
        to plain memory share a redo record: all of them take effect, or none.
        """
        if len(accesses) > WINDOW:
            raise invalid_field("accesses", f"{len(accesses)} accesses", f"at most {WINDOW}")
        return self._alike(accesses) or self._one_by_one(accesses)

    def _alike(self, accesses: Sequence[Access]) -> list[Result]:
        """Carry out accesses to plain memory of one kind and length; nothing if they aren't that, or not granted."""
        if not accesses:
            return []
        address, what = accesses[0]
        length = what if isinstance(what, int) else len(what)
        grant = self._grant
        if grant is None or length != grant.length or (address - grant.base) & grant.select != grant.low:
            if not self._find(address, length):
                return []
            grant = self._grant
            assert grant is not None  # noqa: S101  # it has just been found
        return _read_all(grant, accesses) if isinstance(what, int) else _write_all(grant, accesses)

    def _one_by_one(self, accesses: Sequence[Access]) -> list[Result]:
        results: list[Result] = []
        for address, what in accesses:
            try:
                if isinstance(what, int):
                    result = self._place.access(ACCESS_KIND_READ, address, what, b"")
                else:
                    result = self._place.access(ACCESS_KIND_WRITE, address, len(what), what)
            except VfleetError:
                # What was done before it has results; who goes on from there meets the error.
                if not results:
                    raise
                break
            if result is None:
                break
            results.append(result)
        return results

    def _find(self, virtual_address: int, length: int) -> bool:
        """Get a grant that covers an access. Return False if there is none, or it is not for plain memory."""
        grant = self._grant
        if grant is None or not 0 <= virtual_address - grant.base < grant.span:
            self.forget()
            grant = self._grant = self._place.grant(virtual_address, length)
        if grant is None or not 0 <= (offset := virtual_address - grant.base) - grant.low < grant.size:
            return False
        return grant.take_length(length) and offset & grant.select == grant.low


def _read_all(grant: Grant, accesses: Sequence[Access]) -> list[Result]:
    base, select, low, length = grant.base, grant.select, grant.low, grant.length
    unpack, memory, ok = grant.unpack, grant.memory, ACCESS_STATUS_OK
    results: list[Result] = [
        (ok, unpack(memory, offset)[0])
        for address, what in accesses
        if what == length and (offset := address - base) & select == low
    ]
    if len(results) < len(accesses):
        return []
    sequencer = grant.sequencer
    sequencer.last = grant.words[grant.last_word] = sequencer.last + len(results)
    return results


def _write_all(grant: Grant, accesses: Sequence[Access]) -> list[Result]:
    writes = cast("Sequence[tuple[int, bytes]]", accesses)
    base, length, count = grant.base, grant.length, len(writes)
    image, words, sequencer = grant.bytes, grant.words, grant.sequencer
    try:
        offsets = [address - base for address, _ in writes]
        written = [data for _, data in writes if len(data) == length]
        # What the record says has been done: without its name, it may have offsets that turn out to be none.
        OFFSETS[count].pack_into(image, PLAIN_REDO_BODY, *offsets)
    except (TypeError, struct.error):  # there are reads among them; an offset is negative or has more than 64 bits
        return []
    end_of_offsets = PLAIN_REDO_BODY + count * WORD_BYTES
    end = end_of_offsets + count * length
    # All offsets are checked as one number: each for itself would take a third of the batch's time.
    select, low = _each(count, grant.select, grant.low)
    selected = int.from_bytes(image[PLAIN_REDO_BODY:end_of_offsets], "little") & select
    if selected != low or len(written) < count or end > PLAIN_REDO_END:
        return []
    sequence = sequencer.last + count
    image[end_of_offsets:end] = b"".join(written)
    words[PLAIN_REDO_NAME] = sequence << SEQUENCE_SHIFT | grant.tag + (count - 1 << COUNT_SHIFT)
    deque(map(grant.pack, repeat(grant.memory), offsets, written), maxlen=0)
    sequencer.last = words[grant.last_word] = sequence
    return [_DONE] * count


@lru_cache(maxsize=4 * WINDOW)
def _each(count: int, select: int, low: int) -> tuple[int, int]:
    """Return a grant's `select` and `low` for so many offsets at once, as they lie in the record."""
    ones = sum(1 << 8 * WORD_BYTES * place for place in range(count))
    return ones * (select & (1 << 8 * WORD_BYTES) - 1), ones * low
