"""Small fleets to be rearranged, and what a rearrangement may do, told without the code that plans it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from random import Random

from hypothesis import strategies as st
from support.fake_host import device as plain_device
from support.fleet_values import FleetValues
from support.placements import BOUNDARIES, DIFFERENT, SAME, device_of, rarely, within

from coordinator.rearrangement import plan_rearrangement
from vfleet.address import Location
from vfleet.etcd import keys
from vfleet.etcd.records import decode
from vfleet.v1.migration_service_pb2 import (
    REARRANGEMENT_GOAL_EVEN,
    PlannedMove,
    PlanRearrangementResponse,
    RearrangementGoal,
)
from vfleet.v1.placement_pb2 import BoundaryRule, Constraints, GroupRule
from vfleet.v1.records_pb2 import Cordon, Device, Function, Slot

GOALS = [goal for goal in RearrangementGoal.values() if goal]


@dataclass
class Rearranged:
    """A fleet, and what is asked for. `homes` are of functions that nothing but constraints keeps where they are."""

    fleet: FleetValues
    goal: RearrangementGoal.ValueType
    tolerance_percent: int
    constraints: Constraints
    devices: dict[str, Device]
    homes: dict[str, str]

    def plan(self) -> PlanRearrangementResponse:
        return plan_rearrangement(self.fleet.snapshot(), self.goal, self.tolerance_percent, self.constraints)

    def is_in_use(self, device: str) -> bool:
        """Return whether a device takes part: its host is registered and not cordoned."""
        host = self.devices[device].host
        items = self.fleet.items
        return keys.registration_key(host) in items and keys.cordon_key(host) not in items

    def used(self) -> dict[str, int]:
        """Return how many slots of each device are taken."""
        slots = [key.removeprefix(keys.SLOTS).rpartition("/")[0] for key in self.fleet.items if keys.SLOTS in key]
        return {name: slots.count(name) for name in self.devices}

    def unit(self, device: str) -> str:
        """Return what is to become free."""
        return device if self.goal != RearrangementGoal.REARRANGEMENT_GOAL_FREE_HOSTS else self.devices[device].host

    def will_do(self, function: str, device: str) -> bool:
        """Return whether a function may be on a device, given where it is, if there were room and no rule."""
        source, target = self.devices[self.homes[function]], self.devices[device]
        needed = set(self.constraints.attachments) or set(source.attachments)
        return (
            self.is_in_use(device)
            and source.manufacturer == target.manufacturer
            and source.model == target.model
            and source.io_type == target.io_type
            and source.state_version == target.state_version
            and all(mine.size_bytes <= other.size_bytes for mine, other in zip(source.bars, target.bars, strict=True))
            and needed <= set(target.attachments)
            and all(within(source, r.boundary) == within(target, r.boundary) for r in self.constraints.boundaries)
        )

    def keeps_rules(self, function: str, device: str, homes: Mapping[str, str]) -> bool:
        """Return whether the rules about a function hold if it is on a device and all others are at `homes`."""
        for rule in self.constraints.groups:
            if function not in rule.functions:
                continue
            here = within(self.devices[device], rule.boundary)
            others = [within(self.devices[homes[name]], rule.boundary) for name in rule.functions if name != function]
            if any((here == other) is not (rule.relation == SAME) for other in others):
                return False
        return True

    def carry_out(self, moves: list[PlannedMove]) -> None:
        """Write into the fleet what the moves make of it."""
        for move in moves:
            function = decode(Function, self.fleet.items[keys.function_key(move.function)])
            del self.fleet.items[keys.slot_key(function.device, function.vf_index)]
            target = self.devices[move.target_device]
            free = (n for n in range(1, target.total_vfs + 1) if keys.slot_key(target.name, n) not in self.fleet.items)
            function.device, function.vf_index = target.name, next(free)
            function.base = Location(int(target.host[1:]), target.routing_id + function.vf_index).base
            function.incarnation = f"{target.host}-boot"
            self.fleet.put(keys.function_key(function.name), function)
            self.fleet.put(keys.slot_key(target.name, function.vf_index), Slot(function=function.name))
            self.homes[function.name] = target.name


def fleet_of(random: Random, devices: list[Device], functions: int) -> dict[str, str]:
    """Return homes for functions, as many as there is room for at most."""
    room = {device.name: device.total_vfs for device in devices}
    homes = {}
    for number in range(1, functions + 1):
        free = [name for name, left in room.items() if left]
        if free:
            homes[f"vf{number}"] = random.choice(free[: random.randint(1, len(free))])
            room[homes[f"vf{number}"]] -= 1
    return homes


def rearranged_of(seed: int) -> Rearranged:
    """Return a fleet of up to 4 hosts of up to 3 devices of any shape, with up to 16 functions, and some goal."""
    random, fleet, devices = Random(seed), FleetValues(), list[Device]()
    for segment in range(1, random.randint(2, 4) + 1):
        host = f"h{segment}"
        own = [device_of(random, host, number) for number in range(random.randint(1, 3))]
        for device in own:
            if random.random() < 0.7:  # else most functions could go nowhere
                device.ClearField("attachments")
                device.attachments.append("lan")
        fleet.host(host, segment, *own, registered=rarely(random, value=True, other=False))
        if rarely(random, value=False, other=True):
            fleet.put(keys.cordon_key(host), Cordon(reason="firmware"))
        devices += own
    homes = fleet_of(random, devices, random.randint(4, 16))
    put_functions(random, fleet, devices, homes)
    names = sorted(homes)
    groups = [
        GroupRule(
            functions=random.sample(names, random.randint(2, min(4, len(names)))),
            boundary=random.choice(BOUNDARIES),
            relation=random.choice([SAME, DIFFERENT, DIFFERENT]),
        )
        for _ in range(random.choice([0, 0, 1, 2, 3]) if len(names) > 1 else 0)
    ]
    constraints = Constraints(
        boundaries=[
            BoundaryRule(boundary=boundary, relation=SAME)
            for boundary in random.sample(BOUNDARIES, random.choice([0, 0, 0, 1]))
        ],
        groups=groups,
        attachments=rarely(random, [], ["lan"]),
    )
    goal = random.choice(GOALS)
    tolerance = random.choice([1, 10, 30, 60]) if goal == REARRANGEMENT_GOAL_EVEN else 0
    return Rearranged(fleet, goal, tolerance, constraints, {device.name: device for device in devices}, homes)


def alike_of(seed: int, *, one_size: bool) -> Rearranged:
    """Return a fleet of up to 4 hosts with a device each, of up to 5 slots, on all of which each function may be."""
    random, fleet, devices = Random(seed), FleetValues(), list[Device]()
    size = random.randint(1, 5)
    for segment in range(1, random.randint(2, 4) + 1):
        own = plain_device(f"h{segment}/nic0", total_vfs=size if one_size else random.randint(1, 5))
        fleet.host(f"h{segment}", segment, own)
        devices.append(own)
    homes = fleet_of(random, devices, random.randint(0, 16))
    put_functions(random, fleet, devices, homes)
    goal = random.choice(GOALS)
    tolerance = random.choice([1, 10, 30, 60]) if goal == REARRANGEMENT_GOAL_EVEN else 0
    return Rearranged(fleet, goal, tolerance, Constraints(), {device.name: device for device in devices}, homes)


def put_functions(random: Random, fleet: FleetValues, devices: list[Device], homes: Mapping[str, str]) -> None:
    by_name = {device.name: device for device in devices}
    up = [each.host for each in devices if keys.registration_key(each.host) in fleet.items] or [devices[0].host]
    for number, (name, home) in enumerate(homes.items()):
        index = 1 + sum(key.startswith(f"{keys.SLOTS}{home}/") for key in fleet.items)
        fleet.function(name, by_name[home], int(home[1]), index, f"d{number}@{random.choice(up)}")


def counts_of(devices: Mapping[str, Device], functions: int) -> Iterator[dict[str, int]]:
    """Yield all ways in which so many functions can be on the devices."""
    for counts in product(*(range(device.total_vfs + 1) for device in devices.values())):
        if sum(counts) == functions:
            yield dict(zip(devices, counts, strict=True))


seeds = st.integers(0, (1 << 32) - 1)
