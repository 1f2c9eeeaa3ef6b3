"""What devices on a network and the switch between them agree upon: MAC addresses."""

from typing import Final

HEADER_BYTES: Final = 14
MAC_BYTES: Final = 6

_LOCALLY_ADMINISTERED = 0x02
_GROUP = 0x01


def mac_address(identity: int) -> bytes:
    """Return the MAC address of the function with an identity: locally administered, the same at every home."""
    low = (identity & (1 << 48) - 1).to_bytes(MAC_BYTES, "big")
    return bytes((low[0] & ~_GROUP | _LOCALLY_ADMINISTERED,)) + low[1:]


def is_group(mac: bytes) -> bool:
    """Return whether an address is that of several stations: multicast or broadcast."""
    return bool(mac[0] & _GROUP)
