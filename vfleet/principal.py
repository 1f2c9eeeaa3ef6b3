"""Whom a certificate speaks for: a role and a name, and how the two are written in it.

As the URI `spiffe://vfleet/ROLE/NAME`, by which a server knows its caller, and, for a server, as the DNS names
`NAME.ROLE.vfleet` and `ROLE.vfleet`, by which a caller knows it: an address is no identity.
"""

from contextvars import ContextVar
from dataclasses import dataclass

from vfleet.errors import VfleetError
from vfleet.names import check_name
from vfleet.roles import Role

# The files of who has a certificate, as in a Kubernetes TLS secret.
CA_FILE, CERTIFICATE_FILE, KEY_FILE = "ca.crt", "tls.crt", "tls.key"
TRUST_DOMAIN = "vfleet"
# Further DNS names: etcd can be told to take as a client, or as a member, only who has this one or that.
DAEMON_NAME, ETCD_NAME = f"daemon.{TRUST_DOMAIN}", f"etcd.{TRUST_DOMAIN}"
_URI = f"spiffe://{TRUST_DOMAIN}/"


@dataclass(frozen=True, slots=True)
class Principal:
    """A role, and the name of who has it: a host's, a coordinator's, a person's. Raise INVALID_FIELD for no name."""

    role: Role
    name: str

    def __post_init__(self) -> None:
        check_name("name", self.name)

    @property
    def uri(self) -> str:
        """The SPIFFE ID."""
        return f"{_URI}{self.role}/{self.name}"

    def __str__(self) -> str:
        return f"{self.role} {self.name!r}"


CALLER: ContextVar[Principal | None] = ContextVar("CALLER", default=None)
"""Who makes the call that is being served; None where connections are plaintext, and everybody is trusted."""


def principal_of(uri: str) -> Principal | None:
    """Return whom a SPIFFE ID names; None if it isn't one of vfleet's."""
    role, slash, name = uri.removeprefix(_URI).partition("/")
    if not uri.startswith(_URI) or not slash or role not in frozenset(Role):
        return None
    try:
        return Principal(Role(role), name)
    except VfleetError:
        return None


def server_name(role: Role, name: str = "") -> str:
    """Return the DNS name in the certificate of a server: of any that has the role, or of the one with the name."""
    return f"{name}.{role}.{TRUST_DOMAIN}" if name else f"{role}.{TRUST_DOMAIN}"
