"""Checks the models with Spin: the protocol as it is, and with its rules taken away, alone and in pairs.

Every search is compared with what is expected of it, and one that differs fails the run. `make model` runs this;
docs/model.md says what the models are.
"""

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODELS = Path(__file__).parent
MAX_DEPTH = 100_000
TIMEOUT_S = 1800

STUCK = "invalid end state"

_RULE = re.compile(r"^#define (\w+) +\d+ +/\* (.+) \*/$", re.MULTILINE)
_VIOLATION = re.compile(
    r"^pan:\d+: (?:assertion violated (\S+)|(invalid end state)|(non-progress cycle))", re.MULTILINE
)
_STATES = re.compile(r"^ *(\d+) states, stored", re.MULTILINE)
_ERRORS = re.compile(r"errors: (\d+)$", re.MULTILINE)


class SpinError(Exception):
    """Spin, the C compiler or the search failed, so nothing is known."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """A model and its bounds: the file, and what is defined in it, as NAME=VALUE.

    With `cycles` the search is for a run that never ends, else for a violation or a stuck state.
    """

    name: str
    model: str = "migration.pml"
    defines: tuple[str, ...] = ()
    cycles: bool = False


@dataclass(frozen=True, slots=True)
class Search:
    """One search: the rules that are taken away, and what must be found then; None for nothing."""

    configuration: Configuration
    without: tuple[str, ...] = ()
    expected: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a search found: the first violation, or None if it went through all states without one."""

    violated: str | None
    states: int


AS_IT_IS = (
    Configuration("3 migrations, 3 sessions", defines=("MIGRATIONS=3", "ENDING=1")),
    Configuration("every run ends", defines=("ENDING=1",), cycles=True),
    Configuration("driver at the source", defines=("ENDING=1", "D=0")),
    Configuration("driver at the target", defines=("ENDING=1", "D=1")),
    Configuration("drivers come and go", defines=("ATTACHING=1",)),
    Configuration("a machine restarts", defines=("RESTARTING=1",)),
    Configuration("group", "group.pml"),
    Configuration("group, every run ends", "group.pml", cycles=True),
    Configuration("post-copy", "postcopy.pml"),
    Configuration("post-copy, every run ends", "postcopy.pml", cycles=True),
)

# Rules are taken away with two sessions: a former owner, whose lease has ended, and the one that adopts.
MOVES = Configuration("there and back", defines=("SESSIONS=2",))
ENDS = Configuration("there and back, to the end", defines=("SESSIONS=2", "ENDING=1"))
ATTACHES = Configuration("drivers come and go", defines=("SESSIONS=2", "ATTACHING=1"))
RESTARTS = Configuration("a machine restarts", defines=("SESSIONS=2", "RESTARTING=1"))
NO_LEFTOVERS = Configuration("leftovers aside", defines=("SESSIONS=2", "LEFTOVERS=0"))
RESTARTS_NO_LEFTOVERS = Configuration(
    "restarts, leftovers aside", defines=("SESSIONS=2", "RESTARTING=1", "LEFTOVERS=0")
)
GROUP = Configuration("group", "group.pml")
POST_COPY = Configuration("post-copy", "postcopy.pml")

