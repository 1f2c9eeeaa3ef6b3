"""The configuration space of a guest's function, as its driver's host answers for it (PCI Express Base 4.0, 7.5, 7.7).

    0x00 header | 0x40 PCI Express | 0x80 MSI-X | 0x90 what else the model has

No access to it reaches the function, but for the function-level reset. What the guest writes here (BARs, the command
register) means something to the VMM, and none of it to the function, so none of it moves.
"""

from collections.abc import Mapping
from struct import Struct
from typing import Final

from hostd.models.pci import PciFunction

SPACE_BYTES: Final = 4096
STATE_BYTES: Final = 256

COMMAND: Final = 0x04
_STATUS = 0x06
_REVISION = 0x08
_CACHE_LINE = 0x0C
_BARS = 0x10
_SUBSYSTEM = 0x2C
_CAPABILITIES = 0x34
_INTERRUPT_LINE = 0x3C
_EXPRESS = 0x40
_DEVICE_CONTROL: Final = _EXPRESS + 0x08
_MSIX = 0x80
_MSIX_CONTROL: Final = _MSIX + 0x02
_MORE = 0x90

_HAS_CAPABILITIES = 1 << 4
_COMMAND_WRITABLE = 0x0546  # memory, bus master, parity, SERR, no INTx
_BAR_64_BIT = 0x4
_EXPRESS_IDENTIFIER, _MSIX_IDENTIFIER = 0x10, 0x11
_EXPRESS_ENDPOINT = 0x0002  # version 2 of the capability, an endpoint
_DEVICE_CAPABILITIES = 1 << 28 | 1 << 15  # function-level reset, role-based error reporting
_DEVICE_CONTROL_WRITABLE = 0x7FFF
_RESET = 1 << 15
_LINK = 1 << 4 | 1  # one lane, 2.5 GT/s
_MSIX_CONTROL_WRITABLE = 0xC000
_EXPRESS_BYTES, _MSIX_BYTES = 0x3C, 12

_HALF = Struct("<H")
_WORD = Struct("<I")
_LONG = Struct("<Q")


class ConfigurationSpace:
    """The space of a function with BARs of these sizes, by (vendor, device)."""

    def __init__(self, function: PciFunction, bar_bytes: Mapping[int, int], manufacturer: tuple[int, int]) -> None:
        self._bytes = bytearray(SPACE_BYTES)
        self._writable = bytearray(SPACE_BYTES)
        self._put_header(function, bar_bytes, function.manufacturer or manufacturer)
        self._put_capabilities(function)
        self._initial = bytes(self._bytes)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes; all ones past the end."""
        return bytes(self._bytes[offset : offset + length]).ljust(length, b"\xff")

    def write(self, offset: int, data: bytes) -> bool:
        """Write what can be written, and return whether the function is to be reset. Its registers are, then."""
        control = range(_DEVICE_CONTROL, _DEVICE_CONTROL + 2)
        is_reset = control[1] in range(offset, offset + len(data)) and bool(data[control[1] - offset] & _RESET >> 8)
        for index, byte in enumerate(data[: max(SPACE_BYTES - offset, 0)], offset):
            mask = self._writable[index]
            self._bytes[index] = self._bytes[index] & ~mask | byte & mask
        if is_reset:
            self.reset()
        return is_reset

    def reset(self) -> None:
        """Give all registers their initial values."""
        self._bytes[:] = self._initial

    def state(self) -> bytes:
        """Return the registers that can be other than at the beginning."""
        return bytes(self._bytes[:STATE_BYTES])

    def restore(self, state: bytes) -> None:
        """Take over what `state` returned, as far as it can be written."""
        self.write(0, state)

    def _put_header(self, function: PciFunction, bar_bytes: Mapping[int, int], manufacturer: tuple[int, int]) -> None:
        vendor, device = manufacturer
        self._put(0x00, _WORD.pack(device << 16 | vendor))
        self._put(COMMAND, bytes(2), _HALF.pack(_COMMAND_WRITABLE))
        self._put(_STATUS, _HALF.pack(_HAS_CAPABILITIES))
        self._put(_REVISION, _WORD.pack(function.class_code << 8 | function.revision))
        self._put(_CACHE_LINE, b"\0", b"\xff")
        for bar in function.bars:
            if bar in bar_bytes:
                self._put(_BARS + 4 * bar, _LONG.pack(_BAR_64_BIT), _LONG.pack(-bar_bytes[bar] & (1 << 64) - 1))
        self._put(_SUBSYSTEM, _WORD.pack(device << 16 | vendor))
        self._put(_CAPABILITIES, bytes((_EXPRESS,)))
        self._put(_INTERRUPT_LINE, b"\0", b"\xff")

    def _put_capabilities(self, function: PciFunction) -> None:
        more = [*function.capabilities]
        places = [_MORE + sum(-(-len(each) // 4) * 4 for each in more[:index]) for index in range(len(more))]
        first_of_more = places[0] if places else 0
        express = bytearray(_EXPRESS_BYTES)
        _HALF.pack_into(express, 0x02, _EXPRESS_ENDPOINT)
        _WORD.pack_into(express, 0x04, _DEVICE_CAPABILITIES)
        _WORD.pack_into(express, 0x0C, _LINK)
        _HALF.pack_into(express, 0x12, _LINK)
        after_express = _MSIX if function.vectors else first_of_more
        self._put(_EXPRESS, bytes((_EXPRESS_IDENTIFIER, after_express)) + bytes(express[2:]))
        self._put(_DEVICE_CONTROL, bytes(2), _HALF.pack(_DEVICE_CONTROL_WRITABLE))
        if function.vectors:
            head = bytes((_MSIX_IDENTIFIER, first_of_more)) + _HALF.pack(function.vectors - 1)
            self._put(_MSIX, head + _WORD.pack(function.table) + _WORD.pack(function.pending))
            self._put(_MSIX_CONTROL, _HALF.pack(function.vectors - 1), _HALF.pack(_MSIX_CONTROL_WRITABLE))
        for place, following, capability in zip(places, (*places[1:], 0), more, strict=False):
            self._put(place, bytes((capability[0], following)) + capability[2:])

    def _put(self, offset: int, content: bytes, writable: bytes = b"") -> None:
        self._bytes[offset : offset + len(content)] = content
        self._writable[offset : offset + len(writable)] = writable
