"""A function as a VMM sees it: each message of the VMM becomes accesses of its driver, an answer, or both.

    message ──► answered here: what the function is, configuration space, guest memory, eventfds
            └─► accesses, each with the sequence that follows ──► the driver's queue ──► the function's home

Which accesses a message becomes depends on the message alone. So a hostd that comes after a kill makes them again, with
the same sequences, of all messages that its predecessor had not said to be done, and none takes effect twice.
"""

import errno
import logging
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Protocol

from hostd.guest import frames, vfio_user
from hostd.guest.configuration import SPACE_BYTES, ConfigurationSpace
from hostd.guest.descriptors import is_eventfd
from hostd.guest.dma_messages import DmaMessages
from hostd.guest.interrupts import Interrupts
from hostd.guest.memory import GuestMemory
from hostd.guest.vfio_user import Command, Message, ProtocolError
from hostd.models.msix import ENTRY_BYTES
from hostd.models.pci import PciFunction
from hostd.sequencer import Result
from vfleet.address import AddressError, bar_layout, check_access
from vfleet.errors import VfleetError
from vfleet.limits import INTERRUPT_PAGE_ADDRESS
from vfleet.v1.access_pb2 import (
    ACCESS_KIND_FENCE,
    ACCESS_KIND_READ,
    ACCESS_KIND_RESET,
    ACCESS_KIND_WRITE,
    AccessKind,
)
from vfleet.v1.types_pb2 import Guest

Answered = Callable[[Result], None]
"""Called with an access's result; with all ones if the function is lost."""

_FENCE_BYTES = 8
_CONFIGURATION_KEY = b"configuration"
DMA_KEY = b"dma"

_log = logging.getLogger(__name__)


class Port(Protocol):
    """What a device reaches the world by."""

    def access(
        self, kind: AccessKind.ValueType, offset: int, length: int, data: bytes, answered: Answered | None
    ) -> None:
        """Make an access at an offset in the function's window; accesses keep their order."""

    def reply(self, message: bytes, after_write: int = 0) -> None:
        """Answer the message at hand, once the DMA write with this sequence has taken effect."""

    def cut_off(self) -> None:
        """Let no DMA reach the guest until the reset that is asked for next has been done."""

    def reset_done(self, last_write: int) -> None:
        """Let DMA reach the guest again, but none up to a sequence."""

    def keep(self, key: bytes, data: bytes, descriptor: int = -1) -> None:
        """Let the holder keep something for the next hostd."""

    def drop(self, key: bytes) -> None:
        """Let the holder keep it no longer."""