# What each rule's absence alone violates, and where that shows.
ALONE: Mapping[Configuration, Mapping[str, str | None]] = {
    MOVES: {
        "RECORD_AT_COMMIT": "invariant_5",
        "RECORD_AT_ABORT": "invariant_5",
        "LOCK_AT_BEGIN": None,
        "SLOT_AT_BEGIN": None,
        "FUNCTION_AT_BEGIN": None,
        "FUNCTION_AT_COMMIT": None,
        "READ_BACK": "invariant_1",
        "HELD_BEFORE_COMMIT": "invariant_2",
        "COPIED_BEFORE_COMMIT": "invariant_1",
        "COMMIT_BEFORE_APPLY": "invariant_2",
        "DONE_BEFORE_FINISH": "invariant_8",
        "FENCE": "invariant_8",
        "ENDED": "invariant_8",
        "RESUME_OWN": None,
        "LIFT_OWN": None,
        "DESTROY_OWN": None,
        "DESTROY_OLD": None,
        "IMPORT_OWN": None,
        "COPY_STOPPED": "invariant_1",
        "ENTRY_FORWARD": "invariant_2",
        "ACCESS_GENERATION": "invariant_3",
        "SEQUENCE": "invariant_4",
        "RESOLVE_SAME": "invariant_1",
        "RESOLVE_BY_RECORD": None,
        "STOPPED_UNTIL_FINAL": None,
        "RESOLVE_OWN_HOLD": "invariant_2",
    },
    ATTACHES: {"FUNCTION_AT_COMMIT": None, "LOCK_AT_ATTACH": None},
    RESTARTS: {
        "RESOLVE_BY_RECORD": "invariant_1",
        "TARGET_AT_COMMIT": "invariant_1",
    },
    ENDS: {"HOSTS_RESOLVE": STUCK},
    NO_LEFTOVERS: {"FENCE": None},
    RESTARTS_NO_LEFTOVERS: {"FENCE": None, "IMPORT_OWN": None},
    GROUP: {
        "COMMIT_TOGETHER": "invariant_1",
        "ABORT_TOGETHER": "invariant_1",
        "LIFT_TOGETHER": "invariant_6",
        "FOLLOW_TOGETHER": "invariant_6",
        "RESOLVE_TOGETHER": "invariant_6",
        "HELD_BEFORE_COMMIT": "invariant_2",
        "COPIED_BEFORE_COMMIT": "invariant_1",
        "COPY_STOPPED": "invariant_1",
        "ENTRY_AT_RESOLUTION": "invariant_2",
    },
    POST_COPY: {
        "ARRIVED_BEFORE_SCRUB": "invariant_8",
        "SCRUB_BEFORE_FINISH": "invariant_8",
        "STOPPED_UNTIL_FINAL": "invariant_8",
        "WAIT_FOR_PAGE": "invariant_4",
        "ARRIVE_ONCE": "invariant_4",
        "REST_STOPPED": "invariant_4",
        "FETCH_NAMED": "invariant_4",
        "SAY_LOST": STUCK,
    },
}

# What pairs violate of which neither alone does, in the same configuration. No other pair does.
PAIRS: Mapping[tuple[Configuration, str, str], str] = {
    (MOVES, "LOCK_AT_BEGIN", "SLOT_AT_BEGIN"): "invariant_8",
    (MOVES, "SLOT_AT_BEGIN", "FUNCTION_AT_BEGIN"): "invariant_8",
    (ATTACHES, "FUNCTION_AT_COMMIT", "LOCK_AT_ATTACH"): "invariant_2",
    (NO_LEFTOVERS, "FENCE", "RESUME_OWN"): "invariant_1",
    (NO_LEFTOVERS, "FENCE", "LIFT_OWN"): "invariant_2",
    (NO_LEFTOVERS, "FENCE", "DESTROY_OWN"): "invariant_1",
    (NO_LEFTOVERS, "FENCE", "DESTROY_OLD"): "invariant_1",
    (NO_LEFTOVERS, "FENCE", "RESOLVE_BY_RECORD"): "invariant_1",
    (RESTARTS_NO_LEFTOVERS, "FENCE", "IMPORT_OWN"): "invariant_1",
}

# Nothing misses these, neither alone nor with another that nothing misses alone.
UNMISSED: Mapping[str, frozenset[str]] = {
    "migration.pml": frozenset({"STOPPED_UNTIL_FINAL"}),
    "group.pml": frozenset(),
    "postcopy.pml": frozenset(),
}


def parse(output: str) -> Result:
    """Return what Spin's verifier reports. Raise SpinError unless it searched to a violation or through all states."""
    states, errors = _STATES.search(output), _ERRORS.search(output)
    if states is None or errors is None:
        raise SpinError(f"no report of a search:\n{output}")
    violation = _VIOLATION.search(output)
    if (violation is None) != (errors[1] == "0"):
        raise SpinError(f"an error of an unknown kind:\n{output}")
    if violation is None and ("Search not completed" in output or "max search depth too small" in output):
        raise SpinError(f"the search is not exhaustive:\n{output}")
    violated = next(filter(None, violation.groups())) if violation else None
    return Result(violated, int(states[1]))


