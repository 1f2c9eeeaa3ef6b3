"""The fence: which attempts a host still listens to."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bench import attempt, reason_of

from hostd.fence import Fences
from hostd.ledger import Ledger
from vfleet.errors import Reason, VfleetError
from vfleet.v1.types_pb2 import Attempt

STALE = Reason.STALE_ATTEMPT

# What a host was asked before, what it is asked now, and why it refuses. Attempts are by revision, or (fleet
# generation, revision).
CASES = [
    ([], ("prepare", 5), None),
    ([], ("conclude", 5), None),
    ([("prepare", 5)], ("prepare", 5), None),
    ([("prepare", 5)], ("conclude", 5), None),
    ([("prepare", 5)], ("prepare", 6), None),
    ([("prepare", 5)], ("prepare", 4), STALE),
    ([("prepare", 5)], ("conclude", 4), STALE),
    ([("conclude", 5)], ("conclude", 5), None),
    ([("conclude", 5)], ("prepare", 5), STALE),
    ([("conclude", 5)], ("prepare", 6), None),
    ([("conclude", 5)], ("conclude", 4), STALE),
    ([("prepare", 5), ("conclude", 5)], ("prepare", 5), STALE),
    ([("prepare", 5), ("conclude", 6)], ("prepare", 6), STALE),
    ([("conclude", 5), ("conclude", 6)], ("prepare", 6), STALE),
    ([("conclude", 5), ("prepare", 6)], ("prepare", 6), None),
    ([("prepare", 6), ("prepare", 5)], ("prepare", 5), STALE),
    ([("prepare", 9)], ("prepare", (2, 1)), None),
    ([("prepare", (2, 1))], ("prepare", 9), STALE),
    ([("prepare", (2, 1))], ("conclude", 9), STALE),
]


def of(revision: int | tuple[int, int]) -> Attempt:
    return attempt(revision) if isinstance(revision, int) else attempt(revision[1], revision[0])


def ask(fences: Fences, request: tuple[str, int | tuple[int, int]], function: str = "vf1") -> Reason | None:
    return reason_of(getattr(fences, request[0]), function, of(request[1]))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path)
    yield opened
    opened.close()


@pytest.mark.parametrize(("before", "now", "refused"), CASES)
@pytest.mark.parametrize("is_restarted", [False, True])
def test_a_lower_attempt_is_refused_and_so_is_the_preparation_of_one_that_ended(
    ledger: Ledger, before, now, refused, is_restarted
):
    fences = Fences(ledger)
    for request in before:
        ask(fences, request)
    if is_restarted:
        fences = Fences(ledger)
    for _ in range(2):
        assert ask(fences, now) is refused
    assert ask(fences, now, "vf2") is None, "each function has its own fence"


def test_a_known_decision_ends_its_attempt_but_never_a_later_one(ledger: Ledger):
    fences = Fences(ledger)
    ask(fences, ("prepare", 5))
    fences.end("vf1", of(5))
    assert ask(fences, ("prepare", 5)) is STALE
    ask(fences, ("prepare", 6))
    fences.end("vf1", of(5))
    assert fences.highest() == (1, 6)
    assert ask(fences, ("prepare", 6)) is None
    assert ask(fences, ("prepare", 5)) is STALE


def test_the_decision_of_an_attempt_never_heard_of_ends_it(ledger: Ledger):
    fences = Fences(ledger)
    fences.end("vf1", of(5))
    assert ask(fences, ("prepare", 5)) is STALE
    fences.end("vf1", of((2, 1)))
    assert ask(fences, ("prepare", (2, 1))) is STALE
    assert ask(fences, ("prepare", 5), "vf2") is None


def test_every_change_of_a_fence_is_counted_and_nothing_else(ledger: Ledger):
    fences = Fences(ledger)
    counts = []
    for request in (("prepare", 5), ("prepare", 5), ("prepare", 4), ("conclude", 5), ("conclude", 5), ("prepare", 6)):
        ask(fences, request)
        counts.append(fences.changes)
    assert counts == [1, 1, 1, 2, 2, 3]
    assert Fences(ledger).changes == 0


def test_the_highest_attempt_is_that_of_any_function(ledger: Ledger):
    fences = Fences(ledger)
    assert fences.highest() == (0, 0)
    for function, revision in (("vf1", 9), ("vf2", (2, 3)), ("vf3", 7)):
        ask(fences, ("conclude", revision), function)
    assert Fences(ledger).highest() == (2, 3)


@pytest.mark.parametrize(
    ("before", "now", "why"),
    [
        (("conclude", 5), ("prepare", 5), "attempt 1.5 on function 'vf1' has ended on this host"),
        (
            ("prepare", (2, 1)),
            ("conclude", 5),
            "attempt 1.5 on function 'vf1' is lower than 2.1, which this host has seen",
        ),
    ],
)
def test_a_refusal_names_the_attempt_the_function_and_why(ledger: Ledger, before, now, why):
    fences = Fences(ledger)
    ask(fences, before)
    with pytest.raises(VfleetError) as refused:
        getattr(fences, now[0])("vf1", of(now[1]))
    assert refused.value.message == why
    assert refused.value.metadata == {"function": "vf1", "attempt": "1.5"}


@pytest.mark.parametrize("method", ["prepare", "conclude"])
@pytest.mark.parametrize(
    ("function", "revision"), [("", 5), ("VF_1", 5), ("vf1", (0, 5)), ("vf1", (1, 0)), ("vf1", (1, -1))]
)
def test_no_attempt_and_no_function_are_refused(ledger: Ledger, method, function, revision):
    fences = Fences(ledger)
    with pytest.raises(VfleetError) as refused:
        getattr(fences, method)(function, of(revision))
    assert refused.value.reason is Reason.INVALID_FIELD
    if revision == 5:
        assert refused.value.metadata == {"field": "function"}
    else:
        shown = f"{revision[0]}.{revision[1]}"
        expected = "a fleet generation and a revision, each from 1 on"
        assert refused.value.message == f"attempt is {shown!r}; expected {expected}"
        assert refused.value.metadata == {"field": "attempt"}
    assert fences.highest() == (0, 0)
