"""What imports what: the daemons never each other, `vfleet` neither of them, and no module itself by way of others."""

import ast
from collections.abc import Collection, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import coordinator
import hostd
import vfleet

PACKAGES = {package.__name__: Path(package.__path__[0]) for package in (coordinator, hostd, vfleet)}


@cache
def imports() -> dict[str, set[str]]:
    """Return the modules that each module imports, by name, also where only a type checker does."""
    files = {name: path for package in PACKAGES for name, path in modules(package)}
    return {name: {used for used in named(path, files.keys()) if used in files} for name, path in files.items()}


def modules(package: str) -> Iterator[tuple[str, Path]]:
    root = PACKAGES[package]
    for path in root.rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), path


def named(path: Path, known: Collection[str]) -> Iterator[str]:
    """Yield what a file's imports name; a module within a package that is named with it stands for itself alone."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            within = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from (each if each in known else node.module for each in within)


def test_no_module_imports_itself_by_way_of_others():
    # Raises CycleError, which names the circle.
    TopologicalSorter(imports()).prepare()


@pytest.mark.parametrize(
    ("package", "others"),
    [("coordinator", {"hostd"}), ("hostd", {"coordinator"}), ("vfleet", {"coordinator", "hostd"})],
)
def test_packages_import_in_one_direction(package: str, others: set[str]):
    found = {name: used for name, used in imports().items() if name.partition(".")[0] == package}
    assert found
    wrong = {name: used for name, used in found.items() if {each.partition(".")[0] for each in used} & others}
    assert not wrong
