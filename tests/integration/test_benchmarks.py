"""Each benchmark runs, at its smallest size; what it measures then says nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks.measure import SMALL, Figure, Rounds, Samples, at_least, at_most
from benchmarks.report import table
from benchmarks.suite import benchmark, names
from support.nvme_guest import NvmeGuest

TESTS = Path(__file__).parents[1]
TIMEOUT_S = 30


@pytest.mark.parametrize("name", names())
async def test_a_benchmark_runs(name: str):
    figures = await benchmark(name).run(SMALL)
    assert figures
    assert all(figure.ratio > 0 and figure.ours.values for figure in figures)
    assert table({name: figures}).count("\n") == len(figures) + 1
    assert benchmark(name).__doc__


def test_the_bare_nvme_server_serves_a_guest(tmp_path: Path):
    socket = tmp_path / "bare.sock"
    command = [sys.executable, "-m", "benchmarks.bare_nvme", str(socket)]
    with subprocess.Popen(command, env={"PYTHONPATH": os.pathsep.join([*sys.path[1:], str(TESTS)])}) as server:
        guest = NvmeGuest(socket)
        guest.begin()
        for _ in range(20):
            guest.identify()
        guest.close()
        assert server.wait(TIMEOUT_S) == 0


def test_a_ratio_is_the_median_of_the_rounds_ratios():
    rounds = Rounds(ours=[2.0, 10.0, 3.0], floor=[1.0, 1.0, 6.0])
    assert rounds.speed("speed", "s", at_least(0.5)).ratio == 0.5
    assert rounds.slowness("slowness", "s", at_most(1)).ratio == 2.0
    assert rounds.quantile("p99", "s", None, 0.99).ratio == 10.0


def test_the_table_says_what_was_missed():
    samples = Samples([1.0, 2.0], "s")
    met, missed = (Figure("f", 0.5, goal, samples, None).summary()["met"] for goal in (at_least(0.5), at_most(0.4)))
    assert (met, missed) == (True, False)
    assert "MISSED" in table({"x": [Figure("f", 0.5, at_most(0.4), samples, None)]})


def test_a_name_that_is_none_is_refused(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks", "nothing", "--json", str(tmp_path / "out.json")]
    ended = subprocess.run(command, env={"PYTHONPATH": str(TESTS)}, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "'nothing'" in ended.stderr
    assert not (tmp_path / "out.json").exists()
