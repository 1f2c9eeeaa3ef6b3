"""Parts of the fleet: what each kind has in it, and what a cordon on it keeps away."""

import pytest
from support.fake_host import device
from support.fleet_values import LIMITS, FleetValues, move

from coordinator import transaction
from coordinator.cordon import devices_in
from coordinator.planner import parts_of_targets, plan
from vfleet.errors import Reason, VfleetError
from vfleet.etcd import keys
from vfleet.parts import part_key, part_of, spoken
from vfleet.v1.records_pb2 import Cordon, Device


def placed(name: str, adapter: str, bridge: str, parent: str, power: str) -> Device:
    made = device(name)
    made.physical_adapter, made.bridge, made.parent_bridge, made.power_domain = adapter, bridge, parent, power
    return made


@pytest.fixture
def fleet() -> FleetValues:
    fleet = FleetValues()
    fleet.host(
        "h1",
        1,
        placed("h1/nic0", "card0", "switch0", "port0", "psu-a"),
        placed("h1/nic1", "card0", "switch1", "port0", "psu-b"),
        placed("h1/nic2", "card1", "port0", "", "psu-b"),
        placed("h1/nic3", "card2", "", "", "psu-a"),
    )
    fleet.host("h2", 2, placed("h2/nic0", "card0", "switch0", "port0", "psu-a"))
    fleet.function("vf1", device("h2/nic0"), 2, 1)
    return fleet


PARTS = [
    ("host", "h1", {"nic0", "nic1", "nic2", "nic3"}),
    ("device", "h1/nic1", {"nic1"}),
    ("adapter", "h1/card0", {"nic0", "nic1"}),
    ("bridge", "h1/switch0", {"nic0"}),
    ("bridge", "h1/port0", {"nic0", "nic1", "nic2"}),
    ("power-domain", "h1/psu-b", {"nic1", "nic2"}),
]


@pytest.mark.parametrize(("kind", "name", "devices"), PARTS)
def test_a_part_has_the_devices_of_its_host_that_are_in_it(
    fleet: FleetValues, kind: str, name: str, devices: set[str]
) -> None:
    assert set(devices_in(fleet.snapshot(), part_of(kind, name))) == {f"h1/{device}" for device in devices}


@pytest.mark.parametrize(("kind", "name", "devices"), PARTS)
def test_a_cordon_keeps_away_from_all_that_is_in_it_and_from_nothing_else(
    fleet: FleetValues, kind: str, name: str, devices: set[str]
) -> None:
    """Both from a plan that is made after it, and from one that was made before and begins after it."""
    before = fleet.snapshot()
    key = keys.cordon_key(part_key(part_of(kind, name)))
    for target in ("nic0", "nic1", "nic2", "nic3"):
        migration = plan(before, [move("vf1", f"h1/{target}")], name="m", coordinator="c", limits=LIMITS)
        begin = transaction.begin(migration, 5, before.fleet_generation_is_this, parts_of_targets(before, migration))
        cordoned = FleetValues()
        cordoned.items, cordoned.revision = dict(fleet.items), fleet.revision
        cordoned.put(key, Cordon(part=part_of(kind, name), reason="failing"))
        assert cordoned.commit(begin) is (target not in devices)
        refused = None
        try:
            plan(cordoned.snapshot(), [move("vf1", f"h1/{target}")], name="m2", coordinator="c", limits=LIMITS)
        except VfleetError as error:
            refused = error
        if target in devices:
            assert refused is not None
            assert (refused.reason, refused.message) == (Reason.HOST_CORDONED, f"{kind} {name} is cordoned: failing")
        else:
            assert refused is None or refused.reason is Reason.IN_MIGRATION


@pytest.mark.parametrize(
    ("kind", "name", "missing"),
    [("host", "h9", "host"), ("device", "h9/nic0", "host"), ("bridge", "h1/switch7", "bridge")],
)
def test_a_part_that_is_not_there_is_not_found(fleet: FleetValues, kind: str, name: str, missing: str) -> None:
    with pytest.raises(VfleetError, match=f"no {missing} named") as caught:
        devices_in(fleet.snapshot(), part_of(kind, name))
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize(("kind", "name", "_"), PARTS)
def test_a_key_can_be_spoken(kind: str, name: str, _: set[str]) -> None:
    assert spoken(part_key(part_of(kind, name))) == f"{kind} {name}"
