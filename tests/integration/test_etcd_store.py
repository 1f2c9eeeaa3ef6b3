"""The client against a real etcd, with the synchronous client of the etcd3 package as an outside observer."""

from contextlib import closing
from random import Random

import etcd3
import pytest

from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import client
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.store import Delete, Put, Transaction, absent, unchanged, value_is


@pytest.fixture
def observer(etcd):
    host, port = etcd.endpoint.split(":")
    with closing(etcd3.client(host, int(port))) as observer:
        yield observer


async def put(store: EtcdStore, key: str, value: bytes, lease: int = 0) -> int:
    return (await store.commit(Transaction((), (Put(key, value, lease),)))).revision


async def test_a_key_is_absent_then_there_then_gone(store, observer):
    assert await store.get("/a") is None
    first = await put(store, "/a", b"1")
    second = await put(store, "/a", b"\x00\xff")
    read = await store.get("/a")
    assert (read.key, read.value, read.create_revision, read.mod_revision) == ("/a", b"\x00\xff", first, second)
    assert observer.get("/a")[0] == b"\x00\xff"
    await store.commit(Transaction((), (Delete("/a"), Delete("/never"))))
    assert await store.get("/a") is None


async def test_a_transaction_writes_all_or_nothing(store):
    revision = await put(store, "/a", b"1")
    holds = (absent("/b"), unchanged("/a", revision), value_is("/a", b"1"))
    for fails in (absent("/a"), unchanged("/a", revision - 1), value_is("/a", b"2"), value_is("/b", b"")):
        refused = await store.commit(Transaction((*holds, fails), (Put("/a", b"2"), Put("/b", b"2"))))
        assert not refused.succeeded
        assert refused.revision == revision
    assert (await store.get("/a")).mod_revision == revision
    done = await store.commit(Transaction(holds, (Delete("/a"), Put("/b", b"2"))))
    assert done.succeeded
    assert done.revision == revision + 1
    assert await store.get("/a") is None
    assert (await store.get("/b")).value == b"2"


async def test_a_listing_has_the_prefix_and_nothing_else(store):
    for key in ("/a", "/a/", "/a/2", "/a/1", "/a0", "/b/1"):
        revision = await put(store, key, key.encode())
    listing = await store.list("/a/")
    assert [item.key for item in listing.items] == ["/a/", "/a/1", "/a/2"]
    assert listing.revision == revision
    assert (await store.list("/c/")).items == ()


async def test_a_listing_of_many_pages_is_of_one_revision(store, monkeypatch):
    monkeypatch.setattr(client, "PAGE_KEYS", 3)
    for n in range(10):
        revision = await put(store, f"/a/{n}", b"")
    pages = 0
    original = store._range

    async def page_then_write(what, request):
        nonlocal pages
        page = await original(what, request)
        pages += 1
        await put(store, f"/a/{pages}-late", b"")
        return page

    monkeypatch.setattr(store, "_range", page_then_write)
    listing = await store.list("/a/")
    assert pages == 4
    assert [item.key for item in listing.items] == [f"/a/{n}" for n in range(10)]
    assert listing.revision == revision


async def test_a_listing_whose_revision_is_compacted_begins_again(store, observer, monkeypatch):
    monkeypatch.setattr(client, "PAGE_KEYS", 2)
    for n in range(5):
        await put(store, f"/a/{n}", b"")
    original = store._range
    compacted = False

    async def page_then_compact(what, request):
        nonlocal compacted
        page = await original(what, request)
        if not compacted:
            compacted = True
            observer.compact(await put(store, "/a/5", b""))
        return page

    monkeypatch.setattr(store, "_range", page_then_compact)
    assert [item.key for item in (await store.list("/a/")).items] == [f"/a/{n}" for n in range(6)]


async def test_a_key_lives_as_long_as_its_lease(store, observer):
    lease = await store.grant_lease(1)
    await put(store, "/a", b"1", lease)
    assert (await store.get("/a")).lease == lease
    watch = store.watch("/a")
    await anext(watch)
    (event,) = (await anext(watch)).events
    assert (event.key, event.value) == ("/a", None)
    await watch.aclose()
    assert not await store.keep_lease_alive(lease)


async def test_a_lease_kept_alive_and_revoked(store):
    lease = await store.grant_lease(60)
    await put(store, "/a", b"1", lease)
    assert await store.keep_lease_alive(lease)
    await store.revoke_lease(lease)
    assert await store.get("/a") is None
    assert not await store.keep_lease_alive(lease)
    await store.revoke_lease(lease)


