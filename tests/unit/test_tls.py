"""A folder of certificates: what is wrong with it is said at the start, and changes nothing later."""

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from support.manual_clock import ManualClock

from vfleet.certificates import issue, make_ca
from vfleet.errors import Reason, VfleetError
from vfleet.principal import Principal, principal_of
from vfleet.roles import Role
from vfleet.tls import LOOK_AGAIN_S, Tls

H1 = Principal(Role.HOST, "h1")
FILES = ("ca.crt", "tls.crt", "tls.key")
HOUR_S = 3_600


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    make_ca(tmp_path / "ca")
    return tmp_path / "ca"


@pytest.fixture
def folder(ca: Path, tmp_path: Path) -> Path:
    issue(ca, tmp_path / "h1", "host", "h1")
    return tmp_path / "h1"


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(time.time())


def other(tmp_path: Path, kind: str = "host", name: str = "h1") -> Path:
    """Return a folder of another CA."""
    make_ca(tmp_path / "other")
    issue(tmp_path / "other", tmp_path / "other" / "folder", kind, name)
    return tmp_path / "other" / "folder"


def put(folder: Path, **contents: bytes) -> None:
    """Replace files as `mv` does, by their names with _ for the dot."""
    for name, content in contents.items():
        new = folder / "new"
        new.write_bytes(content)
        new.replace(folder / name.replace("_", "."))


def take(folder: Path, source: Path, *names: str) -> None:
    put(folder, **{name.replace(".", "_"): (source / name).read_bytes() for name in names or FILES})


def look(tls: Tls, clock: ManualClock) -> Principal | None:
    clock.now += LOOK_AGAIN_S
    return tls.credentials.principal


def test_a_folder_says_whose_it_is(folder: Path) -> None:
    tls = Tls(folder)
    assert tls.credentials.principal == H1
    tls.require(Role.HOST)
    tls.require(Role.HOST, "h1")
    for role, name in ((Role.HOST, "h2"), (Role.COORDINATOR, ""), (Role.COORDINATOR, "h1")):
        with pytest.raises(VfleetError, match="it is for host 'h1', not"):
            tls.require(role, name)


# On the curve secp128r1, which nobody takes.
ODD_KEY = b"""-----BEGIN EC PRIVATE KEY-----
MEQCAQEEEP55CkFlFdPMkLC8v/+NiJOgBwYFK4EEAByhJAMiAASFVJI1TA45LT6j
QicxdnFXlMrXvDNAKobilK/2KiLqdw==
-----END EC PRIVATE KEY-----
"""

