"""Which benchmarks there are, by name: the modules in benchmarks/figures, and those in benchmarks/guest_figures.

The latter run virtual machines, which takes Debian's tools and some minutes: they are run if they are named.
"""

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

from benchmarks.measure import Figure, Size

_HERE = Path(__file__).parent
_FIGURES, _GUEST_FIGURES = "figures", "guest_figures"


class Benchmark(Protocol):
    """A module of one of the two."""

    __doc__: str
    run: Callable[[Size], Awaitable[Sequence[Figure]]]


def names() -> list[str]:
    """Return those without virtual machines."""
    return _modules(_FIGURES)


def guest_names() -> list[str]:
    """Return those with virtual machines."""
    return _modules(_GUEST_FIGURES)


def benchmark(name: str) -> Benchmark:
    folder = _GUEST_FIGURES if name in guest_names() else _FIGURES
    return cast("Benchmark", importlib.import_module(f"benchmarks.{folder}.{name}"))


def _modules(folder: str) -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules([str(_HERE / folder)]))
