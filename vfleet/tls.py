"""The certificates of a process: a folder with those of a CA, its own, and the key; read again when they change.

The files are those of a Kubernetes TLS secret. A change is seen by the next connection: those that stand, and what
goes over them, stay. What can't be read, is half written or doesn't fit together changes nothing: what was there
before stays in use, and the log says so.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from vfleet.clock import Clock, SystemClock
from vfleet.errors import Reason, VfleetError
from vfleet.principal import CA_FILE, CERTIFICATE_FILE, KEY_FILE, Principal, principal_of
from vfleet.roles import Role

LOOK_AGAIN_S = 1.0
MAX_FILE_BYTES = 1 << 20

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one look at the folder found, as PEM, whose it is (None: nobody's that has a role in vfleet), and until when
    it is valid, in seconds since 1970.
    """

    ca: bytes
    certificate: bytes
    key: bytes
    principal: Principal | None
    expires_s: float

    def for_channel(self) -> grpc.ChannelCredentials:
        """Return what a client connects with."""
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)

    def for_server(self) -> grpc.ServerCertificateConfiguration:
        """Return what a server meets a client with."""
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.ca)


class Tls:
    """The folder. It may be asked from any thread: gRPC asks from its own, once for each connection."""

    def __init__(self, folder: Path, clock: Clock | None = None, *, option: str = "--tls") -> None:
        """Read the folder. Raise INVALID_FIELD, naming the option, the file and what is wrong with it."""
        self._folder = folder
        self._option = option
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._look_again_s = self._clock.monotonic() + LOOK_AGAIN_S
        self._seen = self._stamp()
        self._credentials = self._load()
        self._told = ""

    @property
    def credentials(self) -> Credentials:
        """What is in use: the same object until the files have changed into others that are sound."""
        if self._clock.monotonic() >= self._look_again_s:
            with self._lock:
                self._look()
        return self._credentials

    def require(self, role: Role, name: str = "") -> None:
        """Raise INVALID_FIELD unless it is the certificate of a role, and of the one with the name if that is given."""
        own = self._credentials.principal
        if own is None or own.role is not role or name not in ("", own.name):
            expected = f"for {Principal(role, name)}" if name else f"a {role}"
            uri = Principal(role, name or "name").uri
            raise self._wrong(CERTIFICATE_FILE, f"it is for {own or 'nobody in vfleet'}, not {expected} ({uri})")

    def for_server(self) -> grpc.ServerCredentials:
        """Return a server's credentials, which take no client without a certificate, and follow the files."""
        used = self.credentials

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal used
            now = self.credentials
            if now is used:
                return None
            used = now
            return now.for_server()

        return grpc.dynamic_ssl_server_credentials(
            used.for_server(),
            changed,  # type: ignore[arg-type]  # None stands for no change, as gRPC documents it and its stubs don't
            require_client_authentication=True,
        )

    def _look(self) -> None:
        now = self._clock.monotonic()
        if now < self._look_again_s:
            return  # another thread has looked
        self._look_again_s = now + LOOK_AGAIN_S
        try:
            stamp = self._stamp()
            found = self._load() if stamp != self._seen else None
            if found is not None and found.principal != self._credentials.principal:
                was, now_for = (each.principal or "nobody in vfleet" for each in (self._credentials, found))
                raise self._wrong(CERTIFICATE_FILE, f"it is for {now_for} now, and was for {was}")
            if self._stamp() != stamp:
                return  # changed while it was read: once more
        except VfleetError as error:
            # Looked at again and again, and told once: what is wrong may pass without a change of the files, as when a
            # clock comes to where a certificate is valid, or a right to read is given.
            if error.message != self._told:
                self._told = error.message
                _log.error("%s; what was there before stays in use", error.message)
            return
        self._seen, self._told = stamp, ""
        if found is not None:
            self._credentials = found
            _log.info("the certificates in %s have changed: new connections use them", self._folder)

    def _stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Return what changes when one of the files does."""
        stamps = []
        for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE):
            try:
                found = (self._folder / name).stat()
            except OSError as error:
                raise self._wrong(name, error.strerror) from None
            stamps.append((found.st_ino, found.st_mtime_ns, found.st_size))
        return tuple(stamps)

    def _load(self) -> Credentials:
        ca, certificate, key = (self._read(name) for name in (CA_FILE, CERTIFICATE_FILE, KEY_FILE))
        authorities = self._parsed(CA_FILE, x509.load_pem_x509_certificates, ca)
        leaf, *chain = self._parsed(CERTIFICATE_FILE, x509.load_pem_x509_certificates, certificate)
        public = self._parsed(CERTIFICATE_FILE, lambda _: leaf.public_key(), certificate)
        private = self._parsed(KEY_FILE, lambda data: load_pem_private_key(data, None), key)
        now = datetime.fromtimestamp(self._clock.time(), UTC)
        if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
            valid = f"from {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} to {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            raise self._wrong(CERTIFICATE_FILE, f"it is valid {valid}, which isn't now")
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if private.public_key().public_bytes(*form) != public.public_bytes(*form):
            raise self._wrong(KEY_FILE, f"it is not the key of {CERTIFICATE_FILE}")
        if not any(_has_issued(issuer, leaf) for issuer in (*chain, *authorities)):
            raise self._wrong(CERTIFICATE_FILE, f"no certificate in {CA_FILE} has issued it")
        return Credentials(ca, certificate, key, principal_in(leaf), leaf.not_valid_after_utc.timestamp())

    def _read(self, name: str) -> bytes:
        try:
            with (self._folder / name).open("rb") as file:
                return file.read(MAX_FILE_BYTES)
        except OSError as error:
            raise self._wrong(name, error.strerror) from None

    def _parsed(self, name: str, parse: Callable[[bytes], T], data: bytes) -> T:
        try:
            return parse(data)
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise self._wrong(name, f"it is not what it should be, in PEM: {error}") from None

    def _wrong(self, name: str, what: object) -> VfleetError:
        message = f"{self._option} {self._folder}: {name} can't be used: {what}"
        return VfleetError(Reason.INVALID_FIELD, message, metadata={"field": self._option, "certificate_file": name})


def principal_in(certificate: x509.Certificate) -> Principal | None:
    """Return whom a certificate speaks for; None if it names nobody, or more than one (SPIFFE allows one URI)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return principal_of(uris[0]) if len(uris) == 1 else None


def _has_issued(issuer: x509.Certificate, certificate: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
