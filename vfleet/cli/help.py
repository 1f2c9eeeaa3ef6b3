"""The help of the vfleet command as a whole: all commands on one screen, two a line, under what they are for."""

from itertools import zip_longest
from typing import Protocol

from typer.core import TyperGroup

NAME_COLUMNS = 11
OTHER = "Other"


class _Formatter(Protocol):
    """What is needed of a formatter of help."""

    width: int

    def write(self, string: str) -> None:
        """Write a piece of help."""


class HelpInPanels(TyperGroup):
    """A group whose help lists its commands by panel (`rich_help_panel`), each with its short help."""

    def format_commands(self, ctx: object, formatter: _Formatter) -> None:  # noqa: ARG002  # as Typer calls it
        """Write each panel's name, and under it its commands in two columns."""
        column = formatter.width // 2
        panels: dict[str, list[str]] = {}
        for name, command in self.commands.items():
            words = command.get_short_help_str(column - NAME_COLUMNS - len("   "))
            panel = getattr(command, "rich_help_panel", None) or OTHER
            panels.setdefault(panel, []).append(f"  {name:<{NAME_COLUMNS}}{words}")
        formatter.write("\n")
        for panel, cells in panels.items():
            formatter.write(f"{panel}:\n")
            middle = (len(cells) + 1) // 2
            for left, right in zip_longest(cells[:middle], cells[middle:], fillvalue=""):
                formatter.write(f"{left:<{column}}{right}".rstrip() + "\n")
