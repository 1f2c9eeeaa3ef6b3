"""Protobuf messages made of a fuzzer's bytes: always well-formed, their values plausible, extreme, or anything."""

from atheris import FuzzedDataProvider
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

MAX_DEPTH = 5
MAX_REPEATED = 3

# What there is in the fleets that the targets make, what there could be, and what is no name.
TEXTS = (
    *("vf1", "vf2", "vf3", "vf5", "d1", "d2", "d3", "h1", "h2", "h3", "h1/nic0", "h2/nic0", "h3/nic0", "c1", "m-1"),
    *(
        "",
        "h9",
        "h1/",
        "/",
        "h1/nic0/x",
        "h1:1",
        "h2:1",
        "checker",
        "network",
        "psu-a",
        "lan",
        "x" * 64,
        "\u00e9",
        "a b",
    ),
)
NUMBERS = (0, 1, 2, 3, 4, 5, 8, 63, 64, 100, 4096, 1 << 16, 1 << 20, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 63) - 1)
ADDRESSES = (1 << 44, (1 << 44) + 4096, 1 << 48 | 0x0180 << 32, 2 << 48 | 0x1110 << 32, (1 << 64) - 4096, (1 << 64) - 1)

_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_SINT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_SFIXED32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_FIXED32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_SINT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_SFIXED64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
    FieldDescriptor.TYPE_FIXED64: (0, (1 << 64) - 1),
}


def fill(message: Message, data: FuzzedDataProvider, depth: int = 0) -> None:
    """Set fields of a message, or leave them."""
    for field in message.DESCRIPTOR.fields:
        # Most are set: a request whose names are missing is refused at its first line.
        if data.ConsumeIntInRange(0, 3) == 0 or (depth >= MAX_DEPTH and field.message_type):
            continue
        if field.message_type and field.message_type.GetOptions().map_entry:
            continue  # no request and no record has one
        if field.is_repeated:
            for _ in range(data.ConsumeIntInRange(0, MAX_REPEATED)):
                if field.message_type:
                    fill(getattr(message, field.name).add(), data, depth + 1)
                else:
                    getattr(message, field.name).append(value(field, data))
        elif field.message_type:
            inner = getattr(message, field.name)
            inner.SetInParent()
            fill(inner, data, depth + 1)
        else:
            setattr(message, field.name, value(field, data))


def value(field: FieldDescriptor, data: FuzzedDataProvider) -> object:
    """Return a value for a field that is no message."""
    if field.type in _INTEGERS:
        low, high = _INTEGERS[field.type]
        if data.ConsumeBool():
            return min(high, data.PickValueInList([*NUMBERS, *ADDRESSES]))
        return data.ConsumeIntInRange(low, high)
    if field.type == FieldDescriptor.TYPE_ENUM:
        # Open: a number that nobody has named may come as well.
        return data.PickValueInList([*field.enum_type.values_by_number, 999])
    if field.type == FieldDescriptor.TYPE_BOOL:
        return data.ConsumeBool()
    if field.type == FieldDescriptor.TYPE_STRING:
        if data.ConsumeIntInRange(0, 7):
            return data.PickValueInList(list(TEXTS))
        return data.ConsumeUnicodeNoSurrogates(data.ConsumeIntInRange(0, 80))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return data.ConsumeBytes(data.PickValueInList([0, 1, 4, 8, 64, 4096]))
    return data.ConsumeFloat()
