"""What reads text: topologies, the command's arguments and settings, names and addresses, the page with the metrics."""

import asyncio
import contextlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from unittest import mock

import yaml
from atheris import FuzzedDataProvider
from fuzz.messages import TEXTS
from prometheus_client import CollectorRegistry

from hostd.topology import HostTopology, load_all
from vfleet import metrics
from vfleet.caller import parse_addresses
from vfleet.cli import constraints, main, settings
from vfleet.cli.migration import move_requests
from vfleet.declared import DeclaredFunction, read_declared
from vfleet.errors import Reason, VfleetError
from vfleet.names import check_device_name, check_name

DECLARED = """functions:
  - {name: vf1, device: h1/nic0, vf_index: 1, drivers: [{guest: /tmp/a.sock, main_memory: 1MiB}, {name: d1, host: h2}]}
  - {name: vf2, device: h2/nic1, drivers: [{name: d1, host: h2}, {name: g2, guest: /tmp/b.sock}]}
"""
DEMO = (Path(__file__).parents[2] / "vfleet" / "topologies" / "demo.yaml").read_text() + DECLARED
DEMO_YAML = yaml.safe_load(DEMO)
_FOLDER = Path(mkdtemp(prefix="vfleet-fuzz-"))
# Commands that ask a cluster. There is none: the settings of the fuzzer's folder name none either.
COMMANDS = (
    *("get", "describe", "history", "events", "plan", "migrate", "watch", "cancel", "cordon", "uncordon", "drain"),
    *("attach", "detach", "doctor", "create", "delete", "workload", "fleet", "context"),
)
WORDS = (
    *(
        "hosts",
        "devices",
        "functions",
        "drivers",
        "migrations",
        "host",
        "device",
        "function",
        "vf1=h2/nic0",
        "vf1=h2/nic0:4",
    ),
    *(
        "--to",
        "--on",
        "--driver",
        "--wait",
        "--timeout",
        "5",
        "nan",
        "-1",
        "1e999",
        "--host",
        "same",
        "different",
        "-o",
        "json",
    ),
    *(
        "--apart",
        "vf1,vf2@host",
        "--together",
        ",,@",
        "--prefer",
        "spread",
        "--priority",
        "--deadline",
        "--retries",
        "start",
    ),
    *(
        "stop",
        "list",
        "use",
        "bump-generation",
        "forget-host",
        "--parallel",
        "--reason",
        "--help",
        "--",
        "-f",
        "--bandwidth",
    ),
)


# What a target begins with; where a provider takes numbers from, they are at the end.
SEEDS = {
    "topology": (DEMO.encode() + b"\1", bytes(500) + b"\0", bytes(range(256)) * 4 + b"\0"),
    "metrics_page": (
        b"GET /metrics HTTP/1.1\r\nHost: h1\r\n\r\n",
        b"HEAD /metrics?name=x HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\n\r\n",
    ),
    "names": (b"vf1,vf2@host" + bytes(8), b"10.0.0.1:7000,10.0.0.2:7000" + bytes(8)),
}


def refused(parse: Callable[[], object], *reasons: Reason) -> object:
    """Return what is parsed; None if it is refused with one clear error."""
    try:
        return parse()
    except VfleetError as error:
        refusal = error
    assert refusal.reason in (Reason.INVALID_FIELD, *reasons), refusal
    assert refusal.message
    assert "\n" not in refusal.message
    return None


def topology(given: bytes) -> None:
    """A topology file is read whole, or refused with a line that says where."""
    data = FuzzedDataProvider(given)
    path = _FOLDER / "topology.yaml"
    if data.ConsumeBool():
        path.write_bytes(data.ConsumeBytes(data.remaining_bytes()))
    else:
        path.write_text(yaml.safe_dump(_changed(DEMO_YAML, data), allow_unicode=True), encoding="utf-8")
    hosts = refused(lambda: load_all(path), Reason.SEGMENT_TAKEN)
    if hosts is not None:
        assert isinstance(hosts, dict)
        for name, host in hosts.items():
            assert host.name == name
            assert all(device.name.startswith(f"{name}/") for device in host.devices())
        _check_declared(read_declared(path), hosts)


