"""A few hundred seeds of the simulation, and the proof that a seed is a run. `make simulate` does thousands."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulation.vopr.bugs import BUGS, FOUND_AT, planted
from simulation.vopr.world import simulate

REPOSITORY = Path(__file__).parents[2]
SEEDS = 240
SEEDS_A_TEST = 20
ACCELERATED_SEEDS = 40
ACCELERATED_SEEDS_A_TEST = 10
SEEDS_A_BUG = 500


@pytest.mark.parametrize("first", range(1, SEEDS + 1, SEEDS_A_TEST))
def test_all_invariants_hold_whatever_fails(first):
    for seed in range(first, first + SEEDS_A_TEST):
        assert simulate(seed).violations == (), f"make simulate SEED={seed}"


@pytest.mark.parametrize("first", range(1, ACCELERATED_SEEDS + 1, ACCELERATED_SEEDS_A_TEST))
def test_every_command_of_an_accelerator_completes_once_whatever_fails(first):
    commands = 0
    for seed in range(first, first + ACCELERATED_SEEDS_A_TEST):
        outcome = simulate(seed, accelerated=True)
        assert outcome.violations == (), f"seed {seed}"
        commands += outcome.hits.get("commands", 0)
    assert commands > 50 * ACCELERATED_SEEDS_A_TEST


@pytest.mark.timeout(600)
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug):
    # A change of the code, or another Python, makes other runs of the seeds; then another finds it.
    seeds = (FOUND_AT[bug], *range(1, SEEDS_A_BUG + 1))
    with planted(bug):
        assert any(simulate(seed).violations for seed in seeds), f"not found within {SEEDS_A_BUG} seeds"


@pytest.mark.parametrize("seed", [3, 11])
def test_a_seed_is_one_run_to_the_last_message(seed):
    here = simulate(seed)
    assert simulate(seed).digest == here.digest
    for hash_seed in ("1", "2"):
        assert digest_elsewhere(seed, hash_seed) == here.digest


def test_another_seed_is_another_run():
    assert len({simulate(seed).digest for seed in (1, 2, 3)}) == 3


def test_a_run_leaves_nothing_in_memory():
    simulate(1)
    before = len(gc.get_objects())
    simulate(2)
    assert len(gc.get_objects()) < before + 1000


def digest_elsewhere(seed: int, hash_seed: str) -> str:
    """Return the digest of a run in a process of its own, where sets have another order."""
    program = f"from simulation.vopr.world import simulate; print(simulate({seed}).digest)"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()
