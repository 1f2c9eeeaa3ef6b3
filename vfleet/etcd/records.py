"""Records as bytes: protobuf messages under their keys, each with the schema version that wrote it.

What is written is the same for equal messages, so values can be compared; what can't be read names its key. What can
be read has times that are times, and enums that are named, so that nobody who uses it meets something else.
"""

import logging
from functools import cache
from typing import TypeVar

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.store import KeyValue

SCHEMA_VERSION = 1
_FIELD = "schema_version"
_NAME_FIELD = "name"

# What has times in it, and refuses to say them if they are none.
_TIMES = frozenset({"google.protobuf.Timestamp", "google.protobuf.Duration"})

_log = logging.getLogger(__name__)

MessageT = TypeVar("MessageT", bound=Message)


class NewerSchemaError(VfleetError):
    """A newer vfleet wrote the record: whatever this one makes of the fleet, it would be wrong."""


def encode(message: Message) -> bytes:
    """Return the record's bytes, the same for equal messages, with the schema version of today if it has the field."""
    if _FIELD in message.DESCRIPTOR.fields_by_name:
        stamped = type(message)()
        stamped.CopyFrom(message)
        setattr(stamped, _FIELD, SCHEMA_VERSION)
        message = stamped
    return message.SerializeToString(deterministic=True)


def decode(message_type: type[MessageT], kv: KeyValue) -> MessageT:
    """Return the record. Raise INTERNAL, naming the key, if it is none; NewerSchemaError if a newer vfleet wrote it."""
    try:
        message = message_type.FromString(kv.value)
    except DecodeError as error:
        raise _unreadable(kv.key, f"is no {message_type.DESCRIPTOR.full_name}: {error}") from None
    version = getattr(message, _FIELD, SCHEMA_VERSION)
    if not 1 <= version <= SCHEMA_VERSION:
        kind = NewerSchemaError if version > SCHEMA_VERSION else VfleetError
        raise _unreadable(kv.key, f"has schema version {version}; this vfleet reads 1 to {SCHEMA_VERSION}", kind)
    named = getattr(message, _NAME_FIELD, None)
    if named is not None and not kv.key.endswith(f"/{named}"):
        raise _unreadable(kv.key, f"is that of {named!r}")
    if wrong := _wrong_field(message):
        raise _unreadable(kv.key, f"has no value of its kind in {wrong}")
    return message


def decode_if_possible(message_type: type[MessageT], kv: KeyValue) -> MessageT | None:
    """Return the record; None, after a line in the log, if it can't be read: one of many is no reason to read none.

    Raise NewerSchemaError.
    """
    try:
        return decode(message_type, kv)
    except NewerSchemaError:
        raise
    except VfleetError as error:
        _log.error("passed over: %s", error.message)
        return None


def _wrong_field(message: Message) -> str:
    """Return the field that has a number which its enum has no name for, or a time that is none; nothing if all do."""
    for field in _checked_fields(message.DESCRIPTOR):
        value = getattr(message, field.name)
        for each in value if field.is_repeated else [value]:
            if field.enum_type is not None:
                if each not in field.enum_type.values_by_number:
                    return field.name
            elif isinstance(each, Timestamp | Duration):
                try:
                    each.ToJsonString()  # of the two ways to look, the one that refuses what is out of range
                except ValueError:
                    return field.name
            elif inner := _wrong_field(each):
                return f"{field.name}.{inner}"
    return ""


@cache
def _checked_fields(descriptor: Descriptor) -> tuple[FieldDescriptor, ...]:
    """Return the fields of a kind of message that can be wrong, or have something in them that can."""
    return tuple(
        field
        for field in descriptor.fields
        if field.enum_type is not None
        or (
            field.message_type is not None
            and (field.message_type.full_name in _TIMES or _checked_fields(field.message_type))
        )
    )


def _unreadable(key: str, why: str, kind: type[VfleetError] = VfleetError) -> VfleetError:
    return kind(Reason.INTERNAL, f"the record at {key} {why}", metadata={"key": key})
