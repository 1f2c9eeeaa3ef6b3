"""The table that is printed, and what is said of the machine."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.measure import Figure, Samples

_HEAD = ("figure", "ratio", "goal", "ours p50 / p99 / max", "floor p50 / p99 / max", "samples")


def table(figures: Mapping[str, Sequence[Figure]]) -> str:
    """Return the figures as a table in Markdown."""
    rows = [_HEAD, *(_row(figure) for own in figures.values() for figure in own)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def machine() -> dict[str, object]:
    """Return what the figures were measured on. The load says whether something else ran as well."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
        "protobuf": version("protobuf"),
    }


def _row(figure: Figure) -> tuple[str, ...]:
    goal = "" if figure.goal is None else f"{figure.goal} {'met' if figure.goal.is_met(figure.ratio) else 'MISSED'}"
    floor = _summary(figure.floor) if figure.floor else ""
    return (figure.name, f"{figure.ratio:.2f}", goal, _summary(figure.ours), floor, str(len(figure.ours.values)))


def _summary(samples: Samples) -> str:
    values = (samples.quantile(0.5), samples.quantile(0.99), max(samples.values))
    return " / ".join(_number(value) for value in values) + f" {samples.unit}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
