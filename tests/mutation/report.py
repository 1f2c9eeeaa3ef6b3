"""Says what `mutmut run` found: the score of each module, and each mutant that no test killed.

A survivor is to be killed by a test, or explained in the table of docs/mutation.md because it changes nothing that can
be seen. One that is not explained fails the report, and so does an explanation of one that is killed. `make mutation`
runs this.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MUTANTS = Path("mutants")
EXPLAINED = Path("docs/mutation.md")

# The exit codes that mutmut notes: of a test that failed, and of tests that never ended. All others are survivors.
FAILED = frozenset({1, 3})
ENDLESS = frozenset({-24, 24, 36, 152, 255})


def function_of(name: str) -> str:
    """Return the function of a mutant, given as module.x_function__mutmut_1 or module.xǁClassǁfunction__mutmut_1."""
    module, _, mangled = name.rpartition("__mutmut_")[0].rpartition(".")
    return f"{module}.{mangled.removeprefix('x_').removeprefix('xǁ').replace('ǁ', '.')}"


def changed_lines(name: str) -> tuple[str, str]:
    """Return the lines of the source that a mutant changes, and what it makes of them."""
    command = [Path(sys.executable).with_name("mutmut"), "show", name]
    diff = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    lines = [line for line in diff if not line.startswith(("---", "+++"))]
    before, after = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    return before, after


def explained() -> Iterator[tuple[str, str]]:
    """Yield the function and the changed lines of each row of the table: | `function` | `lines` | why |."""
    for row in EXPLAINED.read_text().splitlines():
        cells = [cell.strip() for cell in row.replace("\\|", "\0").split("|")]
        if len(cells) == 5 and cells[1].startswith("`") and cells[2].startswith("`"):
            yield cells[1].strip("`"), cells[2].strip("`").replace("\0", "|")


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{line}\n")


def main() -> int:
    """Print the report. Return 1 if the table of survivors is not theirs."""
    unseen, unexplained, totals = set(explained()), 0, [0, 0]
    known = frozenset(unseen)
    for path in sorted(MUTANTS.rglob("*.py.meta")):
        exit_codes = json.loads(path.read_text())["exit_code_by_key"]
        score = (sum(code in FAILED | ENDLESS for code in exit_codes.values()), len(exit_codes))
        totals = [total + part for total, part in zip(totals, score, strict=True)]
        say(f"{path.relative_to(MUTANTS).with_suffix('')!s:32} {score[0]:5} of {score[1]:5} mutants killed")
        for name in (name for name, code in exit_codes.items() if code not in FAILED):
            before, after = changed_lines(name)
            mutant = (function_of(name), after)
            # A busy machine can make one endless that survives on another.
            unseen.discard(mutant)
            if mutant in known or exit_codes[name] in ENDLESS:
                continue
            unexplained += 1
            say(f"  survives: {name}\n    - {before}\n    + {after}")
    say(f"{'in all':32} {totals[0]:5} of {totals[1]:5} mutants killed ({100 * totals[0] / totals[1]:.1f} %)")
    for function, after in sorted(unseen):
        say(f"  explained in {EXPLAINED}, but killed or gone: {function}: {after}")
    say(f"{totals[1] - totals[0] - unexplained} survivors are explained in {EXPLAINED}, {unexplained} are not")
    return 1 if unexplained or unseen else 0


if __name__ == "__main__":
    sys.exit(main())
