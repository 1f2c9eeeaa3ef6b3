"""What the options say of certificates and plaintext, and which addresses plaintext may be spoken with."""

import contextlib
from pathlib import Path

import pytest

from coordinator.config import parse as parse_coordinator
from hostd.config import parse as parse_hostd
from vfleet.errors import Reason, VfleetError
from vfleet.loopback import is_loopback
from vfleet.rpc import Channels, Server
from vfleet.security import Security

PARSERS = {
    "coordinator": lambda *more: parse_coordinator(["--name", "c1", *more]),
    "hostd": lambda *more: parse_hostd(["--topology", "t.yaml", "--host", "h1", "--data-dir", "d", *more]),
}
LOCAL_ETCD = ("--etcd", "127.0.0.1:2379")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VFLEET_TLS", "VFLEET_ETCD_TLS", "VFLEET_INSECURE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.8.9.1:0", "[::1]:7000", "localhost:1", "unix:/run/vfleet"])
def test_loopback_addresses(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:1",
        "[::]:1",
        "10.0.0.1:7000",
        "h1:7000",
        "localhost.example:1",
        "127.0.0.1.example:1",
        "128.0.0.1:1",
        "",
    ],
)
def test_addresses_that_others_can_reach_or_are_elsewhere(address: str) -> None:
    assert not is_loopback(address)


@pytest.mark.parametrize("daemon", PARSERS)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (LOCAL_ETCD, ("--tls DIR", "--insecure")),
        ((*LOCAL_ETCD, "--insecure", "--tls", "certs"), ("--tls and --insecure",)),
        ((*LOCAL_ETCD, "--insecure", "--listen", "0.0.0.0:7000"), ("--listen is '0.0.0.0:7000'", "loopback", "--tls")),
        (
            (*LOCAL_ETCD, "--insecure", "--metrics", "0.0.0.0:9464"),
            ("--metrics is '0.0.0.0:9464'", "loopback", "--tls"),
        ),
        (("--etcd", "127.0.0.1:1,etcd2:2379", "--insecure"), ("--etcd is 'etcd2:2379'", "loopback", "--tls")),
    ],
)
def test_what_can_not_be_meant_ends_a_daemon_with_one_line(
    capsys: pytest.CaptureFixture[str], daemon: str, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    with pytest.raises(SystemExit) as ended:
        PARSERS[daemon](*arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words), err


def test_a_host_without_certificates_is_advertised_on_this_machine_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        PARSERS["hostd"](*LOCAL_ETCD, "--insecure", "--advertise", "h1.example:7001")
    assert "--advertise is 'h1.example:7001'" in capsys.readouterr().err


@pytest.mark.parametrize("daemon", PARSERS)
def test_with_certificates_any_address_is_right(daemon: str) -> None:
    config = PARSERS[daemon]("--tls", "certs", "--listen", "0.0.0.0:7000", "--etcd", "etcd1:2379,etcd2:2379")
    assert config.security == Security(tls=Path("certs"))


def test_an_etcd_with_certificates_may_be_elsewhere_though_the_daemons_have_none() -> None:
    config = PARSERS["coordinator"]("--insecure", "--etcd-tls", "certs", "--etcd", "etcd1:2379")
    assert config.security == Security(etcd_tls=Path("certs"), insecure=True)


def test_the_environment_says_what_the_options_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VFLEET_TLS", "own")
    monkeypatch.setenv("VFLEET_ETCD_TLS", "etcds")
    parse = PARSERS["coordinator"]
    assert parse(*LOCAL_ETCD).security == Security(Path("own"), Path("etcds"))
    assert parse(*LOCAL_ETCD, "--tls", "other").security.tls == Path("other")
    assert parse(*LOCAL_ETCD, "--insecure").security == Security(None, Path("etcds"), insecure=True)


async def test_neither_end_of_a_plaintext_connection_is_on_another_machine() -> None:
    channels = Channels()
    with pytest.raises(VfleetError, match=r"10\.0\.0\.1:7000.*--tls") as refused:
        channels.to("10.0.0.1:7000")
    assert refused.value.reason is Reason.INVALID_FIELD
    server = Server(())
    with pytest.raises(VfleetError, match=r"0\.0\.0\.0:0.*--tls"):
        server.listen("0.0.0.0:0")
    with contextlib.suppress(VfleetError):
        await server.stop(0)
