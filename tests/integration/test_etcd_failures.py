"""The client when the network, or etcd, fails: a proxy between the two breaks what the test wants broken."""

import asyncio
import logging
import shutil
from contextlib import closing
from random import Random

import etcd3
import pytest

from vfleet.clock import SystemClock
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.client import EtcdStore, can_lose_data
from vfleet.etcd.server import EtcdCluster
from vfleet.etcd.session import Session
from vfleet.etcd.store import Changes, Delete, Listing, Put, Transaction, absent
from vfleet.process import free_port


class Proxy:
    """A TCP proxy before one server, which can cut, refuse, stall, or lose what the server answers."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.refusing = False
        self.stalled = False
        self.swallowing = False
        self.cut_on_answer = False

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.endpoint = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks)
        await self._server.wait_closed()

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _accept(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        if self.refusing:
            writer.transport.abort()
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target.split(":"))
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(far_writer)
        self.connections += 1
        await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer, answers=True))

    async def _pump(self, reader, writer, *, answers=False):
        try:
            while data := await reader.read(1 << 16):
                if answers and self.cut_on_answer:
                    self.cut()
                elif not (self.stalled or (answers and self.swallowing)):
                    writer.write(data)
                    await writer.drain()
        except ConnectionError:
            pass
        writer.transport.abort()


@pytest.fixture
async def proxy(etcd):
    async with Proxy(etcd.endpoint) as proxy:
        yield proxy


async def connect(*endpoints: str, timeout_s: float = 5.0) -> EtcdStore:
    return await EtcdStore.connect(endpoints, SystemClock(), Random(), timeout_s=timeout_s)


def put(key: str, value: bytes = b"") -> Transaction:
    return Transaction((), (Put(key, value),))


async def test_endpoints_out_of_reach_are_named_with_how_long_they_were_tried():
    dead = [f"127.0.0.1:{free_port(Random())}" for _ in range(2)]
    with pytest.raises(VfleetError, match=f"status at {dead[0]},{dead[1]}, tried for 0[.][345] s") as unavailable:
        await connect(*dead, timeout_s=0.3)
    assert unavailable.value.reason is Reason.STORE_UNAVAILABLE
    assert unavailable.value.metadata["endpoints"] == ",".join(dead)


async def test_an_endpoint_that_says_nothing_is_left_for_the_next(etcd, proxy):
    proxy.stalled = True
    async with await connect(proxy.endpoint, etcd.endpoint, timeout_s=1) as store:
        assert (await store.commit(put("/a"))).succeeded


async def test_a_write_that_could_not_be_sent_goes_to_the_next_endpoint(etcd, proxy):
    async with await connect(proxy.endpoint, etcd.endpoint) as store:
        await store.get("/a")
        proxy.refusing = True
        proxy.cut()
        # A connection just cut may not have been noticed: then the write counts as sent.
        while (await store.status()).address != etcd.endpoint:
            await asyncio.sleep(0)
        assert (await store.commit(put("/a"))).succeeded


async def test_a_write_that_was_never_sent_is_no_unknown_outcome(etcd, proxy, store):
    async with await connect(proxy.endpoint, timeout_s=0.4) as remote:
        proxy.refusing = True
        proxy.cut()
        with pytest.raises(VfleetError):
            await remote.get("/a")
        with pytest.raises(VfleetError, match=proxy.endpoint) as unavailable:
            await remote.commit(put("/a"))
        assert unavailable.value.reason is Reason.STORE_UNAVAILABLE
    assert await store.get("/a") is None


@pytest.mark.parametrize("failure", ["swallowing", "cut_on_answer"])
async def test_a_write_whose_answer_is_lost_is_unknown_and_not_sent_again(etcd, proxy, store, failure):
    async with await connect(proxy.endpoint, etcd.endpoint, timeout_s=0.5) as remote:
        await remote.get("/a")
        setattr(proxy, failure, True)
        with pytest.raises(VfleetError, match=proxy.endpoint) as unknown:
            await remote.commit(Transaction((), (Put("/a", b"1"),)))
        assert unknown.value.reason is Reason.OUTCOME_UNKNOWN
        # Read back, through the other endpoint: done once, or (cut before it was carried out) not at all.
        read = await remote.get("/a")
        assert read.create_revision == read.mod_revision if read else failure == "cut_on_answer"


async def test_reads_and_leases_are_repeated_when_an_answer_is_lost(etcd, proxy):
    async with await connect(proxy.endpoint, etcd.endpoint, timeout_s=1) as store:
        await store.commit(put("/a", b"1"))
        lease = await store.grant_lease(60)
        for request in (lambda: store.get("/a"), lambda: store.keep_lease_alive(lease), lambda: store.grant_lease(60)):
            while (await store.status()).address != proxy.endpoint:
                store._endpoints.leave(store._endpoints.current)
            proxy.cut_on_answer = True
            assert await request()
            proxy.cut_on_answer = False


async def test_a_store_outlives_a_restart_of_etcd(etcd, store):
    await store.commit(put("/a", b"1"))
    await etcd.kill()
    reading = asyncio.create_task(store.get("/a"))
    await etcd.start()
    assert (await reading).value == b"1"
    assert (await store.commit(put("/a", b"2"))).succeeded


async def test_a_watch_goes_on_after_etcd_was_killed_and_restarted(etcd, store):
    watch = store.watch("/a/")
    listing = await anext(watch)
    assert listing == Listing(listing.revision, ())
    await store.commit(put("/a/1"))
    assert [event.key for event in (await anext(watch)).events] == ["/a/1"]
    following = asyncio.ensure_future(anext(watch))
    await etcd.kill()
    await etcd.start()
    await store.get("/a/1")
    done = await store.commit(put("/a/2"))
    changes = await following
    assert (changes.revision, [event.key for event in changes.events]) == (done.revision, ["/a/2"])
    await watch.aclose()


async def test_a_watch_whose_revision_was_compacted_lists_anew(etcd, proxy, store):
    host, port = etcd.endpoint.split(":")
    async with await connect(proxy.endpoint) as remote:
        watch = remote.watch("/a/")
        await anext(watch)
        following = asyncio.ensure_future(anext(watch))
        await until(lambda: proxy.connections)
        proxy.refusing = True
        proxy.cut()
        for n in range(3):
            done = await store.commit(Transaction((), (Put(f"/a/{n}", b""), Delete(f"/a/{n - 1}"))))
        with closing(etcd3.client(host, int(port))) as observer:
            observer.compact(done.revision)
        proxy.refusing = False
        listing = await following
        assert isinstance(listing, Listing)
        assert listing.revision == done.revision
        assert [item.key for item in listing.items] == ["/a/2"]
        done = await store.commit(put("/a/3"))
        assert (await anext(watch)).revision == done.revision
        await watch.aclose()


async def test_a_watch_lists_anew_when_revisions_run_backwards(etcd, store):
    for n in range(5):
        await store.commit(put(f"/a/{n}"))
    watch = store.watch("/a/")
    assert len((await anext(watch)).items) == 5
    following = asyncio.ensure_future(anext(watch))
    await etcd.kill()
    shutil.rmtree(etcd.directory / "data")
    await etcd.start()
    assert await following == Listing(1, (), restored=True)
    done = await store.commit(put("/a/x"))
    assert (await anext(watch)).revision == done.revision
    await watch.aclose()


@pytest.mark.parametrize("forgotten", ["put", "put and deletion", "listing"])
async def test_a_watch_says_that_etcd_was_restored_though_its_revisions_are_as_high(etcd, proxy, store, forgotten):
    """The backup has /a/1; what was delivered after it, it lacks, and others have written in its place."""
    await store.commit(put("/a/1"))
    await etcd.kill()
    shutil.copytree(etcd.directory / "data", etcd.directory / "backup")
    await etcd.start()
    async with await connect(proxy.endpoint) as remote:
        if forgotten == "listing":
            await store.commit(put("/a/2"))
        watch = remote.watch("/a/")
        assert not (await anext(watch)).restored
        if forgotten != "listing":
            await store.commit(put("/a/2"))
            await anext(watch)
        if forgotten == "put and deletion":
            await store.commit(Transaction((), (Delete("/a/2"),)))
            await anext(watch)
        following = asyncio.ensure_future(anext(watch))
        proxy.refusing = True
        proxy.cut()
        await etcd.kill()
        shutil.rmtree(etcd.directory / "data")
        (etcd.directory / "backup").rename(etcd.directory / "data")
        await etcd.start()
        for n in range(5):
            done = await store.commit(put(f"/a/of-others/{n}"))
        proxy.refusing = False
        listing = await following
        assert isinstance(listing, Listing)
        assert (listing.revision, listing.restored) == (done.revision, True)
        done = await store.commit(put("/a/3"))
        assert (await anext(watch)).revision == done.revision
        await watch.aclose()


async def test_a_watch_goes_on_in_a_restored_etcd_that_has_all_that_was_delivered(etcd, store):
    await store.commit(put("/a/1"))
    watch = store.watch("/a/")
    await anext(watch)
    following = asyncio.ensure_future(anext(watch))
    await store.commit(put("/b/forgotten"))
    await etcd.kill()
    shutil.copytree(etcd.directory / "data", etcd.directory / "backup")
    await etcd.start()
    await store.commit(put("/b/forgotten-too"))
    await etcd.kill()
    shutil.rmtree(etcd.directory / "data")
    (etcd.directory / "backup").rename(etcd.directory / "data")
    await etcd.start()
    await store.get("/a/1")
    done = await store.commit(put("/a/2"))
    assert (await following).revision == done.revision
    await watch.aclose()


async def test_a_watch_is_not_irritated_by_the_compaction_of_what_it_listed(etcd, store):
    host, port = etcd.endpoint.split(":")
    await store.commit(put("/a/1"))
    for n in range(3):
        done = await store.commit(put(f"/b/{n}"))
    with closing(etcd3.client(host, int(port))) as observer:
        observer.compact(done.revision)
    watch = store.watch("/a/")
    await anext(watch)
    following = asyncio.ensure_future(anext(watch))
    await store.commit(Transaction((), (Put("/a/2", b""), Delete("/a/1"))))
    assert isinstance(await following, Changes)
    await watch.aclose()


async def test_a_watch_leaves_a_silent_endpoint(etcd, proxy, store):
    async with await connect(proxy.endpoint, etcd.endpoint, timeout_s=0.3) as remote:
        watch = remote.watch("/a/")
        await anext(watch)
        await store.commit(put("/a/1"))
        await anext(watch)
        proxy.stalled = True
        done = await store.commit(put("/a/2"))
        assert (await anext(watch)).revision == done.revision
        await watch.aclose()


async def test_an_idle_watch_keeps_its_stream(etcd, store, caplog):
    caplog.set_level(logging.INFO, "vfleet.etcd.watch")
    async with await connect(etcd.endpoint, timeout_s=0.2) as remote:
        watch = remote.watch("/a/")
        await anext(watch)
        following = asyncio.ensure_future(anext(watch))
        await asyncio.wait({following}, timeout=1)  # two and a half times as long as a stream may be silent
        await store.commit(put("/a/1"))
        await following
        assert "resumes" not in caplog.text
        await watch.aclose()


async def test_a_watch_misses_and_repeats_nothing_while_its_stream_breaks(proxy, store):
    last = 150
    connections = 0
    written: list[tuple[int, tuple[str, ...]]] = []

    async def write() -> None:
        nonlocal connections
        for n in range(1, last + 1):
            writes = (Put("/a/x", b"%d" % n), Put(f"/a/{n}", b""), Delete(f"/a/{n - 3}"))
            revision = (await store.commit(Transaction((), writes))).revision
            if n % 15 == 0:
                connections = proxy.connections
                proxy.cut()
            elif n % 15 == 5 and n > 15:
                await until(lambda cut_at=connections: proxy.connections > cut_at)
            keys = ("/a/x", f"/a/{n}") if n <= 3 else ("/a/x", f"/a/{n}", f"/a/{n - 3}")
            written.append((revision, tuple(sorted(keys))))

    async with await connect(proxy.endpoint) as remote:
        watch = remote.watch("/a/")
        assert (await anext(watch)).items == ()
        writing = asyncio.create_task(write())
        seen: dict[int, list[str]] = {}
        while f"/a/{last}" not in seen.get(max(seen, default=0), ()):
            changes = await anext(watch)
            assert isinstance(changes, Changes)
            fresh: dict[int, list[str]] = {}
            for event in changes.events:
                fresh.setdefault(event.mod_revision, []).append(event.key)
            assert not seen.keys() & fresh.keys(), "a revision was split or repeated"
            assert list(fresh)[-1] == changes.revision
            seen |= fresh
        await writing
        await watch.aclose()
    assert [(revision, tuple(sorted(keys))) for revision, keys in seen.items()] == written
    assert proxy.connections > 9


async def test_a_cluster_serves_without_one_member_and_not_without_two(tmp_path):
    async with EtcdCluster(tmp_path, SystemClock(), Random(), 3) as cluster:
        async with await connect(*cluster.endpoints, timeout_s=6) as store:
            watch = store.watch("/a/")
            await anext(watch)
            await cluster.servers[0].kill()
            await store.get("/a/1")
            done = await commit_surely(store, "/a/1")
            assert (await anext(watch)).revision == done
            await watch.aclose()
            await cluster.servers[1].kill()
        with pytest.raises(VfleetError) as unavailable:
            async with await connect(*cluster.endpoints, timeout_s=2) as store:
                await store.get("/a/1")
        assert unavailable.value.reason is Reason.STORE_UNAVAILABLE


async def test_a_session_is_lost_when_another_revokes_its_lease(etcd, store):
    host, port = etcd.endpoint.split(":")
    async with await Session.open(store, SystemClock(), 2) as session:
        await store.commit(Transaction((absent("/a"),), (Put("/a", b"1", session.lease),)))
        with closing(etcd3.client(host, int(port))) as observer:
            observer.revoke_lease(session.lease)
        async with asyncio.timeout(5):
            await session.lost.wait()
    assert await store.get("/a") is None


async def test_a_session_outlives_its_ttl_while_etcd_answers_and_ends_within_it_when_not(etcd, store):
    clock = SystemClock()
    session = await Session.open(store, clock, 1)
    opened_s = clock.monotonic()
    await until(lambda: clock.monotonic() > opened_s + 1.5)
    session.check()
    await etcd.kill()
    killed_s = clock.monotonic()
    async with asyncio.timeout(5):
        await session.lost.wait()
    assert clock.monotonic() - killed_s <= 1.2
    await etcd.start()
    await session.close()


@pytest.mark.parametrize(
    ("version", "affected"),
    [("3.5.0", True), ("3.5.2", True), ("3.5.3", False), ("3.5.10", False), ("3.4.23", False), ("3.6.1", False)],
)
def test_the_versions_that_can_lose_data_are_known(version, affected):
    assert can_lose_data(version) is affected


async def test_an_affected_version_is_warned_of_once(etcd, caplog):
    caplog.set_level(logging.WARNING)
    async with await connect(etcd.endpoint) as store:
        version = (await store.status()).version
    warnings = [record for record in caplog.records if "can lose data" in record.message]
    assert len(warnings) == can_lose_data(version)


async def commit_surely(store: EtcdStore, key: str) -> int:
    """Put a key in a cluster that may be electing a leader: read back when the outcome is unknown."""
    while True:
        try:
            return (await store.commit(put(key))).revision
        except VfleetError as error:
            if error.reason is not Reason.OUTCOME_UNKNOWN:
                raise
            if (read := await store.get(key)) is not None:
                return read.mod_revision


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)
