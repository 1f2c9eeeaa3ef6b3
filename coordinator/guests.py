"""Drivers in virtual machines: what is asked of them, and for how long a migration may hold them. Pure."""

from collections.abc import Iterable
from dataclasses import replace

from coordinator.migration import RESOLVE_MARGIN_MS, Options
from coordinator.snapshot import Snapshot
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.limits import (
    GUEST_LONGEST_HOLD_MS,
    GUEST_MAIN_MEMORY_BYTES,
    GUEST_MESSAGE_TIMEOUT_MS,
    MAX_SOCKET_PATH_BYTES,
)
from vfleet.v1.records_pb2 import Device, Driver, Function, Migration
from vfleet.v1.types_pb2 import Guest

MARGIN_MS = 500
"""Between the end of the longest hold and the VMM's time-out: the access that waited has its answer by then."""
MAX_TIMEOUT_MS = 600_000


def checked_guest(guest: Guest) -> Guest:
    """Return what is asked of a guest, with defaults for what is 0. Raise INVALID_FIELD for what can't be."""
    if not guest.socket.startswith("/") or not 2 <= len(guest.socket.encode()) <= MAX_SOCKET_PATH_BYTES:
        expected = f"an absolute path of at most {MAX_SOCKET_PATH_BYTES} bytes"
        raise invalid_field("guest.socket", guest.socket, expected)
    timeout_ms = guest.message_timeout_ms or GUEST_MESSAGE_TIMEOUT_MS
    hold_ms = guest.longest_hold_ms or GUEST_LONGEST_HOLD_MS
    least = hold_ms + RESOLVE_MARGIN_MS + MARGIN_MS
    if not least <= timeout_ms <= MAX_TIMEOUT_MS:
        expected = (
            f"{least} to {MAX_TIMEOUT_MS}: the longest hold of {hold_ms}, {RESOLVE_MARGIN_MS} to find out how a"
            f" migration ended whose coordinator is gone, and {MARGIN_MS} to answer"
        )
        raise invalid_field("guest.message_timeout_ms", timeout_ms, expected)
    return Guest(socket=guest.socket, longest_hold_ms=hold_ms, message_timeout_ms=timeout_ms)


def new_guest_driver(
    name: str, host: str, main_memory_bytes: int, guest: Guest, function: Function, device: Device
) -> Driver:
    """Return the driver of a guest that is to be, for this function, which is at home on `device`."""
    described = Guest()
    described.CopyFrom(guest)
    described.model = function.model
    described.bars.extend(function.bars)
    described.manufacturer.CopyFrom(device.manufacturer)
    memory = main_memory_bytes or GUEST_MAIN_MEMORY_BYTES
    return Driver(name=name, host=host, main_memory_bytes=memory, guest=described)


def check_same_guest(driver: Driver, guest: Guest | None, function: Function, attached: Iterable[str]) -> None:
    """Raise ALREADY_EXISTS if an existing driver is not this guest's, LIMIT_EXCEEDED if it has another function."""
    own = driver.guest if driver.HasField("guest") else None
    if (guest.socket if guest else None) != (own.socket if own else None):
        there = f"a virtual machine's at {own.socket}" if own else "no virtual machine's"
        raise VfleetError(
            Reason.ALREADY_EXISTS,
            f"driver {driver.name!r} exists, and is {there}",
            metadata={"driver": driver.name, "host": driver.host},
        )
    others = [name for name in attached if name != function.name]
    if own is not None and others:
        raise VfleetError(
            Reason.LIMIT_EXCEEDED,
            f"driver {driver.name!r} is a virtual machine's and has function {others[0]!r}; expected one function",
            metadata={"driver": driver.name, "function": others[0]},
        )


def within_longest_hold(snapshot: Snapshot, migration: Migration, options: Options, asked_ms: int) -> Options:
    """Return options that hold no guest for longer than it bears.

    Raise INVALID_FIELD if `asked_ms`, the hold time-out that was asked for (0 for none), is longer than that.
    """
    names = {entry.driver for move in migration.moves for entry in move.entries}
    drivers = [stored.record for name in sorted(names) if (stored := snapshot.drivers.get(name)) is not None]
    guests = [driver for driver in drivers if driver.HasField("guest")]
    if not guests:
        return options
    first = min(guests, key=lambda driver: driver.guest.longest_hold_ms)
    longest_ms = first.guest.longest_hold_ms
    if asked_ms > longest_ms:
        expected = f"at most {longest_ms}, the longest hold of driver {first.name!r}, a virtual machine's"
        raise invalid_field("options.hold_timeout_ms", asked_ms, expected)
    return replace(options, hold_timeout_ms=min(options.hold_timeout_ms, longest_ms))
