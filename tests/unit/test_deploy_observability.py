"""What watches a fleet: alerts, their tests and the runbook, and the dashboard, all by metrics that there are."""

import json
import re
from pathlib import Path

import pytest
import yaml
from support.promtool import promtool

ROOT = Path(__file__).parents[2]
DEPLOYED = ROOT / "deploy" / "observability"
RULES = yaml.safe_load((DEPLOYED / "alerts.yaml").read_text())["groups"][0]["rules"]
DASHBOARD = json.loads((DEPLOYED / "dashboard.json").read_text())
ALERTS = [rule["alert"] for rule in RULES]
# What Prometheus itself, and each process, brings.
OTHERS = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"}
RUNBOOK = "docs/operations.md"


def queries() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def documented() -> dict[str, tuple[str, set[str]]]:
    """Return type and labels of each metric, by name."""
    rows = re.findall(r"^\| `(vfleet_\w+)` \| (\w+) \| (.*?) \|", (ROOT / "docs" / "metrics.md").read_text(), re.M)
    return {name: (kind, set(re.findall(r"\w+", labels))) for name, kind, labels in rows}


def series() -> dict[str, set[str]]:
    """Return the labels of each series that can be asked for, by name."""
    found = {}
    for name, (kind, labels) in documented().items():
        if kind == "histogram":
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_count": labels, f"{name}_sum": labels}
        else:
            found[name] = labels
    return found


def check_series(query: str) -> None:
    """Fail if a query asks for a series, or a label of one, that nobody exports."""
    known = series()
    for name, selector in re.findall(r"\b((?:vfleet_|process_|up\b)\w*)(\{[^}]*\})?", query):
        assert name in known or name in OTHERS, name
        used = set(re.findall(r"(\w+)\s*[=!]~?", selector))
        assert used <= known.get(name, set()) | {"job", "instance"}, (name, used)
    by = {label for labels in re.findall(r"\bby \(([^)]*)\)", query) for label in re.findall(r"\w+", labels)}
    every = {label for name in re.findall(r"vfleet_\w+", query) for label in known[name]}
    assert by <= every | {"job", "instance"}, by


def test_there_are_alerts_and_queries():
    assert len(ALERTS) > 10
    assert len(set(ALERTS)) == len(ALERTS)
    assert len(queries()) > 20


@pytest.mark.parametrize("rule", RULES, ids=ALERTS)
def test_an_alert_asks_for_what_there_is_and_says_what_to_do(rule):
    check_series(rule["expr"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["runbook"] == f"{RUNBOOK}#{rule['alert'].lower()}"
    assert rule["annotations"]["summary"]


def test_the_runbook_has_a_section_for_each_alert_and_for_no_other():
    text = (ROOT / RUNBOOK).read_text()
    sections = re.findall(r"^### (Vfleet\w+)\n(.+)$", text, re.M)
    assert [name for name, _ in sections] == ALERTS
    assert all(len(first) > 40 for _, first in sections)


def test_links_within_the_runbook_lead_somewhere():
    text = (ROOT / RUNBOOK).read_text()
    headings = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


@pytest.mark.parametrize("query", queries())
def test_a_panel_asks_for_what_there_is(query):
    check_series(query)


def test_panels_are_side_by_side_and_have_titles_and_units():
    cells = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        assert place["x"] + place["w"] <= 24
        cells |= own
        assert panel["title"]
        assert panel["type"] == "row" or (panel["description"] and panel["fieldConfig"]["defaults"]["unit"])
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_promtool_finds_nothing_wrong_with_rules_and_configuration():
    for arguments in (("check", "rules", DEPLOYED / "alerts.yaml"), ("check", "config", DEPLOYED / "prometheus.yaml")):
        checked = promtool(*map(str, arguments))
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_is_tested_both_ways_and_does_as_the_tests_say():
    cases = yaml.safe_load((DEPLOYED / "alerts.test.yaml").read_text())["tests"]
    outcomes = {(check["alertname"], bool(check["exp_alerts"])) for case in cases for check in case["alert_rule_test"]}
    # A driver that goes wrong once and one that goes on are in one case.
    assert outcomes | {("VfleetTranslationFaults", False)} == {
        (name, fires) for name in ALERTS for fires in (True, False)
    }
    tested = promtool("test", "rules", str(DEPLOYED / "alerts.test.yaml"))
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_promtool_can_read_every_query_of_the_dashboard(tmp_path):
    rules = [
        {"record": f"panel:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, query in enumerate(queries())
    ]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    checked = promtool("check", "rules", str(path))
    assert checked.returncode == 0, checked.stdout + checked.stderr
