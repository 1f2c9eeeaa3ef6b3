"""What has to be so of an instance, or of a request about one, before anything is done. Pure."""

from hostd.instance import Instance
from hostd.models import create_model
from hostd.models.base import DeviceModel
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.names import check_name
from vfleet.v1.function_service_pb2 import CreateFunctionRequest


def is_of_before(instance: Instance, fleet_generation: int) -> bool:
    """Return whether an instance waits for what was begun before the fleet generation was raised.

    A backup is older than what was decided after it. So etcd may have forgotten that this is the home, or that the
    function has moved away from here. A source from which the rest was fetched knows that it has, raised or not.
    """
    if instance.about.fetched:
        return True
    about = instance.about
    attempt = about.stopped_by if about.HasField("stopped_by") else about.attempt
    return about.complete and attempt.fleet_generation < fleet_generation


def check_whole(instance: Instance) -> None:
    """Raise ILLEGAL_STATE unless all of a home's state is here."""
    about = instance.about
    if not about.complete or about.arriving:
        raise VfleetError(
            Reason.ILLEGAL_STATE,
            f"function {about.function!r} does not have all its state here; it can't leave",
            metadata={"function": about.function},
        )


def check_deadline(resolve_after_ms: int) -> None:
    """Raise INVALID_FIELD unless there is a deadline."""
    if not resolve_after_ms:
        raise invalid_field("resolve_after_ms", resolve_after_ms, "from 1 ms on: whatever waits has a deadline")


def checked_model(request: CreateFunctionRequest) -> DeviceModel:
    """Return the model of a function to be made. Raise INVALID_FIELD for a request that can't be meant."""
    check_name("function", request.function)
    if not request.generation:
        raise invalid_field("generation", 0, "from 1 on")
    if not request.identity:
        raise invalid_field("identity", 0, "an identity other than 0")
    if not request.fresh:
        check_name("migration", request.migration)
        check_deadline(request.resolve_after_ms)
    return create_model(request.model, request.identity, {bar.index: bar.size_bytes for bar in request.bars})
