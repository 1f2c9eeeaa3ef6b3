"""The units for systemd, by systemd's own checkers (which need no systemd that runs) and by the daemons themselves."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from coordinator import config as coordinator_config
from hostd import config as hostd_config

ROOT = Path(__file__).parents[2] / "deploy" / "systemd"
UNITS = ("vfleet-hostd@.service", "vfleet-coordinator@.service")
SYSTEM_UNITS = Path("/usr/lib/systemd/system")
MOST_EXPOSURE = 13  # tenths; 12 is reached, and 100 the most

Analyze = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def analyze(tmp_path: Path) -> Analyze:
    """Run systemd-analyze on a machine's files with the units among them, and what they need."""
    program = shutil.which("systemd-analyze")
    if program is None and os.environ.get("CI") == "true":
        pytest.fail("there is no systemd-analyze: it is in Debian's package systemd")
    if program is None:
        pytest.skip("NOT RUN: there is no systemd-analyze (Debian's package systemd)")
    machine = tmp_path / "machine"
    shutil.copytree(SYSTEM_UNITS, machine / "usr/lib/systemd/system", symlinks=True)
    own = machine / "etc/systemd/system"
    own.mkdir(parents=True)
    for name in UNITS:
        shutil.copy(ROOT / name, own)
        binary = machine / "opt/vfleet/bin" / name.partition("@")[0]
        binary.parent.mkdir(parents=True, exist_ok=True)
        binary.write_text("#!/bin/sh\n")
        binary.chmod(0o755)

    def run(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [program, verb, "--root", str(machine), "--no-pager", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def settings(unit: str) -> dict[str, str]:
    """Return a unit's settings; of one that is there more than once, all values."""
    found: dict[str, str] = {}
    for line in (ROOT / unit).read_text().replace("\\\n", " ").splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name] = f"{found[name]} {value}" if name in found else value
    return found


def environment() -> dict[str, str]:
    lines = (ROOT / "vfleet.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def command_line(unit: str, instance: str) -> list[str]:
    """Return what systemd would run, its variables and %i replaced."""
    line = settings(unit)["ExecStart"].replace("%i", instance)
    seen = environment()
    return [re.sub(r"\$\{(\w+)\}", lambda match: seen[match[1]], each) for each in line.split()]


@pytest.mark.parametrize("unit", ["vfleet-hostd@h1.service", "vfleet-coordinator@c1.service"])
def test_systemd_finds_nothing_wrong_with_a_unit(analyze, unit):
    verified = analyze("verify", "--man=no", unit)
    assert (verified.returncode, verified.stderr) == (0, "")


def test_systemd_would_find_what_is_wrong(analyze, tmp_path):
    unit = tmp_path / "machine/etc/systemd/system/vfleet-hostd@.service"
    unit.write_text(unit.read_text().replace("ProtectHome=", "ProtectHouse="))
    assert "ProtectHouse" in analyze("verify", "--man=no", "vfleet-hostd@h1.service").stderr


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_is_exposed_to_little(analyze, unit):
    checked = analyze("security", "--offline=true", f"--threshold={MOST_EXPOSURE}", unit)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_unit_that_is_exposed_to_more_would_be_found(analyze, tmp_path):
    unit = tmp_path / "machine/etc/systemd/system/vfleet-hostd@.service"
    unit.write_text(unit.read_text().replace("CapabilityBoundingSet=", "CapabilityBoundingSet=CAP_SYS_ADMIN"))
    assert analyze("security", "--offline=true", f"--threshold={MOST_EXPOSURE}", UNITS[0]).returncode != 0


@pytest.fixture
def machine_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VFLEET_TLS", raising=False)
    for variable, value in environment().items():
        monkeypatch.setenv(variable, value)


def test_a_host_takes_its_command_line(machine_environment):
    program, *arguments = command_line(UNITS[0], "h1")
    config = hostd_config.parse(arguments)
    assert program == "/opt/vfleet/bin/vfleet-hostd"
    assert (config.host, config.listen, config.metrics, len(config.etcd)) == ("h1", "10.0.0.1:7001", "10.0.0.1:9464", 3)
    assert (config.security.tls, config.log_format) == (Path("/etc/vfleet/host"), "json")
    # The one place where it writes is the one that systemd makes for it.
    assert str(config.data_dir) == "/var/lib/" + settings(UNITS[0])["StateDirectory"].replace("%i", "h1")


def test_a_coordinator_takes_its_command_line(machine_environment):
    program, *arguments = command_line(UNITS[1], "c1")
    config = coordinator_config.parse(arguments)
    assert program == "/opt/vfleet/bin/vfleet-coordinator"
    assert (config.name, config.listen, config.metrics) == ("c1", "10.0.0.1:7000", "10.0.0.1:9465")
    assert (config.security.tls, len(config.etcd)) == (Path("/etc/vfleet/coordinator"), 3)


def test_both_harden_alike():
    hardening = [(ROOT / unit).read_text().partition("# Nothing but")[2] for unit in UNITS]
    assert hardening[0] == hardening[1]
    assert len(hardening[0]) > 500


@pytest.mark.parametrize("unit", UNITS)
def test_a_daemon_that_dies_is_started_again_and_one_that_is_given_nonsense_is_not(unit):
    found = settings(unit)
    assert (found["Restart"], found["RestartPreventExitStatus"], found["StartLimitIntervalSec"]) == ("always", "2", "0")
    assert found["User"] == found["Group"] == "vfleet"
    assert "vfleet " in (ROOT / "vfleet.sysusers").read_text()
