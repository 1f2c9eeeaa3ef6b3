import pytest

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.records import SCHEMA_VERSION, decode, encode
from vfleet.etcd.store import KeyValue
from vfleet.v1 import records_pb2, types_pb2


def stored(value: bytes) -> KeyValue:
    return KeyValue("/vfleet/hosts/h1", value, 1, 1)


def test_a_record_comes_back_as_it_was_with_todays_schema_version():
    host = records_pb2.Host(name="h1", segment=3, devices=[records_pb2.Device(name="h1/nic0")])
    read = decode(records_pb2.Host, stored(encode(host)))
    assert read.schema_version == SCHEMA_VERSION
    assert host.schema_version == 0
    host.schema_version = SCHEMA_VERSION
    assert read == host


def test_a_record_without_schema_version_comes_back_as_it_was():
    slot = records_pb2.Slot(function="vf1", migration="m1")
    assert decode(records_pb2.Slot, stored(encode(slot))) == slot


def test_equal_messages_have_equal_bytes():
    host = records_pb2.Host(name="h1", segment=3)
    assert encode(host) == encode(records_pb2.Host.FromString(encode(host)))
    assert encode(host) != encode(records_pb2.Host(name="h1", segment=4))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (b"\xff\xff", "is no vfleet.v1.Host"),
        (b"", "schema version 0"),
        (records_pb2.Host(schema_version=SCHEMA_VERSION + 1).SerializeToString(), "schema version 2; .* reads 1 to 1"),
    ],
)
def test_what_is_no_readable_record_is_refused_with_its_key(value: bytes, why: str):
    with pytest.raises(VfleetError, match=f"/vfleet/hosts/h1.*{why}") as refused:
        decode(records_pb2.Host, stored(value))
    assert refused.value.reason is Reason.INTERNAL
    assert refused.value.metadata == {"key": "/vfleet/hosts/h1"}


def test_a_table_entry_is_typed_by_its_message():
    entry = types_pb2.TableEntry()
    assert isinstance(decode(types_pb2.TableEntry, stored(encode(entry))), types_pb2.TableEntry)
