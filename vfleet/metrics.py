"""Metrics for Prometheus: what both daemons count, and the page where they are read.

Most figures are read at the moment of a scrape from what the daemon has anyway. The page is served by the daemon's own
event loop, so they are of one moment, and what a scrape costs is bounded: few connections, small requests, no threads.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import Final

from prometheus_client import CollectorRegistry, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from vfleet.errors import Reason, VfleetError
from vfleet.log import Writer
from vfleet.security import Keys

PATH: Final = "/metrics"
MAX_CONNECTIONS: Final = 16
MAX_REQUEST_BYTES: Final = 16 << 10
REQUEST_TIMEOUT_S: Final = 5.0

# From a call on one machine to one that was tried at every member until its time was up.
ETCD_BUCKETS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# From an idle machine to the longest time that a hold may last by default, and beyond.
BLACKOUT_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
# From a migration without state to one of many gigabytes.
MIGRATION_BUCKETS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)

disable_created_metrics()  # type: ignore[no-untyped-call]


class ReadAtScrape(Collector):
    """A collector of what is read at the moment of a scrape."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        """Return nothing: what is read has names that nothing else has, and there may be nothing to read yet."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Return what is there now."""
        return self._read()


def new_registry(writer: Writer, keys: Keys) -> CollectorRegistry:
    """Return a registry with what every daemon tells: itself, its process, its log, its certificates."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(ReadAtScrape(lambda: _own(writer, keys)))
    return registry


def etcd_histogram(registry: CollectorRegistry) -> Histogram:
    """Return the histogram of calls to etcd, by `operation` and `outcome`: "ok", or a reason in lower case."""
    return Histogram(
        "vfleet_etcd_request_duration_seconds",
        "How long calls to etcd took, with all their retries.",
        ("operation", "outcome"),
        registry=registry,
        buckets=ETCD_BUCKETS_S,
    )


def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    """Return a gauge without labels."""
    return GaugeMetricFamily(name, text, value=value)


def gauges(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> GaugeMetricFamily:
    """Return a gauge by one label."""
    family = GaugeMetricFamily(name, text, labels=(label,))
    for name_of, value in values:
        family.add_metric((name_of,), value)
    return family


def counters(name: str, text: str, label: str, values: Iterable[tuple[str, float]]) -> CounterMetricFamily:
    """Return a counter by one label. Its name has no `_total`, which is added."""
    family = CounterMetricFamily(name, text, labels=(label,))
    for name_of, value in values:
        family.add_metric((name_of,), value)
    return family


@asynccontextmanager
async def serving(address: str | None, registry: CollectorRegistry) -> AsyncGenerator[str | None, None]:
    """Serve the registry at HOST:PORT (port 0: any that is free) until the block ends, and yield the URL; None: don't.

    Raise UNREACHABLE if it can't listen there.
    """
    if address is None:
        yield None
        return
    host, _, port = address.rpartition(":")
    page = _Page(registry)
    try:
        server = await asyncio.start_server(page.answer, host.strip("[]"), int(port), limit=MAX_REQUEST_BYTES)
    except OSError as error:
        raise VfleetError(Reason.UNREACHABLE, f"can't listen on {address} for metrics: {error}") from None
    try:
        yield f"http://{host}:{server.sockets[0].getsockname()[1]}{PATH}"
    finally:
        server.close()
        page.close()


class _Page:
    """The one page that there is, and those who read it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._writers: set[asyncio.StreamWriter] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request and close the connection."""
        if len(self._writers) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(head.split(b"\r\n", 1)[0]))
                writer.close()
                # Not only drained: what is taken slowly would go on after its place is free.
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        finally:
            self._writers.discard(writer)
            writer.close()

    def close(self) -> None:
        """Break off what is under way."""
        for writer in self._writers:
            writer.transport.abort()

    def _response(self, request_line: bytes) -> bytes:
        method, _, rest = request_line.partition(b" ")
        if method not in (b"GET", b"HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, b"", more="Allow: GET, HEAD\r\n")
        if rest.split(b" ")[0].split(b"?")[0] != PATH.encode():
            return _response(HTTPStatus.NOT_FOUND, f"metrics are at {PATH}\n".encode())
        return _response(HTTPStatus.OK, generate_latest(self._registry), CONTENT_TYPE_LATEST, head=method == b"HEAD")


def _response(
    status: HTTPStatus, body: bytes, kind: str = "text/plain; charset=utf-8", *, more: str = "", head: bool = False
) -> bytes:
    lines = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{lines}{more}Connection: close\r\n\r\n".encode() + (b"" if head else body)


def _own(writer: Writer, keys: Keys) -> Iterator[Metric]:
    info = GaugeMetricFamily("vfleet_build_info", "Always 1; the label says what runs.", labels=("version",))
    info.add_metric((version("vfleet"),), 1)
    yield info
    yield gauges(
        "vfleet_certificate_expiry_timestamp_seconds",
        "When the certificate in use ends, in seconds since 1970.",
        "shown_to",
        ((to, tls.credentials.expires_s) for to, tls in (("vfleet", keys.tls), ("etcd", keys.etcd)) if tls is not None),
    )
    yield counters("vfleet_log_lines", "Lines logged, by level.", "level", writer.lines.items())
    yield CounterMetricFamily(
        "vfleet_log_lines_dropped", "Lines that standard error did not take in time.", value=writer.dropped
    )
