"""Why placement chose as it did, or why it could not: for people and programs. Pure.

Of every device it says that it was chosen, that it would do, or the first thing that is in its way; and of a request
that can't be met, each single constraint without which it could.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from coordinator.placement import Question
from coordinator.placement_filters import FREE_SLOT, Rule, Values, free_slots, group_values
from coordinator.site import Site
from vfleet.errors import Obstacle, Reason, VfleetError
from vfleet.parts import spoken
from vfleet.v1.placement_pb2 import Boundary, Explanation, Merit, Placement, PlacementFilter, Relation, Relaxation

MAX_OBSTACLES = 8  # in an error, which travels in a header
MAX_NAMES = 5

_HARDWARE = frozenset(
    {
        PlacementFilter.PLACEMENT_FILTER_MANUFACTURER,
        PlacementFilter.PLACEMENT_FILTER_MODEL,
        PlacementFilter.PLACEMENT_FILTER_IO_TYPE,
        PlacementFilter.PLACEMENT_FILTER_BARS,
    }
)


def explain(question: Question, answer: Mapping[str, str] | None) -> Explanation:
    """Return why the answer is as it is."""
    explanation = Explanation(placements=[_placement(question, answer, name) for name in question.movers])
    if answer is None:
        explanation.relaxations.extend(relaxations(question))
    return explanation


def unsatisfiable(question: Question, ways_out: Sequence[Relaxation] | None = None) -> VfleetError:
    """Return the error for a question that has no answer: it names what would give it one, `ways_out` if known."""
    found = relaxations(question) if ways_out is None else ways_out
    remedies = "; or ".join(each.remedy for each in found[:MAX_OBSTACLES])
    wanted = f"for it to be possible: {remedies}" if found else "no single change is known that would make it possible"
    message = f"no choice of devices meets what is asked for {_listed(question.movers)}; {wanted}"
    return VfleetError(
        Reason.UNSATISFIABLE,
        message,
        obstacles=tuple(
            Obstacle(PlacementFilter.Name(each.filter), _listed(each.devices), each.remedy)
            for each in found[:MAX_OBSTACLES]
        ),
    )


def _placement(question: Question, answer: Mapping[str, str] | None, function: str) -> Placement:
    needs, chosen = question.needs[function], answer[function] if answer else ""
    others = {name: device for name, device in (answer or {}).items() if name != function}
    taken = Counter(others.values())
    preferences = question.preferences()
    for device in others.values():
        preferences.place(device)
    placement = Placement(function=function, source=needs.source, device=chosen)
    fit: list[str] = []
    for name, site in sorted(question.snapshot.sites.items()):
        failure, by_plan = question.rejected(needs, site), False
        if failure is None and others:
            failure = _taken_by_plan(question, function, site, taken[name], others)
            by_plan = failure is not None
        if failure is None:
            fit.append(name)
            continue
        rule, (found, expected) = failure
        placement.rejections.add(
            device=name, filter=rule.filter, group=rule.group, found=found, expected=expected, by_plan=by_plan
        )
    drivers = preferences.hosts_of_drivers(function)
    for name in sorted(fit, key=lambda name: (name != chosen, preferences.worth(name, drivers), name)):
        merits: list[Merit] = preferences.merits(function, name)
        placement.candidates.add(device=name, merits=merits)
    return placement


def _taken_by_plan(
    question: Question, function: str, site: Site, taken: int, others: Mapping[str, str]
) -> tuple[Rule, Values] | None:
    """Return what is in the way of a device because of where the other functions of the plan go."""
    if taken and free_slots(question.snapshot, site) <= taken:
        there = _listed(name for name, device in others.items() if device == site.name)
        return FREE_SLOT, (f"the last for {there}", "1 free")
    for number, rule in enumerate(question.constraints.groups, start=1):
        if function not in rule.functions or not rule.relation:
            continue
        within = {
            question.snapshot.sites[others[name]].within[rule.boundary] for name in rule.functions if name in others
        }
        values = group_values(rule.relation, site.within[rule.boundary], within)
        if values is not None:
            return Rule(PlacementFilter.PLACEMENT_FILTER_GROUP, number), values
    return None


def relaxations(question: Question) -> list[Relaxation]:
    """Return the constraints without which there is an answer, each by itself."""
    found = []
    for rule in question.obstacles():
        try:
            answer = question.answer_without(rule)
        except VfleetError as error:
            if error.reason is not Reason.LIMIT_EXCEEDED:
                raise
            continue
        if answer is not None:
            remedy = _remedy(question, rule, answer)
            found.append(Relaxation(filter=rule.filter, group=rule.group, remedy=remedy, devices=answer))
    return found


def _remedy(question: Question, rule: Rule, answer: Mapping[str, str]) -> str:
    """Return what a person may do about a constraint so that the functions get these devices."""
    sites = {device: question.snapshot.sites[device] for device in sorted(set(answer.values()))}
    kept = [site for site in sites.values() if _is_kept_by(question, rule, answer, site)]
    devices, hosts = _listed(site.name for site in kept), _listed(dict.fromkeys(site.host for site in kept))
    if rule.filter in _HARDWARE:
        return f"replace {devices} by hardware like that of now ({_word(PlacementFilter.Name(rule.filter))})"
    if rule.filter == PlacementFilter.PLACEMENT_FILTER_GROUP:
        group = question.constraints.groups[rule.group - 1]
        how = "together" if group.relation == Relation.RELATION_SAME else "apart"
        boundary = _word(Boundary.Name(group.boundary))
        return f"don't ask for {_listed(group.functions)} to be {how} ({boundary})"
    match rule.filter:
        case PlacementFilter.PLACEMENT_FILTER_TARGET:
            return f"let {_listed(sites)} be chosen"
        case PlacementFilter.PLACEMENT_FILTER_SOURCE:
            return f"name {devices} itself, with another VF"
        case PlacementFilter.PLACEMENT_FILTER_STATE_VERSION:
            return f"run the same version of vfleet on {hosts}"
        case PlacementFilter.PLACEMENT_FILTER_FREE_SLOT:
            return f"free slots of {devices}"
        case PlacementFilter.PLACEMENT_FILTER_ATTACHMENTS:
            return f"ask for attachments that {devices} has"
        case PlacementFilter.PLACEMENT_FILTER_HOST_REGISTERED:
            return f"bring back {hosts}"
        case PlacementFilter.PLACEMENT_FILTER_CORDON:
            return f"uncordon {_listed(_cordons(question, kept))}"
    return f"leave the {_word(PlacementFilter.Name(rule.filter))} open"


def _cordons(question: Question, sites: Iterable[Site]) -> list[str]:
    """Return the parts of the fleet that are cordoned and that one of the devices is in, as people write them."""
    cordons = question.snapshot.cordons
    return [spoken(part) for part in dict.fromkeys(p for site in sites for p in site.parts) if part in cordons]


def _is_kept_by(question: Question, rule: Rule, answer: Mapping[str, str], site: Site) -> bool:
    """Return whether the constraint keeps one of the functions from the device that it would get."""
    there = [name for name, device in answer.items() if device == site.name]
    if rule == FREE_SLOT:
        return free_slots(question.snapshot, site) < len(there)
    return any(question.fails(rule, question.needs[name], site) for name in there)


def _word(name: str) -> str:
    return name.removeprefix("PLACEMENT_FILTER_").removeprefix("BOUNDARY_").lower().replace("_", " ")


def _listed(names: Iterable[str]) -> str:
    """Return names in a row, shortened."""
    every = list(names)
    more = f" and {len(every) - MAX_NAMES} more" if len(every) > MAX_NAMES else ""
    return ", ".join(every[:MAX_NAMES]) + more
