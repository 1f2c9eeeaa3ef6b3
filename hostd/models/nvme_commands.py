"""The I/O commands of the simulated NVMe controller (NVMe 1.4, 6): read, write, write zeroes, deallocate, flush.

A command that was fetched is either completed at once (`parse` says so) or becomes a row of the table of commands in
flight. Its next piece of work is a function of that row alone (`next_action`), at most two pages long, and what the
piece did is in the row again (`act`): so it is carried over wherever the image goes, with what it had done.
"""

from collections.abc import Sequence
from struct import Struct
from typing import Final, NamedTuple

from hostd.models.base import DmaRead, DmaWrite
from hostd.models.nvme_completion import (
    INVALID_FIELD,
    INVALID_NAMESPACE,
    INVALID_OPCODE,
    LBA_OUT_OF_RANGE,
    PRP_OFFSET_INVALID,
    SUCCESS,
    Outcome,
)
from hostd.models.nvme_layout import (
    BLOCK_BYTES,
    COMMANDS,
    LIST_ENTRIES,
    MAX_TRANSFER_BYTES,
    Command,
    Core,
    Entry,
    Layout,
)
from vfleet.address import PAGE_BYTES

FLUSH: Final = 0x00
WRITE: Final = 0x01
READ: Final = 0x02
WRITE_ZEROES: Final = 0x08
DATASET_MANAGEMENT: Final = 0x09

NAMESPACE: Final = 1
ALL_NAMESPACES: Final = 0xFFFFFFFF
RANGE_BYTES: Final = 16
PIECES: Final = 2
"""Pages that one step moves at most, so that it has room for completions too."""

_DEALLOCATE_ATTRIBUTE: Final = 1 << 2
_RANGE: Final = Struct("<IIQ")  # attributes, blocks, first block
_ZEROES: Final = bytes(PAGE_BYTES)
_FROM_MAIN_MEMORY: Final = ("write", "list", "range")
_OFFSET: Final = PAGE_BYTES - 1

Piece = tuple[int, int, int]
"""An address in main memory, an offset in the namespace, bytes."""


class Action(NamedTuple):
    """What is done next for a command: `what` is read, write, zero, list or range."""

    number: int
    command: Command
    what: str
    pieces: tuple[Piece, ...]


def parse(queue: int, entry: Entry, namespace_bytes: int) -> Command | int:
    """Return the command in flight that an entry of a submission queue asks for, or the status of one that isn't."""
    opcode, flags, identifier, namespace, prp1, prp2, word10, word11, word12, _ = entry
    if opcode not in (FLUSH, WRITE, READ, WRITE_ZEROES, DATASET_MANAGEMENT):
        return INVALID_OPCODE
    if flags:  # fused operations, scatter-gather lists
        return INVALID_FIELD
    if namespace != NAMESPACE and not (opcode == FLUSH and namespace == ALL_NAMESPACES):
        return INVALID_NAMESPACE
    if opcode == FLUSH:  # what is completed has been durable since
        return SUCCESS
    if opcode == DATASET_MANAGEMENT:
        if not word11 & _DEALLOCATE_ATTRIBUTE:  # the other attributes are hints
            return SUCCESS
        ranges = (word10 & 0xFF) + 1
        found = Command(opcode, queue, identifier, ranges, 0, 0, 0, 0, 0, prp1, prp2)
        return found if prps_fit(prp1, prp2, ranges * RANGE_BYTES) else PRP_OFFSET_INVALID
    start = (word10 | word11 << 32) * BLOCK_BYTES
    length = ((word12 & 0xFFFF) + 1) * BLOCK_BYTES
    if start + length > namespace_bytes:
        return LBA_OUT_OF_RANGE
    found = Command(opcode, queue, identifier, 1, 0, 0, start, length, 0, prp1, prp2)
    if opcode == WRITE_ZEROES:
        return found
    if length > MAX_TRANSFER_BYTES:
        return INVALID_FIELD
    return found if prps_fit(prp1, prp2, length) else PRP_OFFSET_INVALID


def prps_fit(prp1: int, prp2: int, length: int) -> bool:
    """Return whether the PRP entries of a command can be what they must be for so many bytes (NVMe 1.4, 4.3)."""
    pages = _pages(prp1, length)
    if pages > 2:  # the second is a list of all pages after the first
        return not (prp1 & 3 or prp2 & 7)
    return not (prp1 & 3 or (pages == 2 and prp2 & _OFFSET))


def _pages(prp1: int, length: int) -> int:
    return ((prp1 & _OFFSET) + length + _OFFSET) // PAGE_BYTES


