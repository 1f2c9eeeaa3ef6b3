"""Routes and places in the demo's segments."""

from pathlib import Path

import pytest

from hostd.segment import MAIN_MEMORY, Route, Segment
from hostd.topology import load
from vfleet.address import Location
from vfleet.errors import Reason, VfleetError

DEMO = Path(__file__).parents[2] / "vfleet" / "topologies" / "demo.yaml"


@pytest.fixture(scope="module", params=["h1", "h2", "h3"])
def segment(request: pytest.FixtureRequest) -> Segment:
    return Segment(load(DEMO, request.param))


def devices_of(segment: Segment) -> list[str]:
    return [f"h{segment.number}/nic0", f"h{segment.number}/nic1"]


def test_every_place_routes_back_to_its_vf(segment: Segment) -> None:
    for name in devices_of(segment):
        for vf_index in range(1, segment.device(name).sriov.total_vfs + 1):
            place = segment.place(name, vf_index)
            assert place.segment == segment.number
            assert segment.route(place.routing_id) == Route(name, vf_index)


def test_routing_id_0_is_main_memory(segment: Segment) -> None:
    assert segment.main_memory == Location(segment.number, 0)
    assert segment.route(segment.main_memory.routing_id) is MAIN_MEMORY


def test_a_pf_and_an_empty_place_are_claimed_by_nobody(segment: Segment) -> None:
    pfs = [segment.device(name).sriov.pf_routing_id for name in devices_of(segment)]
    assert [segment.route(rid) for rid in (*pfs, 1, 0xFFFF)] == [None] * 4


def test_nothing_else_is_claimed(segment: Segment) -> None:
    claimed = sum(segment.route(rid) is not None for rid in range(0x10000))
    assert claimed == 1 + sum(segment.device(name).sriov.total_vfs for name in devices_of(segment))


@pytest.mark.parametrize("name", ["h9/nic0", "nic0", "h1/nic9", ""])
def test_an_unknown_device_is_not_found(segment: Segment, name: str) -> None:
    with pytest.raises(VfleetError, match=f"no device named {name!r}") as caught:
        segment.place(name, 1)
    assert caught.value.reason is Reason.NOT_FOUND


@pytest.mark.parametrize("vf_index", [0, -1, 65, 1 << 32])
def test_an_index_beyond_the_devices_vfs_is_refused(segment: Segment, vf_index: int) -> None:
    with pytest.raises(VfleetError, match=f"vf_index is {vf_index}; expected 1 to ") as caught:
        segment.place(devices_of(segment)[0], vf_index)
    assert caught.value.reason is Reason.INVALID_FIELD
