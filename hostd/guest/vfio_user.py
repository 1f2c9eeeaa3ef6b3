"""The vfio-user protocol, as far as a device's server speaks it: messages taken apart and put together. Pure.

    message:  | id, command (16 bits each) | bytes | flags | error (32 bits each) | what the command takes |

After QEMU's docs/interop/vfio-user.rst, of which version 0.1 is spoken.
"""

import errno
import json
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct, error
from typing import Final

from hostd.guest.frames import (
    FAILED,
    HEADER,
    MAX_DESCRIPTORS,
    MAX_MESSAGE_BYTES,
    NO_REPLY,
    REGION_ACCESS,
    REPLY,
    TYPE,
)
from vfleet.address import PAGE_BYTES

MAJOR: Final = 0
MINOR: Final = 1
MAX_DATA_BYTES: Final = 4096
MIN_TRANSFER_BYTES: Final = 256
DEFAULT_TRANSFER_BYTES: Final = 1 << 20

MAP_READABLE: Final = 1 << 0
MAP_WRITABLE: Final = 1 << 1
UNMAP_ALL: Final = 1 << 1

CONFIGURATION_REGION: Final = 7
REGIONS: Final = 9
INTERRUPT_KINDS: Final = 5
MSIX: Final = 2

REGION_READABLE_WRITABLE: Final = 3
DEVICE_RESETS_IS_PCI: Final = 3
INTERRUPT_BY_EVENTFD: Final = 1
SET_NONE: Final = 1 << 0
SET_BOOL: Final = 1 << 1
SET_EVENTFD: Final = 1 << 2
SET_TRIGGER: Final = 1 << 5

MAP = Struct("<IIQQQ")  # bytes of this, flags, offset in the descriptor, address, bytes
UNMAP = Struct("<IIQQ")  # bytes of this, flags, address, bytes
DEVICE_INFO = Struct("<IIII")  # bytes of this, flags, regions, kinds of interrupts
REGION_INFO = Struct("<IIIIQQ")  # bytes of this, flags, index, where capabilities begin, bytes, offset
INTERRUPT_INFO = Struct("<IIII")  # bytes of this, flags, index, number
SET_INTERRUPTS = Struct("<IIIII")  # bytes of this, flags, index, first, number
VERSION = Struct("<HH")


class Command(IntEnum):
    """What a VMM asks for, and in the case of DMA is asked for."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_INFO = 4
    REGION_INFO = 5
    INTERRUPT_INFO = 7
    SET_INTERRUPTS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    RESET = 13


class ProtocolError(Exception):
    """A message that can't be carried out; `number` is the errno that its sender is told."""

    def __init__(self, why: str, number: int = errno.EINVAL) -> None:
        super().__init__(why)
        self.number = number


@dataclass(frozen=True, slots=True)
class Message:
    """A message of a VMM, whole."""

    identifier: int
    command: int
    flags: int
    body: bytes

    @classmethod
    def parse(cls, data: bytes) -> "Message":
        """Take a whole message apart, of which the holder has checked that it is as long as it says."""
        identifier, command, _, flags, _ = HEADER.unpack_from(data)
        return cls(identifier, command, flags, data[HEADER.size :])

    @property
    def wants_reply(self) -> bool:
        """Whether its sender waits for an answer."""
        return not self.flags & (TYPE | NO_REPLY)

    @property
    def has_failed(self) -> bool:
        """Whether it is an answer that refuses."""
        return bool(self.flags & FAILED)

    def take(self, layout: Struct) -> tuple[int, ...]:
        """Return the fields at the beginning of the body. Raise ProtocolError if it is too short for them."""
        try:
            return layout.unpack_from(self.body)
        except error:
            raise ProtocolError(f"{len(self.body)} bytes; expected {layout.size} or more") from None

    def reply(self, body: bytes = b"") -> bytes:
        """Return the message that answers this one."""
        return HEADER.pack(self.identifier, self.command, HEADER.size + len(body), REPLY, 0) + body

    def failure(self, number: int) -> bytes:
        """Return the message that refuses this one, with an errno."""
        return HEADER.pack(self.identifier, self.command, HEADER.size, REPLY | FAILED, number)


def version_reply(message: Message) -> bytes:
    """Return the answer to the first message: what this server can do. Raise ProtocolError for another version."""
    major, minor = message.take(VERSION)
    if major != MAJOR:
        raise ProtocolError(f"version {major}.{minor}; expected {MAJOR}.{MINOR}", errno.ENOTSUP)
    capabilities = {
        "max_msg_fds": MAX_DESCRIPTORS,
        "max_data_xfer_size": MAX_DATA_BYTES,
        "pgsizes": PAGE_BYTES,
    }
    text = json.dumps({"capabilities": capabilities}).encode() + b"\0"
    return message.reply(VERSION.pack(MAJOR, min(MINOR, minor)) + text)


def transfer_bytes(message: Message) -> int:
    """Return how much data a VMM takes in one message, by what it says of itself first. Raise ProtocolError."""
    text = message.body[VERSION.size :].partition(b"\0")[0]
    try:
        found: object = json.loads(text or b"{}")
    except (ValueError, RecursionError):
        raise ProtocolError("capabilities that are no JSON") from None
    capabilities = found.get("capabilities", {}) if isinstance(found, dict) else None
    if not isinstance(capabilities, dict):
        raise ProtocolError("capabilities that are no object")
    size: object = capabilities.get("max_data_xfer_size", DEFAULT_TRANSFER_BYTES)
    if type(size) is not int or size < MIN_TRANSFER_BYTES:
        raise ProtocolError(f"max_data_xfer_size {size!r:.40}; expected {MIN_TRANSFER_BYTES} or more")
    return size


def region_access(message: Message) -> tuple[int, int, int, bytes]:
    """Return region, offset, length and, of a write, the data. Raise ProtocolError for what can't be an access."""
    offset, region, count = message.take(REGION_ACCESS)
    data = message.body[REGION_ACCESS.size :]
    if not 1 <= count <= MAX_DATA_BYTES:
        raise ProtocolError(f"an access of {count} bytes; expected 1 to {MAX_DATA_BYTES}")
    if message.command == Command.REGION_WRITE and len(data) != count:
        raise ProtocolError(f"{len(data)} bytes of data; expected {count}")
    return region, offset, count, data


assert HEADER.size + REGION_ACCESS.size + MAX_DATA_BYTES <= MAX_MESSAGE_BYTES  # noqa: S101  # two files agree
