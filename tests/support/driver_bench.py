"""A driver's entries and holds, as tests of a host's drivers speak of them."""

from pathlib import Path

from support.bench import VIRTUAL_ADDRESS, Bench

from hostd.driver import Submitted
from hostd.models import checker
from vfleet.v1.access_pb2 import ACCESS_KIND_READ
from vfleet.v1.types_pb2 import TableEntry

MIB = 1 << 20
OLD, NEW = 0x0001_0180 << 32, 0x0002_1110 << 32
D1 = ("d1", "vf1", 1)


def attached(path: Path) -> Bench:
    """Return a host whose driver d1 is attached to vf1, which lives there, at revision 1."""
    found = Bench(path)
    found.create()
    found.drivers.recorded("d1", 0)
    found.drivers.attach(old(found))
    return found


def old(bench: Bench, **more) -> TableEntry:
    """Return d1's entry for vf1 as it was written at revision 1."""
    return bench.message(OLD, **more)


def new(bench: Bench, revision: int = 20, **more) -> TableEntry:
    """Return it as a COMMIT at this revision wrote it."""
    return bench.message(NEW, generation=2, revision=revision, **more)


def seen(bench: Bench, function: str = "vf1") -> tuple[int, bool] | None:
    """Return the generation of d1's entry and whether it is held; None if there is none."""
    entry = bench.drivers.require("d1").table.by_function.get(function)
    return None if entry is None else (entry.generation, entry.held)


def holds(bench: Bench) -> list[tuple[str, str, int, int]]:
    """Return driver, function, generation and attempt of each hold."""
    return [(h.driver, h.function, h.generation, h.attempt.revision) for h in bench.drivers.holds()]


def told(bench: Bench, driver: str = "d1") -> list[tuple[int, str]]:
    """Listen for a driver, and return what it is told: a list that grows."""
    found: list[tuple[int, str]] = []
    bench.drivers.require(driver).listeners.append(lambda n: found.append((n.kind, n.function)))
    return found


async def read(bench: Bench, offset: int = checker.IDENTITY) -> Submitted:
    driver = bench.drivers.require("d1")
    return await driver.submit(ACCESS_KIND_READ, VIRTUAL_ADDRESS + offset, 8, b"", sequence=0)
