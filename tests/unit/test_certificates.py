"""The CA for trials: what it makes, and what it refuses to make."""

import stat
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from support.manual_clock import ManualClock

from vfleet.certificates import KINDS, issue, make_ca
from vfleet.cli.main import run
from vfleet.errors import Reason, VfleetError
from vfleet.tls import Tls

DAY_S = 86_400


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    make_ca(tmp_path / "ca", days=100)
    return tmp_path / "ca"


def names(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Return a certificate's URIs, DNS names and addresses."""
    certificate = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return (
        found.get_values_for_type(x509.UniformResourceIdentifier),
        found.get_values_for_type(x509.DNSName),
        [str(address) for address in found.get_values_for_type(x509.IPAddress)],
    )


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_has_a_role_has_a_folder_that_can_be_used(ca: Path, tmp_path: Path, kind: str) -> None:
    issue(ca, tmp_path / "own", kind, "x1")
    tls = Tls(tmp_path / "own")
    own = tls.credentials.principal
    assert (str(own.role), own.name) == (kind, "x1") if own is not None else kind == "etcd"
    certificate = x509.load_pem_x509_certificate((tmp_path / "own" / "tls.crt").read_bytes())
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert set(usage) == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    assert 89 <= (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days <= 90


def test_the_names_by_which_servers_are_known(ca: Path, tmp_path: Path) -> None:
    issue(ca, tmp_path / "h1", "host", "h1", dns=["h1.lab", "*.lab"], addresses=["10.0.0.1", "fd00::1"])
    dns = ["h1.host.vfleet", "host.vfleet", "daemon.vfleet", "h1.lab", "*.lab"]
    assert names(tmp_path / "h1") == (["spiffe://vfleet/host/h1"], dns, ["10.0.0.1", "fd00::1"])
    issue(ca, tmp_path / "eve", "viewer", "eve")
    assert names(tmp_path / "eve") == (["spiffe://vfleet/viewer/eve"], [], [])
    issue(ca, tmp_path / "e1", "etcd", "e1", addresses=["10.0.0.9"])
    assert names(tmp_path / "e1") == ([], ["etcd.vfleet", "daemon.vfleet"], ["10.0.0.9"])


def test_keys_are_their_owners_alone(ca: Path, tmp_path: Path) -> None:
    issue(ca, tmp_path / "h1", "host", "h1")
    for key in (ca / "ca.key", tmp_path / "h1" / "tls.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600


@pytest.mark.parametrize("there", ["ca.crt", "tls.crt", "tls.key"])
def test_nothing_is_overwritten(ca: Path, tmp_path: Path, there: str) -> None:
    (tmp_path / "h1").mkdir()
    (tmp_path / "h1" / there).write_text("mine")
    with pytest.raises(VfleetError, match=there) as refused:
        issue(ca, tmp_path / "h1", "host", "h1")
    assert refused.value.reason is Reason.ALREADY_EXISTS
    assert [path.name for path in (tmp_path / "h1").iterdir()] == [there]
    with pytest.raises(VfleetError, match=r"ca\.crt.*ca\.key"):
        make_ca(ca)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("issue king h1", "role is 'king'; expected one of viewer, operator, coordinator, host, etcd"),
        ("issue host H1", "name is 'H1'"),
        ("issue host h1 --days 0", "--days is 0; expected 1 to 36500"),
        ("issue host h1 --days 101", "--days is 101; expected at most "),
        ("issue host h1 --dns a..b", "--dns is 'a..b'; expected a DNS name"),
        ("issue host h1 --dns h2.host.vfleet", "--dns is 'h2.host.vfleet'; expected a name that doesn't end in"),
        ("issue host h1 --dns h2.host.VFLEET", "--dns is 'h2.host.VFLEET'; expected a name that doesn't end in"),
        ("issue host h1 --ip 10.0.0", "--ip is '10.0.0'; expected an IP address"),
        ("issue viewer eve --ip 10.0.0.1", "expected none: a viewer is no server"),
        ("init other --days -1", "--days is -1"),
        ("init other --name=", "--name is ''"),
    ],
)
def test_the_command_says_in_one_line_what_can_not_be(
    ca: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--ca", "ca"] if command.startswith("issue") else []
    assert run(["certs", *command.split(), *more]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["ca"]


def test_a_folder_that_is_no_ca_issues_nothing(ca: Path, tmp_path: Path) -> None:
    issue(ca, tmp_path / "h1", "host", "h1")
    for wrong in (tmp_path, tmp_path / "h1"):
        with pytest.raises(VfleetError, match="--ca is"):
            issue(wrong, tmp_path / "h2", "host", "h2")
    (ca / "ca.key").write_bytes((tmp_path / "h1" / "tls.key").read_bytes())
    with pytest.raises(VfleetError, match=r"ca\.key that is the key of ca\.crt"):
        issue(ca, tmp_path / "h2", "host", "h2")


def test_the_command_makes_what_daemons_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["certs", "init", str(tmp_path / "ca")]) == 0
    assert run(["certs", "issue", "host", "h1", "--ca", str(tmp_path / "ca")]) == 0
    folder = tmp_path / "ca" / "host-h1"
    assert str(folder) in capsys.readouterr().out
    assert str(Tls(folder).credentials.principal) == "host 'h1'"


def test_no_certificate_outlasts_its_ca_whenever_it_begins(ca, tmp_path):
    issue(ca, tmp_path / "near", "host", "h1", days=50, clock=ManualClock(time.time() + 40 * DAY_S))
    with pytest.raises(VfleetError, match="--days is 70; expected at most"):
        issue(ca, tmp_path / "far", "host", "h1", days=70, clock=ManualClock(time.time() + 40 * DAY_S))
