"""Certificates for tests: a CA and a folder for each who is somebody, as LocalCluster expects them."""

from collections.abc import Iterable
from pathlib import Path

from vfleet.certificates import issue, make_ca

LOOPBACK = ("127.0.0.1",)


def make_certs(folder: Path, hosts: Iterable[str] = ("h1", "h2", "h3"), coordinators: Iterable[str] = ("c1",)) -> Path:
    """Make a CA, and all certificates of a cluster, an operator's and a viewer's."""
    make_ca(folder)
    people = [("operator", "local"), ("viewer", "local")]
    for kind, name in [*(("host", h) for h in hosts), *(("coordinator", c) for c in coordinators), *people]:
        issue(folder, folder / f"{kind}-{name}", kind, name)
    issue(folder, folder / "etcd-local", "etcd", "local", addresses=LOOPBACK, dns=["localhost"])
    return folder
