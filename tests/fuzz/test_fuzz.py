"""Each target of the fuzzer for a bounded number of inputs, always the same; `make fuzz` does more, and others."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.__main__ import TARGETS

TESTS = Path(__file__).parents[1]
RUNS = {
    "topology": 400,
    "command_line": 60,
    "names": 5000,
    "metrics_page": 1500,
    "state": 150,
    "records": 30,
    "requests": 30,
    "guest": 2000,
}


def test_every_target_has_a_bound():
    assert RUNS.keys() == TARGETS.keys()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_found(target: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        # It has wheels for some versions of Python only.
        assert os.environ.get("CI") != "true", "there is no atheris: pip install atheris"
        pytest.skip("NOT RUN: there is no atheris for this Python")
    command = [
        sys.executable,
        "-m",
        "fuzz",
        target,
        "--runs",
        str(RUNS[target]),
        "--seed",
        "1",
        "--folder",
        str(tmp_path),
    ]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-8000:] + ended.stdout[-2000:]
    assert f"Done {RUNS[target]} runs" in ended.stderr + ended.stdout
