"""What may go wrong in a run, and how often: drawn from its seed, each run another mixture."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from vfleet import failpoint
from vfleet.v1.records_pb2 import Phase

if TYPE_CHECKING:
    from simulation.vopr.processes import Process
    from simulation.vopr.world import World


@dataclass(frozen=True)
class Profile:
    """The mixture of one run. Probabilities are per event; times are virtual seconds."""

    latency_s: float
    slowness: float
    request_loss: float
    answer_loss: float
    duplication: float
    store_loss: float
    watch_lag_s: float
    failpoint_death: float
    lease_ttl_s: int
    hold_timeout_ms: int
    faults: tuple[str, ...]
    fault_every_s: float

    def delay(self, random: Random) -> float:
        """Return how long one message takes."""
        if random.random() < self.slowness:
            return random.choice((0.05, 0.5, 3.0)) * random.random()
        return self.latency_s * (0.5 + random.random())

    def watch_delay(self, random: Random) -> float:
        """Return how long a watch lags behind."""
        lag_s = self.watch_lag_s * random.random() if random.random() < 0.2 else 0.0
        return lag_s + self.delay(random)


_DECIDING = [f"coordinator.{step}" for step in ("hold.after", "stop.after", "import.after", "commit.before")]
_COMMITTED = [
    f"coordinator.{step}" for step in ("commit.after", "lift.before", "lift.after", "scrub.before", "scrub.after")
]


def draw_profile(random: Random) -> Profile:
    """Draw a mixture."""
    kinds = [fault for fault in _FAULTS if random.random() < (0.15 if fault == "power cycle" else 0.5)]
    return Profile(
        latency_s=random.choice((0.0005, 0.002, 0.01)),
        slowness=random.choice((0.0, 0.01, 0.05)),
        request_loss=random.choice((0.0, 0.01, 0.05)),
        answer_loss=random.choice((0.0, 0.01, 0.05)),
        duplication=random.choice((0.0, 0.1, 0.4)),
        store_loss=random.choice((0.0, 0.02, 0.1)),
        watch_lag_s=random.choice((0.0, 0.0, 2.0, 8.0)),
        failpoint_death=random.choice((0.0, 0.002, 0.01)),
        lease_ttl_s=random.choice((2, 3, 5)),
        hold_timeout_ms=random.choice((300, 1000, 3000)),
        faults=tuple(kinds),
        fault_every_s=random.choice((2.0, 5.0, 12.0)),
    )


CALM = Profile(
    latency_s=0.001,
    slowness=0.0,
    request_loss=0.0,
    answer_loss=0.0,
    duplication=0.0,
    store_loss=0.0,
    watch_lag_s=0.0,
    failpoint_death=0.0,
    lease_ttl_s=3,
    hold_timeout_ms=1000,
    faults=(),
    fault_every_s=1.0,
)


async def do_faults(world: "World") -> None:
    """Let things go wrong, until cancelled: at times of their own, and at failpoints on the way of a migration."""
    random, profile = world.random, world.chaos
    for names, counts, actions in (
        (_DECIDING, (0, 1, 2), tuple(ACTIONS)),
        (_COMMITTED, (0, 1, 1), ("die", "die all", "stop")),
        (["hostd.prove.after"], (0, 0, 0, 1), ("its source reboots",)),
        ([name for name in sorted(failpoint.NAMES) if name.startswith("coordinator.")], (0, 0, 2), ("die", "stop")),
        ([name for name in sorted(failpoint.NAMES) if name.startswith("hostd.")], (0, 1, 2), ("die", "stop", "reboot")),
    ):
        for name in random.sample(names, random.choice(counts)):
            world.armed[name] = random.choice(actions)
    while True:
        await asyncio.sleep(random.expovariate(1 / profile.fault_every_s))
        if profile.faults:
            kind = random.choice(profile.faults)
            world.trace("fault", kind)
            _FAULTS[kind](world)


def _anybody(world: "World") -> "Process":
    return world.process(world.random.choice(sorted({**world.hosts, **world.coordinators})))


def _kill_coordinator(world: "World") -> None:
    world.kill(world.coordinators[world.random.choice(sorted(world.coordinators))], world.random.uniform(0.2, 8.0))


def _kill_all_coordinators(world: "World") -> None:
    for each in world.coordinators.values():
        world.kill(each, world.random.uniform(3.0, 10.0))


def _kill_host(world: "World") -> None:
    world.kill(world.hosts[world.random.choice(sorted(world.hosts))], world.random.uniform(0.2, 8.0))


def _power_cycle(world: "World") -> None:
    world.power_cycle(world.hosts[world.random.choice(sorted(world.hosts))])


def _stop(world: "World") -> None:
    world.stop(_anybody(world), world.random.choice((0.3, 3.0, 12.0)) * world.random.random())


def _partition(world: "World") -> None:
    random, network = world.random, world.network
    one, other = random.sample([*sorted(world.hosts), *sorted(world.coordinators), world.client.name], 2)
    network.cut(one, other)
    if random.random() < 0.5:
        network.cut(other, one)
    network.later(random.choice((1.0, 10.0)) * random.random(), network.heal)


def _cut_off_and_kill(world: "World") -> None:
    """Kill a host with messages on their way that arrive, if at all, when it is back."""
    random, network = world.random, world.network
    host = random.choice(sorted(world.hosts))
    for other in world.hosts:
        network.cut(host, other)
    network.later(random.uniform(0.1, 1.0), lambda: world.kill(world.hosts[host], random.uniform(0.2, 1.0)))
    network.later(random.uniform(1.0, 3.0), network.heal)


def _cut_etcd(world: "World") -> None:
    name = _anybody(world).name
    world.etcd.cut[name] = None
    world.network.later(world.random.uniform(0.5, 10.0), world.etcd.cut.pop, name, None)


def _change_leader(world: "World") -> None:
    world.etcd.change_leader(world.random.uniform(0.1, 4.0))


def _end_a_lease(world: "World") -> None:
    leases = sorted(world.etcd.state.leases)
    if leases:
        world.etcd.revoke(world.random.choice(leases))


def _compact(world: "World") -> None:
    world.etcd.compact()


_FAULTS: Mapping[str, Callable[["World"], None]] = {
    "kill coordinator": _kill_coordinator,
    "kill all coordinators": _kill_all_coordinators,
    "kill host": _kill_host,
    "power cycle": _power_cycle,
    "stop": _stop,
    "partition": _partition,
    "cut off and kill": _cut_off_and_kill,
    "cut etcd": _cut_etcd,
    "leader change": _change_leader,
    "lease ends early": _end_a_lease,
    "compaction": _compact,
}


def _die(world: "World", process: "Process") -> None:
    world.kill(process, world.random.uniform(0.2, 6.0))


def _die_all(world: "World", process: "Process") -> None:
    for each in {**world.coordinators, process.name: process}.values():
        world.kill(each, world.random.uniform(4.0, 10.0))


def _freeze(world: "World", process: "Process") -> None:
    world.stop(process, world.random.uniform(0.5, 12.0))


def _reboot(world: "World", process: "Process") -> None:
    if process.name in world.hosts:
        world.reboot(world.hosts[process.name])


def _its_source_reboots(world: "World", process: "Process") -> None:
    """Start the machines anew that have the rest of what runs here now: what has not arrived is lost."""
    for record, _ in world.history.migrations.values():
        for move in record.moves if record.phase == Phase.PHASE_COMMITTED else ():
            if move.target.host == process.name != move.source.host:
                world.reboot(world.hosts[move.source.host])


def _freeze_while_cancelled(world: "World", process: "Process") -> None:
    world.stop(process, world.random.uniform(0.5, 2.0))
    world.cancel_all()


def _freeze_while_a_host_dies(world: "World", process: "Process") -> None:
    world.stop(process, world.random.uniform(0.5, 2.0))
    world.kill(world.hosts[world.random.choice(sorted(world.hosts))], world.random.uniform(0.05, 0.3))


def _freeze_while_a_host_reboots(world: "World", process: "Process") -> None:
    world.stop(process, world.random.uniform(0.5, 2.0))
    world.reboot(world.hosts[world.random.choice(sorted(world.hosts))])


ACTIONS: Mapping[str, Callable[["World", "Process"], None]] = {
    "die": _die,
    "die all": _die_all,
    "stop": _freeze,
    "reboot": _reboot,
    "its source reboots": _its_source_reboots,
    "stop while cancelled": _freeze_while_cancelled,
    "stop while a host dies": _freeze_while_a_host_dies,
    "stop while a host reboots": _freeze_while_a_host_reboots,
}
