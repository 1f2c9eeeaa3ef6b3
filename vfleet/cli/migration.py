"""The commands about migrations: migrate, watch, cancel."""

import asyncio
import enum
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from random import Random
from typing import Annotated

import typer

from vfleet import tracing
from vfleet.cli import complete, describe
from vfleet.cli import constraints as asked
from vfleet.cli.constraints import Rule
from vfleet.cli.output import Output, OutputOption, console, print_message
from vfleet.cli.progress import LiveProgress, progress_line
from vfleet.cli.session import (
    FAILED,
    CoordinatorOption,
    EtcdOption,
    TimeoutOption,
    checked_timeout,
    fleet_client,
    run,
)
from vfleet.client import PHASES_OVER, FleetClient, move_request, request_id
from vfleet.clock import backoff_delays
from vfleet.errors import Reason, VfleetError, invalid_field
from vfleet.failure import abort_cause, advice, is_passing, undone
from vfleet.names import check_device_name
from vfleet.v1.migration_service_pb2 import LimitPolicy, MigrationOptions, MoveRequest
from vfleet.v1.records_pb2 import Migration, Phase
from vfleet.v1.types_pb2 import TransferMode

_RETRY_FIRST_S = 1.0
_RETRY_LONGEST_S = 30.0


class Mode(enum.StrEnum):
    """When the state moves."""

    PRE_COPY = "pre-copy"
    POST_COPY = "post-copy"


class OnLimit(enum.StrEnum):
    """What happens if the downtime limit can't be met."""

    ABORT = "abort"
    FORCE = "force"


_MODES = {
    Mode.PRE_COPY: TransferMode.TRANSFER_MODE_PRE_COPY,
    Mode.POST_COPY: TransferMode.TRANSFER_MODE_POST_COPY,
}
_POLICIES = {OnLimit.ABORT: LimitPolicy.LIMIT_POLICY_ABORT, OnLimit.FORCE: LimitPolicy.LIMIT_POLICY_FORCE}

MigrationArgument = Annotated[
    str, typer.Argument(metavar="MIGRATION", help="The migration.", autocompletion=complete.active_migrations)
]


WaitOption = Annotated[bool, typer.Option("--wait", help="Wait until it is over; exit 1 if it was aborted.")]
FunctionsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="FUNCTION[=DEVICE[:VF]]…", help="Functions, and where each is to go.", autocompletion=complete.moves
    ),
]
ToOption = Annotated[
    str | None,
    typer.Option(
        "--to",
        metavar="DEVICE[:VF]",
        help="Where functions named without a device go; else it is chosen.",
        autocompletion=complete.devices,
    ),
]


