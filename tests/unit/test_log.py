"""What a line concerns is told beside its text; nobody who logs waits for whoever reads."""

import ast
import asyncio
import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import coordinator
import hostd
import vfleet
from vfleet import log
from vfleet.background import in_background
from vfleet.v1.function_service_pb2 import DestroyFunctionRequest
from vfleet.v1.types_pb2 import Attempt

_log = logging.getLogger("test_log")


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def writer(stream: io.StringIO) -> Iterator[log.Writer]:
    writer = log.Writer(stream)
    writer.setFormatter(log.JsonFormatter())
    _log.setLevel("DEBUG")
    _log.addHandler(writer)
    yield writer
    _log.removeHandler(writer)
    writer.close()


def lines(writer: log.Writer, stream: io.StringIO) -> list[dict[str, str]]:
    writer.close()
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_what_its_work_is_about(writer, stream):
    with log.about(migration="m-1", attempt="1.42"):
        with log.about(function="vf1", host=""):
            _log.info("one %d", 1)
        _log.warning("two", extra={"function": "vf2"})
    _log.error("three")
    found = lines(writer, stream)
    assert [line.pop("time")[-6:] for line in found] == ["+00:00"] * 3
    assert found == [
        {
            "level": "info",
            "logger": "test_log",
            "message": "one 1",
            "migration": "m-1",
            "attempt": "1.42",
            "function": "vf1",
        },
        {
            "level": "warning",
            "logger": "test_log",
            "message": "two",
            "migration": "m-1",
            "attempt": "1.42",
            "function": "vf2",
        },
        {"level": "error", "logger": "test_log", "message": "three"},
    ]


def test_what_a_line_brings_itself_counts_more(writer, stream):
    with log.about(host="h1"):
        _log.info("", extra={"host": "h2"})
    assert [line["host"] for line in lines(writer, stream)] == ["h2"]


async def test_tasks_have_it_too_but_not_those_in_the_background(writer, stream):
    async def work() -> None:
        _log.info("")

    with log.about(migration="m-1"):
        await asyncio.create_task(work())
        await in_background(work(), "of nobody")
    assert [line.get("migration") for line in lines(writer, stream)] == ["m-1", None]


async def test_what_a_task_binds_is_its_own(writer, stream):
    async def work() -> None:
        log.bind(function="vf1")

    await asyncio.create_task(work())
    _log.info("")
    assert "function" not in lines(writer, stream)[0]


async def test_a_request_tells_what_it_names(writer, stream):
    request = DestroyFunctionRequest(function="vf1", attempt=Attempt(fleet_generation=2, revision=7))

    async def serve() -> None:
        log.bind_migration("m-1")
        log.bind_request(request)
        _log.info("")

    await asyncio.create_task(serve())
    line = lines(writer, stream)[0]
    assert (line["migration"], line["function"], line["attempt"]) == ("m-1", "vf1", "2.7")


@pytest.mark.parametrize("name", ["", "vf1\n2026 ERROR forged", "x" * 64, "vf1 host=h9"])
async def test_what_is_no_name_is_in_no_line(writer, stream, name):
    async def serve() -> None:
        log.bind_migration(name)
        log.bind_request(DestroyFunctionRequest(function=name))
        _log.info("")

    await asyncio.create_task(serve())
    assert lines(writer, stream)[0].keys() == {"time", "level", "logger", "message"}


def test_an_exception_is_in_the_line_for_programs(writer, stream):
    try:
        int("why")
    except ValueError:
        _log.exception("it failed")
    line = lines(writer, stream)[0]
    assert line["message"] == "it failed"
    assert line["exception"].endswith("with base 10: 'why'")


def test_people_read_the_fields_in_brackets(writer, stream):
    writer.setFormatter(log.ConsoleFormatter())
    with log.about(migration="m-1", host="h1"):
        _log.warning("a line")
    _log.warning("another")
    writer.close()
    first, second = stream.getvalue().splitlines()
    assert first.endswith(" WARNING test_log: a line [host=h1 migration=m-1]")
    assert second.endswith(" WARNING test_log: another")


class StuckStream(io.StringIO):
    """Takes nothing until it is let go, as a pipe that nobody reads or a disk that doesn't answer."""

    def __init__(self) -> None:
        super().__init__()
        self.tried = threading.Event()
        self.go = threading.Event()

    def write(self, text: str) -> int:
        self.tried.set()
        self.go.wait()
        return super().write(text)


def test_nobody_waits_for_a_stream_that_takes_nothing():
    stream = StuckStream()
    writer = log.Writer(stream, max_waiting_lines=3)
    writer.setFormatter(log.JsonFormatter())
    record = logging.LogRecord("x", logging.WARNING, __file__, 1, "a line", None, None)
    writer.handle(record)
    stream.tried.wait()
    for _ in range(5):
        writer.handle(record)  # would never return if it waited
    assert (writer.dropped, writer.lines["warning"]) == (2, 6)
    stream.go.set()
    writer.close()
    assert len(stream.getvalue().splitlines()) == 4


def test_a_stream_that_fails_costs_lines_and_nothing_else():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left on device")

    writer = log.Writer(Full())
    writer.handle(logging.LogRecord("x", logging.INFO, __file__, 1, "a line", None, None))
    writer.close()
    assert writer.dropped == 1


def test_it_logs_to_standard_error_and_only_while_asked_to(capsys):
    root = logging.getLogger()
    before = root.level, list(root.handlers)
    with log.logging_to_stderr("info", "json"):
        _log.info("inside")
    assert (root.level, root.handlers) == before
    assert json.loads(capsys.readouterr().err)["message"] == "inside"


# --- every line of the daemons ---

# What runs under `Term._run` alone, which binds the migration and the attempt.
BOUND = {"migration": {"coordinator/migration.py", "coordinator/journal.py"}}
# Work that binds what it is about when it begins.
BOUND["function"] = {"hostd/engine.py", "hostd/rest.py"}
BOUND["driver"] = {"hostd/workload.py", "hostd/workloads/device_workload.py"}
# Every line of a host's process has the host.
BOUND["host"] = {"hostd/registration.py"}


def log_calls() -> Iterator[tuple[str, int, str, set[str]]]:
    for package in (coordinator, hostd, vfleet):
        root = Path(package.__path__[0])
        for path in root.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                is_log = isinstance(node, ast.Call) and ast.unparse(node.func).startswith("_log.")
                if is_log and isinstance(node.args[0], ast.Constant):
                    extra = [keyword.value for keyword in node.keywords if keyword.arg == "extra"]
                    names = {str(key.value) for each in extra if isinstance(each, ast.Dict) for key in each.keys}
                    if extra and not names:
                        names = set(log.FIELDS)  # one that is made before; the cluster's test sees what it has
                    yield f"{package.__name__}/{path.relative_to(root)}", node.lineno, node.args[0].value, names


def test_every_line_that_names_something_has_it_as_a_field():
    calls = list(log_calls())
    assert len(calls) > 40
    lacking = [
        f"{path}:{line}: {field}"
        for path, line, text, extra in calls
        for field in ("migration", "function", "driver", "host")
        if f"{field} %s" in text and field not in extra and path not in BOUND.get(field, ())
    ]
    assert lacking == []
