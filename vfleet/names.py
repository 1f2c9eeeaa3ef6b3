"""Names of hosts, devices, functions, drivers and migrations: one form, checked wherever a name comes in."""

import re

from vfleet.errors import invalid_field

MAX_NAME_LENGTH = 63
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
EXPECTED = f"1 to {MAX_NAME_LENGTH} of a-z, 0-9 and -, with no - first or last"


def is_name(value: str) -> bool:
    """Return whether `value` is a name (a DNS label, RFC 1123)."""
    return _NAME.fullmatch(value) is not None


def check_name(field: str, value: str) -> str:
    """Return `value` if it is a name (a DNS label, RFC 1123); else raise INVALID_FIELD naming `field`."""
    if not is_name(value):
        raise invalid_field(field, value, EXPECTED)
    return value


def check_device_name(field: str, value: str) -> str:
    """Return `value` if it is HOST/DEVICE, two names; else raise INVALID_FIELD naming `field`."""
    if not is_device_name(value):
        raise invalid_field(field, value, f"HOST/DEVICE, for example h1/nic0, each {EXPECTED}")
    return value


def is_device_name(value: str) -> bool:
    """Return whether `value` is two names, HOST/DEVICE."""
    host, slash, device = value.partition("/")
    return bool(slash and _NAME.fullmatch(host) and _NAME.fullmatch(device))


def host_of(device: str) -> str:
    """Return the host in a device's name, HOST/DEVICE."""
    return device.partition("/")[0]


def guest_driver_name(function: str) -> str:
    """Return what the driver of a virtual machine is called that is given no name. It may be too long for one."""
    return f"guest-{function}"
