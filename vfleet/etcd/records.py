"""Records as bytes: protobuf messages under their keys, each with the schema version that wrote it.

What is written is the same for equal messages, so values can be compared; what can't be read names its key.
"""

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.store import KeyValue

SCHEMA_VERSION = 1
_FIELD = "schema_version"

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
    return message


def _unreadable(key: str, why: str, kind: type[VfleetError] = VfleetError) -> VfleetError:
    return kind(Reason.INTERNAL, f"the record at {key} {why}", metadata={"key": key})
