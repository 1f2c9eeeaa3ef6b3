"""How the connections of a process are secured, as its command line says: by certificates, or not at all.

Plaintext has to be asked for, and then nothing leaves the machine: neither what is listened to, nor what is called.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vfleet.errors import Reason, VfleetError
from vfleet.loopback import check_loopback
from vfleet.roles import Role

if TYPE_CHECKING:
    # Imported when there are certificates: what reads them takes a command on plaintext a twentieth of a second.
    from vfleet.tls import Tls

TLS_VARIABLE, ETCD_TLS_VARIABLE = "VFLEET_TLS", "VFLEET_ETCD_TLS"


@dataclass(frozen=True, slots=True)
class Keys:
    """The certificates of a process, for vfleet's daemons and for etcd; None for plaintext."""

    tls: "Tls | None"
    etcd: "Tls | None"


@dataclass(frozen=True, slots=True)
class Security:
    """What the options say: a folder for `tls`, another one for etcd if that has its own CA, or `insecure`.

    Raise INVALID_FIELD if they say nothing, or both.
    """

    tls: Path | None = None
    etcd_tls: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        if self.insecure and self.tls is not None:
            raise _wrong("both --tls and --insecure are given; expected one of them")
        if not self.insecure and self.tls is None:
            raise _wrong(
                f"give --tls DIR (or {TLS_VARIABLE}), a folder with ca.crt, tls.crt and tls.key, or --insecure for "
                "plaintext that doesn't leave this machine"
            )

    @classmethod
    def given(cls, tls: Path | None, etcd_tls: Path | None, *, insecure: bool) -> "Security":
        """Return what options say, and the environment where they say nothing."""
        by_default = None if insecure else _variable(TLS_VARIABLE)
        return cls(tls or by_default, etcd_tls or _variable(ETCD_TLS_VARIABLE), insecure)

    def check(self, field: str, address: str) -> None:
        """Raise INVALID_FIELD if an address of vfleet's, HOST:PORT, can't be used: plaintext and not loopback."""
        if self.tls is None:
            check_loopback(field, address)

    def check_etcd(self, field: str, address: str) -> None:
        """Raise the same for an endpoint of etcd."""
        if self.tls is None and self.etcd_tls is None:
            check_loopback(field, address)

    def open(self, role: Role | None = None, name: str = "") -> Keys:
        """Read the folders. Raise INVALID_FIELD, also if the certificate is not that of a role and, if given, name."""
        if self.tls is None and self.etcd_tls is None:
            return Keys(None, None)
        from vfleet.tls import Tls

        tls = Tls(self.tls) if self.tls is not None else None
        if tls is not None and role is not None:
            tls.require(role, name)
        return Keys(tls, Tls(self.etcd_tls, option="--etcd-tls") if self.etcd_tls is not None else tls)


INSECURE = Security(insecure=True)


def _variable(name: str) -> Path | None:
    value = os.environ.get(name)
    return Path(value) if value else None


def _wrong(message: str) -> VfleetError:
    return VfleetError(Reason.INVALID_FIELD, message, metadata={"field": "--tls"})
