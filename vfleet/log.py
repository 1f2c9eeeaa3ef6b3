"""Log lines with fields: which migration, attempt, function and host a line concerns stands beside its text.

Whoever works for one of them binds it, once, and every line of that work has it, whichever room logs it; a line may
also bring its own (`extra`). Lines are written by a thread: nobody who logs waits for a disk, least of all between a
hold and its lift.
"""

import json
import logging
import queue
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from threading import Thread
from typing import Final, TextIO

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

from vfleet import tracing
from vfleet.names import is_name
from vfleet.v1.types_pb2 import Attempt

LEVELS: Final = ("debug", "info", "warning", "error")
FORMATS: Final = ("console", "json")
FIELDS: Final = ("coordinator", "host", "migration", "attempt", "function", "driver")
MAX_WAITING_LINES: Final = 10_000
CLOSE_TIMEOUT_S: Final = 2.0

_process: dict[str, str] = {}
_bound: ContextVar[Mapping[str, str]] = ContextVar("bound", default=_process)


def name_process(**fields: str) -> None:
    """Let every line of this process have these of `FIELDS`, unless it has its own."""
    _process.update(fields)


@contextmanager
def about(**fields: str) -> Iterator[None]:
    """Let every line of this block, and of tasks that it starts, have these of `FIELDS`; an empty one says nothing."""
    token = _bound.set(_with(fields))
    try:
        yield
    finally:
        _bound.reset(token)


def bind(**fields: str) -> None:
    """Do what `about` does, until the running task ends."""
    _bound.set(_with(fields))


def unbind() -> None:
    """Let the lines of the running task have what those of the whole process have, and no more."""
    _bound.set(_process)


def bind_request(request: Message) -> None:
    """Let every line of the running task have what a request names; what is no name is left out."""
    named = _named_in(request.DESCRIPTOR)
    if named:
        bind(**{field: _text(getattr(request, field)) for field in named})


def bind_migration(name: object) -> None:
    """Let every line of the running task have the migration that a call says it is for."""
    if name:
        bind(migration=_text(name))


def bound_migration() -> str:
    """Return the migration that the running task works for; nothing for none."""
    return _bound.get().get("migration", "")


def attempt_text(attempt: Attempt) -> str:
    """Return an attempt as it is shown everywhere; nothing for none."""
    return f"{attempt.fleet_generation}.{attempt.revision}" if attempt.revision else ""


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """Return what a line concerns, in the order of `FIELDS`. What it brings itself counts more than what is bound."""
    bound = _bound.get()
    found = ((field, getattr(record, field, None) or bound.get(field)) for field in FIELDS)
    return {field: str(value) for field, value in found if value}


class ConsoleFormatter(logging.Formatter):
    """For people: time, level, room, text, and the fields in brackets."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's own name
        """Return the line without an exception's traceback."""
        fields = " ".join(f"{field}={value}" for field, value in fields_of(record).items())
        return super().formatMessage(record) + (f" [{fields}]" if fields else "")


class JsonFormatter(logging.Formatter):
    """For programs: one object a line, of strings only."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **fields_of(record),
            **tracing.ids(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


class Writer(logging.Handler):
    """Writes lines in a thread of its own. While the stream takes none, the latest are dropped, and counted.

    `lines` counts what was logged, by level.
    """

    def __init__(self, stream: TextIO, max_waiting_lines: int = MAX_WAITING_LINES) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter(dict.fromkeys(LEVELS, 0))
        self.dropped = 0
        self._stream = stream
        self._waiting: queue.Queue[str | None] = queue.Queue(max_waiting_lines)
        self._thread = Thread(target=self._write, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Leave a line to the thread."""
        self.lines[record.levelname.lower()] += 1
        try:
            self._waiting.put_nowait(self.format(record))
        except queue.Full:
            self.dropped += 1
        except Exception:  # noqa: BLE001  # a line that can't be formatted is told as logging tells it
            self.handleError(record)

    def close(self) -> None:
        """Wait until all is written, but for `CLOSE_TIMEOUT_S` at most."""
        try:
            self._waiting.put(None, timeout=CLOSE_TIMEOUT_S)
        except queue.Full:
            return
        self._thread.join(CLOSE_TIMEOUT_S)
        super().close()

    def _write(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                self._stream.write(f"{line}\n")
                self._stream.flush()
            except (OSError, ValueError):  # it is full, broken or closed: there is nobody to tell
                self.dropped += 1


@contextmanager
def logging_to_stderr(level: str, line_format: str) -> Iterator[Writer]:
    """Log to standard error in one of `FORMATS`, until the block ends."""
    writer = Writer(sys.stderr)
    writer.setFormatter(JsonFormatter() if line_format == "json" else ConsoleFormatter())
    root = logging.getLogger()
    before = root.level
    root.addHandler(writer)
    root.setLevel(level.upper())
    try:
        yield writer
    finally:
        root.removeHandler(writer)
        root.setLevel(before)
        writer.close()


def _with(fields: Mapping[str, str]) -> Mapping[str, str]:
    return {**_bound.get(), **{field: value for field, value in fields.items() if value}}


@cache
def _named_in(descriptor: Descriptor) -> tuple[str, ...]:
    return tuple(field for field in FIELDS if field in descriptor.fields_by_name)


def _text(value: object) -> str:
    if isinstance(value, Attempt):
        return attempt_text(value)
    return value if isinstance(value, str) and is_name(value) else ""
