"""What a topology declares beside machines: functions and their drivers, which are there once `vfleet up` has come up.

    functions:
      - name: disk1                       # unique in the fleet
        device: h1/nvme0                  # where it is made, if it isn't there
        vf_index: 1                       # the lowest that is free by default
        drivers:                          # none by default
          - guest: /tmp/disk1.sock        # the socket of a virtual machine's; without it hostd's own
            name: guest-disk1             # a guest's is called guest-FUNCTION by default
            host: h1                      # the device's by default
            main_memory: 512MiB           # that of `vfleet attach` by default

hostd checks that they can be, and does nothing about them: vfleet/cli/declaration.py does.
"""

from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BeforeValidator, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import PydanticCustomError

from vfleet.address import PAGE_BYTES
from vfleet.fields import CLOSED, Name, check_size, integer
from vfleet.limits import MAX_MAIN_MEMORY_BYTES, MAX_SOCKET_PATH_BYTES
from vfleet.names import guest_driver_name, host_of, is_device_name

MAX_VF_INDEX = 0xFFFF


def _check_device(value: object) -> str:
    if not isinstance(value, str) or not is_device_name(value):
        raise PydanticCustomError("expected", "HOST/DEVICE, for example h1/nic0")
    return value


def _check_socket(value: object) -> str:
    most = MAX_SOCKET_PATH_BYTES
    if not isinstance(value, str) or not value.startswith("/") or not 2 <= len(value.encode()) <= most:
        raise PydanticCustomError("expected", "an absolute path of at most {most} bytes", {"most": most})
    return value


def _check_main_memory(value: object) -> int:
    size = check_size(value)
    if not PAGE_BYTES <= size <= MAX_MAIN_MEMORY_BYTES or size % PAGE_BYTES:
        limits = {"page": PAGE_BYTES, "most": MAX_MAIN_MEMORY_BYTES >> 30}
        raise PydanticCustomError("expected", "a multiple of {page} bytes, up to {most}GiB", limits)
    return size


@pydantic_dataclass(frozen=True, kw_only=True, config=CLOSED)
class DeclaredDriver:
    """A driver that a function is to have; with `guest` that of a virtual machine, at this socket."""

    name: Name | None = None
    host: Name | None = None
    guest: Annotated[str, BeforeValidator(_check_socket)] | None = None
    main_memory: Annotated[int, BeforeValidator(_check_main_memory)] | None = None


@pydantic_dataclass(frozen=True, kw_only=True, config=CLOSED)
class DeclaredFunction:
    """A function that is to be there."""

    name: Name
    device: Annotated[str, BeforeValidator(_check_device)]
    vf_index: Annotated[int, integer(1, MAX_VF_INDEX)] | None = None
    drivers: tuple[DeclaredDriver, ...] = ()

    def driver_name(self, driver: DeclaredDriver) -> str:
        """Return what one of its drivers is called. It may be no name, if it is the default of a guest's."""
        return driver.name or guest_driver_name(self.name)

    def driver_host(self, driver: DeclaredDriver) -> str:
        """Return the host of one of its drivers."""
        return driver.host or host_of(self.device)


def read_declared(topology: Path) -> tuple[DeclaredFunction, ...]:
    """Return the functions that a topology declares, which hostd has found to be right."""
    content: object = yaml.safe_load(topology.read_text(encoding="utf-8"))
    functions: object = content.get("functions", ()) if isinstance(content, dict) else ()
    return TypeAdapter(tuple[DeclaredFunction, ...]).validate_python(functions)