class GuestDevice:
    """The function that `guest` describes, with the `limit` in bytes up to which guest memory may reach."""

    def __init__(
        self, guest: Guest, function: PciFunction, memory: GuestMemory, messages: DmaMessages, limit: int, port: Port
    ) -> None:
        self._function = function
        self._bars = {bar.index: bar.size_bytes for bar in guest.bars}
        self._layout = bar_layout(self._bars)
        self._configuration = ConfigurationSpace(
            function, self._bars, (guest.manufacturer.vendor_id, guest.manufacturer.device_id)
        )
        self._memory = memory
        self._messages = messages
        self._limit = limit
        self._port = port
        self._refused = 0
        self.interrupts = Interrupts(function.vectors, lambda vector: messages.ring(_vector_key(vector)))

    def restore(self, key: bytes, data: bytes, descriptors: Sequence[int]) -> None:
        """Take over what the holder has kept, and the descriptor that came with it, which stays the caller's."""
        if key == _CONFIGURATION_KEY:
            self._configuration.restore(data)
        elif key == DMA_KEY:
            self._messages.restore(data)
        elif key.startswith(b"map:"):
            try:
                self._map(Message(0, Command.DMA_MAP, 0, data), descriptors)
            except (ProtocolError, VfleetError) as error:
                _log.error("guest memory that was mapped before can't be mapped: %s", error)
        elif key.startswith(b"vector:"):
            self.interrupts.set(int(key.partition(b":")[2]))

    def connected(self) -> None:
        """Begin with a VMM that has just come, as at power-on."""
        self.interrupts.clear()
        self._reset()

    def gone(self) -> None:
        """End with a VMM that has gone: its memory and its eventfds are no more."""
        for start, length in self._memory.clear():
            self._port.drop(_map_key(start, length))
        for vector in self.interrupts.clear():
            self._port.drop(_vector_key(vector))
        self._messages.end()
        self._port.drop(DMA_KEY)
        self._reset()

    def handle(self, message: Message, descriptors: Sequence[int], *, refused: int = 0) -> None:
        """Carry out a message; its descriptors stay the caller's. `refused` is how many others came with it."""
        try:
            self._carry_out(message, descriptors, refused)
        except (ProtocolError, VfleetError) as error:
            self._refused += 1
            # Each time that it has doubled: a VMM can't fill the log.
            if not self._refused & (self._refused - 1):
                told = "a VMM's message (command %d) is refused, %d so far: %s"
                _log.warning(told, message.command, self._refused, error)
            if message.wants_reply:
                number = error.number if isinstance(error, ProtocolError) else errno.EINVAL
                self._port.reply(message.failure(number))

    def _carry_out(self, message: Message, descriptors: Sequence[int], refused: int) -> None:
        match message.command:
            case _ if refused:
                raise ProtocolError(f"{refused} descriptors that are neither memory nor eventfds")
            case _ if message.flags & frames.TYPE:
                self._answered(message)
            case Command.VERSION:
                reply, transfer_bytes = vfio_user.version_reply(message), vfio_user.transfer_bytes(message)
                self._messages.begin(transfer_bytes)
                self._port.reply(reply)
            case Command.REGION_WRITE:
                self._write(message)
            case Command.REGION_READ:
                self._read(message)
            case Command.DMA_MAP:
                self._map(message, descriptors)
                _, _, _, start, length = message.take(vfio_user.MAP)
                body = message.body[: vfio_user.MAP.size]
                self._port.keep(_map_key(start, length), body, descriptors[0] if descriptors else -1)
                self._reply(message)
            case Command.DMA_UNMAP:
                self._unmap(message)
            case Command.SET_INTERRUPTS:
                self._set_interrupts(message, descriptors)
            case Command.RESET:
                self._reset()
                self._reply(message)
            case _:
                self._port.reply(self._describe(message))

    def _describe(self, message: Message) -> bytes:
        """Return the answer to a question about the function."""
        match message.command:
            case Command.DEVICE_INFO:
                layout = vfio_user.DEVICE_INFO
                kinds = vfio_user.INTERRUPT_KINDS
                return message.reply(layout.pack(layout.size, vfio_user.DEVICE_RESETS_IS_PCI, vfio_user.REGIONS, kinds))
            case Command.REGION_INFO:
                layout = vfio_user.REGION_INFO
                _, _, index, _, _, _ = message.take(layout)
                size = self._region_bytes(index)
                flags = vfio_user.REGION_READABLE_WRITABLE if size else 0
                return message.reply(layout.pack(layout.size, flags, index, 0, size, 0))
            case Command.INTERRUPT_INFO:
                layout = vfio_user.INTERRUPT_INFO
                _, _, index, _ = message.take(layout)
                count = self._function.vectors if index == vfio_user.MSIX else 0
                return message.reply(layout.pack(layout.size, vfio_user.INTERRUPT_BY_EVENTFD, index, count))
            case command:
                raise ProtocolError(f"command {command}", errno.ENOSYS)

    def _region_bytes(self, index: int) -> int:
        if index >= vfio_user.REGIONS:
            raise ProtocolError(f"region {index}; expected 0 to {vfio_user.REGIONS - 1}")
        if index == vfio_user.CONFIGURATION_REGION:
            return SPACE_BYTES
        return self._bars.get(index, 0) if index in self._function.bars else 0

    def _reply(self, message: Message, body: bytes = b"") -> None:
        if message.wants_reply:
            self._port.reply(message.reply(body))

    # Regions

    def _read(self, message: Message) -> None:
        region, offset, length, _ = vfio_user.region_access(message)
        head = message.body[: frames.REGION_ACCESS.size]
        if region == vfio_user.CONFIGURATION_REGION:
            self._port.reply(message.reply(head + self._configuration.read(offset, length)))
            return
        place = self._place(region, offset, length)
        identification = self._function.identification
        if region == 0 and offset + length <= len(identification):
            self._port.reply(message.reply(head + identification[offset : offset + length]))
            return
        found: list[bytes] = []

        def answered(result: Result) -> None:
            found.append(result[1] if len(result[1]) == length else b"\xff" * length)

        def fenced(result: Result) -> None:
            self._port.reply(message.reply(head + found[0]), int.from_bytes(result[1][:_FENCE_BYTES], "little"))

        # What is read tells the guest what the function has done: it must not overtake what that wrote before.
        self._port.access(ACCESS_KIND_READ, place, length, b"", answered)
        self._port.access(ACCESS_KIND_FENCE, 0, _FENCE_BYTES, b"", fenced)

    def _write(self, message: Message) -> None:
        region, offset, length, data = vfio_user.region_access(message)
        if region == vfio_user.CONFIGURATION_REGION:
            if self._configuration.write(offset, data):
                self._reset()
            self._port.keep(_CONFIGURATION_KEY, self._configuration.state())
        else:
            self._port.access(ACCESS_KIND_WRITE, self._place(region, offset, length), length, data, None)
        self._reply(message, message.body[: frames.REGION_ACCESS.size])

    def _place(self, region: int, offset: int, length: int) -> int:
        """Return where in the function's window an access goes. Raise ProtocolError if it goes nowhere."""
        size = self._region_bytes(region)
        try:
            check_access(offset, length)
        except AddressError as error:
            raise ProtocolError(f"region {region}, {offset:#x}+{length}: {error}") from None
        if offset + length > size:
            raise ProtocolError(f"region {region}, {offset:#x}+{length}; expected to end at {size:#x}")
        return self._layout[region] + offset

    def _reset(self) -> None:
        """Do a function-level reset, after which the function interrupts through the interrupt page, by vector."""

        def answered(result: Result) -> None:
            self._port.reset_done(int.from_bytes(result[1][:_FENCE_BYTES], "little"))

        self._configuration.reset()
        self._port.keep(_CONFIGURATION_KEY, self._configuration.state())
        self._port.cut_off()
        self._port.access(ACCESS_KIND_RESET, 0, _FENCE_BYTES, b"", answered)
        # The VMM keeps a table of its own, masks included: the function's always says the same.
        for vector in range(self._function.vectors):
            entry = self._layout[0] + self._function.table + vector * ENTRY_BYTES
            for place, word in ((entry, INTERRUPT_PAGE_ADDRESS), (entry + 8, vector)):
                self._port.access(ACCESS_KIND_WRITE, place, 8, word.to_bytes(8, "little"), None)

    # Guest memory

    def _map(self, message: Message, descriptors: Sequence[int]) -> None:
        _, flags, offset, start, length = message.take(vfio_user.MAP)
        descriptor = descriptors[0] if descriptors else None
        writable = bool(flags & vfio_user.MAP_WRITABLE)
        self._memory.add(start, length, descriptor, offset, self._limit, is_writable=writable)

    def _unmap(self, message: Message) -> None:
        _, flags, start, length = message.take(vfio_user.UNMAP)
        gone = self._memory.clear() if flags & vfio_user.UNMAP_ALL else self._memory.remove(start, length)
        for piece in gone:
            self._port.drop(_map_key(*piece))
        self._reply(message, message.body[: vfio_user.UNMAP.size])

    def _answered(self, message: Message) -> None:
        if message.flags & frames.TYPE != frames.REPLY:
            raise ProtocolError("neither a command nor an answer")
        if not self._messages.answered(message):
            # To a predecessor perhaps, whose interrupt, when it came, was told before this write was in memory.
            self.interrupts.raise_all()
            raise ProtocolError("an answer to nothing that was asked in time")

    # Interrupts

    def _set_interrupts(self, message: Message, descriptors: Sequence[int]) -> None:
        _, flags, index, first, count = message.take(vfio_user.SET_INTERRUPTS)
        vectors = self._function.vectors if index == vfio_user.MSIX else 0
        if not flags & vfio_user.SET_TRIGGER or first + count > vectors:
            raise ProtocolError(f"interrupts {first}+{count} of kind {index}, flags {flags:#x}; there are {vectors}")
        named = range(first, first + count) if count else range(vectors)
        if flags & vfio_user.SET_EVENTFD:
            if not all(is_eventfd(descriptor) for descriptor in descriptors):
                raise ProtocolError("a descriptor that is no eventfd")
            for vector, descriptor in zip_longest(named, descriptors[:count]):
                if descriptor is not None:
                    self._port.keep(_vector_key(vector), b"", descriptor)
                    self.interrupts.set(vector)
                else:
                    self.interrupts.unset(vector)
                    self._port.drop(_vector_key(vector))
        elif flags & vfio_user.SET_NONE and not count:
            for vector in self.interrupts.clear():
                self._port.drop(_vector_key(vector))
        else:
            chosen = message.body[vfio_user.SET_INTERRUPTS.size :] if flags & vfio_user.SET_BOOL else b"\1" * count
            for vector, is_chosen in zip(named, chosen, strict=False):
                if is_chosen:
                    self.interrupts.raise_(vector)
        self._reply(message)


def _map_key(start: int, length: int) -> bytes:
    return b"map:%x:%x" % (start, length)


def _vector_key(vector: int) -> bytes:
    return b"vector:%d" % vector
