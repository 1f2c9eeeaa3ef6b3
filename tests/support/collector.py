"""A small collector of traces in the test's own process, for daemons and commands that send to it by OTLP."""

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
                    self.spans.append(Received(service, span.name, *ids, span.status.code == 2, attributes))
        return ExportTraceServiceResponse()

    def services(self, trace: str) -> set[str]:
        return {span.service for span in self.spans if span.trace == trace}

    def named(self, name: str) -> list[Received]:
        return [span for span in self.spans if span.name == name]


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector, server = Collector(), grpc.aio.server()
    add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    yield collector
    await server.stop(0)
