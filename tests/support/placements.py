"""Small fleets of any shape for placement, and what makes a plan right, told without the code that plans."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import TypeVar

from hypothesis import strategies as st
from support.fleet_values import FleetValues, move

from coordinator.placement import Question
from coordinator.planner import ask
from vfleet.etcd import keys
from vfleet.etcd.records import decode
from vfleet.v1.placement_pb2 import (
    Boundary,
    BoundaryRule,
    Constraints,
    GroupRule,
    PlacementFilter,
    Preference,
    Relation,
)
from vfleet.v1.records_pb2 import Cordon, Device, Function, Host, StateVersion
from vfleet.v1.types_pb2 import Bar, Manufacturer

T = TypeVar("T")

SAME, DIFFERENT = Relation.RELATION_SAME, Relation.RELATION_DIFFERENT
Constraint = tuple[int, int]  # a filter, and for GROUP the number of the rule
NOTHING: Constraint = (PlacementFilter.PLACEMENT_FILTER_UNSPECIFIED, 0)
BOUNDARIES = [boundary for _, boundary in Boundary.items() if boundary]
RULES = {
    Boundary.BOUNDARY_HOST: PlacementFilter.PLACEMENT_FILTER_HOST,
    Boundary.BOUNDARY_PHYSICAL_ADAPTER: PlacementFilter.PLACEMENT_FILTER_PHYSICAL_ADAPTER,
    Boundary.BOUNDARY_BRIDGE: PlacementFilter.PLACEMENT_FILTER_BRIDGE,
    Boundary.BOUNDARY_PARENT_BRIDGE: PlacementFilter.PLACEMENT_FILTER_PARENT_BRIDGE,
    Boundary.BOUNDARY_POWER_DOMAIN: PlacementFilter.PLACEMENT_FILTER_POWER_DOMAIN,
}


@dataclass
class Case:
    """A fleet, the functions of it that are to move, each with the device that is named or none, and what is asked."""

    fleet: FleetValues
    moves: dict[str, str]
    constraints: Constraints

    def question(self) -> Question:
        # An index, so that a function's own device may be named.
        requests = [move(name, target, 63 if target else 0) for name, target in self.moves.items()]
        return ask(self.fleet.snapshot(), requests, self.constraints)

    def devices(self) -> dict[str, Device]:
        hosts = [decode(Host, item) for key, item in self.fleet.items.items() if key.startswith(keys.HOSTS)]
        return {device.name: device for host in hosts for device in host.devices}

    def function(self, name: str) -> Function:
        return decode(Function, self.fleet.items[keys.function_key(name)])

    def taken(self, device: str, total_vfs: int) -> int:
        prefix = keys.slot_key(device, 0).removesuffix("0")
        indices = [int(key.removeprefix(prefix)) for key in self.fleet.items if key.startswith(prefix)]
        return sum(index <= total_vfs for index in indices)


def rarely(random: Random, value: T, other: T) -> T:
    return other if random.random() < 0.06 else value


def device_of(random: Random, host: str, number: int) -> Device:
    bridge = random.choice(["", "port0", "port1"])
    return Device(
        name=f"{host}/nic{number}",
        host=host,
        routing_id=(number + 1) << 8,
        model=rarely(random, "checker", "other"),
        manufacturer=Manufacturer(vendor_id=rarely(random, 1, 2), device_id=1),
        io_type=rarely(random, "network", "storage"),
        physical_adapter=random.choice(["card0", "card1"]),
        bridge=bridge,
        parent_bridge=random.choice(["", "switch"]) if bridge else "",
        power_domain=random.choice(["psu-a", "psu-b"]),
        attachments=random.choice([["lan"], ["lan"], ["lan"], ["lan", "san"], []]),
        total_vfs=random.randint(1, 4),
        first_vf_offset=1,
        vf_stride=1,
        bars=[Bar(index=0, size_bytes=rarely(random, 8192, 4096))],
        state_version=StateVersion(format=rarely(random, 2, 1), model=1),
    )


def case_of(seed: int) -> Case:
    """Return one of all cases with up to 4 hosts of up to 3 devices, and up to 4 functions that move."""
    random, fleet = Random(seed), FleetValues()
    devices: list[Device] = []
    for segment in range(1, random.randint(3, 4) + 1):
        host = f"h{segment}"
        own = [device_of(random, host, number) for number in range(random.randint(1, 3))]
        fleet.host(host, segment, *own, registered=rarely(random, value=True, other=False))
        if rarely(random, value=False, other=True):
            fleet.put(keys.cordon_key(host), Cordon(reason="firmware"))
        devices += own
    names = [f"vf{number}" for number in range(1, random.randint(1, 5) + 1)]
    for number, name in enumerate(names):
        home = random.choice(devices)
        index = 1 + sum(key.startswith(f"{keys.SLOTS}{home.name}/") for key in fleet.items)
        fleet.function(name, home, int(home.host[1:]), index, f"d{number}@{random.choice(devices).host}")
    movers = names[: random.randint(1, min(4, len(names)))]
    moves = {name: rarely(random, "", random.choice(devices).name) for name in movers}
    return Case(fleet, moves, constraints_of(random, names, movers))


cases = st.integers(0, (1 << 32) - 1).map(case_of)


def constraints_of(random: Random, names: list[str], movers: list[str]) -> Constraints:
    groups = []
    for _ in range(random.choice([0, 0, 1, 2]) if len(names) > 1 else 0):
        members = random.sample(names, random.randint(2, min(4, len(names))))
        if set(members) & set(movers):
            relation, boundary = random.choice([SAME, DIFFERENT, DIFFERENT]), random.choice(BOUNDARIES)
            groups.append(GroupRule(functions=members, boundary=boundary, relation=relation))
    preferences = [Preference.PREFERENCE_DRIVER_HOST, Preference.PREFERENCE_LEAST_LOADED]
    preferences += random.choice([[], [Preference.PREFERENCE_SPREAD], [Preference.PREFERENCE_PACK]])
    random.shuffle(preferences)
    return Constraints(
        boundaries=[
            BoundaryRule(boundary=boundary, relation=random.choice([SAME, DIFFERENT, DIFFERENT]))
            for boundary in random.sample(BOUNDARIES, random.choice([0, 0, 0, 1, 2]))
        ],
        groups=groups,
        preferences=preferences,
        attachments=rarely(random, [], ["lan"]),
    )


def within(device: Device, boundary: Boundary.ValueType) -> tuple[str, ...]:
    """Return what encloses a device, as the records say it."""
    match boundary:
        case Boundary.BOUNDARY_HOST:
            return (device.host,)
        case Boundary.BOUNDARY_PHYSICAL_ADAPTER:
            return device.host, device.physical_adapter
        case Boundary.BOUNDARY_BRIDGE:
            return device.host, device.bridge
        case Boundary.BOUNDARY_PARENT_BRIDGE:
            return device.host, device.parent_bridge, "" if device.bridge else "none"
    return device.host, device.power_domain


def is_right(case: Case, answer: Mapping[str, str], without: Constraint = NOTHING) -> bool:
    """Return whether a plan meets every constraint but `without`, by a look at nothing but the records."""
    all_devices = case.devices()
    places = {name: all_devices[device] for name, device in answer.items()}
    return all(_will_do(case, all_devices, name, place, without) for name, place in places.items()) and _go_together(
        case, all_devices, places, without
    )


def plan_exists(case: Case, without: Constraint = NOTHING) -> bool:
    """Return whether there is a plan, by going through all that could be one."""
    all_devices = case.devices()
    choices = [
        [device for device in all_devices.values() if _will_do(case, all_devices, name, device, without)]
        for name in case.moves
    ]
    return any(
        _go_together(case, all_devices, dict(zip(case.moves, chosen, strict=True)), without)
        for chosen in product(*choices)
    )


def _will_do(case: Case, all_devices: Mapping[str, Device], name: str, device: Device, without: Constraint) -> bool:
    function, target = case.function(name), case.moves[name]
    source = all_devices[function.device]
    reached = set(case.constraints.attachments) or (set() if target else set(source.attachments))
    bars = {bar.index: bar.size_bytes for bar in device.bars}
    passed = {
        PlacementFilter.PLACEMENT_FILTER_TARGET: target in ("", device.name),
        PlacementFilter.PLACEMENT_FILTER_SOURCE: device.name != source.name or target == source.name,
        PlacementFilter.PLACEMENT_FILTER_MANUFACTURER: device.manufacturer == source.manufacturer,
        PlacementFilter.PLACEMENT_FILTER_MODEL: device.model == function.model,
        PlacementFilter.PLACEMENT_FILTER_IO_TYPE: device.io_type == source.io_type,
        PlacementFilter.PLACEMENT_FILTER_BARS: all(bars.get(b.index, 0) >= b.size_bytes for b in function.bars),
        PlacementFilter.PLACEMENT_FILTER_STATE_VERSION: device.state_version == source.state_version,
        PlacementFilter.PLACEMENT_FILTER_ATTACHMENTS: reached <= set(device.attachments),
        PlacementFilter.PLACEMENT_FILTER_HOST_REGISTERED: keys.registration_key(device.host) in case.fleet.items,
        PlacementFilter.PLACEMENT_FILTER_CORDON: keys.cordon_key(device.host) not in case.fleet.items,
    }
    for rule in case.constraints.boundaries:
        is_same = within(device, rule.boundary) == within(source, rule.boundary)
        passed[RULES[rule.boundary]] = not rule.relation or is_same is (rule.relation == SAME)
    return all(ok for constraint, ok in passed.items() if (constraint, 0) != without)


def _go_together(
    case: Case, all_devices: Mapping[str, Device], places: Mapping[str, Device], without: Constraint
) -> bool:
    chosen = [device.name for device in places.values()]
    for name in set(chosen):
        total = all_devices[name].total_vfs
        taken = 0 if without == (PlacementFilter.PLACEMENT_FILTER_FREE_SLOT, 0) else case.taken(name, total)
        if taken + chosen.count(name) > total:
            return False
    for number, rule in enumerate(case.constraints.groups, start=1):
        if without == (PlacementFilter.PLACEMENT_FILTER_GROUP, number):
            continue
        homes = {
            name: within(places.get(name) or all_devices[case.function(name).device], rule.boundary)
            for name in rule.functions
        }
        if rule.relation == SAME and len(set(homes.values())) > 1:
            return False
        if rule.relation == DIFFERENT:
            for name in places:
                if name in homes and list(homes.values()).count(homes[name]) > 1:
                    return False
    return True


def change_device(case: Case, name: str, **fields: object) -> None:
    """Write other things into a device's record."""
    host = decode(Host, case.fleet.items[keys.host_key(name.partition("/")[0])])
    for device in host.devices:
        if device.name == name:
            for field, value in fields.items():
                if isinstance(value, str | int):
                    setattr(device, field, value)
                else:
                    device.ClearField(field)
                    device.MergeFrom(Device(**{field: value}))
    case.fleet.put(keys.host_key(host.name), host)
