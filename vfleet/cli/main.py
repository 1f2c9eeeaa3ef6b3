"""The vfleet command: its subcommands, and the one place where failures become a line and an exit code.

0 done, 1 failed, 2 bad input (`vfleet.cli.session.exit_code` says which is which).
"""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperOption

from vfleet import tracing
from vfleet.cli import (
    certs,
    cluster,
    contexts,
    demo,
    drain,
    fleet,
    get,
    history,
    migration,
    operations,
    plan,
    rearrange,
    top,
    workload,
)
from vfleet.cli.contexts import context_names
from vfleet.cli.help import HelpInPanels
from vfleet.cli.session import FAILED, INTERRUPTED, Chosen, chosen, exit_code
from vfleet.errors import VfleetError

# Plain help: it fits one screen. The error edge below replaces Typer's own, which prints tracebacks and boxes.
app = typer.Typer(
    name="vfleet",
    cls=HelpInPanels,
    help="Move SR-IOV virtual functions between hosts under running drivers.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Options: --context, --tls DIR, --insecure, --version, --install-completion.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vfleet {version('vfleet')}")
        raise typer.Exit


@app.callback()
def _options(
    context: Annotated[
        str | None,
        typer.Option("--context", metavar="NAME", help="The cluster of this name.", autocompletion=context_names),
    ] = None,
    tls: Annotated[
        Path | None,
        typer.Option("--tls", metavar="DIR", help="Folder with ca.crt, tls.crt and tls.key; or VFLEET_TLS."),
    ] = None,
    etcd_tls: Annotated[
        Path | None,
        typer.Option("--etcd-tls", metavar="DIR", help="The same for etcd, if its CA is another; or VFLEET_ETCD_TLS."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Plaintext instead, on loopback addresses alone.")
    ] = False,
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Move SR-IOV virtual functions between hosts under running drivers."""
    chosen.set(Chosen(context, tls, etcd_tls, insecure))


# The panels of the help. What is said of a command there has 25 characters at most.
_CLUSTER, _SEE, _MAKE, _MOVE, _HOSTS = "Cluster", "See", "Make and end", "Move", "Hosts and upkeep"

app.command("demo", short_help="Functions move under load", rich_help_panel=_CLUSTER)(demo.demo)
app.command("up", short_help="A cluster on this machine", rich_help_panel=_CLUSTER)(cluster.up)
app.add_typer(certs.app, name="certs", help="Certificates for a trial", rich_help_panel=_CLUSTER)
app.add_typer(contexts.app, name="context", help="Clusters with a name", rich_help_panel=_CLUSTER)
app.command("get", short_help="List what there is", rich_help_panel=_SEE)(get.get)
app.command("describe", short_help="Show one thing in full", rich_help_panel=_SEE)(fleet.describe_command)
app.command("history", short_help="Where a function has been", rich_help_panel=_SEE)(history.history)
app.command("events", short_help="What has changed", rich_help_panel=_SEE)(history.events)
app.command("doctor", short_help="Compare etcd with hosts", rich_help_panel=_SEE)(operations.doctor)
app.command("top", short_help="Watch the whole fleet", rich_help_panel=_SEE)(top.top)
app.add_typer(fleet.create_app, name="create", help="Make a function", rich_help_panel=_MAKE)
app.add_typer(fleet.delete_app, name="delete", help="End a function or driver", rich_help_panel=_MAKE)
app.command("attach", short_help="Attach a driver", rich_help_panel=_MAKE)(fleet.attach)
app.command("detach", short_help="Detach a driver", rich_help_panel=_MAKE)(fleet.detach)
app.add_typer(workload.app, name="workload", help="A driver at work", rich_help_panel=_MAKE)
app.command("plan", short_help="Where to, and why", rich_help_panel=_MOVE)(plan.plan)
app.command("migrate", short_help="Move some, all or none", rich_help_panel=_MOVE)(migration.migrate)
app.command("watch", short_help="Follow a migration", rich_help_panel=_MOVE)(migration.watch)
app.command("cancel", short_help="Abort a migration", rich_help_panel=_MOVE)(migration.cancel)
app.command("cordon", short_help="Keep functions away", rich_help_panel=_HOSTS)(operations.cordon)
app.command("uncordon", short_help="Put it back in use", rich_help_panel=_HOSTS)(operations.uncordon)
app.command("drain", short_help="Move everything away", rich_help_panel=_HOSTS)(drain.drain)
app.command("rebalance", short_help="Make loads even", rich_help_panel=_HOSTS)(rearrange.rebalance)
app.command("defragment", short_help="Make whole devices free", rich_help_panel=_HOSTS)(rearrange.defragment)
app.add_typer(operations.fleet_app, name="fleet", help="After a loss: etcd, host", rich_help_panel=_HOSTS)


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line and return its exit code. A failure is one line on standard error."""
    command = typer.main.get_command(app)
    # The help is to fit one screen, so that its last line names them instead. What --show-completion is for is said in
    # Typer's documentation.
    for option in (*command.params, command.get_help_option(typer.Context(command))):
        if isinstance(option, TyperOption):
            option.hidden = True
    try:
        tracing.enable(os.environ, "vfleet")
        result: object = command.main(list(arguments) or ["--help"], prog_name="vfleet", standalone_mode=False)
    except VfleetError as error:
        return _fail(error.message, exit_code(error))
    except typer.TyperException as error:
        return _fail(error.format_message(), error.exit_code)
    except typer.Abort:
        return INTERRUPTED
    except OSError as error:
        return _fail(str(error), FAILED)
    finally:
        tracing.close()
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    line = " ".join(message.split())
    typer.echo(f"vfleet: {line}", err=True)
    return code


def main() -> None:
    """Run the vfleet command."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
