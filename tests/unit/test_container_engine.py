"""Where there is no Docker, tests in containers are not run, and nobody can miss it; in CI that is a failure."""

import pytest
from support.containers.engine import require_engine


@pytest.fixture(autouse=True)
def nothing_on_path(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 0)


def test_locally_they_are_skipped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="CONTAINER TESTS NOT RUN: there is no docker on PATH"):
        require_engine()


def test_in_ci_they_fail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CONTAINER TESTS NOT RUN: there is no docker on PATH"):
        require_engine()


def test_who_is_not_root_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(pytest.skip.Exception, match="they need root"):
        require_engine()
