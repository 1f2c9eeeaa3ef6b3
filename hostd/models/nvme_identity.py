"""What the simulated NVMe controller says of itself: Identify data and log pages (NVMe 1.4, 5.14 and 5.15)."""

from collections.abc import Mapping
from struct import pack_into
from typing import Final

from hostd.models.nvme_layout import BLOCK_BYTES, EVENT_REQUESTS, MAX_TRANSFER_SHIFT

VERSION: Final = 0x0001_0400
PAGE: Final = 4096
EVENT_NOTICES: Final = 1 << 8
"""Asynchronous events that can be asked for beside the health warnings: the list of namespaces has changed."""

_VENDOR: Final = 0x1AF4
_IO_CONTROLLER: Final = 1
_READ_ONLY_FIRMWARE_SLOT: Final = 1 << 1 | 1
_LONG_LOG_REQUESTS: Final = 1 << 2
_DATASET_MANAGEMENT_AND_WRITE_ZEROES: Final = 1 << 2 | 1 << 3
_VOLATILE_WRITE_CACHE: Final = 1
_DEALLOCATED_READS_ZERO: Final = 1
_NAMESPACE_IDENTIFIER_EUI64: Final = 1
_KELVIN: Final = 273
_WARNING_KELVIN: Final = _KELVIN + 70
_CRITICAL_KELVIN: Final = _KELVIN + 100
_FIRMWARE: Final = b"1".ljust(8)
_SPARE_PERCENT: Final = 100
_SPARE_THRESHOLD_PERCENT: Final = 10


def controller(identity: int) -> bytes:
    """Return the Identify Controller data structure of a function: 4096 bytes."""
    data = bytearray(PAGE)
    serial = f"{identity:016x}"
    pack_into("<HH20s40s8s", data, 0, _VENDOR, _VENDOR, serial.encode().ljust(20), b"vfleet NVMe".ljust(40), _FIRMWARE)
    data[77] = MAX_TRANSFER_SHIFT
    pack_into("<HI", data, 78, 1, VERSION)  # controller identifier
    pack_into("<I", data, 92, EVENT_NOTICES)
    data[111] = _IO_CONTROLLER
    data[258] = 0  # aborts at once, less one
    data[259] = EVENT_REQUESTS - 1
    data[260] = _READ_ONLY_FIRMWARE_SLOT
    data[261] = _LONG_LOG_REQUESTS
    pack_into("<HH", data, 266, _WARNING_KELVIN, _CRITICAL_KELVIN)
    data[512] = 0x66  # a submission queue's entry has 2**6 bytes
    data[513] = 0x44  # a completion queue's 2**4
    pack_into("<I", data, 516, 1)  # namespaces
    pack_into("<H", data, 520, _DATASET_MANAGEMENT_AND_WRITE_ZEROES)
    data[525] = _VOLATILE_WRITE_CACHE
    pack_into("<256s", data, 768, f"nqn.2014.08.org.nvmexpress:{_VENDOR:04x}{_VENDOR:04x}{serial}".encode())
    return bytes(data)


def namespace(identity: int, namespace_bytes: int) -> bytes:
    """Return the Identify Namespace data structure of the one namespace: 4096 bytes."""
    data = bytearray(PAGE)
    blocks = namespace_bytes // BLOCK_BYTES
    pack_into("<QQQ", data, 0, blocks, blocks, blocks)  # size, capacity, use
    data[33] = _DEALLOCATED_READS_ZERO
    pack_into(">Q", data, 120, identity)
    data[130] = BLOCK_BYTES.bit_length() - 1  # format 0
    return bytes(data)


def namespace_descriptors(identity: int) -> bytes:
    """Return the Namespace Identification Descriptor list of the one namespace: 4096 bytes."""
    data = bytearray(PAGE)
    pack_into(">BBxxQ", data, 0, _NAMESPACE_IDENTIFIER_EUI64, 8, identity)
    return bytes(data)


def _health() -> bytes:
    data = bytearray(512)
    pack_into("<xHBB", data, 0, _KELVIN + 27, _SPARE_PERCENT, _SPARE_THRESHOLD_PERCENT)
    return bytes(data)


def _firmware_slots() -> bytes:
    data = bytearray(512)
    data[0] = 1  # the active slot
    data[8:16] = _FIRMWARE
    return bytes(data)


ERROR_LOG: Final = 0x01
HEALTH_LOG: Final = 0x02
FIRMWARE_LOG: Final = 0x03
CHANGED_NAMESPACES_LOG: Final = 0x04

LOGS: Final[Mapping[int, bytes]] = {
    ERROR_LOG: bytes(64),
    HEALTH_LOG: _health(),
    FIRMWARE_LOG: _firmware_slots(),
    CHANGED_NAMESPACES_LOG: bytes(PAGE),
}
