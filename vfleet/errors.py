"""One error root, and the only place that knows gRPC status codes.

Everything that vfleet refuses is a `VfleetError` with a `Reason`. At a server's edge it becomes a google.rpc.Status
with ErrorInfo (domain "vfleet"), for bad fields BadRequest, for obstacles PreconditionFailure, and RetryInfo if it is
known when to try again; a client gets the same error back.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass

import grpc
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "vfleet"
TOO_MANY_CALLS = "Concurrent RPC limit exceeded!"  # gRPC's word for one call too many of a server, which was not begun
BUSY_RETRY_S = 1.0


class Reason(enum.StrEnum):
    """Why something was refused: the names of vfleet.v1.ErrorReason, where each is explained."""

    INVALID_FIELD = "INVALID_FIELD"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    IN_MIGRATION = "IN_MIGRATION"
    TARGET_IS_SOURCE = "TARGET_IS_SOURCE"
    NO_FREE_SLOT = "NO_FREE_SLOT"
    SLOT_TAKEN = "SLOT_TAKEN"
    INCOMPATIBLE_DEVICE = "INCOMPATIBLE_DEVICE"
    HOST_UNAVAILABLE = "HOST_UNAVAILABLE"
    INCARNATION_CHANGED = "INCARNATION_CHANGED"
    STALE_ATTEMPT = "STALE_ATTEMPT"
    WRONG_GENERATION = "WRONG_GENERATION"
    ILLEGAL_STATE = "ILLEGAL_STATE"
    GROUP_TOO_LARGE = "GROUP_TOO_LARGE"
    CONFLICT = "CONFLICT"
    TOO_LATE = "TOO_LATE"
    TRANSLATION_FAULT = "TRANSLATION_FAULT"
    HOLD_TIMEOUT = "HOLD_TIMEOUT"
    SEQUENCE_GAP = "SEQUENCE_GAP"
    BAD_STATE = "BAD_STATE"
    STORE_UNAVAILABLE = "STORE_UNAVAILABLE"
    OUTCOME_UNKNOWN = "OUTCOME_UNKNOWN"
    LIMIT_EXCEEDED = "LIMIT_EXCEEDED"
    IN_USE = "IN_USE"
    FUNCTION_LOST = "FUNCTION_LOST"
    SEGMENT_TAKEN = "SEGMENT_TAKEN"
    INTERNAL = "INTERNAL"
    UNREACHABLE = "UNREACHABLE"
    UNSATISFIABLE = "UNSATISFIABLE"
    HOST_CORDONED = "HOST_CORDONED"
    CANCELLED = "CANCELLED"
    PERMISSION_DENIED = "PERMISSION_DENIED"


_CODES: Mapping[Reason, grpc.StatusCode] = {
    Reason.INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.ALREADY_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Reason.IN_MIGRATION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.TARGET_IS_SOURCE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NO_FREE_SLOT: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.SLOT_TAKEN: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.INCOMPATIBLE_DEVICE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.HOST_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.INCARNATION_CHANGED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STALE_ATTEMPT: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.WRONG_GENERATION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.ILLEGAL_STATE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.GROUP_TOO_LARGE: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.CONFLICT: grpc.StatusCode.ABORTED,
    Reason.TOO_LATE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.TRANSLATION_FAULT: grpc.StatusCode.OUT_OF_RANGE,
    Reason.HOLD_TIMEOUT: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.SEQUENCE_GAP: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.BAD_STATE: grpc.StatusCode.DATA_LOSS,
    Reason.STORE_UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.OUTCOME_UNKNOWN: grpc.StatusCode.UNKNOWN,
    Reason.LIMIT_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.IN_USE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.FUNCTION_LOST: grpc.StatusCode.DATA_LOSS,
    Reason.SEGMENT_TAKEN: grpc.StatusCode.ALREADY_EXISTS,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
    Reason.UNREACHABLE: grpc.StatusCode.UNAVAILABLE,
    Reason.UNSATISFIABLE: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.HOST_CORDONED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.CANCELLED: grpc.StatusCode.ABORTED,
    Reason.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field of a request that is not what was expected. `field` is its path, for example `moves[2].function`."""

    field: str
    description: str


@dataclass(frozen=True, slots=True)
class Obstacle:
    """What has to change before a request can be met: the kind of obstacle, what it is about, and what may be done."""

    kind: str
    subject: str
    description: str


