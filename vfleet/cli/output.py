"""What commands print: tables for people, protobuf's JSON mapping (also as YAML) for programs.

Results go to standard output, progress to standard error. Colours and animation are for terminals only.
"""

import enum
from collections.abc import Iterable, Sequence
from datetime import UTC
from typing import Annotated

import typer
import yaml
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict, MessageToJson
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.bar import Bar
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

PIPE_WIDTH = 400  # columns, where there is no terminal to fit: enough not to break lines


_STYLES = {
    **dict.fromkeys(("active", "done", "yes"), "green"),
    **dict.fromkeys(("creating", "deleting", "queued", "preparing", "committed", "aborting"), "yellow"),
    **dict.fromkeys(("lost", "aborted", "no"), "red"),
}


class Output(enum.StrEnum):
    """The form of a command's output."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="For people, or for programs.")]


def console(*, stderr: bool = False) -> Console:
    """Return the console for results, or for progress."""
    found = Console(stderr=stderr, highlight=False, emoji=False, markup=False)
    if not found.is_terminal:
        found.width = PIPE_WIDTH
    return found


def print_message(message: Message, output: Output, *, compact: bool = False) -> None:
    """Print a message for programs: all fields, named as in the protos. `compact` JSON is one line."""
    if output is Output.JSON:
        text = MessageToJson(
            message,
            preserving_proto_field_name=True,
            always_print_fields_with_no_presence=True,
            indent=None if compact else 2,
        )
        typer.echo(text)
    else:
        fields = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        typer.echo(yaml.safe_dump(fields, sort_keys=False, explicit_start=compact), nl=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table."""
    print_rich(table_of(columns, rows))


def table_of(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text | Bar) else str(cell) for cell in row))
    return table


def coloured(word: str) -> Text:
    """Return a state's word in the colour of what it means; there are colours on a terminal only."""
    return Text(word, _STYLES.get(word, ""))


def print_fields(fields: Iterable[tuple[str, object]]) -> None:
    """Print names and values, one pair a line."""
    grid = Table.grid(padding=(0, 3))
    for name, value in fields:
        grid.add_row(name, str(value))
    print_rich(grid)


def print_rich(shown: RenderableType) -> None:
    """Print what rich can show, without the blanks that it puts at the end of lines."""
    out = console()
    with out.capture() as captured:
        out.print(shown)
    for line in captured.get().splitlines():
        typer.echo(line.rstrip(), color=True)  # rich has decided on colours already


def hex64(value: int) -> str:
    """Return a 64-bit address or offset with all its digits."""
    return f"{value:#018x}"


def size(value_bytes: int) -> str:
    """Return a size in the largest unit that divides it."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value_bytes and not value_bytes % (1 << shift):
            return f"{value_bytes >> shift} {unit}"
    return f"{value_bytes} B"


def rounded_size(value_bytes: int) -> str:
    """Return a size in the largest unit that it has one of, to a tenth."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value_bytes >= 1 << shift:
            return f"{value_bytes / (1 << shift):.1f} {unit}"
    return f"{value_bytes} B"


def milliseconds(duration: Duration) -> str:
    """Return a duration in milliseconds."""
    return f"{duration.ToTimedelta().total_seconds() * 1000:.1f} ms"


def moment(time: Timestamp) -> str:
    """Return a moment in UTC, to the millisecond."""
    return time.ToDatetime(UTC).isoformat(" ", "milliseconds").removesuffix("+00:00") + "Z"


def enum_word(name: str, prefix: str) -> str:
    """Return the name of an enum's value without its prefix, in small letters."""
    return name.removeprefix(prefix).lower()
