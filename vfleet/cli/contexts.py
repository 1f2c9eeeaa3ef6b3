"""The commands about contexts: context list, context use."""

from typing import Annotated

import typer

from vfleet.cli.output import print_table
from vfleet.cli.settings import load_settings, use_context
from vfleet.errors import VfleetError

app = typer.Typer()


def context_names(incomplete: str) -> list[str]:
    """Complete the name of a context. There is no place for errors: of settings that can't be read there are none."""
    try:
        return [name for name in load_settings().contexts if name.startswith(incomplete)]
    except VfleetError:
        return []


@app.command("list")
def list_contexts() -> None:
    """List the clusters that have a name, and which of them is the current one.

    They are in ~/.config/vfleet/config.yaml. `local` is the cluster that `vfleet up` runs on this machine.

    Example: vfleet context list
    """
    settings = load_settings()
    print_table(
        ("CURRENT", "CONTEXT", "COORDINATOR", "ETCD"),
        (
            ("*" if name == settings.current else "", name, context.coordinator or "", context.etcd or "")
            for name, context in settings.contexts.items()
        ),
    )


@app.command("use")
def use(
    context: Annotated[str, typer.Argument(metavar="CONTEXT", help="Its name.", autocompletion=context_names)],
) -> None:
    """Make a cluster the one that commands mean where they don't name another.

    Example: vfleet context use local
    """
    what = use_context(context).contexts[context]
    typer.echo(f"commands mean {context}: {what.coordinator or what.etcd or 'the cluster of vfleet up'}")
