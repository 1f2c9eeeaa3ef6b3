"""Where a second VF is chosen, through the CLI on a real cluster: a row for each thing that claims 5 to 7 choose by."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import yaml
from support.local_cluster import Cluster, assert_nothing_left, running

from vfleet.cli.main import run
from vfleet.etcd.keys import CORDONS


def nic(name: str, card: str, psu: str, *, function: int = 0, **more: object) -> dict[str, object]:
    return {
        "name": name,
        "function": function,
        "model": "checker",
        "manufacturer": {"vendor_id": 0x1AF4, "device_id": 0x10C0},
        "io_type": "network",
        "physical_adapter": card,
        "power_domain": psu,
        "attachments": ["lan"],
        "total_vfs": 32,
        "first_vf_offset": 8 if not function else 40,
        "vf_stride": 1,
        "bars": {0: "4KiB", 2: "64KiB"},
        **more,
    }


def bridge(name: str, bus: int, last: int, *devices: dict[str, object], **more: object) -> dict[str, object]:
    return {"name": name, "secondary": bus, "subordinate": last, "devices": list(devices), **more}


# vf… are made on h1/nic0: card0, switch0 below port0, psu-a, lan.
TOPOLOGY = {
    "hosts": [
        {
            "name": "h1",
            "segment": 1,
            "bridges": [
                bridge(
                    "port0",
                    1,
                    9,
                    bridges=[
                        bridge(
                            "switch0", 2, 3, nic("nic0", "card0", "psu-a"), nic("nic1", "card0", "psu-a", function=1)
                        ),
                        bridge("switch1", 4, 5, nic("nic2", "card0", "psu-b")),
                        bridge("switch2", 6, 7, nic("nic3", "card1", "psu-a")),
                    ],
                ),
                bridge("port1", 10, 19, bridges=[bridge("switch3", 11, 12, nic("nic4", "card1", "psu-b"))]),
                bridge(
                    "port2",
                    20,
                    21,
                    nic("wan", "card3", "psu-a", attachments=["wan"]),
                ),
                bridge("port3", 22, 23, nic("san", "card4", "psu-a", io_type="storage")),
                bridge(
                    "port4", 24, 25, nic("other", "card5", "psu-a", manufacturer={"vendor_id": 0x8086, "device_id": 1})
                ),
            ],
        },
        {
            # The same names mean others on another host.
            "name": "h2",
            "segment": 2,
            "bridges": [bridge("port0", 1, 9, bridges=[bridge("switch0", 2, 3, nic("nic0", "card0", "psu-a"))])],
        },
    ]
}
ALL = {"h1/nic1", "h1/nic2", "h1/nic3", "h1/nic4", "h2/nic0"}

# Claim, options, the devices that will do; and of one that won't, the filter with both values.
ROWS = [
    ("5, manufacturer", [], ALL, ("h1/other", "MANUFACTURER", "8086:0001", "1af4:10c0")),
    ("5, I/O type", [], ALL, ("h1/san", "IO_TYPE", "storage", "network")),
    (
        "6, same physical adapter",
        ["--adapter", "same"],
        {"h1/nic1", "h1/nic2"},
        ("h2/nic0", "PHYSICAL_ADAPTER", "h2/card0", "h1/card0"),
    ),
    (
        "6, different physical adapter",
        ["--adapter", "different"],
        {"h1/nic3", "h1/nic4", "h2/nic0"},
        ("h1/nic1", "PHYSICAL_ADAPTER", "h1/card0", "other than h1/card0"),
    ),
    ("6, same bridge", ["--bridge", "same"], {"h1/nic1"}, ("h1/nic2", "BRIDGE", "h1/switch1", "h1/switch0")),
    (
        "6, different bridge",
        ["--bridge", "different"],
        ALL - {"h1/nic1"},
        ("h1/nic1", "BRIDGE", "h1/switch0", "other than h1/switch0"),
    ),
    (
        "6, same parent bridge",
        ["--parent-bridge", "same"],
        {"h1/nic1", "h1/nic2", "h1/nic3"},
        ("h1/nic4", "PARENT_BRIDGE", "h1/port1", "h1/port0"),
    ),
    (
        "6, different parent bridge",
        ["--parent-bridge", "different"],
        {"h1/nic4", "h2/nic0"},
        ("h1/nic3", "PARENT_BRIDGE", "h1/port0", "other than h1/port0"),
    ),
    (
        "6, same power boundary",
        ["--power-domain", "same"],
        {"h1/nic1", "h1/nic3"},
        ("h1/nic2", "POWER_DOMAIN", "h1/psu-b", "h1/psu-a"),
    ),
    (
        "6, different power boundary",
        ["--power-domain", "different"],
        {"h1/nic2", "h1/nic4", "h2/nic0"},
        ("h1/nic3", "POWER_DOMAIN", "h1/psu-a", "other than h1/psu-a"),
    ),
    ("7, attachment of now", [], ALL, ("h1/wan", "ATTACHMENTS", "wan", "lan")),
    ("7, attachment that is asked for", ["--attachment", "wan"], {"h1/wan"}, ("h1/nic1", "ATTACHMENTS", "lan", "wan")),
    (
        "beyond the patent: another host",
        ["--host", "different"],
        {"h2/nic0"},
        ("h1/nic1", "HOST", "h1", "other than h1"),
    ),
]

Vfleet = Callable[..., Awaitable[tuple[int, str, str]]]


@pytest.mark.timeout(300)
async def test_each_row_of_claims_5_to_7(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    subtests: pytest.Subtests,
):
    """One cluster for all: each row plans for a function of its own, looks at the reasons, and moves it."""
    topology = tmp_path / "topology.yaml"
    topology.write_text(yaml.safe_dump(TOPOLOGY), encoding="utf-8")
    async with running(tmp_path, topology=topology) as cluster:
        monkeypatch.setenv("VFLEET_COORDINATOR", ",".join(cluster.local.coordinator_addresses))
        monkeypatch.setenv("VFLEET_INSECURE", "1")

        async def vfleet(*arguments: str) -> tuple[int, str, str]:
            code = await asyncio.to_thread(run, arguments)
            return code, *capsys.readouterr()

        for number, (claim, options, will_do, reason) in enumerate(ROWS):
            with subtests.test(claim):
                await check_row(cluster, vfleet, f"vf{number}", options, will_do, reason)
        with subtests.test("where its driver is"):
            await check_driver_host(cluster, vfleet)
        with subtests.test("cordon"):
            await check_cordon(cluster, vfleet)
        await assert_nothing_left(cluster)


async def check_row(
    cluster: Cluster,
    vfleet: Vfleet,
    function: str,
    options: list[str],
    will_do: set[str],
    reason: tuple[str, str, str, str],
) -> None:
    await cluster.fleet.create_function(function, "h1/nic0")
    code, out, _ = await vfleet("plan", function, *options, "-o", "json")
    assert code == 0
    planned = json.loads(out)
    (placement,) = planned["explanation"]["placements"]
    assert {candidate["device"] for candidate in placement["candidates"]} == will_do
    rejected = {each["device"]: each for each in placement["rejections"]}
    assert len(rejected) + len(will_do) == len(await cluster.fleet.list_devices())
    device, filter_, found, expected = reason
    told = rejected[device]
    assert (told["filter"], told["found"], told["expected"]) == (f"PLACEMENT_FILTER_{filter_}", found, expected)
    code, out, _ = await vfleet("migrate", function, *options, "--wait", "-o", "json")
    assert (code, json.loads(out)["phase"]) == (0, "PHASE_DONE")
    home = (await cluster.fleet.get_function(function)).device
    assert home == placement["device"] == planned["migration"]["moves"][0]["target"]["device"]
    assert home in will_do


async def check_driver_host(cluster: Cluster, vfleet: Vfleet) -> None:
    """A function moves to its driver's host, and the driver sees nothing of it."""
    await cluster.fleet.create_function("worker", "h1/nic0")
    await cluster.work("d1", "worker", "h2")
    code, _, err = await vfleet("migrate", "worker", "--wait")
    assert code == 0, err
    assert (await cluster.fleet.get_function("worker")).device == "h2/nic0"
    await cluster.stop_workloads()


