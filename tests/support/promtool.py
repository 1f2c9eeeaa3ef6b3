"""promtool, Prometheus' own checker: from PATH, or from Debian's package, unpacked and not installed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".cache" / "promtool"


def promtool(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Run promtool. Where it can't be had, the test is skipped, but fails where CI=true."""
    command = [_find(), *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False)


def _find() -> str:
    unpacked = CACHE / "usr" / "bin" / "promtool"
    found = shutil.which("promtool") or (str(unpacked) if unpacked.exists() else None)
    if found is None and os.environ.get("CI") == "true":
        pytest.fail("there is no promtool: `make promtool` gets it from Debian's package")
    if found is None:
        pytest.skip("NOT RUN: there is no promtool; `make promtool` gets it from Debian's package")
    return found
