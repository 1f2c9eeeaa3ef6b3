"""Routes: the walk down the tree finds what a search of all VFs finds, and a tree in which it would not is refused."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostd.segment import MAIN_MEMORY, Route, Segment
from hostd.topology import load
from vfleet.address import routing_id, vf_routing_id
from vfleet.errors import VfleetError


@dataclass
class Host:
    """A host as drawn: bridges by name, with their bus ranges, and each claim to a routing ID with its bridge."""

    bridges: dict[str, range] = field(default_factory=lambda: {"": range(256)})
    claims: list[tuple[int, str, Route | None]] = field(default_factory=list)
    tree: dict[str, object] = field(default_factory=dict)
    devices: int = 0

    def innermost(self, bus: int) -> str:
        return min((len(buses), name) for name, buses in self.bridges.items() if bus in buses)[1]

    def can_exist(self) -> bool:
        rids = [rid for rid, _, _ in self.claims]
        return (
            len(set(rids)) == len(rids)
            and 0 not in rids
            and all(self.innermost(rid >> 8) == bridge for rid, bridge, _ in self.claims)
        )


def draw_device(draw: st.DrawFn, host: Host, bridge: str) -> dict[str, object]:
    host.devices += 1
    name = f"nic{host.devices}"
    buses = host.bridges[bridge]
    numbers = (draw(st.sampled_from([buses[0], buses[-1]])), draw(st.integers(0, 31)), draw(st.integers(0, 7)))
    total, offset, stride = draw(st.integers(1, 8)), draw(st.integers(1, 64)), draw(st.integers(1, 24))
    pf = routing_id(*numbers)
    host.claims.append((pf, bridge, None))
    for index in range(1, total + 1):
        if pf + offset + (index - 1) * stride <= 0xFFFF:
            host.claims.append((vf_routing_id(pf, offset, stride, index), bridge, Route(f"h/{name}", index)))
        else:
            host.claims.append((0, bridge, None))
    return {
        "name": name, "bus": numbers[0], "device": numbers[1], "function": numbers[2],
        "model": "checker", "manufacturer": {"vendor_id": 1, "device_id": 1}, "io_type": "network", "power_domain": "p",
        "total_vfs": total, "first_vf_offset": offset, "vf_stride": stride, "bars": {0: 4096},
    }  # fmt: skip


def draw_below(draw: st.DrawFn, host: Host, bridge: str, depth: int) -> dict[str, object]:
    bridges: list[dict[str, object]] = []
    buses = host.bridges[bridge]
    bus = buses[0] + 1
    while depth and bus < buses.stop and draw(st.booleans()):
        secondary = draw(st.integers(bus, min(buses[-1], bus + 3)))
        subordinate = draw(st.integers(secondary, min(buses[-1], secondary + 12)))
        name = f"br{len(host.bridges)}"
        host.bridges[name] = range(secondary, subordinate + 1)
        below = draw_below(draw, host, name, depth - 1)
        bridges.append({"name": name, "secondary": secondary, "subordinate": subordinate, **below})
        bus = subordinate + 1
    devices = [draw_device(draw, host, bridge) for _ in range(draw(st.integers(0, 2)))]
    return {"bridges": bridges, "devices": devices}


@st.composite
def hosts(draw: st.DrawFn) -> Host:
    host = Host()
    host.tree = {"name": "h", "segment": 9, **draw_below(draw, host, "", 3)}
    return host


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None)
@given(host=hosts(), others=st.lists(st.integers(1, 0xFFFF)))
def test_a_walk_finds_what_a_search_of_all_vfs_finds(tmp_path: Path, host: Host, others: list[int]) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(yaml.safe_dump({"hosts": [host.tree]}))
    if not host.can_exist():
        with pytest.raises(VfleetError):
            load(file)
        return
    segment = Segment(load(file))
    found = {rid: route for rid, _, route in host.claims}
    assert segment.route(0) is MAIN_MEMORY
    for rid in {*found, *others, *(rid + 1 for rid in found), *(rid - 1 for rid in found)} - {0}:
        assert segment.route(rid) == found.get(rid)
    for rid, route in found.items():
        if route is not None:
            assert segment.place(route.device, route.vf_index).routing_id == rid
