"""Traces for OpenTelemetry: one a migration, across the command, coordinators, hosts and calls to etcd.

Off unless OTEL_EXPORTER_OTLP_ENDPOINT is set: then nothing of OpenTelemetry is imported, and each place below is a look
at one name. The trace goes on in the metadata of calls, and in the migration's record for whoever adopts it, as a
`traceparent` (W3C Trace Context). Only what belongs to a trace makes spans: no access, no renewal of a lease.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Thread
from typing import TYPE_CHECKING, Final, Protocol

from google.protobuf.message import Message

from vfleet.errors import Reason, VfleetError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

VARIABLE: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
PROTOCOL_VARIABLE: Final = "OTEL_EXPORTER_OTLP_PROTOCOL"
METADATA_KEY: Final = "traceparent"
PACKAGE: Final = "vfleet.v1"
CLOSE_TIMEOUT_S: Final = 2.0

_NOTHING: Final = nullcontext("")


class Call(Protocol):
    """A call as whoever serves it is given it: gRPC's `ServicerContext`."""

    def invocation_metadata(self) -> Iterable[tuple[str, str | bytes]] | None:
        """Return what came with it."""


class _State:
    """What there is while traces are on."""

    provider: TracerProvider | None = None
    tracer: Tracer | None = None


def enable(
    environment: Mapping[str, str], service: str, instance: str = "", exporter: SpanExporter | None = None
) -> None:
    """Make traces if the environment names an endpoint, or an exporter is given. OpenTelemetry's variables say how.

    Raise INVALID_FIELD for a protocol that isn't gRPC.
    """
    if exporter is None and not environment.get(VARIABLE):
        return
    from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    protocol = environment.get(PROTOCOL_VARIABLE, "grpc")
    if protocol != "grpc":
        raise VfleetError(Reason.INVALID_FIELD, f"{PROTOCOL_VARIABLE} is {protocol!r}; expected grpc")
    if exporter is None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        try:
            exporter = OTLPSpanExporter()
        except ValueError as error:
            raise VfleetError(Reason.INVALID_FIELD, f"{VARIABLE} or what goes with it: {error}") from None
    named = {SERVICE_NAME: service, SERVICE_INSTANCE_ID: instance}
    resource = Resource.create({key: value for key, value in named.items() if value})
    _State.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    _State.provider.add_span_processor(BatchSpanProcessor(exporter))
    _State.tracer = _State.provider.get_tracer("vfleet")


def close() -> None:
    """Send what is left, for `CLOSE_TIMEOUT_S` at most, and make no more traces."""
    provider, _State.provider, _State.tracer = _State.provider, None, None
    if provider is not None:
        closing = Thread(target=provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT_S)


def is_on() -> bool:
    """Return whether traces are made."""
    return _State.tracer is not None


def current() -> str:
    """Return the traceparent of the running task's span; nothing if it has none."""
    if _State.tracer is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get(METADATA_KEY, "")


def ids() -> dict[str, str]:
    """Return the trace and the span that the running task works for, for the lines that it logs; nothing for none."""
    _, trace, span, _ = (current() or "---").split("-")
    return {"trace_id": trace, "span_id": span} if trace else {}


def span(name: str, parent: str = "", **attributes: str) -> AbstractContextManager[str]:
    """Let a block be a span: of the trace that `parent` (a traceparent) belongs to, else of the task's own, else a new
    one. Gives its traceparent.
    """
    return _span(_State.tracer, name, parent, attributes) if _State.tracer is not None else _NOTHING


def calling(name: str, **attributes: str) -> AbstractContextManager[str]:
    """Let a block be a call to somewhere else, if the running task has a trace. Gives its traceparent.

    What is called in the block is no child of it, so that it may be the body of a generator.
    """
    return _calling(_State.tracer, name, attributes) if _State.tracer is not None and current() else _NOTHING


def calling_method(request: Message, address: str) -> AbstractContextManager[str]:
    """Let a block send one of vfleet's own requests, as `calling` does."""
    if _State.tracer is None or request.DESCRIPTOR.file.package != PACKAGE:
        return _NOTHING
    return calling(_method(request), **{"server.address": address})


def serving_method(request: Message, call: Call) -> AbstractContextManager[str]:
    """Let a block, and what its task does until it ends, serve a request that came with a traceparent, if it did."""
    if _State.tracer is None:
        return _NOTHING
    parent = next((value for key, value in call.invocation_metadata() or () if key == METADATA_KEY), "")
    return _serving(_State.tracer, _method(request), parent) if parent and isinstance(parent, str) else _NOTHING


def past(name: str, seconds: float) -> None:
    """Tell of something that has just ended and took so long, if the running task has a trace."""
    if _State.tracer is not None and current():
        now_ns = time.time_ns()
        _State.tracer.start_span(name, start_time=now_ns - round(seconds * 1e9)).end(now_ns)


def unbind() -> None:
    """Let what the running task does from now on belong to no trace."""
    if _State.tracer is not None:
        from opentelemetry.context import Context, attach

        attach(Context())


@contextmanager
def _span(tracer: Tracer, name: str, parent: str, attributes: Mapping[str, str]) -> Iterator[str]:
    with tracer.start_as_current_span(
        name, _context(parent) if parent else None, attributes=_named(attributes), record_exception=False
    ):
        yield current()


@contextmanager
def _calling(tracer: Tracer, name: str, attributes: Mapping[str, str]) -> Iterator[str]:
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    began = tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(began))
    with _ended(began):
        yield carrier.get(METADATA_KEY, "")


@contextmanager
def _serving(tracer: Tracer, name: str, parent: str) -> Iterator[str]:
    from opentelemetry.context import attach
    from opentelemetry.trace import SpanKind, set_span_in_context

    began = tracer.start_span(name, _context(parent), kind=SpanKind.SERVER)
    # A call has a task of its own, with which this ends: a stream's block may be left in another one.
    attach(set_span_in_context(began))
    with _ended(began):
        yield current()


@contextmanager
def _ended(began: Span) -> Iterator[None]:
    """End a span with the block, and say what the block fails with."""
    from opentelemetry.trace import StatusCode

    try:
        yield
    except Exception as error:
        began.set_status(StatusCode.ERROR, str(error))
        if isinstance(error, VfleetError):
            began.set_attribute("vfleet.reason", error.reason.value)
        raise
    finally:
        began.end()


def _context(parent: str) -> Context:
    """Return the context of a traceparent; none, of which a new trace begins, if it isn't one."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({METADATA_KEY: parent}, Context())


def _method(request: Message) -> str:
    """Return the method that takes a request: each has a message of its own, named after it."""
    return request.DESCRIPTOR.name.removesuffix("Request")


def _named(attributes: Mapping[str, str]) -> dict[str, str]:
    return {f"vfleet.{name}": value for name, value in attributes.items() if value}
