"""Errors survive the way over gRPC, and every reason has its place in the contract."""

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from vfleet.errors import (
    FieldViolation,
    Obstacle,
    Reason,
    VfleetError,
    from_rpc_error,
    invalid_field,
    not_found,
    to_status,
)
from vfleet.v1.types_pb2 import ErrorReason

DETAILS_KEY = "grpc-status-details-bin"


def rpc_error(code: grpc.StatusCode, details: str, status: status_pb2.Status | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata()
    if status is not None:
        trailing.add(DETAILS_KEY, status.SerializeToString())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=details)


def received(error: VfleetError) -> VfleetError:
    """What a client gets of an error that a daemon answers with."""
    status = status_pb2.Status.FromString(to_status(error).SerializeToString())
    return from_rpc_error(rpc_error(error.code, error.message, status), "127.0.0.1:1")


def test_reasons_are_those_of_the_contract() -> None:
    assert {f"ERROR_REASON_{reason}" for reason in Reason} | {"ERROR_REASON_UNSPECIFIED"} == set(ErrorReason.keys())


@pytest.mark.parametrize("reason", Reason)
def test_an_error_comes_back_as_it_was(reason: Reason) -> None:
    violations = (FieldViolation("moves[0].function", "is 'é'; expected a name"), FieldViolation("b", "is missing"))
    error = VfleetError(reason, "the function 'é' is not", metadata={"kind": "function"}, violations=violations)
    back = received(error)
    assert (back.reason, back.message, back.metadata, back.violations, back.code) == (
        reason, error.message, error.metadata, violations, error.code,
    )  # fmt: skip
    assert error.code is not grpc.StatusCode.OK
    assert to_status(error).code == error.code.value[0]


def test_obstacles_come_back_as_they_were() -> None:
    obstacles = (Obstacle("CORDON", "h2/nic0", "uncordon h2"), Obstacle("HOST", "h1/nic1", "leave the host open"))
    error = VfleetError(Reason.UNSATISFIABLE, "no choice of devices", obstacles=obstacles)
    assert received(error).obstacles == obstacles
    assert received(VfleetError(Reason.CONFLICT, "changed")).obstacles == ()


def test_a_bad_field_says_field_value_and_expectation() -> None:
    error = received(invalid_field("moves[2].function", "X", "a name"))
    assert error.message == "moves[2].function is 'X'; expected a name"
    assert error.violations == (FieldViolation("moves[2].function", "is 'X'; expected a name"),)
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_long_value_is_shortened() -> None:
    assert len(invalid_field("name", "x" * 1_000_000, "a name").message) < 120


def test_not_found_names_kind_and_name() -> None:
    error = received(not_found("function", "vf9"))
    assert (error.message, error.metadata) == ("no function named 'vf9'", {"kind": "function", "name": "vf9"})
    assert error.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, Reason.UNREACHABLE),
        (grpc.StatusCode.CANCELLED, Reason.UNREACHABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.UNREACHABLE),
        (grpc.StatusCode.INVALID_ARGUMENT, Reason.INVALID_FIELD),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.LIMIT_EXCEEDED),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.INTERNAL),
    ],
)
def test_an_error_that_is_not_ours_names_the_daemon(code: grpc.StatusCode, reason: Reason) -> None:
    error = from_rpc_error(rpc_error(code, "what went wrong"), "10.0.0.1:7000")
    assert error.reason is reason
    assert error.metadata == {"address": "10.0.0.1:7000", "code": code.name}
    assert "10.0.0.1:7000" in error.message
    assert "what went wrong" in error.message


def foreign_status(reason: str, domain: str) -> status_pb2.Status:
    packed = any_pb2.Any()
    packed.Pack(error_details_pb2.ErrorInfo(reason=reason, domain=domain))
    return status_pb2.Status(code=grpc.StatusCode.ABORTED.value[0], message="m", details=[packed])


@pytest.mark.parametrize(("reason", "domain"), [("CONFLICT", "example.com"), ("FROM_A_LATER_VERSION", "vfleet")])
def test_details_of_another_domain_or_version_are_not_taken_for_ours(reason: str, domain: str) -> None:
    error = from_rpc_error(rpc_error(grpc.StatusCode.ABORTED, "m", foreign_status(reason, domain)), "a:1")
    assert error.reason is Reason.INTERNAL


def test_details_that_contradict_the_status_are_not_believed() -> None:
    status = to_status(not_found("host", "h1"))
    error = from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, "gone", status), "a:1")
    assert error.reason is Reason.UNREACHABLE
