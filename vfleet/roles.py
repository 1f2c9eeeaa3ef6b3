"""Who may call what: for each RPC of both daemons the roles that it needs. What has no row here nobody may call.

A viewer sees, an operator sees and acts, a coordinator carries out what etcd says, a host speaks for the functions and
drivers that live there. `docs/security.md` shows the table; a test keeps the two equal.
"""

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


class Role(enum.StrEnum):
    """What a certificate's owner is to the fleet."""

    VIEWER = "viewer"
    OPERATOR = "operator"
    COORDINATOR = "coordinator"
    HOST = "host"


_SEE = frozenset({Role.VIEWER, Role.OPERATOR})
_ACT = frozenset({Role.OPERATOR})
_COORDINATE = frozenset({Role.COORDINATOR})
_BOTH = _SEE | _COORDINATE
_FABRIC = frozenset({Role.HOST})
_ALL = frozenset(Role)

_ROWS: Mapping[str, Mapping[frozenset[Role], str]] = {
    "vfleet.v1.FleetService": {
        _SEE: "ListHosts ListDevices ListFunctions ListDrivers CheckFleet WatchEvents",
        _ACT: "CreateFunction DeleteFunction AttachDriver DetachDriver DeleteDriver BumpGeneration ForgetHost Cordon "
        "Uncordon",
    },
    "vfleet.v1.MigrationService": {
        _SEE: "PlanMigration PlanRearrangement GetMigration ListMigrations WatchMigration",
        _ACT: "CreateMigration CancelMigration Drain Rearrange",
    },
    "vfleet.v1.FunctionService": {
        _BOTH: "GetFunction ListFunctions",
        _COORDINATE: "CreateFunction DestroyFunction ChangeState",
        _ACT: "ResetFunction InjectFault",
    },
    "vfleet.v1.HoldService": {_BOTH: "ListHolds", _COORDINATE: "PlaceHold LiftHold"},
    "vfleet.v1.TranslationService": {_BOTH: "GetTable", _COORDINATE: "UpdateTable", _SEE: "WatchTable"},
    "vfleet.v1.TransferService": {_COORDINATE: "ImportState WatchArrival", _FABRIC: "ExportState FetchState"},
    "vfleet.v1.DriverService": {
        _BOTH: "GetDriver ListDrivers",
        _COORDINATE: "CreateDriver DeleteDriver AttachFunction DetachFunction",
        _SEE: "GetWorkloadReport",
        # A driver is a program that acts: even a read of a device may change it.
        _ACT: "Read Write StreamAccesses AccessMany WatchNotifications AcknowledgeHold StartWorkload StopWorkload",
    },
    "vfleet.v1.FabricService": {
        _FABRIC: "Exchange GetSequence ExchangeDma DeliverFrames",
        # Also by a coordinator, when it repairs what was left of a driver.
        _FABRIC | _COORDINATE: "ForgetDriver",
    },
    # A daemon asks itself, too, and a client asks whether a daemon that is silent lives.
    "grpc.health.v1.Health": {_ALL: "Check List Watch"},
    "grpc.reflection.v1alpha.ServerReflection": {_SEE: "ServerReflectionInfo"},
}

ROLES: Mapping[str, frozenset[Role]] = {
    f"/{service}/{method}": roles
    for service, rows in _ROWS.items()
    for roles, methods in rows.items()
    for method in methods.split()
}
"""By the path of the RPC, as gRPC names it."""


@dataclass(frozen=True, slots=True)
class FieldRule:
    """A field of a request that takes other roles, if it is set, than the RPC itself."""

    field: str
    roles: frozenset[Role]


FIELD_RULES: Mapping[str, FieldRule] = {
    "/vfleet.v1.FleetService/CheckFleet": FieldRule("repair", _ACT),
    "/vfleet.v1.DriverService/GetWorkloadReport": FieldRule("restart_measurement", _ACT),
}


def table() -> Iterator[tuple[str, frozenset[Role]]]:
    """Yield what `docs/security.md` shows: each RPC, or RPC and field, with its roles, in the order of the services."""
    for path, roles in ROLES.items():
        name = path.strip("/").replace("/", ".").removeprefix("vfleet.v1.")
        yield name, roles
        if path in FIELD_RULES:
            yield f"{name} with {FIELD_RULES[path].field}", FIELD_RULES[path].roles
