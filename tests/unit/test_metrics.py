"""The page with the metrics: what it answers, and what it costs the daemon that serves it."""

import asyncio
import contextlib
import io
import socket
import time
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from support.manual_clock import ManualClock

from vfleet import metrics
from vfleet.certificates import issue, make_ca
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.observed import ObservedStore
from vfleet.etcd.store import Committed, Transaction
from vfleet.log import Writer
from vfleet.security import Keys
from vfleet.tls import Tls

DAY_S = 86_400
PAGE = b"GET /metrics HTTP/1.1\r\nHost: h1\r\n\r\n"


@pytest.fixture
def registry() -> CollectorRegistry:
    writer = Writer(io.StringIO())
    yield metrics.new_registry(writer, Keys(None, None))
    writer.close()


@pytest.fixture
async def page(registry: CollectorRegistry) -> AsyncIterator[tuple[str, int]]:
    async with metrics.serving("127.0.0.1:0", registry) as url:
        assert url is not None
        assert url.endswith("/metrics")
        host, _, port = url.removeprefix("http://").removesuffix("/metrics").rpartition(":")
        yield host, int(port)


async def ask(page: tuple[str, int], request: bytes) -> tuple[int, bytes]:
    reader, writer = await asyncio.open_connection(*page)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """Return what comes before the other side closes or breaks off the connection."""
    try:
        return await reader.read()
    except ConnectionError:
        return b""


async def test_it_has_what_the_daemon_tells(page):
    status, body = await ask(page, PAGE)
    names = {family.name for family in text_string_to_metric_families(body.decode())}
    assert status == 200
    assert {"vfleet_build_info", "vfleet_log_lines", "process_resident_memory_bytes"} <= names


async def test_a_query_changes_nothing_and_a_head_has_no_body(page):
    assert (await ask(page, PAGE.replace(b"/metrics", b"/metrics?name=x")))[0] == 200
    assert await ask(page, PAGE.replace(b"GET", b"HEAD")) == (200, b"")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET / HTTP/1.1", 404),
        (b"POST /metrics HTTP/1.1", 405),
        (b"", 405),
        (b"GET", 404),
        (b"\xff\x00 /metrics", 405),
    ],
)
async def test_anything_else_is_refused(page, request_line, status):
    assert (await ask(page, request_line + b"\r\n\r\n"))[0] == status


async def test_a_request_that_does_not_end_is_broken_off(page):
    reader, writer = await asyncio.open_connection(*page)
    writer.write(b"GET /metrics HTTP/1.1\r\n" + b"x" * (metrics.MAX_REQUEST_BYTES + 1))
    assert await rest_of(reader) == b""
    writer.close()
    assert (await ask(page, PAGE))[0] == 200


async def test_who_says_nothing_takes_no_more_than_a_place(page):
    silent = [await asyncio.open_connection(*page) for _ in range(metrics.MAX_CONNECTIONS)]
    # One of a full house is turned away; when somebody leaves, there is room again.
    with pytest.raises((ConnectionError, IndexError)):
        await ask(page, PAGE)
    for _, writer in silent:
        writer.close()

    async def answered() -> bool:
        try:
            return (await ask(page, PAGE))[0] == 200
        except (ConnectionError, IndexError):
            return False

    async with asyncio.timeout(30):
        while not await answered():
            await asyncio.sleep(0)


