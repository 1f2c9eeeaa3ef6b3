"""Run in the service `certs`: a CA for a trial and the fleet's certificates, each in a volume of its own.

What is there already stays. The argument is the first three bytes of the addresses of the network of control.
"""

import os
import sys
from pathlib import Path

from vfleet.certificates import CA_KEY_FILE, issue, make_ca
from vfleet.principal import KEY_FILE

CERTS = Path("/certs")
CA = CERTS / "ca"
OWNER = 65532  # as whom the daemons run
DAYS = 365


def provide(folder: str, kind: str, name: str, *, dns: tuple[str, ...] = (), addresses: tuple[str, ...] = ()) -> None:
    """Issue a certificate that is not there yet."""
    own = CERTS / folder
    if not (own / KEY_FILE).exists():
        issue(CA, own, kind, name, dns=dns, addresses=addresses, days=DAYS)
    for path in (own, *own.iterdir()):
        os.chown(path, OWNER, OWNER)


def main() -> None:
    """Provide all of them."""
    network = sys.argv[1]
    if not (CA / CA_KEY_FILE).exists():
        make_ca(CA)
    for n in range(1, 4):
        provide(f"etcd{n}", "etcd", f"etcd{n}", dns=(f"etcd{n}",), addresses=(f"{network}.1{n}", "127.0.0.1"))
        provide(f"h{n}", "host", f"h{n}")
    for n in range(1, 3):
        provide(f"c{n}", "coordinator", f"c{n}")
    provide("operator", "operator", "person")


if __name__ == "__main__":
    main()
