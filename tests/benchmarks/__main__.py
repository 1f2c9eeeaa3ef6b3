"""Measure: `python -m benchmarks [NAME…]`, with PYTHONPATH=tests. Without a name, all without virtual machines.

`--list` names them. Each module in benchmarks/figures or benchmarks/guest_figures is a benchmark: its docstring says
what is compared with what, and its `run(size)` returns the figures.
"""

import argparse
import asyncio
import json
import sys
from pathlib import Path

from benchmarks.measure import FULL, SMALL, Figure
from benchmarks.report import machine, table
from benchmarks.suite import benchmark, guest_names, names


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure ratios.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="which to run; by default all without virtual machines"
    )
    parser.add_argument("--list", action="store_true", help="name them, with what each compares, and end")
    parser.add_argument("--small", action="store_true", help="just enough to see that each runs")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where to write the figures")
    arguments = parser.parse_args()
    known = [*names(), *guest_names()]
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"no benchmark is called {unknown[0]!r}; there are {', '.join(known)}")
    chosen = arguments.names or names()
    if arguments.list:
        for name in arguments.names or known:
            print(f"{name}\n{benchmark(name).__doc__}")
        return 0
    size = SMALL if arguments.small else FULL
    figures: dict[str, list[Figure]] = {}
    for name in chosen:
        print(f"{name} …", file=sys.stderr, flush=True)
        figures[name] = asyncio.run(benchmark(name).run(size))
        print(table({name: figures[name]}), file=sys.stderr, flush=True)
    print(table(figures))
    content = {
        "machine": machine(),
        "size": "full" if size.is_full else "small",
        "figures": {name: [figure.summary() for figure in own] for name, own in figures.items()},
    }
    arguments.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