def migrate(
    functions: FunctionsArgument,
    to: ToOption = None,
    host: asked.HostOption = Rule.ANY,
    adapter: asked.AdapterOption = Rule.ANY,
    bridge: asked.BridgeOption = Rule.ANY,
    parent_bridge: asked.ParentBridgeOption = Rule.ANY,
    power_domain: asked.PowerDomainOption = Rule.ANY,
    attachment: asked.AttachmentOption = None,
    prefer: asked.PreferOption = None,
    together: asked.TogetherOption = None,
    apart: asked.ApartOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    wait: WaitOption = False,
    timeout: TimeoutOption = None,
    name: Annotated[
        str, typer.Option("--request-id", metavar="NAME", help="Name of the migration; the same again is the same one.")
    ] = "",
    mode: Annotated[
        Mode,
        typer.Option("--mode", help="Copy all state before the move, or local memory after it: shorter, but riskier."),
    ] = Mode.PRE_COPY,
    downtime_limit: Annotated[
        int, typer.Option("--downtime-limit", metavar="MS", min=0, help="Longest blackout wanted; 0 for no limit.")
    ] = 0,
    on_limit: Annotated[
        OnLimit, typer.Option("--on-limit", help="What to do if that limit can't be met.")
    ] = OnLimit.ABORT,
    max_rounds: Annotated[
        int, typer.Option("--max-rounds", metavar="N", min=0, help="Rounds of copying before the hold; 0 for 8.")
    ] = 0,
    bandwidth: Annotated[
        int, typer.Option("--bandwidth", metavar="MIB/S", min=0, help="Of each copy, at most; 0 for no bound.")
    ] = 0,
    priority: Annotated[
        int,
        typer.Option("--priority", metavar="N", min=-100, max=100, help="If it has to wait: the highest goes first."),
    ] = 0,
    deadline: Annotated[
        int,
        typer.Option("--deadline", metavar="S", min=0, max=86_400, help="For how long it may wait; 0 for an hour."),
    ] = 0,
    retries: Annotated[
        int,
        typer.Option("--retries", metavar="N", min=0, max=10, help="Tries more if it fails for what may pass; waits."),
    ] = 0,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Move functions to other devices, all or none.

    Their drivers go on meanwhile, at the same virtual addresses. Devices that aren't named are chosen, as `vfleet plan`
    shows and explains. If there are too many migrations under way it is queued.

    \b
    Example: vfleet migrate vf1 --wait --timeout 60
    Example: vfleet migrate vf1 vf2 --host different --apart vf1,vf2
    Example: vfleet migrate vf1 --to h2/nic0 --wait
    Example: vfleet migrate vf1=h2/nic0 vf2=h3/nic1:4
    Example: vfleet migrate vf1 --to h2/nic0 --downtime-limit 20 --on-limit force --bandwidth 200
    Example: vfleet migrate vf1 --to h2/nic0 --mode post-copy --wait
    Example: vfleet migrate vf1 --priority 10 --deadline 60 --retries 2
    """
    options = MigrationOptions(
        mode=_MODES[mode],
        downtime_limit_ms=_fits("--downtime-limit", downtime_limit),
        limit_policy=_POLICIES[on_limit],
        max_rounds=_fits("--max-rounds", max_rounds),
        bandwidth_mib_per_s=_fits("--bandwidth", bandwidth),
    )
    moves, base = move_requests(functions, to), name or request_id()
    patience_s = _waiting(wait or bool(retries), timeout)
    wanted = asked.constraints(
        host=host,
        adapter=adapter,
        bridge=bridge,
        parent_bridge=parent_bridge,
        power_domain=power_domain,
        attachments=attachment,
        prefer=prefer,
        together=together,
        apart=apart,
    )

    async def command() -> Migration:
        async with fleet_client(coordinator, etcd) as fleet:
            if dry_run:
                return await fleet.plan_migration(moves, wanted)
            began_s = asyncio.get_running_loop().time()

            async def attempt(own_name: str) -> Migration:
                with tracing.span("vfleet migrate", migration=own_name):
                    migration = await fleet.create_migration(
                        moves,
                        name=own_name,
                        options=options,
                        constraints=wanted,
                        priority=priority,
                        deadline_ms=deadline * 1000,
                    )
                    if wait or retries:
                        migration = await _follow(fleet, own_name, timeout_s=patience_s, began_s=began_s)
                return migration

            return await _tried(attempt, base, retries, began_s + (patience_s or math.inf))

    migration = run(command())
    if output is not Output.TABLE:
        print_message(migration, output)
    elif dry_run:
        describe.print_moves(migration.moves)
    elif wait or retries:
        describe.describe_migration(migration)
    elif migration.phase == Phase.PHASE_QUEUED:
        typer.echo(f"{migration.name} is queued until limits allow it; follow it with: vfleet watch {migration.name}")
    else:
        typer.echo(f"{migration.name} has begun; follow it with: vfleet watch {migration.name}")
    _exit_by_outcome(migration)


def watch(
    migration: MigrationArgument,
    timeout: TimeoutOption = None,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Follow a migration until it is over.

    Exits 1 if it was aborted. JSON is one line an update.

    Example: vfleet watch m-0123456789ab
    """
    patience_s = checked_timeout(timeout)

    async def command() -> Migration:
        async with fleet_client(coordinator, etcd) as fleet:
            return await _follow(fleet, migration, output, timeout_s=patience_s)

    last = run(command())
    if output is Output.TABLE:
        describe.describe_migration(last)
    _exit_by_outcome(last)


def cancel(
    migration: MigrationArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until everything is back in its place.")] = False,
    timeout: TimeoutOption = None,
    coordinator: CoordinatorOption = None,
    etcd: EtcdOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Abort a migration that is queued or not yet committed.

    \b
    Example: vfleet cancel m-0123456789ab
    Example: vfleet cancel m-0123456789ab --wait
    """
    patience_s = _waiting(wait, timeout)

    async def command() -> Migration:
        async with fleet_client(coordinator, etcd) as fleet:
            cancelled = await fleet.cancel_migration(migration)
            return await _follow(fleet, migration, timeout_s=patience_s) if wait else cancelled

    cancelled = run(command())
    if output is Output.TABLE:
        typer.echo(f"{migration} is {describe.phase_word(cancelled)}")
    else:
        print_message(cancelled, output)


def move_requests(functions: Sequence[str], to: str | None) -> list[MoveRequest]:
    """Return the moves that a command line means. Raise INVALID_FIELD for what can't be meant."""
    if to is not None and all("=" in function for function in functions):
        raise invalid_field("--to", to, "a function without a device of its own")
    return [_move(function, to) for function in functions]


def _move(argument: str, to: str | None) -> MoveRequest:
    function, equals, own = argument.partition("=")
    target = own if equals else to
    if target is None:
        return move_request(function)
    device, colon, vf_index = target.partition(":")
    check_device_name("device", device)  # none at all would let it be chosen
    if colon and not (vf_index.isascii() and vf_index.isdigit()):
        raise invalid_field("device", target, "HOST/DEVICE or HOST/DEVICE:VF, for example h2/nic0:4")
    return move_request(function, device, int(vf_index) if colon else 0)


async def _tried(attempt: Callable[[str], Awaitable[Migration]], name: str, retries: int, end_s: float) -> Migration:
    """Return what comes of attempts: `retries` more at most, if one fails for what may pass and it is not `end_s` yet.

    A migration is one attempt: each that began had a name of its own. One that was refused, or of which nothing was
    heard, keeps it: the same name again is the same migration.
    """
    begun, loop = 0, asyncio.get_running_loop()
    tries = backoff_delays(Random(), _RETRY_FIRST_S, _RETRY_LONGEST_S)  # noqa: S311  # spreads retries
    for number, delay_s in enumerate(tries):
        own_name = f"{name}-{begun + 1}" if begun else name
        refusal = None
        try:
            migration = await attempt(own_name)
        except VfleetError as error:
            refusal = error
        is_last = number == retries or loop.time() + delay_s > end_s
        if refusal is not None:
            if is_last or not is_passing(refusal.reason):
                raise refusal
            what = f"{own_name}: {refusal.message}"
        else:
            is_aborted = migration.phase in (Phase.PHASE_ABORTING, Phase.PHASE_ABORTED)
            if is_last or not is_aborted or not is_passing(abort_cause(migration)):
                return migration
            begun += 1
            what = f"{own_name} was aborted: {migration.abort_reason}"
        typer.echo(f"{what}; tried again", err=True)
        await asyncio.sleep(delay_s)
    raise AssertionError("backoff_delays never ends")


async def _follow(
    fleet: FleetClient,
    name: str,
    output: Output = Output.TABLE,
    *,
    timeout_s: float | None = None,
    began_s: float | None = None,
) -> Migration:
    """Return the migration once it is over. Raise ILLEGAL_STATE if that is later than in `timeout_s`.

    That counts from `began_s`, by the loop's clock, or from now.

    Until then show how far it is: on a terminal as bars that grow, else a line for each step and each round; or every
    update in the form for programs.
    """
    out = console(stderr=True)
    shown = ""
    end_s = (began_s or asyncio.get_running_loop().time()) + timeout_s if timeout_s is not None else None
    try:
        with LiveProgress(out, name) as live:
            async with asyncio.timeout_at(end_s), aclosing(fleet.watch_migration(name)) as updates:
                async for update in updates:
                    if output is not Output.TABLE:
                        print_message(update, output, compact=True)
                    elif out.is_terminal:
                        live.show(update)
                    elif (line := progress_line(update)) != shown:
                        out.print(line)
                        shown = line
                    if update.migration.phase in PHASES_OVER:
                        return update.migration
    except TimeoutError:
        message = f"{name} is not over after {timeout_s:g} s, and goes on; follow it with: vfleet watch {name}"
        raise VfleetError(Reason.ILLEGAL_STATE, message) from None
    return await fleet.get_migration(name)


def _waiting(wait: bool, timeout: float | None) -> float | None:
    """Return how long to wait. Raise INVALID_FIELD for a bad timeout, or one for nothing."""
    if timeout is not None and not wait:
        raise invalid_field("--timeout", timeout, "only with --wait")
    return checked_timeout(timeout)


def _fits(option: str, value: int) -> int:
    """Return a number that the request can carry; the coordinator knows its range."""
    if value >= 1 << 32:
        raise invalid_field(option, value, f"at most {(1 << 32) - 1}")
    return value


def _exit_by_outcome(migration: Migration) -> None:
    if migration.phase in (Phase.PHASE_ABORTING, Phase.PHASE_ABORTED):
        at = f" at {describe.step_word(migration.abort_step)}" if migration.abort_step else ""
        what = f"{migration.abort_reason} ({undone(migration)}); {advice(migration)}"
        typer.echo(f"vfleet: {migration.name} was aborted{at}: {what}", err=True)
        raise typer.Exit(FAILED)