async def test_a_put_under_a_lease_that_is_gone_is_a_conflict_that_names_it(store):
    lease = await store.grant_lease(60)
    await store.revoke_lease(lease)
    with pytest.raises(VfleetError, match="nothing was written") as conflict:
        await store.commit(Transaction((), (Put("/a", b"1"), Put("/b", b"1", lease))))
    assert conflict.value.reason is Reason.CONFLICT
    assert conflict.value.metadata == {"lease": f"{lease:x}"}
    assert await store.get("/a") is None
    unheld = await store.commit(Transaction((value_is("/a", b""),), (Put("/b", b"1", lease),)))
    assert not unheld.succeeded


async def test_transactions_do_what_a_dictionary_would(store):
    random = Random(8)
    model: dict[str, tuple[bytes, int, int]] = {}
    keys = [f"/k/{n}" for n in range(4)]
    revision = (await store.list("/k/")).revision
    for _ in range(200):
        compares, holds = [], True
        for key in random.sample(keys, random.randrange(4)):
            value, _, modified = model.get(key, (None, 0, 0))
            if random.random() < 0.2:
                compares.append(absent(key))
                holds &= key not in model
            elif random.random() < 0.5:
                expected = random.choice([modified, modified, modified, modified + 1])
                compares.append(unchanged(key, expected))
                holds &= expected == modified
            else:
                expected = random.choice([value or b"", value or b"", b"x"])
                compares.append(value_is(key, expected))
                holds &= expected == value
        written = random.sample(keys, random.randrange(1, 4))
        writes = [Delete(key) if random.random() < 0.3 else Put(key, random.randbytes(2)) for key in written]
        committed = await store.commit(Transaction(tuple(compares), tuple(writes)))
        assert committed.succeeded is holds
        if holds:
            # A transaction that changes nothing takes no revision.
            revision += any(isinstance(write, Put) or write.key in model for write in writes)
            for write in writes:
                if isinstance(write, Put):
                    model[write.key] = (write.value, model.get(write.key, (b"", revision, 0))[1], revision)
                else:
                    model.pop(write.key, None)
        assert committed.revision == revision
        listing = await store.list("/k/")
        assert {kv.key: (kv.value, kv.create_revision, kv.mod_revision) for kv in listing.items} == model


def puts(count: int, value: bytes = b"") -> Transaction:
    return Transaction((), tuple(Put(f"/a/{n}", value) for n in range(count)))


async def test_the_largest_transaction_is_taken_and_a_larger_one_is_a_clear_error(etcd, store):
    assert (store.max_operations, store.max_request_bytes) == (128, 1572864)
    assert (await store.commit(puts(128))).succeeded
    with pytest.raises(VfleetError, match="129 operations; etcd takes at most 128") as refused:
        await store.commit(puts(129))
    assert refused.value.reason is Reason.LIMIT_EXCEEDED
    with pytest.raises(VfleetError, match="bytes; etcd takes at most 1572864") as refused:
        await store.commit(puts(2, bytes(800_000)))
    assert refused.value.reason is Reason.LIMIT_EXCEEDED
    assert (await store.get("/a/0")).value == b""


@pytest.mark.parametrize(
    ("transaction", "why"),
    [
        (puts(129), "too many operations"),
        (puts(2, bytes(800_000)), "request is too large"),
        (puts(3, bytes(1_000_000)), "larger than max"),
    ],
)
async def test_what_etcd_itself_finds_too_large_is_the_same_error(etcd, transaction, why):
    limits = {"max_operations": 1000, "max_request_bytes": 1 << 30}
    async with await EtcdStore.connect([etcd.endpoint], SystemClock(), Random(), **limits) as store:
        with pytest.raises(VfleetError, match=why) as refused:
            await store.commit(transaction)
        assert refused.value.reason is Reason.LIMIT_EXCEEDED
        assert await store.get("/a/0") is None


async def test_a_malformed_transaction_is_refused_and_nothing_done(store):
    with pytest.raises(VfleetError, match="duplicate key") as refused:
        await store.commit(Transaction((), (Put("/a", b"1"), Put("/a", b"2"))))
    assert refused.value.reason is Reason.INTERNAL
    assert await store.get("/a") is None


async def test_status_names_version_and_leader(etcd, store):
    status = await store.status()
    assert status.address == etcd.endpoint
    assert status.version.startswith("3.")
    assert status.member == status.leader != 0


@pytest.mark.parametrize("endpoint", ["", "127.0.0.1", "127.0.0.1:", ":2379", "127.0.0.1:0", "127.0.0.1:99999", "h:x"])
async def test_an_endpoint_that_is_none_is_refused(endpoint):
    with pytest.raises(VfleetError, match="expected HOST:PORT") as refused:
        await EtcdStore.connect([endpoint], SystemClock(), Random())
    assert refused.value.reason is Reason.INVALID_FIELD


async def test_no_endpoint_is_refused():
    with pytest.raises(VfleetError, match="at least one HOST:PORT"):
        await EtcdStore.connect([], SystemClock(), Random())
