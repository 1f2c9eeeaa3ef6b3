"""Addresses that don't leave the machine: where connections may be plaintext."""

from ipaddress import ip_address

from vfleet.errors import Reason, VfleetError


def is_loopback(address: str) -> bool:
    """Return whether HOST:PORT, or unix:PATH, is on this machine and can't be reached from another."""
    host = address.rpartition(":")[0]
    if address.startswith("unix:") or host == "localhost":
        return True
    try:
        return ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def check_loopback(field: str, address: str) -> str:
    """Return an address that plaintext may be spoken with. Raise INVALID_FIELD, naming `field`, for any other."""
    if not is_loopback(address):
        message = f"{field} is {address!r}; without TLS only loopback addresses are allowed: give --tls DIR"
        raise VfleetError(Reason.INVALID_FIELD, message, metadata={"field": field})
    return address