WRONGS: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "no certificate": (lambda folder, _: (folder / "tls.crt").unlink(), r"tls\.crt .*No such file"),
    "no key": (lambda folder, _: (folder / "tls.key").unlink(), r"tls\.key .*No such file"),
    "an empty CA": (lambda folder, _: put(folder, ca_crt=b""), r"ca\.crt .*PEM"),
    "half a certificate": (
        lambda folder, _: put(folder, tls_crt=(folder / "tls.crt").read_bytes()[:200]),
        r"tls\.crt .*PEM",
    ),
    "no PEM": (lambda folder, _: put(folder, tls_key=b"\0" * 100), r"tls\.key .*PEM"),
    "a key of a kind that nobody takes": (lambda folder, _: put(folder, tls_key=ODD_KEY), r"tls\.key .*not supported"),
    "another's key": (lambda folder, tmp: take(folder, other(tmp), "tls.key"), r"tls\.key .*not the key of tls\.crt"),
    "another CA": (lambda folder, tmp: take(folder, other(tmp), "ca.crt"), r"tls\.crt .*no certificate in ca\.crt has"),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_what_can_not_be_used_is_named_at_the_start_and_left_aside_later(
    folder: Path, tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    spoil, words = WRONGS[wrong]
    tls = Tls(folder, clock)
    before = tls.credentials
    spoil(folder, tmp_path)
    with pytest.raises(VfleetError, match=rf"--tls {folder}: {words}") as refused:
        Tls(folder, clock)
    assert refused.value.reason is Reason.INVALID_FIELD
    for _ in range(3):
        look(tls, clock)
    assert tls.credentials is before
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 1
    assert "stays in use" in caplog.text


def test_a_certificate_that_has_expired_or_is_not_valid_yet_is_refused(folder: Path, clock: ManualClock) -> None:
    for days in (-1, 91):
        late = ManualClock(clock.now + timedelta(days=days).total_seconds())
        with pytest.raises(VfleetError, match=r"it is valid from .* UTC, which isn't now"):
            Tls(folder, late)


def test_new_files_are_used_from_the_next_look_on_and_only_then_other_credentials(
    ca: Path, folder: Path, tmp_path: Path, clock: ManualClock
) -> None:
    tls = Tls(folder, clock)
    before = tls.credentials
    look(tls, clock)
    assert tls.credentials is before
    issue(ca, tmp_path / "new", "host", "h1")
    take(folder, tmp_path / "new")
    assert tls.credentials is before
    look(tls, clock)
    assert tls.credentials.certificate == (tmp_path / "new" / "tls.crt").read_bytes()


def test_files_that_change_one_after_the_other_are_used_once_they_fit(
    ca: Path, folder: Path, tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    tls = Tls(folder, clock)
    before = tls.credentials
    issue(ca, tmp_path / "new", "host", "h1")
    take(folder, tmp_path / "new", "tls.crt")
    look(tls, clock)
    assert tls.credentials is before
    assert "tls.key can't be used: it is not the key of tls.crt" in caplog.text
    take(folder, tmp_path / "new", "tls.key")
    look(tls, clock)
    assert tls.credentials.key == (tmp_path / "new" / "tls.key").read_bytes()


def test_a_new_certificate_is_used_once_the_clock_comes_to_where_it_is_valid(
    ca: Path, folder: Path, tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    tls = Tls(folder, clock)
    before = tls.credentials
    issue(ca, tmp_path / "new", "host", "h1", clock=ManualClock(clock.now + HOUR_S))
    take(folder, tmp_path / "new")
    look(tls, clock)
    assert tls.credentials is before
    assert "it is valid from" in caplog.text
    clock.now += HOUR_S
    look(tls, clock)
    assert tls.credentials.certificate == (tmp_path / "new" / "tls.crt").read_bytes()


def test_files_that_go_while_they_are_read_change_nothing(
    ca: Path, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Vanishing(ManualClock):
        """Asked for the time when the files have been read, it takes the folder away."""

        def time(self) -> float:
            if self.vanishes:
                folder.rename(tmp_path / "gone")
            return super().time()

        vanishes = False

    clock = Vanishing(time.time())
    tls = Tls(folder, clock)
    before = tls.credentials
    issue(ca, tmp_path / "new", "host", "h1")
    take(folder, tmp_path / "new")
    clock.vanishes = True
    look(tls, clock)
    clock.vanishes = False
    look(tls, clock)
    assert tls.credentials is before
    assert "No such file" in caplog.text
    (tmp_path / "gone").rename(folder)
    look(tls, clock)
    assert tls.credentials.certificate == (tmp_path / "new" / "tls.crt").read_bytes()


def test_a_kubernetes_secret_changes_by_a_link(ca: Path, tmp_path: Path, clock: ManualClock) -> None:
    for version in ("1", "2"):
        issue(ca, tmp_path / f"data{version}", "host", "h1")
    mounted = tmp_path / "mounted"
    mounted.mkdir()
    (mounted / "..data").symlink_to(tmp_path / "data1")
    for name in FILES:
        (mounted / name).symlink_to(f"..data/{name}")
    tls = Tls(mounted, clock)
    (mounted / "new").symlink_to(tmp_path / "data2")
    (mounted / "new").rename(mounted / "..data")
    look(tls, clock)
    assert tls.credentials.certificate == (tmp_path / "data2" / "tls.crt").read_bytes()


def test_a_process_never_becomes_somebody_else(
    ca: Path, folder: Path, tmp_path: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    tls = Tls(folder, clock)
    issue(ca, tmp_path / "h2", "host", "h2")
    take(folder, tmp_path / "h2")
    assert look(tls, clock) == H1
    assert "it is for host 'h2' now, and was for host 'h1'" in caplog.text


@pytest.mark.parametrize(
    "uri",
    [
        "spiffe://vfleet/host",
        "spiffe://vfleet/host/",
        "spiffe://vfleet/host/h1/h2",
        "spiffe://vfleet/host/H1",
        "spiffe://vfleet/root/h1",
        "spiffe://other/host/h1",
        "spiffe://vfleet.example/host/h1",
        "https://vfleet/host/h1",
        "x spiffe://vfleet/host/h1",
        "",
    ],
)
def test_what_is_not_exactly_a_name_of_the_fleet_is_nobodys(uri: str) -> None:
    assert principal_of(uri) is None
    assert principal_of(H1.uri) == H1
