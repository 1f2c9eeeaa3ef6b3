"""Spans: whose child each is, what ends it, and that there are none while traces are off."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from vfleet import tracing
from vfleet.background import in_background
from vfleet.errors import Reason, VfleetError
from vfleet.v1.function_service_pb2 import CreateFunctionRequest

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE = 0x0AF7651916CD43DD8448EB211C80319C


@dataclass
class Call:
    """A call that is served, as far as traces are concerned."""

    metadata: Sequence[tuple[str, str | bytes]]

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return self.metadata


Spans = Callable[[], dict[str, ReadableSpan]]


@pytest.fixture
def spans() -> Iterator[Spans]:
    """Traces are on. What is called gives the spans that have ended, by name."""
    exporter = InMemorySpanExporter()
    tracing.enable({}, "test", "t1", exporter)

    def ended() -> dict[str, ReadableSpan]:
        tracing.close()
        return {span.name: span for span in exporter.get_finished_spans()}

    yield ended
    tracing.close()


def parents(found: dict[str, ReadableSpan]) -> dict[str, str | None]:
    names = {span.context.span_id: name for name, span in found.items()}
    return {name: names.get(span.parent.span_id) if span.parent else None for name, span in found.items()}


def test_a_span_is_a_child_of_the_one_it_is_in(spans):
    with tracing.span("outer", migration="m-1", host=""), tracing.span("inner"):
        tracing.past("done", 0.5)
    found = spans()
    assert parents(found) == {"outer": None, "inner": "outer", "done": "inner"}
    assert found["outer"].attributes == {"vfleet.migration": "m-1"}
    assert found["done"].end_time - found["done"].start_time == 500_000_000


def test_a_stored_traceparent_goes_on_with_the_trace_whatever_the_task_works_for(spans):
    with tracing.span("other"), tracing.span("adopted", PARENT) as own:
        assert own.split("-")[1] == PARENT.split("-")[1]
    found = spans()["adopted"]
    assert (found.context.trace_id, found.parent.span_id) == (TRACE, 0xB7AD6B7169203331)


@pytest.mark.parametrize(
    "bad", ["garbage", "00-0-0-01", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "\x00", "00-" * 999]
)
def test_what_is_no_traceparent_begins_a_trace_of_its_own(spans, bad):
    with tracing.span("root", bad):
        pass
    found = spans()["root"]
    assert found.parent is None
    assert found.context.trace_id


def test_a_call_belongs_to_the_trace_or_makes_no_span(spans):
    with tracing.calling("of nobody") as parent:
        assert parent == ""
    with tracing.span("work"), tracing.calling("etcd commit") as parent:
        assert parent.split("-")[2] != tracing.current().split("-")[2]
    assert parents(spans()) == {"work": None, "etcd commit": "work"}


def test_a_call_that_fails_says_why(spans):
    with tracing.span("work"), pytest.raises(VfleetError), tracing.calling("etcd commit"):
        raise VfleetError(Reason.STORE_UNAVAILABLE, "no answer")
    found = spans()
    assert found["etcd commit"].status.description == "no answer"
    assert found["etcd commit"].attributes["vfleet.reason"] == "STORE_UNAVAILABLE"


async def test_a_request_is_served_as_a_child_of_the_call(spans):
    async def serve(metadata: Sequence[tuple[str, str | bytes]]) -> None:
        with tracing.serving_method(CreateFunctionRequest(), Call(metadata)), tracing.calling("etcd get"):
            pass

    await asyncio.create_task(serve([("traceparent", PARENT)]))
    await asyncio.create_task(serve([("traceparent", b"\xff")]))
    await asyncio.create_task(serve([]))
    found = spans()
    assert parents(found) == {"CreateFunction": None, "etcd get": "CreateFunction"}
    assert found["CreateFunction"].context.trace_id == TRACE


async def test_the_body_of_a_generator_may_end_in_another_task(spans):
    async def answers():
        with (
            tracing.serving_method(CreateFunctionRequest(), Call([("traceparent", PARENT)])),
            tracing.calling("inner"),
        ):
            yield 1
            yield 2

    generator = answers()
    assert await anext(generator) == 1
    await asyncio.create_task(generator.aclose())
    assert set(spans()) == {"CreateFunction", "inner"}


async def test_what_goes_on_in_the_background_belongs_to_no_trace(spans):
    async def work() -> str:
        return tracing.current()

    with tracing.span("work"):
        assert await asyncio.create_task(work())
        assert await in_background(work(), "of nobody") == ""


def test_lines_of_a_trace_name_it(spans):
    assert tracing.ids() == {}
    with tracing.span("work", PARENT):
        assert tracing.ids()["trace_id"] == PARENT.split("-")[1]


def test_while_it_is_off_there_is_nothing():
    request, metadata = CreateFunctionRequest(), [("traceparent", PARENT)]
    blocks = (
        tracing.span("a", PARENT),
        tracing.calling("b"),
        tracing.calling_method(request, ""),
        tracing.serving_method(request, Call(metadata)),
    )
    for block in blocks:
        with block as parent:
            tracing.past("c", 1)
            assert (parent, tracing.current(), tracing.ids()) == ("", "", {})


@pytest.mark.parametrize("module", ["hostd.__main__", "coordinator.__main__", "vfleet.cli.main"])
def test_while_it_is_off_nothing_of_opentelemetry_is_imported(module):
    code = f"import sys, {module}; sys.exit(any('opentelemetry' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({tracing.PROTOCOL_VARIABLE: "http/json"}, "OTEL_EXPORTER_OTLP_PROTOCOL is 'http/json'; expected grpc"),
        ({}, "OTEL_EXPORTER_OTLP_ENDPOINT or what goes with it: "),
    ],
)
def test_what_can_not_be_is_one_clear_error(monkeypatch, environment, message):
    monkeypatch.setenv(tracing.VARIABLE, "http://[::1")
    with pytest.raises(VfleetError) as raised:
        tracing.enable({tracing.VARIABLE: "http://[::1", **environment}, "test")
    assert raised.value.reason is Reason.INVALID_FIELD
    assert raised.value.message.startswith(message)
    assert not tracing.is_on()
