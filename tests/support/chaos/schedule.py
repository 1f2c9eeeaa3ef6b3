"""What goes wrong, when, and for how long: a function of a seed. Nothing here happens yet.

Each target has a lane of its own, in which times of trouble and of peace alternate; the lanes know nothing of each
other, so that troubles meet in all ways. The members of etcd share one lane, so that a quorum remains.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

from support.chaos.proxy import Disturbance, Way

# Peace in a lane lasts this long on average.
PROCESS_PEACE_S = 14.0
NETWORK_PEACE_S = 20.0
ETCD_PEACE_S = 10.0
LEADER = "leader"


@dataclass(frozen=True, slots=True)
class Fault:
    """One trouble: `what` is "kill" (restarted after `length_s`), "pause", or a disturbance of what leads to `target`.

    `target` is a daemon, a member of etcd, LEADER (whoever leads etcd by then), or the name of a proxy.
    """

    at_s: float
    length_s: float
    target: str
    what: str
    disturbance: Disturbance | None = None

    @property
    def end_s(self) -> float:
        """When it is over; a restart takes longer than that."""
        return self.at_s + self.length_s


@dataclass(frozen=True, slots=True)
class Targets:
    """What can go wrong: the names of all daemons, of the members of etcd that may be hit, and of the proxies."""

    daemons: Sequence[str]
    members: Sequence[str]
    proxies: Sequence[str]


def schedule(seed: int, duration_s: float, targets: Targets, lease_ttl_s: float) -> list[list[Fault]]:
    """Return the lanes, each in order of time and over by `duration_s`. The same arguments give the same lanes."""

    def lane(name: str, peace_s: float, trouble: Callable[[Random], Fault]) -> list[Fault]:
        return list(_lane(Random(f"{seed} {name}"), duration_s, peace_s, trouble))

    lanes = [lane(name, PROCESS_PEACE_S, _process_trouble((name,), lease_ttl_s)) for name in targets.daemons]
    lanes += [lane(name, NETWORK_PEACE_S, _network_trouble(name, lease_ttl_s)) for name in targets.proxies]
    if targets.members:
        lanes.append(lane("etcd", ETCD_PEACE_S, _process_trouble((*targets.members, LEADER, LEADER), lease_ttl_s)))
    return lanes


def _lane(random: Random, duration_s: float, peace_s: float, trouble: Callable[[Random], Fault]) -> Iterator[Fault]:
    now_s = 0.0
    while True:
        now_s += random.expovariate(1 / peace_s)
        fault = trouble(random)
        if now_s + fault.length_s > duration_s:
            return
        yield Fault(now_s, fault.length_s, fault.target, fault.what, fault.disturbance)
        now_s += fault.length_s


def _process_trouble(names: Sequence[str], lease_ttl_s: float) -> Callable[[Random], Fault]:
    def trouble(random: Random) -> Fault:
        target = random.choice(names)
        if random.random() < 0.5:
            return Fault(0.0, random.uniform(0.0, 1.5) * lease_ttl_s, target, "kill")
        shorter, longer = random.uniform(0.05, 0.8), random.uniform(1.2, 2.5)
        return Fault(0.0, random.choice((shorter, longer)) * lease_ttl_s, target, "pause")

    return trouble


def _network_trouble(name: str, lease_ttl_s: float) -> Callable[[Random], Fault]:
    def trouble(random: Random) -> Fault:
        kind = random.choice(("cut", "freeze", "delay"))
        way = Way.BOTH if kind == "cut" else random.choice(list(Way))
        delay_s = random.uniform(0.005, 0.3) if kind == "delay" else 0.0
        disturbance = Disturbance(kind, way, half=random.random() < 0.4, delay_s=delay_s)
        return Fault(0.0, random.uniform(0.1, 2.5) * lease_ttl_s, name, kind, disturbance)

    return trouble
