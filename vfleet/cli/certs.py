"""The commands certs init and certs issue: certificates for a trial."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

_DAYS, _CA_DAYS = 90, 3650


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where to make it.")],
    name: Annotated[str, typer.Option("--name", help="What it is called.")] = "vfleet trial CA",
    days: Annotated[int, typer.Option("--days", metavar="N", help="For how long it is valid.")] = _CA_DAYS,
) -> None:
    """Make a CA: ca.crt, which everybody gets, and ca.key, which issues certificates and is to be kept.

    It is for trials. In production something else issues the certificates; docs/security.md says what is in them.

    Example: vfleet certs init certs
    """
    # Imported when needed: it costs every other command a twentieth of a second.
    from vfleet.certificates import make_ca

    make_ca(folder, name=name, days=days)
    typer.echo(f"a CA is in {folder}: keep ca.key where nobody else reads it")


@app.command("issue")
def issue(
    role: Annotated[str, typer.Argument(metavar="ROLE", help="viewer, operator, coordinator, host or etcd.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose it is; a host's is that of the topology.")],
    ca: Annotated[Path, typer.Option("--ca", metavar="DIR", help="The CA.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to put it; by default ROLE-NAME beside the CA.")
    ] = None,
    dns: Annotated[
        list[str] | None, typer.Option("--dns", metavar="NAME", help="A DNS name of a server; may be repeated.")
    ] = None,
    ip: Annotated[
        list[str] | None, typer.Option("--ip", metavar="ADDRESS", help="An address of a server; may be repeated.")
    ] = None,
    days: Annotated[int, typer.Option("--days", metavar="N", help="For how long it is valid.")] = _DAYS,
) -> None:
    """Issue a certificate: a folder for --tls, with ca.crt, tls.crt and tls.key.

    Where etcd is found has to be in its certificate: --dns, --ip. vfleet's own daemons are known by role and name,
    wherever they are.

    Example: vfleet certs issue etcd e1 --ca certs --dns etcd1 --ip 10.0.0.9
    """
    from vfleet.certificates import issue

    folder = out or ca / f"{role}-{name}"
    issue(ca, folder, role, name, dns=dns or (), addresses=ip or (), days=days)
    typer.echo(f"the certificate of {role} {name} is in {folder}")
