"""What a topology file may say, before anyone looks at whether it makes sense: its sections, as dataclasses."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Literal

from pydantic import StrictInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ErrorDetails

from hostd.yaml_file import YamlFile
from vfleet.declared import DeclaredDriver, DeclaredFunction
from vfleet.errors import VfleetError
from vfleet.fields import CLOSED, Name, Size, integer

LAST_BUS = 255

_Bus = Annotated[int, integer(0, LAST_BUS)]
_Uint16 = Annotated[int, integer(0, 0xFFFF)]
_Positive16 = Annotated[int, integer(1, 0xFFFF)]


@pydantic_dataclass(frozen=True, kw_only=True, config=CLOSED)
class ManufacturerSection:
    """Who made a device, as PCI has it."""

    vendor_id: _Uint16
    device_id: _Uint16


@pydantic_dataclass(frozen=True, kw_only=True, config=CLOSED)
class DeviceSection:
    """A device, with its VFs."""

    name: Name
    bus: _Bus | None = None
    device: Annotated[int, integer(0, 31)] = 0
    function: Annotated[int, integer(0, 7)] = 0
    model: Name
    manufacturer: ManufacturerSection
    io_type: Literal["network", "storage", "accelerator"]
    physical_adapter: Name | None = None
    power_domain: Name
    attachments: tuple[Name, ...] = ()
    total_vfs: _Positive16
    first_vf_offset: _Positive16
    vf_stride: _Positive16
    bars: dict[StrictInt, Size]


@pydantic_dataclass(frozen=True, kw_only=True, config=CLOSED)
class BridgeSection:
    """A bridge, with what is behind it."""

    name: Name
    secondary: _Bus
    subordinate: _Bus
    bridges: tuple["BridgeSection", ...] = ()
    devices: tuple[DeviceSection, ...] = ()


@pydantic_dataclass(frozen=True, kw_only=True, config=CLOSED)
class HostSection:
    """A host, and what is on its root complex."""

    name: Name
    segment: _Uint16
    bridges: tuple[BridgeSection, ...] = ()
    devices: tuple[DeviceSection, ...] = ()


@pydantic_dataclass(frozen=True, kw_only=True, config=CLOSED)
class FleetSection:
    """The whole file."""

    hosts: tuple[HostSection, ...]
    functions: tuple[DeclaredFunction, ...] = ()


_Section = HostSection | BridgeSection | DeviceSection | ManufacturerSection | DeclaredFunction | DeclaredDriver
_SECTIONS: Mapping[str, type[_Section]] = {
    "hosts": HostSection,
    "bridges": BridgeSection,
    "devices": DeviceSection,
    "manufacturer": ManufacturerSection,
    "functions": DeclaredFunction,
    "drivers": DeclaredDriver,
}
_KINDS = {
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "int_type": "an integer",
}


def read(file: YamlFile) -> FleetSection:
    """Return what a topology file says. Raise VfleetError INVALID_FIELD for the first value that can't be."""
    try:
        return TypeAdapter(FleetSection).validate_python(file.data)
    except ValidationError as invalid:
        raise _first_error(file, invalid.errors()) from None


def _first_error(file: YamlFile, errors: Sequence[ErrorDetails]) -> VfleetError:
    # A misspelt key is both unknown and missing; that it is unknown tells more.
    told = [details for details in errors if details["type"] != "missing"] or errors
    return min((_error(file, details) for details in told), key=lambda error: int(error.metadata["line"]))


def _error(file: YamlFile, details: ErrorDetails) -> VfleetError:
    path = tuple(step for step in details["loc"] if step != "[key]")
    if details["type"] == "missing":
        return file.refuse(path, "is missing; expected a value")
    if details["type"] in ("unexpected_keyword_argument", "invalid_key"):
        section = next((_SECTIONS[step] for step in reversed(path[:-1]) if isinstance(step, str)), FleetSection)
        return file.refuse(path, f"is unknown; expected one of {', '.join(field.name for field in fields(section))}")
    expected = _KINDS.get(details["type"], details["msg"].removeprefix("Input should be "))
    shown = repr(details["input"])
    return file.refuse(path, f"is {shown if len(shown) <= 80 else shown[:77] + '...'}; expected {expected}")
