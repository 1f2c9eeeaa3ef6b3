"""The "nvme": an NVMe 1.4 controller with one namespace, as much of it as Linux's in-tree driver uses.

BAR 0 has the registers, the doorbells and the MSI-X table; BAR 2 is the namespace, which is local memory. All else that
the controller knows is in its own memory, by the tables of `nvme_layout`. docs/device-model.md is its data sheet.

    admin queue ──► one command a step, ahead of all others ──────────────────────┐
    I/O queues, by turns ──► commands in flight, by turns, at most two pages ──►  completions ──► interrupts
"""

from collections.abc import Mapping, Sequence
from struct import Struct
from typing import Final

from hostd.models.base import DmaRead, Section, Step, Store, Work
from hostd.models.msix import Msix
from hostd.models.nvme_admin import ADMIN_QUEUE, Admin
from hostd.models.nvme_commands import READ, WRITE, Action, Commands, parse, reads
from hostd.models.nvme_completion import DATA_TRANSFER_ERROR, UNRECOVERED_READ_ERROR, WRITE_FAULT, Outcome, room
from hostd.models.nvme_layout import (
    CC,
    CC_SHUTDOWN,
    COMMANDS,
    CSTS,
    CSTS_FATAL,
    CSTS_READY,
    ENTRY,
    ENTRY_BYTES,
    IO_QUEUES,
    MSIX_PENDING,
    MSIX_TABLE,
    PRIVATE_BYTES,
    QUEUES,
    REGISTER_BYTES,
    VECTORS,
    Command,
    Core,
    Entry,
    Layout,
)
from hostd.models.nvme_registers import Registers
from vfleet.address import PAGE_BYTES, bar_layout, bar_span
from vfleet.errors import invalid_field

_ALL: Final = Struct(f"<{QUEUES}H")
_MEDIA_ERRORS: Final = {READ: UNRECOVERED_READ_ERROR, WRITE: WRITE_FAULT}
_ENTRIES_A_PAGE: Final = PAGE_BYTES // ENTRY_BYTES


