"""What `vfleet up` asks for on behalf of its topology, and what it doesn't, by what is there already."""

from typing import Self

import pytest
from support.manual_clock import ManualClock

from vfleet.cli.declaration import PATIENCE_S, Declaration
from vfleet.declared import DeclaredDriver, DeclaredFunction
from vfleet.errors import Reason, VfleetError
from vfleet.v1.driver_service_pb2 import DriverState
from vfleet.v1.records_pb2 import Function
from vfleet.v1.types_pb2 import (
    GUEST_STATE_CONNECTED,
    GUEST_STATE_LOST,
    GUEST_STATE_UNSPECIFIED,
    GUEST_STATE_WAITING,
    Guest,
    GuestState,
)

SOCKET = "/run/disk1.sock"
DISK = DeclaredFunction(name="disk1", device="h1/nvme0", drivers=(DeclaredDriver(guest=SOCKET),))
NIC = DeclaredFunction(
    name="vf1",
    device="h2/nic0",
    vf_index=3,
    drivers=(DeclaredDriver(name="d1", host="h1"), DeclaredDriver(name="d2", main_memory=4096)),
)


class Rig:
    """A fleet, and all of its hosts, that remember what they are asked for. `states` are what a guest is in next."""

    def __init__(self) -> None:
        self.there: dict[str, str] = {}
        self.is_out_of_reach = False
        self.asked: list[tuple[object, ...]] = []
        self.refused: dict[str, str] = {}
        self.states: list[GuestState.ValueType] = [GUEST_STATE_WAITING]
        self.said: list[str] = []
        self.complaints: list[str] = []
        self.clock = ManualClock()

    async def declare(self, *functions: DeclaredFunction) -> None:
        declaration = Declaration(self, self.host, self.clock, self.said.append, self.complaints.append)
        await self.clock.until_done(declaration.ask_for(functions), 1)

    def host(self, name: str) -> "Rig":
        self.asked.append(("host", name))
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def get_driver(self, driver: str) -> DriverState:
        return DriverState(driver=driver, guest_state=self.states.pop(0) if len(self.states) > 1 else self.states[0])

    async def list_functions(self) -> list[Function]:
        if self.is_out_of_reach:
            raise VfleetError(Reason.UNREACHABLE, "no answer from etcd")
        return [Function(name=name, device=device) for name, device in self.there.items()]

    async def create_function(self, name: str, device: str, *, vf_index: int) -> Function:
        self._ask("create", name, device, vf_index)
        return Function(name=name, device=device, vf_index=vf_index or 1)

    async def attach_driver(
        self, function: str, driver: str, *, host: str, main_memory_bytes: int, guest: Guest | None
    ) -> None:
        self._ask("attach", driver, function, host, main_memory_bytes, guest.socket if guest else "")

    async def detach_driver(self, function: str, driver: str) -> None:
        self._ask("detach", driver, function)

    def _ask(self, what: str, name: str, *more: object) -> None:
        self.asked.append((what, name, *more))
        if name in self.refused:
            raise VfleetError(Reason.LIMIT_EXCEEDED, self.refused[name])


ATTACH = ("attach", "guest-disk1", "disk1", "h1", 0, SOCKET)


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def test_what_is_not_there_is_made(rig: Rig):
    await rig.declare(DISK, NIC)
    assert rig.asked == [
        ("create", "disk1", "h1/nvme0", 0),
        ATTACH,
        ("host", "h1"),
        ("create", "vf1", "h2/nic0", 3),
        ("attach", "d1", "vf1", "h1", 0, ""),
        ("attach", "d2", "vf1", "h2", 4096, ""),
    ]
    assert rig.said == [
        "function disk1 is made: h1/nvme0, VF 1",
        f"  driver guest-disk1 on h1 offers it at {SOCKET}",
        "function vf1 is made: h2/nic0, VF 3",
        "  driver d1 on h1 has it",
        "  driver d2 on h2 has it",
    ]
    assert rig.complaints == []


async def test_what_is_there_stays_where_it_has_gone(rig: Rig):
    rig.there["disk1"] = "h3/nvme0"
    await rig.declare(DISK)
    assert rig.asked == [ATTACH, ("host", "h1")]
    assert rig.said[0] == "function disk1 is there: h3/nvme0"


async def test_nothing_declared_is_nothing_asked(rig: Rig):
    await rig.declare()
    assert (rig.asked, rig.said, rig.complaints) == ([], [], [])


async def test_a_fleet_that_says_nothing_of_its_functions_is_asked_for_none(rig: Rig):
    rig.is_out_of_reach = True
    await rig.declare(DISK)
    assert rig.complaints == ["nothing that the topology declares was asked for: no answer from etcd"]
    assert rig.asked == []


async def test_a_guest_is_waited_for_until_its_host_says_what_has_become_of_it(rig: Rig):
    rig.states = [GUEST_STATE_UNSPECIFIED, GUEST_STATE_UNSPECIFIED, GUEST_STATE_CONNECTED]
    before = rig.clock.now
    await rig.declare(DISK)
    assert rig.clock.now > before
    assert [each[0] for each in rig.asked] == ["create", "attach", "host"]


async def test_a_guest_that_was_lost_with_the_cluster_is_attached_anew(rig: Rig):
    rig.there["disk1"] = "h1/nvme0"
    rig.states = [GUEST_STATE_LOST, GUEST_STATE_LOST, GUEST_STATE_UNSPECIFIED, GUEST_STATE_WAITING]
    await rig.declare(DISK)
    asked = [each for each in rig.asked if each[0] != "host"]
    assert asked == [ATTACH, ("detach", "guest-disk1", "disk1"), ATTACH]
    assert rig.states == [GUEST_STATE_WAITING]


async def test_a_guest_without_a_socket_is_not_waited_for_for_ever(rig: Rig):
    rig.states = [GUEST_STATE_UNSPECIFIED]
    began = rig.clock.now
    await rig.declare(DISK, NIC)
    assert rig.clock.now - began == pytest.approx(PATIENCE_S, abs=2)
    assert rig.complaints == [
        "function disk1 of the topology, driver guest-disk1: the guest's socket is not there after 30 s",
    ]
    assert len(rig.said) == 4


@pytest.mark.parametrize(
    ("refused", "made", "complaint"),
    [
        ("vf1", [], "function vf1 of the topology: no room"),
        ("d1", ["d2"], "function vf1 of the topology, driver d1: no room"),
    ],
)
async def test_what_fails_keeps_nothing_else_back(rig: Rig, refused: str, made: list[str], complaint: str):
    rig.refused[refused] = "no room"
    await rig.declare(NIC, DISK)
    assert rig.complaints == [complaint]
    attached = [each[1] for each in rig.asked if each[0] == "attach" and each[1] != refused]
    assert attached == [*made, "guest-disk1"]
