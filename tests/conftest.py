"""What all tests share."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings

from vfleet import process
from vfleet.clock import SystemClock
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.server import EtcdServer

# No test fails because the machine is busy.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Who runs the tests in the background of a script ignores it, and all that they start would.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A daemon that was killed comes back on its ports, which no other worker may have taken meanwhile.
if "PYTEST_XDIST_WORKER" in os.environ:
    share = len(process.PORTS) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    first = process.PORTS.start + share * int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    process.PORTS = range(first, first + share)

WORKERS_PER_CORE = 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many workers `-n auto` stands for: tests with real daemons wait half of the time."""
    return WORKERS_PER_CORE * (os.cpu_count() or 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let two workers begin with the tests in containers, which take longest and mostly wait; the others follow.

    xdist gives each worker an equal part of the tests, in their order.
    """
    contained = sorted((item for item in items if "containers" in item.path.parts), key=lambda item: item.nodeid)
    others = [item for item in items if "containers" not in item.path.parts]
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    before = 0  # how many tests the first half of the workers gets
    for worker in range(workers // 2):
        before += (len(items) - before) // (workers - worker)
    first, second = contained[::2], contained[1::2]
    middle = max(before - len(first), 0)
    items[:] = [*first, *others[:middle], *second, *others[middle:]]


@pytest.fixture
async def etcd(tmp_path: Path) -> AsyncIterator[EtcdServer]:
    """An etcd of the test's own: real, empty, on a free port."""
    async with EtcdServer(tmp_path / "etcd", SystemClock(), Random()) as server:
        yield server


@pytest.fixture
async def store(etcd: EtcdServer) -> AsyncIterator[EtcdStore]:
    """A client of the test's etcd."""
    async with await EtcdStore.connect([etcd.endpoint], SystemClock(), Random()) as store:
        yield store
