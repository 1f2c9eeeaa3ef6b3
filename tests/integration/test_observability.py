"""What a real cluster logs and counts: each line has what it concerns, each metric is as the documentation has it."""

import json
import re
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from support.local_cluster import Cluster, eventually, running
from support.promtool import promtool

from vfleet.driver import DriverClient
from vfleet.errors import VfleetError
from vfleet.v1.records_pb2 import Phase

DOCUMENTED = Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.fixture(scope="module")
def json_logs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VFLEET_LOG_FORMAT", "json")
        yield


@pytest.fixture
async def cluster(tmp_path: Path, json_logs: None) -> AsyncIterator[Cluster]:
    """A cluster in which migrations were done, aborted and refused, and a driver is at work on another host."""
    async with running(tmp_path, coordinators=2) as cluster:
        await cluster.fleet.create_function("vf1", device="h1/nic0")
        await cluster.work("d1", "vf1", "h3")
        assert (await cluster.move("m-done", {"vf1": "h2/nic0"})).phase == Phase.PHASE_DONE
        # Within no time at all nothing is prepared.
        assert (await cluster.move("m-aborted", {"vf1": "h1/nic0"}, prepare_timeout_ms=1)).phase == Phase.PHASE_ABORTED
        await cluster.fleet.create_function("vf2", device="h3/nic0")
        await cluster.fleet.attach_driver("vf2", "d2", host="h3")
        with pytest.raises(VfleetError, match="nothing at virtual address"):
            await DriverClient(cluster.hosts["h3"], "d2").read(0x10, 4)
        yield cluster


def scrape(url: str) -> str:
    with urllib.request.urlopen(url) as response:  # the test's own cluster
        return response.read().decode()


def pages(cluster: Cluster) -> dict[str, str]:
    return {daemon.name: scrape(daemon.metrics) for daemon in cluster.local.daemons}


def families(page: str) -> dict[str, Metric]:
    """Return a page's metrics by the names that are documented: those of counters end in _total."""
    found = {}
    for family in text_string_to_metric_families(page):
        if not family.name.startswith("process_"):
            found[family.name + ("_total" if family.type == "counter" else "")] = family
    return found


def documented() -> dict[str, dict[str, tuple[str, str, str]]]:
    """Return type, labels and meaning of each metric, by section and name."""
    sections: dict[str, dict[str, tuple[str, str, str]]] = {}
    for line in DOCUMENTED.read_text().splitlines():
        if line.startswith("## "):
            section = sections.setdefault(line.removeprefix("## "), {})
        elif match := re.fullmatch(r"\| `(vfleet_\w+)` \| (\w+) \| (.*) \| (.+) \|", line):
            section[match[1]] = (match[2], match[3].replace("`", "").strip(), match[4])
    return sections


def labels_of(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


async def test_the_metrics_are_those_that_are_documented(cluster):
    sections = documented()
    by_name = pages(cluster)
    coordinators, hosts = [], []
    for name, page in by_name.items():
        (coordinators if name in cluster.local.coordinators else hosts).append(families(page))
    for section, exported in (("Of coordinators", coordinators), ("Of hosts", hosts)):
        expected = sections["Of both"] | sections[section]
        shown = {name: family for page in exported for name, family in page.items()}
        assert sorted(shown) == sorted(expected)
        assert {name: (family.type, family.documentation) for name, family in shown.items()} == {
            name: (kind, meaning) for name, (kind, _, meaning) in expected.items()
        }
        for name, (_, labels, _) in expected.items():
            found = set().union(*(labels_of(page[name]) for page in exported if name in page))
            # Where nothing of its kind has happened yet, nothing has a label.
            assert found in (set(labels.split(", ")) - {""}, set()), name


async def test_promtool_finds_nothing_wrong_with_names_and_texts(cluster):
    for name, page in pages(cluster).items():
        checked = promtool("check", "metrics", given=page)
        assert (checked.returncode, checked.stderr) == (0, ""), name


async def test_figures_are_those_of_what_has_happened(cluster):
    by_name = pages(cluster)

    def total(daemons: object, name: str, **labels: str) -> float:
        return sum(
            sample.value
            for daemon in daemons
            for family in text_string_to_metric_families(by_name[daemon])
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    coordinators, hosts = cluster.local.coordinators, cluster.local.hosts
    assert total(coordinators, "vfleet_migrations_total", outcome="done") == 1
    assert total(coordinators, "vfleet_migrations_total", outcome="aborted", cause="limit_exceeded") == 1
    assert total(coordinators, "vfleet_migration_blackout_seconds_count", outcome="done", mode="pre_copy") == 1
    assert total(coordinators, "vfleet_coordinator_active") == 2
    assert total(hosts, "vfleet_host_registered") == 3
    assert total(["h3"], "vfleet_translation_faults_total", driver="d2") == 1
    assert total(["h3"], "vfleet_hold_duration_seconds_count") == 1
    assert total(["h2"], "vfleet_state_received_bytes_total") > 0
    assert total(["h2"], "vfleet_fabric_accesses_total") > 0
    # The driver is another host's, so what the function has done came by the fabric, to one home and to the other.
    everything = total(["h2"], "vfleet_function_accesses_total", function="vf1")
    assert everything > total(["h2"], "vfleet_fabric_accesses_total")
    assert total(hosts, "vfleet_holds") == 0


async def test_what_a_driver_did_stays_as_it_is_when_another_one_goes(cluster):
    def counted() -> dict[str, float]:
        family = families(scrape(cluster.local.hosts["h3"].metrics))["vfleet_function_accesses_total"]
        return {sample.labels["driver"]: sample.value for sample in family.samples}

    for driver, reads in (("d2", 5), ("d3", 3)):
        entry = await cluster.fleet.attach_driver("vf2", driver, host="h3")
        for _ in range(reads):
            await DriverClient(cluster.hosts["h3"], driver).read(entry.virtual_address, 4)
    assert counted() == {"d2": 5, "d3": 3}
    await cluster.fleet.detach_driver("vf2", "d2")

    async def is_gone() -> bool:
        return counted() == {"d3": 3}

    await eventually(is_gone)


def log_lines(cluster: Cluster) -> list[dict[str, str]]:
    return [json.loads(line) for daemon in cluster.local.daemons for line in daemon.log.read_text().splitlines()]


async def test_every_line_has_what_it_concerns(cluster):
    # A host that goes and comes back has something to say, and so has whoever wants to move a function there.
    await cluster.local.hosts["h1"].kill()
    await cluster.begin("m-late", {"vf1": "h3/nic0"})
    await cluster.over("m-late")
    await cluster.local.hosts["h1"].start()
    for daemon in cluster.local.daemons:
        await daemon.stop()  # all is written then
    lines = log_lines(cluster)
    assert {line["message"] for line in lines} >= {"migration m-done is PHASE_DONE", "migration m-late is PHASE_DONE"}
    for line in lines:
        assert line.keys() & {"coordinator", "host"}, line
        for field, names in (("migration", ("m-done", "m-aborted", "m-late")), ("function", ("vf1",))):
            for name in names:
                if re.search(rf"\b{name}\b", line["message"]):
                    assert line[field] == name, line
        if "migration" in line and line["logger"] == "coordinator.migration":
            assert re.fullmatch(r"1\.\d+", line["attempt"]), line
