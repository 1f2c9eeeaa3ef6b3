"""What `vfleet describe` and the migration commands show of one thing: every address with what it is computed from."""

from collections.abc import Iterable

from vfleet.address import Location, bar_layout, format_routing_id, location_of, translate, vf_routing_id
from vfleet.cli.output import enum_word, hex64, moment, print_fields, print_rich, print_table, size
from vfleet.cli.timeline import aborted_word, blackout_word, timeline
from vfleet.cli.timeline import phase_word as phase_word
from vfleet.cli.timeline import step_word as step_word
from vfleet.failure import advice, undone
from vfleet.parts import part_key, spoken
from vfleet.v1.fleet_service_pb2 import DeviceUse
from vfleet.v1.records_pb2 import Cordon, Driver, Function, FunctionStatus, Host, Migration, Move, PartKind, Place
from vfleet.v1.types_pb2 import Bar, GuestState, TableEntry, TransferMode


def status_word(function: Function) -> str:
    """Return where a function is in its life, in a word."""
    return enum_word(FunctionStatus.Name(function.status), "FUNCTION_STATUS_")


def base_arithmetic(base: int) -> str:
    """Return how a base address is computed from its place."""
    place = location_of(base)
    return f"{hex64(base)} = {place.segment:#06x} << 48 | {place.routing_id:#06x} << 32"


def offset_arithmetic(base: int, virtual_address: int, offset: int) -> str:
    """Return how a table's offset is computed from base and virtual address."""
    return f"{hex64(offset)} = ({hex64(base)} - {hex64(virtual_address)}) mod 2^64"


def describe_host(host: Host, devices: Iterable[DeviceUse]) -> None:
    """Print a host and its devices."""
    print_fields(
        [
            ("Host", host.name),
            ("Segment", f"{host.segment:#06x}"),
            ("Address", host.address),
            ("Fabric address", host.fabric_address or host.address),
            ("Incarnation", host.incarnation),
            ("Registered", "yes" if host.registered else "no"),
            ("Cordoned", cordon_word(host)),
        ]
    )
    print_table(DEVICE_COLUMNS, map(device_row, devices))


def cordon_word(host: Host) -> str:
    """Return what of a host is cordoned, and why."""
    return "; ".join(_cordon(cordon) for cordon in host.cordons) or "no"


def _cordon(cordon: Cordon) -> str:
    is_all = cordon.part.kind == PartKind.PART_KIND_HOST
    what = "yes" if is_all else spoken(part_key(cordon.part))
    return f"{what}: {cordon.reason}" if cordon.reason else what


DEVICE_COLUMNS = ("DEVICE", "LOCATION", "MODEL", "TYPE", "VFS", "USED", "RESERVED", "BARS", "ATTACHMENTS")


def device_row(use: DeviceUse) -> tuple[object, ...]:
    """Return what is said of a device and the use of its slots in these columns."""
    return (
        use.device.name,
        Location(use.segment, use.device.routing_id),
        use.device.model,
        use.device.io_type,
        use.device.total_vfs,
        use.used_slots,
        use.reserved_slots,
        bars(use.device.bars),
        ", ".join(use.device.attachments),
    )


def describe_device(use: DeviceUse) -> None:
    """Print a device, with the arithmetic of its VFs' routing IDs."""
    device = use.device
    first, last = (
        vf_routing_id(device.routing_id, device.first_vf_offset, device.vf_stride, index)
        for index in (1, device.total_vfs)
    )
    print_fields(
        [
            ("Device", device.name),
            ("Host", f"{device.host}, segment {use.segment:#06x}"),
            ("Location", f"{Location(use.segment, device.routing_id)}, routing ID {device.routing_id:#06x}"),
            ("Model", device.model),
            ("Manufacturer", f"{device.manufacturer.vendor_id:04x}:{device.manufacturer.device_id:04x}"),
            ("I/O type", device.io_type),
            ("Physical adapter", device.physical_adapter),
            ("Bridge", device.bridge or "none"),
            ("Parent bridge", device.parent_bridge or "none"),
            ("Power domain", device.power_domain),
            ("Attachments", ", ".join(device.attachments) or "none"),
            ("State version", f"{device.state_version.format}.{device.state_version.model}"),
            ("VFs", f"{device.total_vfs}: {use.used_slots} used, {use.reserved_slots} reserved"),
            ("VF n", f"routing ID {device.routing_id:#06x} + {device.first_vf_offset} + (n - 1) * {device.vf_stride}"),
            ("VFs at", f"{format_routing_id(first)} to {format_routing_id(last)}"),
            ("VF BARs", bars(device.bars)),
        ]
    )


