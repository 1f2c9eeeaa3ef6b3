"""The transactions of a migration as floors make them: as many comparisons and writes as ours, of the same sizes.

The sizes are those of a migration of one function with one driver between two other hosts, as etcd had them. Every
comparison holds.
"""

from collections.abc import Mapping, Sequence

from etcd3 import etcdrpc

HOSTS = ("h1", "h2", "h3")

_NOT_EQUAL, _MOD_REVISION = 3, 2  # etcdserverpb.Compare


def begin(name: str) -> etcdrpc.TxnRequest:
    """Return BEGIN: what is there and what is not, and whether three hosts are registered; then four records."""
    compared = ["migration", "owner", "generation", "function", "lock", "slot-b", *HOSTS]
    return _transaction(name, compared, {"migration": 239, "owner": 2, "lock": 5, "slot-b": 12})


def commit(name: str) -> etcdrpc.TxnRequest:
    """Return COMMIT: record, function, the target's host; record, function, entry."""
    return _transaction(name, ["migration", "function", HOSTS[2]], {"migration": 253, "function": 90, "entry": 38})


def finish(name: str) -> etcdrpc.TxnRequest:
    """Return FINISH: the record; record and slot stay, owner, lock and the other slot go."""
    return _transaction(name, ["migration"], {"migration": 346, "slot-b": 5}, ["owner", "lock", "slot-a"])


def _transaction(
    name: str, compared: Sequence[str], puts: Mapping[str, int], deleted: Sequence[str] = ()
) -> etcdrpc.TxnRequest:
    def key(kind: str) -> bytes:
        return f"bench/{kind}/{name}".encode()

    request = etcdrpc.TxnRequest()
    for kind in compared:
        request.compare.add(result=_NOT_EQUAL, target=_MOD_REVISION, key=key(kind), mod_revision=-1)
    for kind, length in puts.items():
        request.success.add(request_put=etcdrpc.PutRequest(key=key(kind), value=bytes(length)))
    for kind in deleted:
        request.success.add(request_delete_range=etcdrpc.DeleteRangeRequest(key=key(kind)))
    return request
