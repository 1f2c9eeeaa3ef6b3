"""The options that say what is asked of devices that the coordinator chooses, for every command that has moves."""

import enum
from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from vfleet.errors import invalid_field
from vfleet.names import check_name
from vfleet.v1.placement_pb2 import Boundary, BoundaryRule, Constraints, GroupRule, Preference, Relation


class Rule(enum.StrEnum):
    """Whether a boundary is to be left."""

    SAME = "same"
    DIFFERENT = "different"
    ANY = "any"


class Preferred(enum.StrEnum):
    """What is preferred among devices that will do."""

    DRIVER_HOST = "driver-host"
    LEAST_LOADED = "least-loaded"
    SPREAD = "spread"
    PACK = "pack"


_BOUNDARIES: Mapping[str, Boundary.ValueType] = {
    "host": Boundary.BOUNDARY_HOST,
    "adapter": Boundary.BOUNDARY_PHYSICAL_ADAPTER,
    "bridge": Boundary.BOUNDARY_BRIDGE,
    "parent-bridge": Boundary.BOUNDARY_PARENT_BRIDGE,
    "power-domain": Boundary.BOUNDARY_POWER_DOMAIN,
}
_RELATIONS = {
    Rule.SAME: Relation.RELATION_SAME,
    Rule.DIFFERENT: Relation.RELATION_DIFFERENT,
}
_PREFERENCES = {
    Preferred.DRIVER_HOST: Preference.PREFERENCE_DRIVER_HOST,
    Preferred.LEAST_LOADED: Preference.PREFERENCE_LEAST_LOADED,
    Preferred.SPREAD: Preference.PREFERENCE_SPREAD,
    Preferred.PACK: Preference.PREFERENCE_PACK,
}

HostOption = Annotated[Rule, typer.Option("--host", help="Stay on the host, or leave it.")]
AdapterOption = Annotated[Rule, typer.Option("--adapter", help="The same for the physical adapter.")]
BridgeOption = Annotated[Rule, typer.Option("--bridge", help="The same for the bridge.")]
ParentBridgeOption = Annotated[Rule, typer.Option("--parent-bridge", help="The same for the bridge above that.")]
PowerDomainOption = Annotated[Rule, typer.Option("--power-domain", help="The same for the power domain.")]
AttachmentOption = Annotated[
    list[str] | None,
    typer.Option("--attachment", metavar="NAME", help="A network or fabric to reach; by default, those of now."),
]
PreferOption = Annotated[
    list[Preferred] | None,
    typer.Option("--prefer", help="What counts among devices that will do; the first counts most."),
]
TogetherOption = Annotated[
    list[str] | None,
    typer.Option(
        "--together",
        metavar="FUNCTION,…[@BOUNDARY]",
        help=f"Functions that are to be within one {', '.join(_BOUNDARIES)}; by default, host.",
    ),
]
ApartOption = Annotated[
    list[str] | None,
    typer.Option("--apart", metavar="FUNCTION,…[@BOUNDARY]", help="Functions that are to be in different ones."),
]


def constraints(
    *,
    host: Rule,
    adapter: Rule,
    bridge: Rule,
    parent_bridge: Rule,
    power_domain: Rule,
    attachments: Sequence[str] | None,
    prefer: Sequence[Preferred] | None,
    together: Sequence[str] | None,
    apart: Sequence[str] | None,
) -> Constraints:
    """Return what the options ask for. Raise INVALID_FIELD, naming the option, for what can't be meant."""
    rules = (host, adapter, bridge, parent_bridge, power_domain)
    groups = (("--together", together, Rule.SAME), ("--apart", apart, Rule.DIFFERENT))
    return Constraints(
        boundaries=[
            BoundaryRule(boundary=boundary, relation=_RELATIONS[rule])
            for boundary, rule in zip(_BOUNDARIES.values(), rules, strict=True)
            if rule is not Rule.ANY
        ],
        groups=[_group(option, text, rule) for option, texts, rule in groups for text in texts or ()],
        preferences=[_PREFERENCES[each] for each in prefer or ()],
        attachments=[check_name("--attachment", name) for name in attachments or ()],
    )


def _group(option: str, text: str, rule: Rule) -> GroupRule:
    names, at, boundary = text.partition("@")
    if at and boundary not in _BOUNDARIES:
        raise invalid_field(option, text, f"after @ one of {', '.join(_BOUNDARIES)}")
    functions = [check_name(option, name) for name in names.split(",")]
    if len(functions) < 2:
        raise invalid_field(option, text, "two functions or more, for example vf1,vf2")
    return GroupRule(functions=functions, boundary=_BOUNDARIES[boundary or "host"], relation=_RELATIONS[rule])
