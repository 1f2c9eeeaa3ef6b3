"""Parts of the fleet: what can be taken out of use, or emptied. Each is a host, or something named within one.

A part is written as a kind and a name, "device" and "h1/nic0"; its key is HOST, or HOST/KIND/NAME.
"""

from collections.abc import Mapping

from vfleet.errors import invalid_field
from vfleet.names import EXPECTED, check_name, is_device_name
from vfleet.v1.records_pb2 import Part, PartKind

KINDS: Mapping[str, PartKind.ValueType] = {
    "host": PartKind.PART_KIND_HOST,
    "device": PartKind.PART_KIND_DEVICE,
    "adapter": PartKind.PART_KIND_ADAPTER,
    "bridge": PartKind.PART_KIND_BRIDGE,
    "power-domain": PartKind.PART_KIND_POWER_DOMAIN,
}
_WORDS = {kind: word for word, kind in KINDS.items()}


def part_of(kind: str, name: str) -> Part:
    """Return the part of that kind and name. Raise INVALID_FIELD for what can't be meant."""
    if kind not in KINDS:
        raise invalid_field("kind", kind, f"one of {', '.join(KINDS)}")
    return check_part("part", Part(kind=KINDS[kind], name=name))


def check_part(field: str, part: Part) -> Part:
    """Return `part` if its kind is one and its name is well-formed; else raise INVALID_FIELD naming `field`."""
    if part.kind not in _WORDS:
        raise invalid_field(f"{field}.kind", part.kind, f"one of {', '.join(KINDS)}")
    if part.kind == PartKind.PART_KIND_HOST:
        check_name(f"{field}.name", part.name)
    elif not is_device_name(part.name):
        kind = _WORDS[part.kind].upper()
        raise invalid_field(f"{field}.name", part.name, f"HOST/{kind}, for example h1/nic0, each {EXPECTED}")
    return part


def part_key(part: Part) -> str:
    """Return the key of a part that is well-formed."""
    host, _, name = part.name.partition("/")
    return within(host, part.kind, name) if name else host


def within(host: str, kind: PartKind.ValueType, name: str) -> str:
    """Return the key of the part of a host that has this kind and name."""
    return f"{host}/{_WORDS[kind]}/{name}"


def spoken(key: str) -> str:
    """Return a part as people write it, by its key: "host h1", "device h1/nic0"."""
    host, _, inner = key.partition("/")
    kind, _, name = inner.partition("/")
    return f"{kind} {host}/{name}" if inner else f"host {host}"
