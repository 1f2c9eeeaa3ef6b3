"""The key layout: where each record lives. Every key of vfleet begins with PREFIX.

| key | value |
| --- | --- |
| fleet/generation | the fleet generation, decimal; absent means 1 |
| segments/SEGMENT | name of the host that claimed the PCI segment, for good |
| hosts/HOST | Host |
| cordons/HOST, cordons/HOST/KIND/NAME | Cordon |
| registrations/HOST | incarnation, under the daemon's lease |
| witnesses/HOST | what only this host writes, by which it knows its etcd again: random, new each time; never deleted |
| coordinators/COORDINATOR | Coordinator, under its lease |
| functions/FUNCTION | Function |
| locks/FUNCTION | name of the migration that has the function |
| slots/HOST/DEVICE/VF_INDEX | Slot |
| drivers/DRIVER | Driver |
| entries/HOST/DRIVER/FUNCTION | TableEntry; HOST is the driver's |
| guests/HOST/DRIVER | name of the GuestState of a driver in a virtual machine; its host alone writes it |
| migrations/MIGRATION | Migration; deleted some time after it is over |
| queue/MIGRATION | QueuedMigration |
| owners/MIGRATION | name of the coordinator that runs it, under its lease |
"""

PREFIX = "/vfleet/"

FLEET_GENERATION = f"{PREFIX}fleet/generation"
SEGMENTS = f"{PREFIX}segments/"
HOSTS = f"{PREFIX}hosts/"
CORDONS = f"{PREFIX}cordons/"
REGISTRATIONS = f"{PREFIX}registrations/"
WITNESSES = f"{PREFIX}witnesses/"
COORDINATORS = f"{PREFIX}coordinators/"
FUNCTIONS = f"{PREFIX}functions/"
LOCKS = f"{PREFIX}locks/"
SLOTS = f"{PREFIX}slots/"
DRIVERS = f"{PREFIX}drivers/"
ENTRIES = f"{PREFIX}entries/"
GUESTS = f"{PREFIX}guests/"
MIGRATIONS = f"{PREFIX}migrations/"
QUEUE = f"{PREFIX}queue/"
OWNERS = f"{PREFIX}owners/"


def segment_key(segment: int) -> str:
    """Key of the claim on a PCI segment."""
    return f"{SEGMENTS}{segment}"


def host_key(host: str) -> str:
    """Key of a host's record."""
    return f"{HOSTS}{host}"


def cordon_key(part: str) -> str:
    """Key that is there while a part of the fleet is cordoned: see `vfleet.parts.part_key`; a host's is its name."""
    return f"{CORDONS}{part}"


def registration_key(host: str) -> str:
    """Key that is there while the host's daemon is registered; its value is the incarnation."""
    return f"{REGISTRATIONS}{host}"


def witness_key(host: str) -> str:
    """Key of what a host has last written to know its etcd by."""
    return f"{WITNESSES}{host}"


def coordinator_key(coordinator: str) -> str:
    """Key of a running coordinator."""
    return f"{COORDINATORS}{coordinator}"


def function_key(function: str) -> str:
    """Key of a function's record."""
    return f"{FUNCTIONS}{function}"


def lock_key(function: str) -> str:
    """Key of a function's lock."""
    return f"{LOCKS}{function}"


def slot_key(device: str, vf_index: int) -> str:
    """Key of a slot; `device` is HOST/DEVICE."""
    return f"{SLOTS}{device}/{vf_index}"


def driver_key(driver: str) -> str:
    """Key of a driver's record."""
    return f"{DRIVERS}{driver}"


def entries_prefix(host: str) -> str:
    """Prefix of all table entries of drivers on a host."""
    return f"{ENTRIES}{host}/"


def entry_key(host: str, driver: str, function: str) -> str:
    """Key of a table entry; `host` is the driver's."""
    return f"{ENTRIES}{host}/{driver}/{function}"


def guests_prefix(host: str) -> str:
    """Prefix of what has become of all guests of a host."""
    return f"{GUESTS}{host}/"


def guest_key(host: str, driver: str) -> str:
    """Key of what has become of a driver's guest; `host` is the driver's."""
    return f"{GUESTS}{host}/{driver}"


def migration_key(migration: str) -> str:
    """Key of a migration's record."""
    return f"{MIGRATIONS}{migration}"


def queue_key(migration: str) -> str:
    """Key that is there while the migration waits to begin."""
    return f"{QUEUE}{migration}"


def owner_key(migration: str) -> str:
    """Key that is there while a coordinator runs the migration."""
    return f"{OWNERS}{migration}"
