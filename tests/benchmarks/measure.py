"""What a benchmark hands back: figures, each a ratio of two things that were measured in turns in one run.

A round measures ours and the floor, one right after the other, so that whatever else the machine does meets both. The
ratio is the median of the rounds' ratios, or that of two quantiles where the goal speaks of quantiles.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """How much is measured: enough for a figure, or just enough to see that the benchmark runs."""

    is_full: bool

    def of(self, full: T, small: T) -> T:
        return full if self.is_full else small


FULL, SMALL = Size(is_full=True), Size(is_full=False)


@dataclass(frozen=True)
class Samples:
    """Measured values of one thing, one a round, in `unit`."""

    values: Sequence[float]
    unit: str

    def quantile(self, part: float) -> float:
        ordered = sorted(self.values)
        return ordered[min(int(part * len(ordered)), len(ordered) - 1)]

    def summary(self) -> dict[str, float | int | str]:
        return {
            "unit": self.unit,
            "samples": len(self.values),
            "p50": self.quantile(0.5),
            "p99": self.quantile(0.99),
            "max": max(self.values),
        }


@dataclass(frozen=True)
class Goal:
    """What a ratio has to be: at least or at most so much."""

    limit: float
    is_at_least: bool

    def is_met(self, ratio: float) -> bool:
        return ratio >= self.limit if self.is_at_least else ratio <= self.limit

    def __str__(self) -> str:
        return f"{'≥' if self.is_at_least else '≤'} {self.limit:g}"


def at_least(limit: float) -> Goal:
    return Goal(limit, is_at_least=True)


def at_most(limit: float) -> Goal:
    return Goal(limit, is_at_least=False)


@dataclass(frozen=True)
class Figure:
    """One line of the table. Without a floor, `ratio` is a count, and `ours` are the counts."""

    name: str
    ratio: float
    goal: Goal | None
    ours: Samples
    floor: Samples | None

    def summary(self) -> dict[str, object]:
        return {
            "name": self.name,
            "ratio": self.ratio,
            "goal": str(self.goal) if self.goal else None,
            "met": self.goal.is_met(self.ratio) if self.goal else None,
            "ours": self.ours.summary(),
            "floor": self.floor.summary() if self.floor else None,
        }


@dataclass
class Rounds(Generic[T]):
    """Times of ours and of the floor, in the order in which they were measured."""

    ours: list[float]
    floor: list[float]

    def speed(self, name: str, unit: str, goal: Goal | None) -> Figure:
        """How fast ours is, as a part of the floor's speed."""
        ratio = median(floor / ours for ours, floor in zip(self.ours, self.floor, strict=True))
        return self._figure(name, ratio, unit, goal)

    def slowness(self, name: str, unit: str, goal: Goal | None) -> Figure:
        """How long ours takes, as a multiple of the floor's time."""
        ratio = median(ours / floor for ours, floor in zip(self.ours, self.floor, strict=True))
        return self._figure(name, ratio, unit, goal)

    def quantile(self, name: str, unit: str, goal: Goal | None, part: float, floor_part: float = 0.5) -> Figure:
        """A quantile of ours over one of the floor's."""
        ratio = Samples(self.ours, unit).quantile(part) / Samples(self.floor, unit).quantile(floor_part)
        return self._figure(name, ratio, unit, goal)

    def _figure(self, name: str, ratio: float, unit: str, goal: Goal | None) -> Figure:
        return Figure(name, ratio, goal, Samples(self.ours, unit), Samples(self.floor, unit))


def seconds_of(work: Callable[[], object], times: int = 1) -> float:
    """Return how long it takes to do `work` so many times."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - began


async def seconds_of_async(work: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await work()
    return time.perf_counter() - began


def alternate(
    rounds: int, ours: Callable[[], object], floor: Callable[[], object], *, times: int, scale: float
) -> Rounds:
    """Measure both in turns: each round does each so many times, and counts the seconds for one, times `scale`."""
    measured: Rounds = Rounds([], [])
    ours(), floor()
    for number in range(rounds):
        # Whoever goes second finds the processor's caches as the other left them.
        order = (ours, floor) if number % 2 else (floor, ours)
        spent = {work: seconds_of(work, times) / times * scale for work in order}
        measured.ours.append(spent[ours])
        measured.floor.append(spent[floor])
    return measured


async def alternate_async(
    rounds: int, ours: Callable[[], Awaitable[float]], floor: Callable[[], Awaitable[float]], warm_up: int = 1
) -> Rounds:
    """Measure both in turns; each says itself what it measured. The first `warm_up` rounds don't count."""
    measured: Rounds = Rounds([], [])
    for _ in range(warm_up + rounds):
        measured.floor.append(await floor())
        measured.ours.append(await ours())
    return Rounds(measured.ours[warm_up:], measured.floor[warm_up:])
