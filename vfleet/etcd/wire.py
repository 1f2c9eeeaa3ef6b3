"""etcd's messages to and from the values of `vfleet.etcd.store`. Pure."""

from etcd3 import etcdrpc
from etcd3.etcdrpc import kv_pb2

from vfleet.etcd.store import Compare, Delete, KeyValue, Put, Target, Transaction

_EQUAL = 0  # etcdserverpb.Compare.EQUAL
_CREATE_REVISION, _MOD_REVISION, _VALUE = 1, 2, 3  # etcdserverpb.Compare.CompareTarget


def range_end(prefix: str) -> bytes:
    """Return the first key after all that begin with `prefix`, which is not empty and ends in an ASCII character."""
    key = prefix.encode()
    return key[:-1] + bytes([key[-1] + 1])


def key_text(key: bytes) -> str:
    """Return a key as text. One that is not UTF-8 is none of vfleet's, and comes out readable, not as an error."""
    return bytes(key).decode(errors="backslashreplace")


def key_value(kv: kv_pb2.KeyValue) -> KeyValue:
    """Return a key as etcd returned it."""
    return KeyValue(key_text(kv.key), bytes(kv.value), int(kv.create_revision), int(kv.mod_revision), int(kv.lease))


def txn_request(transaction: Transaction) -> etcdrpc.TxnRequest:
    """Return the request that carries the transaction."""
    return etcdrpc.TxnRequest(
        compare=[_compare(compare) for compare in transaction.compares],
        success=[_operation(write) for write in transaction.writes],
    )


def _compare(compare: Compare) -> etcdrpc.Compare:
    key, expected = compare.key.encode(), compare.expected
    match compare.target:
        case Target.VALUE:
            return etcdrpc.Compare(result=_EQUAL, target=_VALUE, key=key, value=expected)
        case Target.CREATE_REVISION:
            return etcdrpc.Compare(result=_EQUAL, target=_CREATE_REVISION, key=key, create_revision=expected)
        case Target.MOD_REVISION:
            return etcdrpc.Compare(result=_EQUAL, target=_MOD_REVISION, key=key, mod_revision=expected)


def _operation(write: Put | Delete) -> etcdrpc.RequestOp:
    key = write.key.encode()
    match write:
        case Put():
            return etcdrpc.RequestOp(
                request_put=etcdrpc.PutRequest(key=key, value=write.value, lease=write.lease),
            )
        case Delete():
            return etcdrpc.RequestOp(request_delete_range=etcdrpc.DeleteRangeRequest(key=key))
