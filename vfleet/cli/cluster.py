"""The command `up`: a local cluster that stays up until Ctrl-C."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from vfleet.caller import parse_addresses
from vfleet.cli.output import print_table
from vfleet.cli.session import OwnEtcdOption, refuse_certificates, run, state_file
from vfleet.clock import SystemClock
from vfleet.local import LocalCluster


def up(
    topology: Annotated[Path, typer.Argument(metavar="TOPOLOGY", help="The topology file.")],
    coordinators: Annotated[int, typer.Option("--coordinators", metavar="N", help="How many coordinators.")] = 1,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Where to keep data and logs; by default, only while it is up.")
    ] = None,
    etcd: OwnEtcdOption = None,
) -> None:
    """Run a cluster on this machine until Ctrl-C.

    It has etcd, coordinators, and a hostd for each host of the topology, each a process of its own. Other vfleet
    commands find it by themselves. A daemon that ends, or is killed, is started again. Functions and drivers that the
    topology declares are made if they aren't there.

    Example: vfleet up vfleet/topologies/demo.yaml
    """
    refuse_certificates()
    endpoints = parse_addresses("--etcd", etcd) if etcd is not None else ()
    with contextlib.ExitStack() as stack:
        directory = data_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vfleet-")))
        cluster = LocalCluster(topology, directory, etcd=endpoints, coordinators=coordinators)
        run(_stay_up(cluster))


async def _stay_up(cluster: LocalCluster) -> None:
    with contextlib.suppress(asyncio.CancelledError), cancelled_by_signals():
        async with cluster:
            with _announced(cluster):
                await _ask_for_declared(cluster)
                _print_cluster(cluster)
                await cluster.keep_running(lambda line: typer.echo(line, err=True))


async def _ask_for_declared(cluster: LocalCluster) -> None:
    # Imported where they are needed: pydantic takes every command a tenth of a second.
    from vfleet.cli.declaration import Declaration
    from vfleet.declared import read_declared

    async with cluster.fleet() as fleet:
        declaration = Declaration(fleet, cluster.host, SystemClock(), typer.echo, _complain)
        await declaration.ask_for(read_declared(cluster.topology))


def _complain(line: str) -> None:
    typer.echo(f"vfleet: {line}", err=True)


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Let Ctrl-C, SIGTERM and the end of the terminal cancel the current task, so that it can clean up."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # a coroutine that runs is in a task
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in signals:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def _announced(cluster: LocalCluster) -> Iterator[None]:
    """Leave the cluster's addresses where other commands look for them."""
    path = state_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"coordinator": ",".join(cluster.coordinator_addresses), "pid": os.getpid(), "insecure": True})
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(content, encoding="utf-8")
    new.replace(path)
    try:
        yield
    finally:
        if path.exists() and path.read_text(encoding="utf-8") == content:  # else another cluster came up since
            path.unlink()


def _print_cluster(cluster: LocalCluster) -> None:
    etcd = "its own" if cluster.etcd_server is not None else "given"
    rows: list[tuple[object, ...]] = [("etcd", etcd, ",".join(cluster.etcd), "", "", "")]
    for kind, daemons in (("coordinator", cluster.coordinators), ("hostd", cluster.hosts)):
        rows += [(kind, d.name, d.address, d.metrics, d.process.pid, d.log) for d in daemons.values()]
    print_table(("DAEMON", "NAME", "ADDRESS", "METRICS", "PID", "LOG"), rows)
    typer.echo("\nThe cluster is up. In another terminal:\n")
    typer.echo("    vfleet get devices")
    first = next(iter(cluster.hosts))
    typer.echo(f"    vfleet create function vf1 --on {first}/DEVICE")
    typer.echo(f"    vfleet attach vf1 --driver d1 --host {first}")
    typer.echo("    vfleet workload start d1 vf1")
    typer.echo("    vfleet migrate vf1 --to HOST/DEVICE --wait\n")
    typer.echo(f"Metrics of each, for Prometheus: curl {next(iter(cluster.hosts.values())).metrics}\n")
    typer.echo("Ctrl-C ends it.")
    sys.stdout.flush()