class Nvme:
    """One function. VfleetError INVALID_FIELD unless BAR 0 has at least 16 KiB and there is a BAR 2, and no other."""

    name = "nvme"
    version = 1
    private_bytes = PRIVATE_BYTES
    keeps_local_memory = True

    def __init__(self, identity: int, bar_bytes: Mapping[int, int]) -> None:
        if bar_bytes.keys() != {0, 2} or bar_bytes[0] < REGISTER_BYTES:
            expected = f"BAR 0 of at least {REGISTER_BYTES} bytes for registers and BAR 2, which is the namespace"
            raise invalid_field("bars", dict(bar_bytes), expected)
        places = bar_layout(bar_bytes)
        start = bar_span(bar_bytes)
        self._registers_end = bar_bytes[0]
        self.local_memory = self.plain_memory = range(places[2], places[2] + bar_bytes[2])
        self.sections: Sequence[Section] = (
            Section("registers", 0, bar_bytes[0]),
            Section("namespace", places[2], bar_bytes[2]),
            Section("queues", start, PRIVATE_BYTES),
        )
        self.layout = Layout(start)
        self._msix = Msix(VECTORS, MSIX_TABLE, MSIX_PENDING)
        self._registers = Registers(self.layout, self._msix)
        self._admin = Admin(self.layout, identity, bar_bytes[2])
        self._commands = Commands(self.layout, self.local_memory)

    def reset(self) -> Sequence[Store]:
        """Return the registers and features that aren't 0 after a reset."""
        return self._registers.reset()

    def read(self, memory: memoryview, offset: int, length: int) -> tuple[bytes, Sequence[Store]] | None:
        """Read a register, or the namespace."""
        if offset < self._registers_end:
            return self._registers.read(memory, offset, length), ()
        return (bytes(memory[offset : offset + length]), ()) if offset in self.local_memory else None

    def write(self, memory: memoryview, offset: int, data: bytes) -> Sequence[Store] | None:
        """Write a register, or the namespace."""
        if offset < self._registers_end:
            return self._registers.write(memory, offset, data)
        return ((offset, data),) if offset in self.local_memory else None

    def work(self, memory: memoryview) -> Work | None:
        """Return the next piece of work: interrupts, admin commands, events, commands in flight, then new ones.

        What is fetched is named with the epoch: a controller that was reset and set up in the same way meanwhile has
        other commands at the same place. Commands in flight are named with all that they are.
        """
        vector = self._msix.due(memory)
        if vector is not None:
            return Work(("interrupt", vector))
        if memory[CSTS] != CSTS_READY:
            return None
        layout = self.layout
        core = Core(*layout.core.get(memory))
        is_shut_down = memory[CC + 1] & CC_SHUTDOWN >> 8
        heads = _ALL.unpack_from(memory, layout.heads.start)
        tails = _ALL.unpack_from(memory, layout.tails.start)
        can_tell = core.events and core.requests and not core.masked
        if (heads[ADMIN_QUEUE] != tails[ADMIN_QUEUE] or can_tell) and room(layout, memory, ADMIN_QUEUE, 0) > 0:
            if heads[ADMIN_QUEUE] != tails[ADMIN_QUEUE] and not is_shut_down:
                return self._fetch(memory, core, ADMIN_QUEUE, heads[ADMIN_QUEUE], 1)
            if can_tell:
                return Work(("event", core.events))
        if not core.busy & core.busy - 1 and heads != tails and not is_shut_down:
            fetch = self._next_fetch(memory, core, heads, tails)
            if fetch is not None:
                return fetch
        if core.busy:
            actions = self._commands.next_actions(memory, core)
            return Work(("act", core.epoch, actions), reads(actions), self._commands.touches(actions))
        return None

    def finish(self, memory: memoryview, work: Work, data: Sequence[bytes] | None) -> Step:
        """Do the work. A fault on a queue is fatal to the controller, a fault on data to the command."""
        match work.what:
            case ("interrupt", int(vector)):
                return self._msix.release(memory, vector)
            case ("act", _, tuple(actions)):
                return self._act(memory, actions, data)
            case ("fetch", _, int(queue), int(head), int(count)):
                if data is None:
                    return Step([(CSTS, bytes((CSTS_READY | CSTS_FATAL,)))])
                entries = [Entry(*values) for values in ENTRY.iter_unpack(data[0])]
                return self._take(memory, queue, head + count, entries)
        outcome = Outcome(self.layout, self._msix, memory)
        core = self._admin.tell_event(outcome, memory, Core(*self.layout.core.get(memory)))
        outcome.stores.append(self.layout.core.put(0, *core))
        return outcome.step()

    def receive(self, memory: memoryview, frame: bytes) -> Step | None:
        """Drop a frame: storage is on no network."""
        del memory, frame
        return Step()

    def inject(self, memory: memoryview, name: str, count: int) -> Sequence[Store] | None:
        """Return the stores that let something go wrong; None if it isn't known.

        "media": the next `count` reads and writes fail, or as many as come before the controller is reset.
        """
        if name != "media":
            return None
        core = Core(*self.layout.core.get(memory))
        return (self.layout.core.put(0, *core._replace(media_errors=min(core.media_errors + count, 0xFFFF))),)

    def _next_fetch(
        self, memory: memoryview, core: Core, heads: tuple[int, ...], tails: tuple[int, ...]
    ) -> Work | None:
        """Return the fetch for the next queue that has commands, and room for their completions (round robin)."""
        for index in range(IO_QUEUES):
            queue = 1 + (core.turn + index) % IO_QUEUES
            if heads[queue] != tails[queue]:
                completion = self.layout.submission.get(memory, queue)[2]
                most = min(room(self.layout, memory, completion, core.busy), COMMANDS - core.busy.bit_count())
                if most > 0:
                    ahead = tails[queue] if tails[queue] > heads[queue] else COMMANDS + heads[queue]
                    return self._fetch(memory, core, queue, heads[queue], min(ahead - heads[queue], most))
        return None

    def _fetch(self, memory: memoryview, core: Core, queue: int, head: int, most: int) -> Work:
        """Return the work that fetches up to `most` commands from a queue: those that lie together in one page."""
        base, entries, _ = self.layout.submission.get(memory, queue)
        count = min(most, entries - head, _ENTRIES_A_PAGE - head % _ENTRIES_A_PAGE)
        reads = (DmaRead(base + head * ENTRY_BYTES, count * ENTRY_BYTES),)
        return Work(("fetch", core.epoch, queue, head, count), reads)

    def _take(self, memory: memoryview, queue: int, head: int, entries: Sequence[Entry]) -> Step:
        """Take commands that were fetched, after which the queue's head is at `head`, or at its end."""
        layout = self.layout
        if head == layout.submission.get(memory, queue)[1]:
            head = 0
        outcome = Outcome(layout, self._msix, memory)
        core = Core(*layout.core.get(memory))
        if queue == ADMIN_QUEUE:
            core = self._admin.execute(outcome, memory, core, head, entries[0])
        else:
            core = self._start(outcome, core._replace(turn=queue % IO_QUEUES), queue, head, entries)
        outcome.stores += (layout.heads.put(queue, head), layout.core.put(0, *core))
        return outcome.step()

    def _start(self, outcome: Outcome, core: Core, queue: int, head: int, entries: Sequence[Entry]) -> Core:
        busy = core.busy
        for entry in entries:
            command = parse(queue, entry, len(self.local_memory))
            if core.media_errors and entry.opcode in _MEDIA_ERRORS and isinstance(command, Command):
                command = _MEDIA_ERRORS[entry.opcode]
                core = core._replace(media_errors=core.media_errors - 1)
            if isinstance(command, int):
                outcome.complete(queue, head, entry.identifier, command)
                continue
            free = ~busy & busy + 1
            outcome.stores.append(self.layout.commands.put(free.bit_length() - 1, *command))
            busy |= free
        return core._replace(busy=busy)

    def _act(self, memory: memoryview, actions: Sequence[Action], data: Sequence[bytes] | None) -> Step:
        outcome = Outcome(self.layout, self._msix, memory)
        core = Core(*self.layout.core.get(memory))
        if data is not None:
            busy = core.busy & ~self._commands.act(outcome, memory, actions, data)
            core = core._replace(busy=busy, cursor=(actions[-1].number + 1) % COMMANDS, alone=core.alone if busy else 0)
        elif len(actions) > 1:  # whose fault it was is seen when each is alone
            core = core._replace(alone=1)
        else:
            outcome.complete_command(actions[0].command, DATA_TRANSFER_ERROR)
            core = core._replace(busy=core.busy & ~(1 << actions[0].number), alone=0)
        outcome.stores.append(self.layout.core.put(0, *core))
        return outcome.step()
