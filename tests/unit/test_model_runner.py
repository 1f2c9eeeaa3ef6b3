"""The runner of the models: what it takes for a proof, and what it must not."""

import pytest
from model.check import ALONE, MOVES, PAIRS, UNMISSED, Result, SpinError, parse, rules_of, searches, unmissed

EXHAUSTIVE = """
(Spin Version 6.5.2 -- 6 December 2019)

Full statespace search for:
	assertion violations	+
	invalid end states	+

State-vector 124 byte, depth reached 63, errors: 0
    70500 states, stored
   251000 states, matched
"""


def with_error(line: str) -> str:
    return f"{line}\npan: wrote migration.pml.trail\n\nWarning: Search not completed\n" + EXHAUSTIVE.replace(
        "errors: 0", "errors: 1"
    )


def test_an_exhaustive_search_without_an_error_finds_nothing():
    assert parse(EXHAUSTIVE) == Result(None, 70500)


@pytest.mark.parametrize(
    ("line", "violated"),
    [
        ("pan:1: assertion violated invariant_5 (at depth 38)", "invariant_5"),
        ("pan:1: invalid end state (at depth 12)", "invalid end state"),
        ("pan:1: non-progress cycle (at depth 7)", "non-progress cycle"),
    ],
)
def test_the_first_violation_is_found(line: str, violated: str):
    assert parse(with_error(line)) == Result(violated, 70500)


@pytest.mark.parametrize(
    "output",
    [
        "",
        "sh: 1: ./pan: not found",
        EXHAUSTIVE.replace("70500 states, stored", ""),
        EXHAUSTIVE.replace("errors: 0", ""),
        # It ran out of memory or depth: no error, but no proof.
        EXHAUSTIVE + "pan: reached -DMEMLIM bound\nWarning: Search not completed\n",
        "error: max search depth too small\n" + EXHAUSTIVE,
        # An error that the runner doesn't know is none of those it expects.
        with_error("pan:1: acceptance cycle (at depth 7)"),
        with_error("pan:1: VECTORSZ is too small"),
    ],
)
def test_what_is_no_proof_is_refused(output: str):
    with pytest.raises(SpinError):
        parse(output)


def test_every_rule_of_every_model_is_taken_away():
    taken_away = {(search.configuration.model, rule) for search in searches() for rule in search.without}
    for model in UNMISSED:
        rules = rules_of(model)
        assert rules
        assert taken_away >= {(model, rule) for rule in rules}
        assert {rule for other, rule in taken_away if other == model} == set(rules)


def test_every_two_rules_that_are_covered_alone_are_taken_away_together():
    covered = [rule for rule, expected in ALONE[MOVES].items() if expected is None]
    pairs = [search for search in searches() if search.configuration == MOVES and len(search.without) == 2]
    assert len(pairs) == len(covered) * (len(covered) - 1) / 2


def test_every_pair_that_must_violate_something_is_searched():
    expected = {(search.configuration, *search.without): search.expected for search in searches()}
    assert {pair: expected.get(pair) for pair in PAIRS} == PAIRS


def test_the_rules_that_nothing_misses_are_named():
    assert unmissed() == UNMISSED
