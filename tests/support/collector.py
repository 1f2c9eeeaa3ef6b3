"""A small collector of traces in the test's own process, for daemons and commands that send to it by OTLP.

As a program it waits for traces at HOST:PORT until Ctrl-C, and then shows each as a tree.
"""

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


@dataclass(frozen=True)
class Received:
    """A span, with whose it is: vfleet for the command, SERVICE/NAME for a daemon."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    begin_ns: int
    end_ns: int
    failed: bool
    attributes: dict[str, str]


@dataclass
class Collector(TraceServiceServicer):
    """What has been received. `endpoint` is where it is sent to."""

    endpoint: str = ""
    spans: list[Received] = field(default_factory=list)

    async def Export(self, request, context):  # noqa: N802  # as the proto says
        for of_resource in request.resource_spans:
            named = {each.key: each.value.string_value for each in of_resource.resource.attributes}
            service = named["service.name"]
            if service != "vfleet":
                service += f"/{named['service.instance.id']}"
            for scope in of_resource.scope_spans:
                for span in scope.spans:
                    attributes = {each.key: each.value.string_value for each in span.attributes}
                    ids = (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex())
                    times = (span.start_time_unix_nano, span.end_time_unix_nano)
                    self.spans.append(Received(service, span.name, *ids, *times, span.status.code == 2, attributes))
        return ExportTraceServiceResponse()

    def services(self, trace: str) -> set[str]:
        return {span.service for span in self.spans if span.trace == trace}

    def named(self, name: str) -> list[Received]:
        return [span for span in self.spans if span.name == name]


@asynccontextmanager
async def collecting(address: str = "127.0.0.1:0") -> AsyncIterator[Collector]:
    collector, server = Collector(), grpc.aio.server()
    add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port(address)}"
    await server.start()
    yield collector
    await server.stop(0)


def tree(spans: list[Received]) -> list[str]:
    """Return a trace as lines: each span with its service, and when it began and how long it took, in milliseconds."""
    known, start_ns = {span.span for span in spans}, min(span.begin_ns for span in spans)

    def below(parent: str | None, depth: int) -> list[str]:
        lines = []
        for span in sorted(spans, key=lambda each: each.begin_ns):
            if span.parent == parent or (parent is None and span.parent not in known):
                name = f"{'  ' * depth}{span.name}{' FAILED' if span.failed else ''}"
                at_ms, took_ms = (span.begin_ns - start_ns) / 1e6, (span.end_ns - span.begin_ns) / 1e6
                lines += [f"{at_ms:8.1f} {took_ms:8.1f}  {span.service:22} {name}", *below(span.span, depth + 1)]
        return lines

    return below(None, 0)


async def main(address: str) -> None:
    async with collecting(address) as collector:
        sys.stdout.write(f"traces are awaited at {collector.endpoint}; Ctrl-C shows them\n")
        sys.stdout.flush()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
    for trace in dict.fromkeys(span.trace for span in collector.spans):
        lines = tree([span for span in collector.spans if span.trace == trace])
        heading = (f"\ntrace {trace}", "begin ms  took ms  service                span")
        sys.stdout.write("\n".join((*heading, *lines, "")))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1]))
