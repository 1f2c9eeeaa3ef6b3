"""Whether the functions and drivers that a topology declares can all be there, on its machines."""

from collections import Counter
from collections.abc import Mapping, Sequence

from hostd.yaml_file import FieldPath, YamlFile
from vfleet.declared import DeclaredDriver, DeclaredFunction
from vfleet.errors import VfleetError
from vfleet.limits import MAX_DRIVERS
from vfleet.names import EXPECTED, is_name
from vfleet.v1.records_pb2 import Device


def check_functions(
    file: YamlFile, functions: Sequence[DeclaredFunction], devices: Mapping[str, Sequence[Device]]
) -> None:
    """Raise VfleetError INVALID_FIELD for the first that can't be. `devices` are those of each host, by its name."""
    checks = _Checks(file, devices)
    for index, function in enumerate(functions):
        checks.function(function, ("functions", index))


class _Checks:
    """What was declared so far, and what of it keeps something else from being."""

    def __init__(self, file: YamlFile, devices: Mapping[str, Sequence[Device]]) -> None:
        self._file = file
        self._hosts = list(devices)
        self._devices = {device.name: device for each in devices.values() for device in each}
        self._functions: set[str] = set()
        self._used: Counter[str] = Counter()
        self._slots: dict[tuple[str, int], str] = {}
        self._drivers: dict[str, tuple[str, DeclaredDriver]] = {}
        self._sockets: dict[tuple[str, str], str] = {}

    def function(self, function: DeclaredFunction, at: FieldPath) -> None:
        if function.name in self._functions:
            raise self._refuse((*at, "name"), function.name, "a name that no other function has")
        self._functions.add(function.name)
        device = self._devices.get(function.device)
        if device is None:
            example = next(iter(self._devices), "")
            expected = (
                f"a device of a host here, for example {example}" if example else "a device: no host here has one"
            )
            raise self._refuse((*at, "device"), function.device, expected)
        self._used[device.name] += 1
        if self._used[device.name] > device.total_vfs:
            raise self._refuse(
                (*at, "device"), device.name, f"at most {device.total_vfs} functions there, as many as VFs"
            )
        if function.vf_index is not None:
            self._slot(function.vf_index, function.name, device, (*at, "vf_index"))
        limit = device.max_drivers or MAX_DRIVERS
        if len(function.drivers) > limit:
            expected = f"at most {limit}, the most that a function of model {device.model} can have"
            raise self._refuse((*at, "drivers"), f"{len(function.drivers)} drivers", expected)
        names: set[str] = set()
        for index, driver in enumerate(function.drivers):
            here = (*at, "drivers", index)
            name = function.driver_name(driver)
            if name in names:
                raise self._refuse((*here, "name"), name, "each driver once")
            names.add(name)
            self._driver(function, driver, here)

    def _slot(self, index: int, function: str, device: Device, at: FieldPath) -> None:
        if index > device.total_vfs:
            raise self._refuse(at, index, f"1 to {device.total_vfs}, the VFs of {device.name}")
        if (device.name, index) in self._slots:
            other = self._slots[device.name, index]
            raise self._refuse(at, index, f"a VF of {device.name} that is not that of function {other}")
        self._slots[device.name, index] = function

    def _driver(self, function: DeclaredFunction, driver: DeclaredDriver, at: FieldPath) -> None:
        name, host = function.driver_name(driver), function.driver_host(driver)
        if driver.name is None and driver.guest is None:
            raise self._file.refuse((*at, "name"), "is missing; expected a value, unless there is a guest")
        if not is_name(name):
            raise self._refuse((*at, "name"), name, f"{EXPECTED}: give it one, as this is that of a guest by default")
        if host not in self._hosts:
            raise self._refuse((*at, "host"), host, f"one of {', '.join(self._hosts)}")
        self._same(name, host, driver, at)
        if driver.guest is not None:
            other = self._sockets.setdefault((host, driver.guest), name)
            if other != name:
                raise self._refuse((*at, "guest"), driver.guest, f"a socket that is not that of driver {other}")

    def _same(self, name: str, host: str, driver: DeclaredDriver, at: FieldPath) -> None:
        """Refuse a driver that was declared before, for another function, and is another now."""
        if name not in self._drivers:
            self._drivers[name] = (host, driver)
            return
        known_host, known = self._drivers[name]
        if driver.guest is not None or known.guest is not None:
            raise self._refuse((*at, "name"), name, "a name that no other driver has: a guest's has one function")
        if host != known_host:
            raise self._refuse((*at, "host"), host, f"{known_host}, where driver {name} is")
        if driver.main_memory not in (None, known.main_memory):
            expected = f"what was said of driver {name} before: {known.main_memory or 'nothing'}"
            raise self._refuse((*at, "main_memory"), driver.main_memory, expected)

    def _refuse(self, path: FieldPath, value: object, expected: str) -> VfleetError:
        return self._file.refuse(path, f"is {value!r}; expected {expected}")
