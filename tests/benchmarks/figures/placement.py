"""Planning: one function in fleets of 100, 1,000 and 10,000 hosts, and 500 functions that leave one of 1,000 hosts.

Hosts have 4 devices of 64 VFs, a quarter of which are in use. The floor of one function is a bare walk over the same
devices that compares one value of each and keeps the one with the fewest slots in use: any planner has to look at each.
That walk is linear by its making, though each step takes longer in a fleet that is larger than the processor's caches;
planning is linear if it grows by no more. The others are seconds, without a floor. The inventory is warm: the snapshot
is there, and the plan is placement's, not the migration's record.
"""

from random import Random

from benchmarks.measure import Figure, Samples, Size, alternate, at_most, seconds_of
from support.fake_host import device
from support.fleet_values import FleetValues, move

from coordinator.planner import ask
from coordinator.snapshot import Snapshot
from vfleet.etcd import keys
from vfleet.v1.placement_pb2 import Boundary, BoundaryRule, Constraints, Relation
from vfleet.v1.records_pb2 import Slot

VFS = 64
DEVICES = 4
LEAVE_THE_HOST = Constraints(
    boundaries=[BoundaryRule(boundary=Boundary.BOUNDARY_HOST, relation=Relation.RELATION_DIFFERENT)]
)


def fleet_of(hosts: int, functions: int) -> Snapshot:
    """Return a fleet with so many functions on h0, spread over its devices; other slots are taken at random."""
    random, fleet = Random(1), FleetValues()
    for number in range(hosts):
        own = [
            device(f"h{number}/nic{each}", bus=each + 1, total_vfs=256 if number == 0 else VFS)
            for each in range(DEVICES)
        ]
        fleet.host(f"h{number}", number + 1, *own)
        if number == 0:
            for index in range(functions):
                fleet.function(
                    f"vf{index}", own[index % DEVICES], 1, index // DEVICES + 1, f"d{index}@h{index % hosts}"
                )
        else:
            for each in own:
                for index in random.sample(range(1, VFS + 1), random.randrange(VFS // 2)):
                    fleet.put(keys.slot_key(each.name, index), Slot(function="other"))
    return fleet.snapshot()


def plan_one(snapshot: Snapshot) -> None:
    assert ask(snapshot, [move("vf0", "")], LEAVE_THE_HOST).answer()


def bare_walk(snapshot: Snapshot) -> None:
    best, least = "", 1.0
    for name, site in snapshot.sites.items():
        used = len(snapshot.slots_of(name)) / site.total_vfs
        if site.model == "checker" and used < least:
            best, least = name, used
    assert best


async def run(size: Size) -> list[Figure]:
    rounds = size.of(20, 2)
    figures, ratios = [], {}
    for hosts in size.of((100, 1_000, 10_000), (5, 50)):
        snapshot = fleet_of(hosts, 1)
        measured = alternate(
            rounds, lambda s=snapshot: plan_one(s), lambda s=snapshot: bare_walk(s), times=1, scale=1e3
        )
        ratios[hosts] = [ours / floor for ours, floor in zip(measured.ours, measured.floor, strict=True)]
        figures.append(measured.slowness(f"planning one function / bare walk, {hosts:,} hosts", "ms", None))
        if hosts < size.of(10_000, 50):
            continue
        seconds = Samples([value / 1e3 for value in measured.ours], "s")
        figures.append(
            Figure(f"planning one function, {hosts:,} hosts", seconds.quantile(0.5), at_most(1), seconds, None)
        )
    for fewer, more in zip(list(ratios), list(ratios)[1:], strict=False):
        growth = [after / before for after, before in zip(ratios[more], ratios[fewer], strict=True)]
        name = f"growth from {fewer:,} to {more:,} hosts / the bare walk's"
        figures.append(Figure(name, Samples(growth, "").quantile(0.5), at_most(1), Samples(growth, "times"), None))
    hosts, functions = size.of((1_000, 500), (50, 20))
    snapshot, moves = fleet_of(hosts, functions), [move(f"vf{number}", "") for number in range(functions)]

    def leave() -> None:
        assert ask(snapshot, moves, LEAVE_THE_HOST).answer()

    many = Samples([seconds_of(leave) for _ in range(size.of(10, 1))], "s")
    name = f"planning {functions} functions that leave a host, {hosts:,} hosts"
    return [*figures, Figure(name, many.quantile(0.5), at_most(2), many, None)]
