import re

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from vfleet.errors import Reason, VfleetError
from vfleet.etcd.records import SCHEMA_VERSION, decode, decode_if_possible, encode
from vfleet.etcd.store import KeyValue
from vfleet.v1 import records_pb2, types_pb2
from vfleet.v1.records_pb2 import Migration, StepDuration


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


# What only a defect, another program, or a newer vfleet has written


def stored_at(message: Message, key: str) -> KeyValue:
    return KeyValue(key, message.SerializeToString(), 1, 1)


def with_times(**fields: object) -> Migration:
    return Migration(name="m-1", schema_version=1, **fields)


@pytest.mark.parametrize(
    ("migration", "field"),
    [
        (with_times(begin_time=Timestamp(seconds=1 << 60)), "begin_time"),
        (with_times(finish_time=Timestamp(nanos=-1)), "finish_time"),
        (with_times(steps=[StepDuration(duration=Duration(seconds=1 << 60))]), "steps.duration"),
        (with_times(phase=999), "phase"),
        (with_times(steps=[StepDuration(step=999)]), "steps.step"),
    ],
)
def test_a_record_with_a_time_that_is_none_or_an_enum_that_nobody_named_cannot_be_read(migration, field):
    with pytest.raises(VfleetError, match=re.escape(f"has no value of its kind in {field}")) as raised:
        decode(Migration, stored_at(migration, "/vfleet/migrations/m-1"))
    assert raised.value.reason is Reason.INTERNAL


def test_a_record_under_the_key_of_another_cannot_be_read():
    with pytest.raises(VfleetError, match="is that of 'm-1'"):
        decode(Migration, stored_at(with_times(), "/vfleet/migrations/m-2"))


def test_one_of_many_that_cannot_be_read_is_passed_over_and_told_of(caplog):
    assert decode_if_possible(Migration, KeyValue("/vfleet/migrations/m-1", b"\xff", 1, 1)) is None
    assert "passed over: the record at /vfleet/migrations/m-1" in caplog.text
    assert decode_if_possible(Migration, stored_at(with_times(), "/vfleet/migrations/m-1")) == with_times()
