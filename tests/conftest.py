"""What all tests share."""

import os
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, settings

from vfleet.clock import SystemClock
from vfleet.etcd.client import EtcdStore
from vfleet.etcd.server import EtcdServer

# No test fails because the machine is busy.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

WORKERS_PER_CORE = 2


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Return how many workers `-n auto` stands for: tests with real daemons wait half of the time."""
    return WORKERS_PER_CORE * (os.cpu_count() or 1)


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
