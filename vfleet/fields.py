"""What a value in a YAML file may be, as types for pydantic's dataclasses. Their messages say what was expected."""

import re
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict
from pydantic_core import PydanticCustomError

from vfleet.errors import VfleetError
from vfleet.names import EXPECTED, check_name

CLOSED = ConfigDict(extra="forbid")
"""Of a mapping whose other keys are refused."""

_SIZE = re.compile(r"([0-9]{1,10}) ?(KiB|MiB|GiB)")
_UNIT_BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def integer(low: int, high: int) -> BeforeValidator:
    """Return the validator of an integer from `low` to `high`."""

    def check(value: object) -> int:
        if type(value) is not int or not low <= value <= high:
            raise PydanticCustomError("expected", "an integer from {low} to {high}", {"low": low, "high": high})
        return value

    return BeforeValidator(check)


def _check_name(value: object) -> str:
    try:
        return check_name("name", value if isinstance(value, str) else "")
    except VfleetError:
        raise PydanticCustomError("expected", "{form}", {"form": EXPECTED}) from None


def check_size(value: object) -> int:
    """Return a number of bytes, given as that or as text like 64KiB. It may be any number, negative ones too."""
    if type(value) is int:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise PydanticCustomError("expected", "a number of bytes, or one of KiB, MiB or GiB, for example 64KiB")
    return int(match[1]) * _UNIT_BYTES[match[2]]


Name = Annotated[str, BeforeValidator(_check_name)]
Size = Annotated[int, BeforeValidator(check_size)]