async def test_who_says_nothing_is_not_waited_for_for_long(registry, monkeypatch):
    monkeypatch.setattr(metrics, "REQUEST_TIMEOUT_S", 0.01)
    async with metrics.serving("127.0.0.1:0", registry) as url:
        port = int(str(url).removesuffix("/metrics").rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await rest_of(reader) == b""
        writer.close()


def slow_reader(address: tuple[str, int]) -> socket.socket:
    """Connect with as little room as the kernel gives, for somebody who reads nothing."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    reader.connect(address)
    return reader


def taken_by_the_kernel() -> int:
    """Return how many bytes it takes for somebody who reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server, slow_reader(server.getsockname()):
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(0)
            return accepted.send(bytes(1 << 25))


async def test_who_reads_nothing_keeps_its_place_until_it_is_broken_off(page, registry, monkeypatch):
    monkeypatch.setattr(metrics, "REQUEST_TIMEOUT_S", 60)
    # More than the kernel takes, but not so much that whoever writes would wait.
    text = "x" * (taken_by_the_kernel() + (24 << 10))
    registry.register(metrics.ReadAtScrape(lambda: [metrics.gauge("long", text, 1)]))
    with contextlib.ExitStack() as stack:
        for _ in range(metrics.MAX_CONNECTIONS):
            reader = stack.enter_context(slow_reader(page))
            reader.sendall(PAGE)
            reader.settimeout(0)
            await asyncio.get_running_loop().sock_recv(reader, 1)
        with pytest.raises((ConnectionError, IndexError)):
            await ask(page, PAGE)


async def test_the_end_breaks_off_what_is_under_way(registry):
    async with metrics.serving("127.0.0.1:0", registry) as url:
        port = int(str(url).removesuffix("/metrics").rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET")
    assert await rest_of(reader) == b""
    writer.close()


async def test_an_address_that_is_taken_is_one_clear_error(page, registry):
    with pytest.raises(VfleetError, match=r"can't listen on 127\.0\.0\.1:\d+ for metrics") as raised:
        async with metrics.serving(f"127.0.0.1:{page[1]}", registry):
            pass
    assert raised.value.reason is Reason.UNREACHABLE


async def test_without_an_address_there_is_no_page(registry):
    async with metrics.serving(None, registry) as url:
        assert url is None


def test_it_tells_when_the_certificates_in_use_end(tmp_path):
    clock, writer = ManualClock(time.time()), Writer(io.StringIO())
    make_ca(tmp_path / "ca")
    for days in (30, 60):
        issue(tmp_path / "ca", tmp_path / str(days), "host", "h1", days=days, clock=clock)
    tls, etcd = (Tls(tmp_path / days, clock) for days in ("30", "60"))
    registry = metrics.new_registry(writer, Keys(tls, etcd))
    for shown_to, days in (("vfleet", 30), ("etcd", 60)):
        ends = registry.get_sample_value("vfleet_certificate_expiry_timestamp_seconds", {"shown_to": shown_to})
        assert ends == pytest.approx(clock.now + days * DAY_S, abs=1)
    writer.close()


# --- calls to etcd ---


class SlowStore:
    """A store whose calls take as long as the clock is advanced, and end as told."""

    def __init__(self, clock: ManualClock, outcome: Committed | VfleetError) -> None:
        self.clock, self.outcome = clock, outcome

    async def commit(self, transaction: Transaction) -> Committed:
        self.clock.now += 0.02
        if isinstance(self.outcome, VfleetError):
            raise self.outcome
        return self.outcome


@pytest.mark.parametrize(
    ("outcome", "label"),
    [
        (Committed(succeeded=True, revision=1), "ok"),
        (Committed(succeeded=False, revision=1), "ok"),
        (VfleetError(Reason.OUTCOME_UNKNOWN, ""), "outcome_unknown"),
    ],
)
async def test_calls_to_etcd_are_measured_by_how_they_end(registry, outcome, label):
    clock = ManualClock()
    store = ObservedStore(SlowStore(clock, outcome), clock, metrics.etcd_histogram(registry))
    with contextlib.suppress(VfleetError):
        assert await store.commit(Transaction((), ())) == outcome
    labels = {"operation": "commit", "outcome": label}
    name = "vfleet_etcd_request_duration_seconds"
    assert registry.get_sample_value(f"{name}_count", labels) == 1
    assert registry.get_sample_value(f"{name}_sum", labels) == pytest.approx(0.02)
