"""Who a host is: when it is the same machine still, and which session of its daemon this is."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from support.manual_clock import ManualClock

from hostd.identity import kernel_boot_id, open_identity
from hostd.ledger import Ledger
from vfleet.errors import Reason, VfleetError
from vfleet.v1.host_records_pb2 import Fence, HostIdentity


class Machine:
    """A data directory, and how its daemon is started in it."""

    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path)
        self.random = Random(1)
        self.clock = ManualClock()

    def start(self, host: str = "h1", boot_id: str = "boot-1", *, power_cycle: bool = False) -> HostIdentity:
        return open_identity(self.ledger, host, boot_id, self.random, self.clock, power_cycle=power_cycle)

    def knows_something(self) -> bool:
        return self.ledger.get("fence", "vf1", Fence) is not None

    def learn_something(self) -> None:
        self.ledger.put("fence", "vf1", Fence())


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    found = Machine(tmp_path / "one")
    yield found
    found.ledger.close()


def test_a_restart_of_the_daemon_is_another_session_of_the_same_machine(machine: Machine):
    first = machine.start()
    machine.learn_something()
    second = machine.start()
    assert second.incarnation == first.incarnation
    assert second.session == first.session + 1
    assert machine.knows_something()


@pytest.mark.parametrize("how", [{"power_cycle": True}, {"boot_id": "boot-2"}, {"boot_id": ""}])
def test_another_boot_is_another_machine_that_knows_nothing(machine: Machine, how):
    first = machine.start()
    machine.learn_something()
    second = machine.start(**how)
    assert second.incarnation != first.incarnation
    assert not machine.knows_something()
    machine.learn_something()
    third = machine.start(boot_id=second.kernel_boot_id)
    assert third.incarnation == second.incarnation
    assert machine.knows_something()


@pytest.mark.parametrize("how", [{"power_cycle": True}, {"boot_id": "boot-2"}])
def test_sessions_go_on_in_the_next_incarnation(machine: Machine, how):
    # Functions elsewhere know the drivers of this host by name, and refuse the sessions of before.
    sessions = [machine.start().session for _ in range(3)] + [machine.start(**how).session, machine.start().session]
    assert sessions == sorted(set(sessions))


def test_sessions_in_a_new_directory_are_later_than_in_any_before_it(machine: Machine, tmp_path: Path):
    for _ in range(3):
        before = machine.start().session
    new = Machine(tmp_path / "two")
    new.clock.now = machine.clock.now + 10
    assert new.start().session > before
    new.ledger.close()


def test_the_directory_of_another_host_is_refused_and_left_alone(machine: Machine):
    first = machine.start("h1")
    for power_cycle in (False, True):
        with pytest.raises(VfleetError, match=r"'h1'.*'h2'") as caught:
            machine.start("h2", power_cycle=power_cycle)
        assert caught.value.reason is Reason.INVALID_FIELD
    assert machine.start("h1").session == first.session + 1


def test_the_kernel_tells_its_boot():
    assert kernel_boot_id() == kernel_boot_id() != ""
