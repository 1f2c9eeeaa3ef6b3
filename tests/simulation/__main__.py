"""Runs many seeds, or looks for planted bugs, on all cores; a seed that fails is printed with how to see it again.

make simulate SEEDS=2000        make simulate SEED=17 [BUG=lease-trusted]        make simulate-bugs
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable

from simulation.vopr.bugs import BUGS, planted
from simulation.vopr.history import HIT
from simulation.vopr.world import Outcome, simulate

BUG_SEEDS = 500
LEAST_HIT_PERCENT = 20


def main() -> None:
    """Do what the command line says; exit with 1 if an invariant did not hold, or a bug was not found."""
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=2000, help="how many runs (%(default)s)")
    parser.add_argument("--first", type=int, default=1, help="the first seed (%(default)s)")
    parser.add_argument("--seed", type=int, help="one run, with its trace")
    parser.add_argument("--bug", choices=sorted(BUGS), help="with a bug planted")
    parser.add_argument("--bugs", action="store_true", help="look for every bug that can be planted")
    options = parser.parse_args()
    if options.bugs:
        sys.exit(not _all_bugs())
    if options.seed is not None:
        sys.exit(bool(_one(options.seed, options.bug).violations))
    sys.exit(not _many(range(options.first, options.first + options.seeds)))


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _one(seed: int, bug: str | None) -> Outcome:
    outcome = _with_bug(seed, bug, verbose=True)
    _say("\n".join((*outcome.lines, *outcome.violations, f"digest {outcome.digest}")))
    return outcome


def _with_bug(seed: int, bug: str | None, *, verbose: bool = False) -> Outcome:
    if bug is None:
        return simulate(seed, verbose=verbose)
    with planted(bug):
        return simulate(seed, verbose=verbose)


def _many(seeds: Iterable[int]) -> bool:
    """Run all seeds; return whether all invariants held and every schedule was hit often enough."""
    began_s, hits, runs, failed = time.monotonic(), Counter[str](), 0, 0
    with multiprocessing.Pool() as pool:
        for outcome in pool.imap_unordered(simulate, seeds, chunksize=5):
            runs += 1
            hits.update(outcome.hits.keys())
            if outcome.violations:
                failed += 1
                _say(f"seed {outcome.seed}: {outcome.violations[0]}\n    make simulate SEED={outcome.seed}")
    _say(f"{runs} runs in {time.monotonic() - began_s:.0f} s, {failed} with a violation")
    for name in (*HIT, "etcd restored", "lost with its source", "DONE", "ABORTED"):
        _say(f"    {100 * hits[name] / runs:5.1f} % of runs: {name}")
    seldom = [name for name in HIT if 100 * hits[name] < LEAST_HIT_PERCENT * runs]
    if seldom:
        _say(f"hit in less than {LEAST_HIT_PERCENT} % of the runs: {', '.join(seldom)}")
    return not failed and not seldom


def _all_bugs() -> bool:
    """Look for every bug; return whether all were found."""
    with multiprocessing.Pool() as pool:
        found = [bug for bug, outcome in pool.imap(_first_finding, BUGS) if _told(bug, outcome)]
    _say(f"{len(found)} of {len(BUGS)} found within {BUG_SEEDS} seeds")
    return len(found) == len(BUGS)


def _told(bug: str, outcome: Outcome | None) -> bool:
    what = f"seed {outcome.seed}: {outcome.violations[0]}" if outcome else "not found"
    _say(f"{bug:40} {what}")
    return outcome is not None


def _first_finding(bug: str) -> tuple[str, Outcome | None]:
    for seed in range(1, BUG_SEEDS + 1):
        outcome = _with_bug(seed, bug)
        if outcome.violations:
            return bug, outcome
    return bug, None


if __name__ == "__main__":
    main()
