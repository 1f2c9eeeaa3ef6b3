"""The commands about built-in workloads: drivers that verify every access of theirs."""

from typing import Annotated

import typer

from vfleet.cli.fleet import DriverArgument, FunctionArgument
from vfleet.cli.output import Output, OutputOption, hex64, milliseconds, print_fields, print_message
from vfleet.cli.session import CoordinatorOption, EtcdOption, driver_host, fleet_client, run
from vfleet.v1.driver_service_pb2 import WorkloadOptions, WorkloadReport

app = typer.Typer()


@app.command("start")
def start(
    driver: DriverArgument,
    function: FunctionArgument,
    rate: Annotated[
        int, typer.Option("--rate", min=0, max=1_000_000, help="Accesses per second; 0 for all it can.")
    ] = 0,
    window: Annotated[
        int, typer.Option("--window", min=0, max=64, help="Accesses on their way at once; 0 for 16.")
    ] = 0,
    channel: Annotated[
        int, typer.Option("--channel", min=0, max=7, help="Sequence checker's channel, one a driver.")
    ] = 0,
    memory_bytes: Annotated[
        int, typer.Option("--memory-bytes", min=0, max=1 << 31, help="Local memory to use; 0 for all.")
    ] = 0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=(1 << 64) - 1, help="Seed of the values that it writes.")
    ] = 0,
    kind: Annotated[
        str, typer.Option("--kind", metavar="MODEL", help="Device it drives; by default what the function is.")
    ] = "",
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
) -> None:
    """Start a workload of a driver on one of its functions.

    Example: vfleet workload start d1 vf1 --rate 5000
    """
    options = WorkloadOptions(
        accesses_per_second=rate, window=window, channel=channel, memory_bytes=memory_bytes, seed=seed, kind=kind
    )

    async def command() -> None:
        if not kind:
            async with fleet_client(coordinator, etcd) as fleet:
                options.kind = (await fleet.get_function(function)).model
        async with driver_host(coordinator, etcd, driver) as host:
            await host.start_workload(driver, function, options)
        typer.echo(f"{driver} works on {function}")

    run(command())


@app.command("stop")
def stop(
    driver: DriverArgument,
    function: FunctionArgument,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Stop a workload and show its final report. During a hold it may run still: it stops when it has its answers.

    Example: vfleet workload stop d1 vf1
    """

    async def command() -> WorkloadReport:
        async with driver_host(coordinator, etcd, driver) as host:
            return await host.stop_workload(driver, function)

    _show(run(command()), output)


@app.command("report")
def report(
    driver: DriverArgument,
    function: FunctionArgument,
    restart: Annotated[bool, typer.Option("--restart", help="Let longest gap and latencies start anew.")] = False,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what a workload did and saw so far.

    Example: vfleet workload report d1 vf1
    """

    async def command() -> WorkloadReport:
        async with driver_host(coordinator, etcd, driver) as host:
            return await host.workload_report(driver, function, restart_measurement=restart)

    _show(run(command()), output)


def _show(found: WorkloadReport, output: Output) -> None:
    if output is not Output.TABLE:
        print_message(found, output)
        return
    print_fields(
        [
            ("Driver", found.driver),
            ("Function", f"{found.function}, at virtual address {hex64(found.virtual_address)}"),
            ("Running", "yes" if found.running else f"no{f': {found.failure}' if found.failure else ''}"),
            ("Operations", f"{found.operations:,}"),
            ("Lost", found.lost),
            ("Repeated", found.repeated),
            ("Reordered", found.reordered),
            ("Misrouted", found.misrouted),
            ("Mismatches", found.mismatches),
            ("Errors", found.errors),
            ("Longest gap", milliseconds(found.longest_gap)),
            ("Longest blackout", milliseconds(found.blackout)),
            ("Latency, median", milliseconds(found.latency_p50)),
            ("Latency, 99th percentile", milliseconds(found.latency_p99)),
            ("Latency, longest", milliseconds(found.latency_max)),
        ]
    )
