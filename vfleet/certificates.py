"""A small CA for trials: made in one folder, issuing certificates into others, of which each is a `--tls DIR`.

In production something else issues them, cert-manager for example, with the same names in them. Keys are readable by
their owner alone, and nothing is ever overwritten.
"""

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from vfleet.clock import Clock, SystemClock
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.names import check_name
from vfleet.principal import (
    CA_FILE,
    CERTIFICATE_FILE,
    DAEMON_NAME,
    ETCD_NAME,
    KEY_FILE,
    TRUST_DOMAIN,
    Principal,
    server_name,
)
from vfleet.roles import Role

CA_KEY_FILE = "ca.key"
ETCD = "etcd"  # an etcd server: no role of vfleet's, but it has certificates of the same kind
KINDS = (*(role.value for role in Role), ETCD)
CA_DAYS = 3650
DAYS = 90
MAX_DAYS = 36_500
MAX_SANS = 100
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
_CLOCKS_DIFFER = timedelta(minutes=5)
_SERVERS = (Role.COORDINATOR, Role.HOST, ETCD)


def make_ca(folder: Path, *, name: str = "vfleet trial CA", days: int = CA_DAYS, clock: Clock | None = None) -> None:
    """Make a CA: ca.crt, which everybody gets, and ca.key, which issues. Raise INVALID_FIELD or ALREADY_EXISTS."""
    if not 1 <= len(name) <= 64:
        raise invalid_field("--name", name, "1 to 64 characters")
    key, subject = _new_key(), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, subject, key, _check_days(days), _now(clock))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(is_ca=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    _write(folder, {CA_FILE: _pem(builder.sign(key, SHA256())), CA_KEY_FILE: _key_pem(key)})


def issue(
    ca_folder: Path,
    folder: Path,
    kind: str,
    name: str,
    *,
    dns: Sequence[str] = (),
    addresses: Sequence[str] = (),
    days: int = DAYS,
    clock: Clock | None = None,
) -> None:
    """Issue a certificate for who has a role, or for an etcd server, into `folder`, with ca.crt and the key.

    `dns` and `addresses` are further names of a server: what is not vfleet's own looks for them. It is valid for `days`
    from now on. Raise INVALID_FIELD, or ALREADY_EXISTS rather than overwrite.
    """
    if kind not in KINDS:
        raise invalid_field("role", kind, f"one of {', '.join(KINDS)}")
    check_name("name", name)
    if (dns or addresses) and kind not in _SERVERS:
        raise invalid_field("--dns or --ip", [*dns, *addresses][0], f"none: a {kind} is no server")
    names = [*_own_names(kind, name), *map(_checked_dns, dns), *map(_checked_address, addresses)]
    if len(names) > MAX_SANS:
        raise invalid_field("--dns and --ip", f"{len(names)} names", f"at most {MAX_SANS}")
    ca_pem, issuer, ca_key = _open_ca(ca_folder)
    begin = _now(clock)
    latest = (issuer.not_valid_after_utc - begin).days
    if _check_days(days) > latest:
        raise invalid_field("--days", days, f"at most {latest}: {ca_folder / CA_FILE} ends then")
    key = _new_key()
    authority = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), issuer.subject, key, days, begin)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(is_ca=False), critical=True)
        # An etcd server is its own client, too, and so are vfleet's daemons each other's.
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]), critical=False
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
    )
    certificate = _pem(builder.sign(ca_key, SHA256()))
    _write(folder, {CA_FILE: ca_pem, CERTIFICATE_FILE: certificate, KEY_FILE: _key_pem(key)})


def _own_names(kind: str, name: str) -> list[x509.GeneralName]:
    if kind == ETCD:
        return [x509.DNSName(ETCD_NAME), x509.DNSName(DAEMON_NAME)]
    role = Role(kind)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(Principal(role, name).uri)]
    if role in _SERVERS:
        names += [x509.DNSName(each) for each in (server_name(role, name), server_name(role), DAEMON_NAME)]
    return names


def _checked_dns(name: str) -> x509.GeneralName:
    if len(name) > 253 or not _DNS.fullmatch(name):
        raise invalid_field("--dns", name, "a DNS name")
    if name.lower().endswith(f".{TRUST_DOMAIN}"):
        raise invalid_field("--dns", name, f"a name that doesn't end in .{TRUST_DOMAIN}: those say who it is")
    return x509.DNSName(name)


def _checked_address(address: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(address))
    except ValueError:
        raise invalid_field("--ip", address, "an IP address") from None


def _open_ca(folder: Path) -> tuple[bytes, x509.Certificate, ec.EllipticCurvePrivateKey]:
    try:
        pem = (folder / CA_FILE).read_bytes()
        certificate = x509.load_pem_x509_certificate(pem)
        key = load_pem_private_key((folder / CA_KEY_FILE).read_bytes(), None)
    except OSError as error:
        raise invalid_field("--ca", str(folder), f"a folder that `vfleet certs init` has made ({error})") from None
    except (ValueError, TypeError) as error:
        raise invalid_field("--ca", str(folder), f"a CA in PEM ({error})") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise invalid_field(
            "--ca", str(folder), f"{CA_KEY_FILE} that is the key of {CA_FILE}, as `vfleet certs init` makes it"
        )
    return pem, certificate, key


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int, begin: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin - _CLOCKS_DIFFER)
        .not_valid_after(begin + timedelta(days=days))
    )


def _key_usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _check_days(days: int) -> int:
    if not 1 <= days <= MAX_DAYS:
        raise invalid_field("--days", days, f"1 to {MAX_DAYS}")
    return days


def _new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(folder: Path, files: dict[str, bytes]) -> None:
    """Write all files, or, if one of them is there, none."""
    folder.mkdir(parents=True, exist_ok=True)
    there = [str(folder / name) for name in files if (folder / name).exists()]
    if there:
        raise VfleetError(Reason.ALREADY_EXISTS, f"{', '.join(there)} is there already, and is not overwritten")
    for name, content in files.items():
        mode = 0o600 if name.endswith(".key") else 0o644
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)


def _now(clock: Clock | None) -> datetime:
    return datetime.fromtimestamp((clock or SystemClock()).time(), UTC)