async def check_cordon(cluster: Cluster, vfleet: Vfleet) -> None:
    """A cordoned host gets nothing, chosen or named, whatever its daemon does, until it is put back in use."""
    await cluster.fleet.create_function("last", "h1/nic0")
    assert (await vfleet("cordon", "host", "h2", "--reason", "firmware"))[0] == 0
    assert (await vfleet("cordon", "host", "h2", "--reason", "new firmware"))[0] == 0
    await cluster.local.hosts["h2"].restart()
    await cluster.until_registered("h2")
    code, out, _ = await vfleet("plan", "last", "--host", "different")
    assert code == 1
    assert "uncordon host h2" in out
    assert "host h2 cordoned: new firmware" in out
    for refused in (
        ("migrate", "last", "--host", "different"),
        ("migrate", "last", "--to", "h2/nic0"),
        ("create", "function", "new", "--on", "h2/nic0"),
    ):
        code, out, err = await vfleet(*refused)
        assert (code, out) == (1, "")
        assert "cordon" in err
    assert (await vfleet("migrate", "worker", "--host", "different", "--wait"))[0] == 0  # what is there may leave
    for _ in range(2):
        assert (await vfleet("uncordon", "host", "h2"))[0] == 0
    assert (await cluster.store.list(CORDONS)).items == ()
    assert (await vfleet("migrate", "last", "--host", "different", "--wait"))[0] == 0
    assert (await vfleet("cordon", "host", "h9"))[0] == 2
