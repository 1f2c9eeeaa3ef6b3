"""The SR-IOV arithmetic of a device."""

import pytest

from hostd.sriov import Sriov
from vfleet.address import AddressError


def test_the_example_of_the_formula() -> None:
    sriov = Sriov(pf_routing_id=0x0100, total_vfs=4, first_vf_offset=0x80, vf_stride=2)
    assert [sriov.routing_id_of(index) for index in (1, 2, 3, 4)] == [0x180, 0x182, 0x184, 0x186]
    assert list(sriov.vf_routing_ids) == [0x180, 0x182, 0x184, 0x186]


@pytest.mark.parametrize("sriov", [Sriov(0x100, 32, 16, 1), Sriov(0x101, 7, 256, 5), Sriov(0, 1, 1, 1)])
def test_index_and_routing_id_are_inverses(sriov: Sriov) -> None:
    indices = {sriov.routing_id_of(index): index for index in range(1, sriov.total_vfs + 1)}
    assert {rid: sriov.vf_index_of(rid) for rid in range(0x10000) if sriov.vf_index_of(rid)} == indices


@pytest.mark.parametrize("index", [0, -1, 5])
def test_an_index_that_does_not_exist_is_refused(index: int) -> None:
    with pytest.raises(AddressError, match=rf"VF index is {index}; expected 1 to 4"):
        Sriov(0x100, 4, 16, 1).routing_id_of(index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1, 1, 1), "routing ID is -1"),
        ((0x10000, 1, 1, 1), "routing ID is 65536"),
        ((0, 0, 1, 1), "TotalVFs is 0"),
        ((0, 1, 0, 1), "First VF Offset is 0"),
        ((0, 1, 1, 0), "VF Stride is 0"),
        ((0xFFFF, 1, 1, 1), "VF 1 would have routing ID 0x10000"),
        ((0xFF00, 3, 0xFD, 2), "VF 3 would have routing ID 0x10001"),
    ],
)
def test_a_capability_that_cannot_exist_is_refused(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(AddressError, match=message):
        Sriov(*arguments)


def test_the_last_routing_id_may_be_used() -> None:
    assert Sriov(0xFF00, 2, 0xFD, 2).routing_id_of(2) == 0xFFFF
