"""Names: one form, checked where they come in."""

import pytest

from vfleet.errors import Reason, VfleetError
from vfleet.names import check_device_name, check_name, host_of

GOOD = ["a", "0", "h1", "vf-1", "a" * 63, "a--b"]
BAD = ["", "-", "-a", "a-", "A", "a_b", "a.b", "a/b", "a b", "a\n", "é", "a" * 64, "a" * 100_000, "\udcff", "\0", "٣"]


@pytest.mark.parametrize("name", GOOD)
def test_a_dns_label_is_a_name(name: str) -> None:
    assert check_name("function", name) == name


@pytest.mark.parametrize("name", BAD)
def test_anything_else_is_refused_naming_the_field(name: str) -> None:
    with pytest.raises(VfleetError) as refused:
        check_name("function", name)
    error = refused.value
    assert error.reason is Reason.INVALID_FIELD
    assert error.metadata == {"field": "function"}
    assert error.message.startswith("function is ")
    assert len(error.message) < 250


@pytest.mark.parametrize("name", ["h1/nic0", "a/b"])
def test_a_device_name_is_host_and_device(name: str) -> None:
    assert check_device_name("device", name) == name
    assert host_of(name) == name[: name.index("/")]


@pytest.mark.parametrize("name", ["", "h1", "h1/", "/nic0", "h1/nic0/", "h1/nic0/1", "H1/nic0", "h1/nic 0", "h1//nic0"])
def test_other_device_names_are_refused(name: str) -> None:
    with pytest.raises(VfleetError, match="expected HOST/DEVICE"):
        check_device_name("device", name)
