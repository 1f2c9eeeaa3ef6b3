"""How often the doctor looks before it believes what it sees, when hosts begin to answer meanwhile."""

from collections import Counter
from random import Random
from types import SimpleNamespace

import pytest
from support.fleet_values import FleetValues, device, three_hosts
from support.manual_clock import ManualClock

from coordinator.context import Context
from coordinator.doctor import MAX_LOOKS, Doctor
from coordinator.findings import HostState
from vfleet.errors import Reason, VfleetError
from vfleet.etcd.keys import registration_key
from vfleet.etcd.store import Listing
from vfleet.v1.fleet_service_pb2 import Difference, DifferenceKind

MISSING, UNREACHABLE = (
    DifferenceKind.DIFFERENCE_KIND_MISSING_INSTANCE,
    DifferenceKind.DIFFERENCE_KIND_HOST_UNREACHABLE,
)


class Hosts:
    """Hosts that have nothing. `silent_looks` says at how many looks each says nothing first."""

    def __init__(self, **silent_looks: int) -> None:
        self.silent_looks = silent_looks
        self.looks: Counter[str] = Counter()

    async def state(self, host: str) -> HostState:
        self.looks[host] += 1
        if self.looks[host] <= self.silent_looks.get(host, 0):
            raise VfleetError(Reason.HOST_UNAVAILABLE, "not registered")
        return HostState((), (), ())


async def check(hosts: Hosts, fleet: FleetValues) -> list[Difference]:
    async def listed(prefix: str) -> Listing:
        return Listing(fleet.revision, tuple(fleet.items.values()))

    clock = ManualClock()
    context = Context("c1", SimpleNamespace(list=listed), None, hosts, clock, Random(7))
    return await clock.until_done(Doctor(context).check(), 0.1)


def kinds(differences: list[Difference]) -> set[int]:
    return {each.kind for each in differences}


async def test_what_stands_at_three_looks_counts() -> None:
    hosts = Hosts()
    assert MISSING in kinds(await check(hosts, three_hosts()))
    assert hosts.looks["h1"] == 3


@pytest.mark.parametrize("silent", [{"h1": 1}, {"h1": 2, "h2": 1}, {"h1": 4, "h2": 2, "h3": 1}])
async def test_hosts_that_come_while_it_looks_are_looked_at_as_often(silent: dict[str, int]) -> None:
    """As right after the fleet generation was raised, when each registers anew."""
    hosts = Hosts(**silent)
    found = kinds(await check(hosts, three_hosts()))
    assert MISSING in found
    assert UNREACHABLE not in found
    assert hosts.looks["h1"] == max(silent.values()) + 3


async def test_a_host_that_goes_and_comes_does_not_keep_it_looking_for_ever() -> None:
    class Flapping(Hosts):
        async def state(self, host: str) -> HostState:
            if host == "h3" and self.looks["h1"] % 2:
                raise VfleetError(Reason.HOST_UNAVAILABLE, "not registered")
            return await super().state(host)

    hosts = Flapping()
    await check(hosts, three_hosts())
    assert hosts.looks["h1"] <= MAX_LOOKS


async def test_what_is_new_at_the_last_look_is_looked_at_as_often() -> None:
    """As what a host has of a function whose deletion ends while the doctor looks."""

    class Losing(Hosts):
        async def state(self, host: str) -> HostState:
            if host == "h1" and self.looks["h1"] == 1:
                fleet.function("late", device("h2/nic0"), 2, 3)
            return await super().state(host)

    fleet, hosts = three_hosts(), Losing()
    found = await check(hosts, fleet)
    assert "late" in {each.function for each in found}
    assert hosts.looks["h1"] > 3


async def test_a_host_that_registers_after_it_was_to_be_asked_was_not_looked_at() -> None:
    """As one that has something and that etcd has forgotten: whoever repairs is to look again."""

    class Registering(Hosts):
        async def state(self, host: str) -> HostState:
            try:
                return await super().state(host)
            finally:
                if self.looks["h1"] == 3:
                    fleet.put(registration_key("h1"), "h1-boot")

    fleet = three_hosts()
    del fleet.items[registration_key("h1")]
    (unreachable,) = [each for each in await check(Registering(h1=3), fleet) if each.kind == UNREACHABLE]
    assert unreachable.host == "h1"


async def test_a_host_that_says_nothing_for_another_reason_each_time_is_named() -> None:
    class Stammering(Hosts):
        async def state(self, host: str) -> HostState:
            if host == "h1":
                raise VfleetError(Reason.UNREACHABLE, f"no answer {self.looks['h2']}")
            return await super().state(host)

    assert UNREACHABLE in kinds(await check(Stammering(), three_hosts()))


async def test_a_host_that_goes_before_the_last_look_is_named() -> None:
    class Going(Hosts):
        async def state(self, host: str) -> HostState:
            if host == "h3" and self.looks["h1"] >= 3:
                raise VfleetError(Reason.HOST_UNAVAILABLE, "not registered")
            return await super().state(host)

    assert UNREACHABLE in kinds(await check(Going(), three_hosts()))