def rules_of(model: str) -> dict[str, str]:
    """Return the rules that a model can do without, and what each says."""
    rules, _, _ = (MODELS / model).read_text().partition("#ifndef WITHOUT")
    return dict(_RULE.findall(rules))


def searches() -> Iterator[Search]:
    """Yield every search: as it is, each rule taken away, and each two that nothing misses alone."""
    yield from (Search(configuration) for configuration in AS_IT_IS)
    for configuration, alone in ALONE.items():
        for rule, expected in alone.items():
            yield Search(configuration, (rule,), expected)
        covered = [rule for rule, expected in alone.items() if expected is None]
        if configuration == NO_LEFTOVERS:
            pairs = [("FENCE", rule) for rule, expected in ALONE[MOVES].items() if expected is None]
        else:
            pairs = list(itertools.combinations(covered, 2))
        for first, second in pairs:
            yield Search(configuration, (first, second), PAIRS.get((configuration, first, second)))


def unmissed() -> dict[str, frozenset[str]]:
    """Return, by model, the rules whose absence no expected search shows."""
    missed = {(c.model, rule) for c, alone in ALONE.items() for rule, expected in alone.items() if expected}
    missed |= {(configuration.model, rule) for configuration, *pair in PAIRS for rule in pair}
    return {model: frozenset(rule for rule in rules_of(model) if (model, rule) not in missed) for model in UNMISSED}


def explore(search: Search) -> Result:
    """Search all states of a model, or up to the first violation. Raise SpinError."""
    configuration = search.configuration
    defines = [f"-D{define}" for define in configuration.defines]
    if search.without:
        defines.append(f"-DWITHOUT={'+'.join(search.without)}")
    # Only a long search is worth a long compilation.
    build = ["-w", "-O1" if search.without else "-O2", "-DVECTORSZ=512", "-DNP" if configuration.cycles else "-DSAFETY"]
    with tempfile.TemporaryDirectory(prefix="vfleet-model-") as directory:
        _run(directory, "spin", "-a", *defines, str(MODELS / configuration.model))
        _run(directory, "cc", *build, "-o", "pan", "pan.c")
        return parse(_run(directory, "./pan", f"-m{MAX_DEPTH}", "-w22", *(["-l"] if configuration.cycles else [])))


def _run(directory: str, *command: str) -> str:
    try:
        done = subprocess.run(  # the commands are fixed
            command,
            cwd=directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SpinError(f"{command[0]} takes longer than {TIMEOUT_S} s") from None
    if done.returncode:
        raise SpinError(f"{' '.join(command)} fails:\n{done.stdout}")
    return done.stdout


def missing_tools() -> list[str]:
    """Return what must be installed first."""
    needed = {"spin": "Spin (Debian: apt-get install spin)", "cc": "a C compiler (Debian: apt-get install gcc)"}
    return [what for command, what in needed.items() if shutil.which(command) is None]


def check(chosen: Sequence[Search]) -> int:
    """Print a table of searches, and return how many found something else than expected."""
    differing = 0
    _print("configuration", "without", "found", "states", "s")
    for search in chosen:
        began_s = time.monotonic()
        result = explore(search)
        found = result.violated or "nothing"
        if result.violated != search.expected:
            differing += 1
            found += f"; expected {search.expected or 'nothing'}"
        seconds = f"{time.monotonic() - began_s:.1f}"
        _print(search.configuration.name, " ".join(search.without) or "-", found, f"{result.states:,}", seconds)
    return differing


def _print(configuration: str, without: str, found: str, states: str, seconds: str) -> None:
    print(f"{configuration:27} {without:39} {found:18} {states:>11} {seconds:>6}", flush=True)  # noqa: T201


def main() -> None:
    """Search, print, and exit with 1 if a search differs or can't be done."""
    if missing := missing_tools():
        sys.exit(f"The model needs {' and '.join(missing)}.")
    if unmissed() != UNMISSED:
        sys.exit(f"The rules that nothing misses are {unmissed()}; expected {UNMISSED}")
    try:
        differing = check(list(searches()))
    except SpinError as error:
        sys.exit(str(error))
    if differing:
        sys.exit(f"{differing} searches differ from what is expected.")


if __name__ == "__main__":
    main()
