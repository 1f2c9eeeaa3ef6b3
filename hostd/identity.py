"""Who this host is: its incarnation, and which session of its daemon this is.

The incarnation is the simulated machine's, not the daemon's: it changes when the data directory is new, when the
machine is power-cycled on purpose, and when the kernel below was booted anew, since then what the daemon keeps only in
the page cache may be gone.

Sessions grow with every start, also from one incarnation to the next, since functions elsewhere refuse a driver's
earlier ones. A new directory begins with the present second: later than any that was there before it had counted to.
"""

from pathlib import Path
from random import Random

from hostd.ledger import Ledger
from vfleet.clock import Clock
from vfleet.errors import invalid_field
from vfleet.v1.host_records_pb2 import HostIdentity

_KIND = "identity"
_KEY = "host"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def kernel_boot_id() -> str:
    """Return what the kernel drew at its boot; empty where it tells no such thing."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def open_identity(
    ledger: Ledger, host: str, boot_id: str, random: Random, clock: Clock, *, power_cycle: bool
) -> HostIdentity:
    """Count this start, in the incarnation of before or, where that is over, in a new one over an empty ledger.

    Raise INVALID_FIELD if the data directory is another host's.
    """
    known = ledger.get(_KIND, _KEY, HostIdentity)
    if known is not None and known.host != host:
        raise invalid_field("data-dir", known.host, f"a directory of host {host!r}, or a new one")
    with ledger.together():
        if known is None or power_cycle or known.kernel_boot_id != boot_id:
            ledger.erase()
            known = HostIdentity(
                incarnation=f"{random.getrandbits(64):016x}",
                kernel_boot_id=boot_id,
                host=host,
                session=known.session if known is not None else int(clock.time()),
            )
        known.session += 1
        known.starts += 1
        ledger.put(_KIND, _KEY, known)
    return known
