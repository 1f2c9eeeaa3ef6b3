"""Which benchmarks there are: the modules in benchmarks/figures, by name."""

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol, cast

from benchmarks.measure import Figure, Size

_FIGURES = Path(__file__).parent / "figures"


class Benchmark(Protocol):
    """A module in benchmarks/figures."""

    __doc__: str
    run: Callable[[Size], Awaitable[Sequence[Figure]]]


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules([str(_FIGURES)]))


def benchmark(name: str) -> Benchmark:
    return cast("Benchmark", importlib.import_module(f"benchmarks.figures.{name}"))