def _check_declared(functions: Sequence[DeclaredFunction], hosts: Mapping[str, HostTopology]) -> None:
    """Check that what a topology declares can be asked for, in the form in which a coordinator is asked."""
    devices = {device.name: device for host in hosts.values() for device in host.devices()}
    assert len({function.name for function in functions}) == len(functions)
    for function in functions:
        check_name("function", function.name)
        assert (function.vf_index or 1) <= devices[function.device].total_vfs
        assert len(function.drivers) <= devices[function.device].max_drivers
        for driver in function.drivers:
            check_name("driver", function.driver_name(driver))
            assert function.driver_host(driver) in hosts
            assert driver.guest is None or driver.guest.startswith("/")


def _changed(value: object, data: FuzzedDataProvider) -> object:
    """Return a document with some of its values replaced, dropped or repeated."""
    chance = data.ConsumeIntInRange(0, 40)
    if chance == 0:
        return data.PickValueInList(
            [
                None,
                [],
                {},
                "",
                "h1",
                "4KiB",
                "1e9",
                True,
                -1,
                0,
                1,
                255,
                256,
                65536,
                1 << 40,
                0.5,
                [1],
                {"a": 1},
                "16EiB",
                "é",
                "h1/nic0",
                "/tmp/a.sock",
                "d1",
            ]
        )
    if isinstance(value, dict):
        return {
            (
                data.PickValueInList(["name", "segment", "bars", "x", 7]) if data.ConsumeIntInRange(0, 60) == 0 else key
            ): (_changed(each, data))
            for key, each in value.items()
            if data.ConsumeIntInRange(0, 60)
        }
    if isinstance(value, list):
        return [_changed(each, data) for each in value for _ in range(2 if data.ConsumeIntInRange(0, 30) == 1 else 1)]
    return value


def command_line(given: bytes) -> None:
    """Any command line ends with an exit code and, if it is refused, a line."""
    data = FuzzedDataProvider(given)
    arguments = [data.PickValueInList(list(COMMANDS))]
    while data.remaining_bytes() and len(arguments) < 12:
        if data.ConsumeIntInRange(0, 5):
            arguments.append(data.PickValueInList([*WORDS, *TEXTS]))
        else:
            arguments.append(data.ConsumeUnicodeNoSurrogates(20).replace("\0", ""))
    out, err = io.StringIO(), io.StringIO()
    environment = {"XDG_STATE_HOME": str(_FOLDER), "XDG_CONFIG_HOME": str(_FOLDER / "config"), "HOME": str(_FOLDER)}
    with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.run(arguments)
    assert code in (0, 1, 2), (arguments, code)
    if code == 2:
        assert err.getvalue().startswith("vfleet: "), arguments


def names(given: bytes) -> None:
    """Names, addresses, moves, groups and settings, as they come from a person."""
    data = FuzzedDataProvider(given)
    text = data.ConsumeUnicodeNoSurrogates(data.ConsumeIntInRange(0, 200))
    assert refused(lambda: check_name("name", text)) in (None, text)
    assert refused(lambda: check_device_name("device", text)) in (None, text)
    addresses = refused(lambda: parse_addresses("--coordinator", text))
    assert addresses is None or ",".join(addresses) == text
    refused(lambda: move_requests([text, "vf1"], data.PickValueInList([None, "h1/nic0", text])))
    rules = [constraints.Rule.SAME, constraints.Rule.DIFFERENT]
    refused(lambda: constraints._group("--apart", text, data.PickValueInList(rules)))
    refused(lambda: settings._parse(Path("config.yaml"), data.ConsumeUnicodeNoSurrogates(data.remaining_bytes())))


def metrics_page(given: bytes) -> None:
    """A request for the metrics is answered or broken off, and so is the next one."""
    page = metrics._Page(CollectorRegistry())

    async def ask(request: bytes) -> bytes:
        reader = asyncio.StreamReader(limit=metrics.MAX_REQUEST_BYTES)
        reader.feed_data(request)
        reader.feed_eof()
        writer = _Writer()
        await page.answer(reader, writer)
        assert writer.is_closed
        return bytes(writer.written)

    async def play() -> None:
        answer = await ask(given)
        assert not answer or answer.startswith(b"HTTP/1.1 ")
        assert (await ask(b"GET /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 OK\r\n")

    asyncio.run(play())


class _Writer:
    """A writer that keeps what is written."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.is_closed = False
        self.transport = self

    def write(self, data: bytes) -> None:
        self.written += data

    async def wait_closed(self) -> None:
        """Take it at once."""

    def abort(self) -> None:
        self.is_closed = True

    def close(self) -> None:
        self.is_closed = True
