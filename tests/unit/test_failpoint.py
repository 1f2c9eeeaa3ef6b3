"""Failpoints: off by default, hit once, exactly where they are named, and no others than the named ones."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vfleet import failpoint
from vfleet.errors import Reason, VfleetError

ROOT = Path(failpoint.__file__).parents[1]
NAME = "hostd.stop.before"


@pytest.fixture(autouse=True)
def _off_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failpoint, "_directory", None)


def enable(directory: Path) -> None:
    failpoint.enable({failpoint.VARIABLE: str(directory)})


def test_without_the_variable_nothing_happens(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("kill")
    failpoint.enable({})
    failpoint.reach(NAME)
    with failpoint.around("hostd.stop"):
        pass
    assert (tmp_path / NAME).exists()


def test_an_armed_failpoint_is_hit_once_and_leaves_its_mark(tmp_path: Path) -> None:
    enable(tmp_path)
    failpoint.reach(NAME)
    (tmp_path / NAME).write_text("error")  # armed while the process runs
    with pytest.raises(VfleetError, match=NAME) as refusal, failpoint.around("hostd.stop"):
        raise AssertionError("went on")
    assert refusal.value.reason is Reason.UNREACHABLE
    assert [path.name for path in tmp_path.iterdir()] == [NAME + failpoint.REACHED]
    enable(tmp_path)  # as a daemon does that is started again
    failpoint.reach(NAME)


def test_a_block_that_fails_does_not_reach_what_lies_after_it(tmp_path: Path) -> None:
    enable(tmp_path)
    (tmp_path / "hostd.stop.after").write_text("error")
    with pytest.raises(ValueError, match="its own"), failpoint.around("hostd.stop"):
        raise ValueError("its own")
    with pytest.raises(VfleetError), failpoint.around("hostd.stop"):
        pass


def test_a_delay_is_in_milliseconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(failpoint.time, "sleep", slept.append)
    (tmp_path / NAME).write_text("delay 250")
    enable(tmp_path)
    failpoint.reach(NAME)
    assert slept == [0.25]


@pytest.mark.parametrize(("action", "number"), [("kill", signal.SIGKILL), ("stop", signal.SIGSTOP)])
def test_signals_hit_the_process_itself(tmp_path: Path, action: str, number: signal.Signals) -> None:
    (tmp_path / NAME).write_text(action)
    script = f"import os; from vfleet import failpoint; failpoint.enable(os.environ); failpoint.reach({NAME!r})"
    environment = {**os.environ, failpoint.VARIABLE: str(tmp_path)}
    pid = os.posix_spawn(sys.executable, [sys.executable, "-c", script], environment)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):
        assert os.WSTOPSIG(status) == number
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    else:
        assert os.WTERMSIG(status) == number


@pytest.mark.parametrize(
    ("name", "action", "what"),
    [
        ("hostd.stop", "kill", "is 'hostd.stop'; expected the name of a failpoint"),
        (NAME, "explode", "hostd.stop.before is 'explode'; expected kill or stop or error or delay MILLISECONDS"),
        (NAME, "delay", "is 'delay'"),
        (NAME, "delay -1", "is 'delay -1'"),
        (NAME, "", "is ''"),
    ],
)
def test_what_is_unknown_is_refused_by_name(tmp_path: Path, name: str, action: str, what: str) -> None:
    (tmp_path / name).write_text(action)
    with pytest.raises(VfleetError, match=re.escape(what)) as refusal:
        enable(tmp_path)
    assert refusal.value.reason is Reason.INVALID_FIELD
    assert failpoint.VARIABLE in refusal.value.message


@pytest.mark.parametrize(
    ("module", "arguments"),
    [("hostd", "--topology none --host h1 --data-dir none"), ("coordinator", "--name c1")],
)
def test_a_daemon_with_an_unknown_failpoint_ends_with_one_line(tmp_path: Path, module: str, arguments: str) -> None:
    (tmp_path / "nowhere").write_text("kill")
    ended = subprocess.run(
        [sys.executable, "-m", module, "--etcd", "127.0.0.1:1", "--insecure", *arguments.split()],
        env={**os.environ, failpoint.VARIABLE: str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "VFLEET_FAILPOINTS is 'nowhere'; expected the name of a failpoint" in ended.stderr


def test_the_code_has_all_failpoints_that_are_listed_and_no_other() -> None:
    found = set()
    for package in ("coordinator", "hostd"):
        source = "".join(path.read_text() for path in (ROOT / package).rglob("*.py"))
        for call, arguments in re.findall(r"failpoint\.(reach|around)\((.*)\)", source):
            for name in re.findall(r'"([^"]+)"', arguments):
                found |= {name} if call == "reach" else {f"{name}.before", f"{name}.after"}
    assert found == failpoint.NAMES
