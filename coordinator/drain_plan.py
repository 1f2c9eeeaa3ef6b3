"""How a part of the fleet is emptied: which functions go where, which of them in one migration, in what order. Pure.

All functions get their devices together. If not all can, as few as can be stay, each with the reason. Rules about
functions hold also on the way: those that are to be together move together, and one that is to be apart from another
doesn't come to where that one still is.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

from coordinator.explanation import relaxations, unsatisfiable
from coordinator.placement import Question
from coordinator.placement_filters import Needs
from coordinator.planner import ask, find_device, movable
from coordinator.snapshot import Snapshot
from vfleet.errors import Reason, VfleetError
from vfleet.v1.migration_service_pb2 import MoveRequest
from vfleet.v1.placement_pb2 import Constraints, GroupRule, Relation, Relaxation

Unit = frozenset[str]


@dataclass(frozen=True, slots=True)
class Batch:
    """Functions that move in one migration, once those of `after` have moved."""

    functions: tuple[str, ...]
    after: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class DrainPlan:
    """Where functions go, in what batches, in their order; and why the others can't move.

    `homes` are those of functions that rules name and that don't move: the plan counts on them.
    """

    devices: Mapping[str, str]
    batches: Sequence[Batch]
    stuck: Mapping[str, VfleetError]
    homes: Mapping[str, str]


def plan_drain(
    snapshot: Snapshot, functions: Iterable[str], constraints: Constraints, shunned: Collection[str] = ()
) -> DrainPlan:
    """Return how these functions leave, given that they and nothing else move. Hosts of `shunned` are a last resort.

    Raise IN_MIGRATION if a rule names another function and that is in a migration: where it will be isn't known yet.
    """
    stuck: dict[str, VfleetError] = {}
    movers: list[str] = []
    for name in functions:
        try:
            find_device(snapshot, movable(snapshot, name).device)
            movers.append(name)
        except VfleetError as error:
            stuck[name] = error
    while movers:
        question = _question(snapshot, movers, constraints, shunned)
        answer = _answer(question)
        if answer is not None:
            return DrainPlan(answer, _batches(question, answer), stuck, question.homes)
        reasons = _Reasons(question, constraints)
        for name in _too_many(question):
            stuck[name] = reasons.why(name)
            movers.remove(name)
    return DrainPlan({}, (), stuck, {})


def binding_rules(snapshot: Snapshot, movers: Collection[str], constraints: Constraints) -> list[GroupRule]:
    """Return the rules about functions that say something of these, with those functions only that are somewhere."""
    rules = []
    for rule in constraints.groups:
        bound = [name for name in rule.functions if _binds(snapshot, name)]
        if len(bound) > 1 and any(name in movers for name in bound):
            rules.append(GroupRule(functions=bound, boundary=rule.boundary, relation=rule.relation))
    return rules


def _question(
    snapshot: Snapshot, movers: Sequence[str], constraints: Constraints, shunned: Collection[str] = ()
) -> Question:
    asked = Constraints()
    asked.CopyFrom(constraints)
    del asked.groups[:]
    asked.groups.extend(binding_rules(snapshot, movers, constraints))
    return ask(snapshot, [MoveRequest(function=name) for name in movers], asked, shunned)


def _binds(snapshot: Snapshot, name: str) -> bool:
    """Return whether a function is somewhere, so that others can be together with it or apart."""
    try:
        movable(snapshot, name)
    except VfleetError as error:
        return error.reason is Reason.IN_MIGRATION
    return True


def _answer(question: Question) -> dict[str, str] | None:
    try:
        return question.answer()
    except VfleetError as error:
        if error.reason is not Reason.LIMIT_EXCEEDED:
            raise
        return None


def _too_many(question: Question) -> list[str]:
    """Return functions that have to stay: as few as can be, or, if it is rules that can't be met, those they name."""
    bound = [name for name in question.movers if any(name in rule.functions for rule in question.constraints.groups)]
    return question.without_device() or bound or list(question.movers)


class _Reasons:
    """Why functions have to stay, looked into once for all that need the same: there may be hundreds of them."""

    def __init__(self, question: Question, constraints: Constraints) -> None:
        self._question = question
        self._constraints = constraints
        # What would let each move by itself; None if it could.
        self._ways_out: dict[tuple[Needs, str], Sequence[Relaxation] | None] = {}

    def why(self, name: str) -> VfleetError:
        """Return why a function has to stay."""
        alone = _question(self._question.snapshot, [name], self._constraints)
        needs = alone.needs[name]
        key = needs, name if needs.groups else ""  # a way out may name the functions of a rule
        if key not in self._ways_out:
            self._ways_out[key] = relaxations(alone) if _answer(alone) is None else None
        ways_out = self._ways_out[key]
        if ways_out is not None:
            return unsatisfiable(alone, ways_out)
        if any(name in rule.functions for rule in self._question.constraints.groups):
            return self._together
        message = f"other functions that move need all free slots of the devices that would do for {name!r}"
        return VfleetError(Reason.UNSATISFIABLE, message)

    @cached_property
    def _together(self) -> VfleetError:
        return unsatisfiable(self._question)


def _batches(question: Question, answer: Mapping[str, str]) -> list[Batch]:
    unit_of: dict[str, Unit] = {name: frozenset((name,)) for name in answer}

    def merge(names: Iterable[str]) -> None:
        merged = frozenset[str]().union(*(unit_of[name] for name in names))
        unit_of.update(dict.fromkeys(merged, merged))

    for rule in question.constraints.groups:
        if rule.relation == Relation.RELATION_SAME:
            merge(name for name in rule.functions if name in answer)
    while True:
        # Dictionaries for sets: their order doesn't change from one process to the next.
        after: dict[Unit, dict[Unit, None]] = {unit_of[name]: {} for name in sorted(answer)}
        for comes, leaves in _meetings(question, answer):
            if unit_of[comes] != unit_of[leaves]:
                after[unit_of[comes]][unit_of[leaves]] = None
        try:
            order = list(TopologicalSorter(after).static_order())
        except CycleError as error:
            circle: list[Unit] = error.args[1]
            merge(name for unit in circle for name in unit)
        else:
            return [Batch(tuple(sorted(unit)), frozenset[str]().union(*after[unit])) for unit in order]


def _meetings(question: Question, answer: Mapping[str, str]) -> Iterable[tuple[str, str]]:
    """Yield pairs of functions that are to be apart of which the first comes to where the second has been."""
    for rule in question.constraints.groups:
        if rule.relation == Relation.RELATION_DIFFERENT:
            members = [name for name in rule.functions if name in answer]
            for comes in members:
                target = question.snapshot.sites[answer[comes]].within[rule.boundary]
                for leaves in members:
                    home = question.snapshot.sites[question.needs[leaves].source]
                    if comes != leaves and home.within[rule.boundary] == target:
                        yield comes, leaves
