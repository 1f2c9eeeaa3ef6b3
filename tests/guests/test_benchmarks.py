"""The benchmarks with virtual machines run, at their smallest size; what they measure then says nothing."""

import pytest
from benchmarks.measure import SMALL
from benchmarks.report import table
from benchmarks.suite import benchmark, guest_names, names

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize("name", guest_names())
async def test_a_benchmark_runs(name: str):
    figures = await benchmark(name).run(SMALL)
    assert all(figure.ratio > 0 and figure.ours.values and figure.floor for figure in figures)
    assert table({name: figures}).count("\n") == len(figures) + 1
    assert benchmark(name).__doc__


def test_they_are_run_only_if_they_are_named():
    assert guest_names()
    assert not set(guest_names()) & set(names())