def describe_function(function: Function, entries: Iterable[TableEntry]) -> None:
    """Print a function, its BARs, and its drivers' entries."""
    layout = bar_layout({bar.index: bar.size_bytes for bar in function.bars})
    print_fields(
        [
            ("Function", function.name),
            ("Identity", hex64(function.identity)),
            ("Status", status_word(function)),
            ("Generation", function.generation),
            ("Home", f"{function.device}, VF {function.vf_index}"),
            ("Location", location_of(function.base)),
            ("Base", base_arithmetic(function.base)),
            *(
                (f"BAR {bar.index}", f"{hex64(function.base + layout[bar.index])}, {size(bar.size_bytes)}")
                for bar in function.bars
            ),
            ("Model", function.model),
            ("Migration", function.migration or "none"),
        ]
    )
    print_entries(entries)


def describe_driver(driver: Driver) -> None:
    """Print a driver and its entries."""
    fields = [("Driver", driver.name), ("Host", driver.host), ("Main memory", size(driver.main_memory_bytes))]
    if driver.HasField("guest"):
        guest = driver.guest
        fields += [
            ("Guest", guest_word(driver)),
            ("Socket", guest.socket),
            ("Longest hold", f"{guest.longest_hold_ms} ms"),
            ("Message time-out", f"{guest.message_timeout_ms} ms"),
        ]
    print_fields(fields)
    print_entries(driver.entries)


def guest_word(driver: Driver) -> str:
    """Return what has become of a driver's guest in a word; empty if it has none."""
    if not driver.HasField("guest"):
        return ""
    return GuestState.Name(driver.guest_state).removeprefix("GUEST_STATE_").lower().replace("unspecified", "unknown")


def print_entries(entries: Iterable[TableEntry]) -> None:
    """Print table entries, one a line, with the base that each leads to."""
    print_table(
        ("DRIVER", "HOST", "FUNCTION", "GENERATION", "VIRTUAL ADDRESS", "LENGTH", "OFFSET", "LEADS TO", "AT"),
        (
            (
                entry.driver,
                entry.host,
                entry.function,
                entry.generation,
                hex64(entry.virtual_address),
                size(entry.length_bytes),
                hex64(entry.offset),
                hex64(base := translate(entry.virtual_address, entry.offset)),
                location_of(base),
            )
            for entry in entries
        ),
    )


def describe_migration(migration: Migration) -> None:
    """Print a migration: what it moves, how far it is, how long each step took."""
    attempt = migration.attempt
    print_fields(
        [
            ("Migration", migration.name or "not begun"),
            ("Phase", phase_word(migration)),
            ("Attempt", f"{attempt.fleet_generation}.{attempt.revision}" if attempt.fleet_generation else "none"),
            ("Coordinator", coordinators(migration)),
            *([("Begun", moment(migration.begin_time))] if migration.HasField("begin_time") else []),
            *([("Over", moment(migration.finish_time))] if migration.HasField("finish_time") else []),
            *([("Blackout", blackout_word(migration))] if migration.steps else []),
            *([("Mode", mode_word(migration))] if migration.mode else []),
            *(
                [
                    ("Aborted", aborted_word(migration)),
                    ("Undone", undone(migration)),
                    ("What to do", advice(migration)),
                ]
                if migration.abort_reason
                else []
            ),
        ]
    )
    print_moves(migration.moves)
    if migration.steps:
        print_rich(timeline(migration))


def coordinators(migration: Migration) -> str:
    """Return who began a migration, and who ended it if that was another."""
    begun, ended = migration.coordinator, migration.finished_by
    return f"{begun}, ended by {ended}" if ended and ended != begun else begun or "none"


def mode_word(migration: Migration) -> str:
    """Return when the state of a migration's functions moves."""
    return enum_word(TransferMode.Name(migration.mode), "TRANSFER_MODE_").replace("_", "-")


def print_moves(moves: Iterable[Move]) -> None:
    """Print moves: places, generations, and how each driver's entry changes."""
    moves = tuple(moves)
    print_table(
        ("FUNCTION", "", "DEVICE", "VF", "GENERATION", "LOCATION", "BASE"),
        (
            (move.function, word, *_place(place))
            for move in moves
            for word, place in (("from", move.source), ("to", move.target))
        ),
    )
    if any(move.entries for move in moves):
        print_table(
            ("FUNCTION", "DRIVER", "HOST", "VIRTUAL ADDRESS", "OFFSET BEFORE", "OFFSET AFTER"),
            (
                (
                    move.function,
                    entry.driver,
                    entry.host,
                    hex64(entry.virtual_address),
                    hex64(entry.offset_before),
                    hex64(entry.offset_after),
                )
                for move in moves
                for entry in move.entries
            ),
        )


def _place(place: Place) -> tuple[object, ...]:
    if not place.base:  # it was queued, and has not been planned
        return place.device or "not planned", place.vf_index or "", "", "", ""
    location = Location(place.segment, place.routing_id)
    return place.device, place.vf_index, place.generation, location, hex64(place.base)


def bars(found: Iterable[Bar]) -> str:
    """Return BARs with their sizes."""
    return ", ".join(f"{bar.index}: {size(bar.size_bytes)}" for bar in found)
