"""The README's lines to type, and a copy of the tree to type them in."""

import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
NEEDED = ("Makefile", "README.md", "pyproject.toml", "vfleet", "coordinator", "hostd")


def blocks(section: str) -> list[list[str]]:
    """Return the lines of each block that a section of the README lets a person type."""
    text = (REPOSITORY / "README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [block.splitlines() for block in re.findall(r"^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def checkout(directory: Path, *more: str, links: Iterable[str] = ()) -> Path:
    """Make a copy of the tree, in which all is installed, so that what a person has in this one is left alone.

    `more` is what is copied beside the programs; `links` is what need not be there, and is this tree's.
    """
    copy = directory / "vfleet"
    copy.mkdir()
    for name in (*NEEDED, *more):
        ignore = shutil.ignore_patterns("__pycache__")
        source = REPOSITORY / name
        shutil.copytree(source, copy / name, ignore=ignore) if source.is_dir() else shutil.copy2(source, copy / name)
    os.utime(copy / "pyproject.toml", (0, 0))  # older than what was installed by it
    (copy / ".venv").symlink_to(sys.prefix)
    for name in links:
        (copy / name).symlink_to(REPOSITORY / name)
    return copy