class VfleetError(Exception):
    """The root, and the whole, of vfleet's errors.

    `reason` is for programs, the message for people: it names what was meant, what was found and what was expected.
    `metadata` gives the names in it to programs. Of `obstacles` each by itself is in the way. `retry_after_s` says when
    the same call may succeed, in seconds.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: tuple[FieldViolation, ...] = (),
        obstacles: tuple[Obstacle, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.violations = violations
        self.obstacles = obstacles
        self.retry_after_s = retry_after_s

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code that stands for the reason."""
        return _CODES[self.reason]


def invalid_field(field: str, value: object, expected: str) -> VfleetError:
    """Return the error for a field of a request: names the field, the value (shortened) and what was expected."""
    shown = repr(value)
    if len(shown) > 80:
        shown = f"{shown[:77]}..."
    description = f"is {shown}; expected {expected}"
    return VfleetError(
        Reason.INVALID_FIELD,
        f"{field} {description}",
        metadata={"field": field},
        violations=(FieldViolation(field, description),),
    )


def not_found(kind: str, name: str) -> VfleetError:
    """Return the error for a `kind` (host, device, function, driver, migration) that does not exist."""
    return VfleetError(Reason.NOT_FOUND, f"no {kind} named {name!r}", metadata={"kind": kind, "name": name})


def to_status(error: VfleetError) -> status_pb2.Status:
    """Return the google.rpc.Status that carries the error."""
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN, metadata=dict(error.metadata))
    status.details.append(_packed(info))
    if error.violations:
        bad_request = error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=v.field, description=v.description)
                for v in error.violations
            ]
        )
        status.details.append(_packed(bad_request))
    if error.obstacles:
        failure = error_details_pb2.PreconditionFailure()
        for obstacle in error.obstacles:
            failure.violations.add(type=obstacle.kind, subject=obstacle.subject, description=obstacle.description)
        status.details.append(_packed(failure))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMicroseconds(round(error.retry_after_s * 1e6))
        status.details.append(_packed(retry))
    return status


def from_rpc_error(rpc_error: grpc.aio.AioRpcError, address: str) -> VfleetError:
    """Return what a call to the daemon at `address` failed with: the daemon's own error, or one that names it."""
    try:
        status = rpc_status.from_call(rpc_error)  # type: ignore[arg-type]  # AioRpcError has what it reads of a call
    except ValueError:  # details that contradict the status: not ours
        status = None
    error = _from_status(status) if status is not None else None
    if error is not None:
        return error
    code = rpc_error.code()
    details = f"{address}: {rpc_error.details() or code.name}"
    metadata = {"address": address, "code": code.name}
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return VfleetError(Reason.UNREACHABLE, f"no answer from {details}", metadata=metadata)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return VfleetError(Reason.UNREACHABLE, f"no answer in time from {details}", metadata=metadata)
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return VfleetError(Reason.INVALID_FIELD, details, metadata=metadata)
    if code in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
        return VfleetError(Reason.PERMISSION_DENIED, details, metadata=metadata)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        # Else it is a message that is too large.
        retry_after_s = BUSY_RETRY_S if rpc_error.details() == TOO_MANY_CALLS else None
        return VfleetError(Reason.LIMIT_EXCEEDED, details, metadata=metadata, retry_after_s=retry_after_s)
    return VfleetError(Reason.INTERNAL, f"{details} ({code.name})", metadata=metadata)


def is_broken(error: VfleetError, address: str) -> bool:
    """Return whether the connection to the daemon at `address` broke, or came to nothing, before that had answered.

    Whether the request was carried out is not known. A deadline that passed is not among this.
    """
    return (
        error.reason is Reason.UNREACHABLE
        and error.metadata.get("address") == address
        and error.metadata.get("code") == grpc.StatusCode.UNAVAILABLE.name
    )


def _packed(
    message: error_details_pb2.ErrorInfo
    | error_details_pb2.BadRequest
    | error_details_pb2.PreconditionFailure
    | error_details_pb2.RetryInfo,
) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _from_status(status: status_pb2.Status) -> VfleetError | None:
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    failure = error_details_pb2.PreconditionFailure()
    retry = error_details_pb2.RetryInfo()
    for detail in status.details:
        for known in (info, bad_request, failure, retry):
            detail.Unpack(known)
    if info.domain != DOMAIN or info.reason not in Reason.__members__ or status.code == code_pb2.OK:
        return None
    return VfleetError(
        Reason(info.reason),
        status.message,
        metadata=dict(info.metadata),
        violations=tuple(FieldViolation(v.field, v.description) for v in bad_request.field_violations),
        obstacles=tuple(Obstacle(v.type, v.subject, v.description) for v in failure.violations),
        retry_after_s=retry.retry_delay.ToMicroseconds() / 1e6 if retry.HasField("retry_delay") else None,
    )