class Commands:
    """The commands in flight of a controller whose namespace is the image's bytes in `medium`."""

    def __init__(self, layout: Layout, medium: range) -> None:
        self._layout = layout
        self._medium = medium

    def next_actions(self, memory: memoryview, core: Core) -> tuple[Action, ...]:
        """Return what is next for the commands whose turn it is: one piece each of two, or two of one."""
        cursor = core.cursor % COMMANDS
        ahead = (core.busy >> cursor | core.busy << (COMMANDS - cursor)) & (1 << COMMANDS) - 1
        first = (cursor + (ahead & -ahead).bit_length() - 1) % COMMANDS
        ahead &= ahead - 1
        if not ahead or core.alone:
            return (self._next_action(memory, first, PIECES),)
        second = (cursor + (ahead & -ahead).bit_length() - 1) % COMMANDS
        return self._next_action(memory, first, 1), self._next_action(memory, second, 1)

    def _next_action(self, memory: memoryview, number: int, most: int) -> Action:
        command = Command(*self._layout.commands.get(memory, number))
        kind, _, _, _, extent, listed, start, length, done, prp1, prp2 = command
        if kind == DATASET_MANAGEMENT and not length:
            return Action(number, command, "range", _range_pieces(prp1, prp2, extent))
        pieces: list[Piece] = []
        if kind in (DATASET_MANAGEMENT, WRITE_ZEROES):
            while done < length and len(pieces) < most:
                piece = min(PAGE_BYTES, length - done)
                pieces.append((0, start + done, piece))
                done += piece
            return Action(number, command, "zero", tuple(pieces))
        position, pages = (prp1 & _OFFSET) + done, _pages(prp1, length)
        while done < length and len(pieces) < most:
            page = position // PAGE_BYTES
            if page == 0:
                address = prp1 + done
            elif pages == 2:
                address = prp2
            elif page <= listed:
                address = self._layout.lists.get(memory, number * LIST_ENTRIES + page - 1)[0]
            elif pieces:
                break
            else:
                return Action(number, command, "list", (_list_piece(prp2, pages - 1 - listed),))
            piece = min(PAGE_BYTES - position % PAGE_BYTES, length - done)
            pieces.append((address, start + done, piece))
            position, done = position + piece, done + piece
        return Action(number, command, "read" if kind == READ else "write", tuple(pieces))

    def touches(self, actions: Sequence[Action]) -> tuple[tuple[int, int], ...]:
        """Return what of the namespace the actions read or write, as offsets in the image and bytes."""
        start = self._medium.start
        return tuple(
            (start + offset, length)
            for _, _, what, pieces in actions
            if what in ("read", "write", "zero")
            for _, offset, length in pieces
        )

    def act(self, outcome: Outcome, memory: memoryview, actions: Sequence[Action], data: Sequence[bytes]) -> int:
        """Do the actions, given what `reads` returned. Return a mask of the commands that are completed with that."""
        over, taken = 0, 0
        for action in actions:
            got: Sequence[bytes] = ()
            if action.what in _FROM_MAIN_MEMORY:
                got = data[taken : taken + len(action.pieces)]
                taken += len(got)
            if action.what == "list":
                after = self._take_list(outcome, action, got[0])
            elif action.what == "range":
                after = self._take_range(action, b"".join(got))
            else:
                after = self._move(outcome, memory, action, got)
            if isinstance(after, Command):
                outcome.stores.append(self._layout.commands.put(action.number, *after))
            else:
                outcome.complete_command(action.command, after)
                over |= 1 << action.number
        return over

    def _move(self, outcome: Outcome, memory: memoryview, action: Action, data: Sequence[bytes]) -> Command | int:
        """Do the pieces of a read, write or zeroing. Return the command after it, or its status if that was all."""
        _, command, what, pieces = action
        medium, done = self._medium.start, command.done
        for index, (address, offset, length) in enumerate(pieces):
            place = medium + offset
            if what == "read":
                outcome.sends.append(DmaWrite(address, bytes(memory[place : place + length])))
            elif what == "write":
                outcome.stores.append((place, data[index]))
            else:
                outcome.stores.append((place, _ZEROES[:length]))
            done += length
        return command._replace(done=done) if done < command.length else _next_extent(command)

    def _take_list(self, outcome: Outcome, action: Action, data: bytes) -> Command | int:
        """Take entries of a PRP list; the last of them leads on if there are more than fit into the list's page."""
        number, command, _, _ = action
        entries = memoryview(data).cast("Q").tolist()
        if any(entry & _OFFSET for entry in entries):
            return PRP_OFFSET_INVALID
        prp2 = command.prp2
        if len(entries) < _pages(command.prp1, command.length) - 1 - command.listed:
            prp2 = entries.pop()
        place = self._layout.lists.place(number * LIST_ENTRIES + command.listed)
        outcome.stores.append((place, data[: 8 * len(entries)]))
        return command._replace(listed=command.listed + len(entries), prp2=prp2)

    def _take_range(self, action: Action, data: bytes) -> Command | int:
        """Take one range of a deallocation: the extent that is zeroed next."""
        _, blocks, first = _RANGE.unpack(data)
        start, length = first * BLOCK_BYTES, blocks * BLOCK_BYTES
        if start + length > len(self._medium):
            return LBA_OUT_OF_RANGE
        if not length:
            return _next_extent(action.command)
        return action.command._replace(start=start, length=length)


def reads(actions: Sequence[Action]) -> tuple[DmaRead, ...]:
    """Return what has to be read from main memory for the actions."""
    return tuple(
        DmaRead(address, length)
        for _, _, what, pieces in actions
        if what in _FROM_MAIN_MEMORY
        for address, _, length in pieces
    )


def _next_extent(command: Command) -> Command | int:
    extent = command.extent + 1
    return SUCCESS if extent == command.extents else command._replace(extent=extent, length=0, done=0)


def _list_piece(address: int, wanted: int) -> Piece:
    room = (PAGE_BYTES - (address & _OFFSET)) // 8
    return address, 0, min(wanted, room) * 8


def _range_pieces(prp1: int, prp2: int, extent: int) -> tuple[Piece, ...]:
    position = (prp1 & _OFFSET) + extent * RANGE_BYTES
    if position >= PAGE_BYTES:
        return ((prp2 + position - PAGE_BYTES, 0, RANGE_BYTES),)
    first = min(PAGE_BYTES - position, RANGE_BYTES)
    piece = (prp1 + extent * RANGE_BYTES, 0, first)
    return (piece,) if first == RANGE_BYTES else (piece, (prp2, 0, RANGE_BYTES - first))
