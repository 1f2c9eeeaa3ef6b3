"""Tests with virtual machines: one at a time on a machine, since each takes all that two cores have."""

import asyncio
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

LOCK = Path(tempfile.gettempdir()) / "vfleet-guests.lock"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cells", action="store_true", help="run what takes long too: make guest-matrix")


@pytest.fixture(autouse=True)
async def alone() -> AsyncIterator[None]:
    """Wait for one's turn. Without Debian's tools there is no QEMU: not run, which is a failure where CI=true."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        told = "NOT RUN: a guest is made of Debian packages, and there is no apt-get here"
        assert os.environ.get("CI") != "true", told
        pytest.skip(told)
    with LOCK.open("w") as lock:
        await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
        yield
